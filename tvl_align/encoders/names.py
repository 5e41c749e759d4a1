"""Names of modalities, and options with a value for each further one: `--more_columns depth=depth_path audio=wav`.

Further modalities are all but vision, tactile and text.
"""

from collections.abc import Sequence
from itertools import combinations

from torch import nn

from tvl_align.contract import MODALITIES
from tvl_align.system.console import UserError

RESERVED_NAMES = ("index", "caption_keys")  # names inside a store
TAKEN = (  # by something else wherever a further modality is a name: in batches, samples, stores, keywords of `embed`
    *(*MODALITIES, "present", "name", "group", "split", "labels", "rows", "done", "begun"),
    *("keep", "attention", "sentences", "dataset", "batch_size", "precision", "quiet"),
)


def check_modalities(names: Sequence[str]) -> None:
    """Names of modalities become names of modules and of tables, and pairs are named by joining two with an underscore."""
    for name in names:
        if not name.isidentifier():
            raise UserError(f"modality {name!r} is not a valid name; use letters, digits and underscores.")
        if name in RESERVED_NAMES or hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
            raise UserError(f"modality {name!r} has a reserved name; give it another name.")
    pairs: dict[str, tuple[str, str]] = {}
    for pair in combinations(sorted(names), 2):
        other = pairs.setdefault("_".join(pair), pair)
        if other != pair:
            raise UserError(f"the pairs {other} and {pair} would both be named {'_'.join(pair)}; rename a modality.")


def by_modality(option: str, given: Sequence[str] | None) -> dict[str, list[str]]:
    """{further modality: its values} of an option that is given as NAME=VALUE, any number of times.

    Raises UserError for anything else, for vision, tactile and text, which have options of their own, and for a name that no
    modality can have.
    """
    found: dict[str, list[str]] = {}
    for text in given or ():
        name, _, value = text.partition("=")
        if not (name and value):
            raise UserError(f"--{option} {text!r} names no modality and value; give NAME=VALUE, such as depth=VALUE.")
        if name in MODALITIES:
            raise UserError(f"--{option} {text}: {name} has a flag of its own; leave it out here.")
        if name in TAKEN:
            raise UserError(f"modality {name!r} has a reserved name; give it another name.")
        check_modalities([name])
        found.setdefault(name, []).append(value)
    return found


def one_each(option: str, given: Sequence[str] | None) -> dict[str, str]:
    """{further modality: its value} of an option that has one value for each. Raises UserError as `by_modality` does."""
    found = by_modality(option, given)
    if twice := [name for name, values in found.items() if len(values) > 1]:
        raise UserError(f"--{option} has {twice[0]} twice; give every modality one value.")
    return {name: value for name, (value,) in found.items()}
