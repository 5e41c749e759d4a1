"""METHODS lists the methods that ship with the package. `package.module:NAME` names any other method."""

from pathlib import Path

from tvl_align.contract import Method
from tvl_align.methods.base import BASE
from tvl_align.methods.closed import CLOSED
from tvl_align.methods.cursor import CURSOR
from tvl_align.methods.disentangled import DISENTANGLED
from tvl_align.methods.flextok import FLEXTOK
from tvl_align.methods.matryoshka import MATRYOSHKA
from tvl_align.methods.mlp import MLP
from tvl_align.system.console import UserError
from tvl_align.system.modules import import_named

METHODS: dict[str, Method] = {
    "base": BASE,
    "cursor": CURSOR,
    "flextok": FLEXTOK,
    "matryoshka": MATRYOSHKA,
    "disentangled": DISENTANGLED,
    "closed": CLOSED,
    "mlp": MLP,
}


def load_method(name: str, never_from: Path | None = None) -> Method:
    """Return a method by name: a key of METHODS, or `package.module:NAME`.

    NAME is a Method in that module, or a key of its METHODS. The module must be installed or in the current folder.
    never_from: a folder that nothing is imported from, such as a run folder, which may be untrusted. Raises UserError for
    unknown names, for modules that cannot be imported and for objects that are not a Method.
    """
    if name in METHODS:
        return METHODS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"unknown method {name!r}; --method takes {', '.join(METHODS)}, or package.module:NAME.")
    remedy = f" in {Path.cwd()} or among the installed ones; run the command in the folder that contains it."
    imported = import_named(module, f"--method {name}", remedy, never_from)
    listed = getattr(imported, "METHODS", {})
    method = listed[attribute] if isinstance(listed, dict) and attribute in listed else getattr(imported, attribute, None)
    if not isinstance(method, Method):
        what = "not defined" if method is None else f"a {type(method).__name__}"
        raise UserError(f"--method {name} is {what}; it must name a tvl_align.contract.Method.")
    return method
