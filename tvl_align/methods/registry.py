"""METHODS lists the methods that ship with the package. `package.module:NAME` names any other method."""

import importlib
import importlib.util
import sys
import traceback
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
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that nothing installed is shadowed
    try:
        importlib.invalidate_caches()
        top = importlib.util.find_spec(module.partition(".")[0])
        locations = [top.origin or "", *(top.submodule_search_locations or ())] if top is not None else []
        if never_from is not None and any(Path(p).resolve().is_relative_to(never_from.resolve()) for p in locations if p):
            raise UserError(
                f"{name} is in {never_from}, and nothing in a run folder is imported; move the module out of it."
            )
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        reason = f"there is no module {error.name!r} in {Path.cwd()} or among the installed ones"
        raise UserError(
            f"--method {name} cannot be imported: {reason}; run the command in the folder that contains it."
        ) from error
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--method {name} cannot be imported: {reason} ({last.filename}, line {last.lineno}).") from error
    listed = getattr(imported, "METHODS", {})
    method = listed[attribute] if isinstance(listed, dict) and attribute in listed else getattr(imported, attribute, None)
    if not isinstance(method, Method):
        what = "not defined" if method is None else f"a {type(method).__name__}"
        raise UserError(f"--method {name} is {what}; it must name a tvl_align.contract.Method.")
    return method
