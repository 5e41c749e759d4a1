"""METHODS: every approach to Stage 2 that ships, the only list. `package.module:NAME` takes one from outside."""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path

from tvl_align.contract import Method
from tvl_align.methods.base import BASE
from tvl_align.methods.cursor import CURSOR
from tvl_align.methods.disentangled import DISENTANGLED
from tvl_align.methods.flextok import FLEXTOK
from tvl_align.methods.matryoshka import MATRYOSHKA
from tvl_align.system.console import UserError

METHODS: dict[str, Method] = {
    "base": BASE,
    "cursor": CURSOR,
    "flextok": FLEXTOK,
    "matryoshka": MATRYOSHKA,
    "disentangled": DISENTANGLED,
}


def load_method(name: str, never_from: Path | None = None) -> Method:
    """The method of a name: a key of METHODS, or `package.module:NAME`, where NAME is a Method in that module or a key of
    its own METHODS. The module is an installed one, or lies in the current folder.

    never_from: a folder whose files are not imported (a run folder, which may come from a stranger). Raises UserError for
    unknown names, for modules that cannot be imported, and for what is not a Method.
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
        places = [top.origin or "", *(top.submodule_search_locations or ())] if top is not None else []
        if never_from is not None and any(Path(p).resolve().is_relative_to(never_from.resolve()) for p in places if p):
            raise UserError(
                f"{name} lies in {never_from}, and nothing of a run folder is imported; move the module out of it."
            )
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        where = f"there is no module {error.name!r} in {Path.cwd()} or among the installed ones"
        raise UserError(
            f"--method {name} cannot be imported: {where}; give the command in the folder that holds it."
        ) from error
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--method {name} cannot be imported: {reason} ({last.filename}, line {last.lineno}).") from error
    listed = getattr(found, "METHODS", {})
    method = listed[attribute] if isinstance(listed, dict) and attribute in listed else getattr(found, attribute, None)
    if not isinstance(method, Method):
        what = "nothing" if method is None else f"a {type(method).__name__}"
        raise UserError(f"--method {name} names {what}; it must name a tvl_align.contract.Method.")
    return method
