"""What the readers of other projects' repositories share: missing files, imports from a clone, their global random seeds."""

import importlib.util
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from tvl_align.system.console import UserError


def file_of_clone(path: Path, url: str) -> Path:
    """Return `path`. Raises UserError, with the URL to clone, if there is no such file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; clone {url} and give --data its parent folder.")
    return path


class FilesBeside(MetaPathFinder):
    """Finds the modules that are Python files of one folder, without that folder on the import path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of `<folder>/<fullname>.py`; None if there is no such file."""
        file = self.folder / f"{fullname}.py"
        return importlib.util.spec_from_file_location(fullname, file) if file.is_file() else None


@contextmanager
def module_of_clone(path: Path, url: str, seed: int, root: Path | None = None) -> Iterator[ModuleType]:
    """Import one Python file of a clone, with the files beside it, for use inside the context.

    This runs the code of the clone. Global random numbers of NumPy and PyTorch, which such code draws from, are seeded with
    `seed` and restored at the end, as are the imported modules, those of files below `root` (default: the folder of the
    file). What the code prints is dropped. Raises UserError for a missing file or package.
    """
    file_of_clone(path, url)
    spec = importlib.util.spec_from_file_location(f"_clone_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    finder, before = FilesBeside(path.parent), set(sys.modules)
    shadowed = {
        name: sys.modules.pop(name) for name in [file.stem for file in path.parent.glob("*.py")] if name in sys.modules
    }
    below = (root or path.parent).resolve()
    state = np.random.get_state()  # noqa: NPY002 - the clone draws from the global generator
    sys.meta_path.insert(0, finder)
    try:
        with torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()):
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            try:
                spec.loader.exec_module(module)
            except ImportError as error:
                raise UserError(f"{path} needs a missing package ({error}); install it with pip.") from error
            yield module
    finally:
        np.random.set_state(state)  # noqa: NPY002
        sys.meta_path.remove(finder)
        for name, loaded in list(sys.modules.items()):
            file = getattr(loaded, "__file__", None)
            if name not in before and file is not None and Path(file).resolve().is_relative_to(below):
                del sys.modules[name]
        sys.modules.update(shadowed)
