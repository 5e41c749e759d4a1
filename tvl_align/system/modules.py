"""Import a module that a user names: a method or an encoder of one's own."""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from tvl_align.system.console import UserError


def import_named(module: str, option: str, remedy: str, never_from: Path | None = None) -> ModuleType:
    """Import a module that is installed or in the current folder.

    option: the flag and its value, remedy: what to do if there is no such module, both for messages. never_from: a folder
    that nothing is imported from, such as a run folder, which may be untrusted. Raises UserError for a module that cannot be
    found, and for any error while it is imported.
    """
    name = module.partition(".")[0]
    try:
        importlib.invalidate_caches()
        top = importlib.util.find_spec(name)
        if top is None and str(Path.cwd()) not in sys.path:  # only then: a folder `ray` here is not the package ray
            sys.path.append(str(Path.cwd()))  # last, so that nothing installed is shadowed
            top = importlib.util.find_spec(name)
        locations = [top.origin or "", *(top.submodule_search_locations or ())] if top is not None else []
        if never_from is not None and any(Path(p).resolve().is_relative_to(never_from.resolve()) for p in locations if p):
            raise UserError(
                f"{option} is in {never_from}, and nothing in a run folder is imported; move the module out of it."
            )
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{option} cannot be imported: there is no module {error.name!r}{remedy}") from error
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise UserError(f"{option} cannot be imported: {error_and_place(error)}.") from error


def error_and_place(error: Exception) -> str:
    """An error of somebody's code in one line: type, text, file and line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{reason} ({last.filename}, line {last.lineno})"
