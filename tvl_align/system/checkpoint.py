"""Checkpoint files: plain containers and tensors, written atomically and loaded without executing code from the file."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvl_align.system.console import UserError
from tvl_align.system.files import atomic_file

MAX_EXPANSION = 2**20  # bytes an archive may unpack to beyond its file size; torch.save does not compress


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint with torch.save. The file is replaced atomically: a reader never sees a partial file."""
    with atomic_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides the cause, e.g. a full disk
                raise error.__context__ from error
            raise


def link_as(path: Path, name: str) -> None:
    """Hard-link `path` under another name in the same folder.

    The content is not copied. A later `save_checkpoint(path, ...)` replaces `path` and leaves the link unchanged.
    """
    temporary = path.with_name(name + ".tmp")
    temporary.unlink(missing_ok=True)
    os.link(path, temporary)
    os.replace(temporary, path.with_name(name))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file written by `save_checkpoint`.

    Raises UserError for a missing file, for any other content, and for weights with NaN or inf.
    """
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}; give --resume an existing checkpoint.pth.")
    content = load_safely(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is not a Stage-2 checkpoint: it has no 'model' entry with weights.")
    check_weights(content["model"], path)
    return content


def load_safely(path: Path, classes: Sequence[type] = ()) -> Any:
    """Read a file written by torch.save with `weights_only=True`, plus the given `classes`.

    Raises UserError for every other file, and for an archive that unpacks to much more than its file size.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(part.file_size for part in archive.infolist())
            if unpacked > path.stat().st_size + MAX_EXPANSION:
                raise UserError(
                    f"{path} would unpack to {unpacked} bytes; give a file written by torch.save, which is not compressed."
                )
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises many types for a damaged or foreign file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is not a checkpoint that can be loaded safely ({reason}).") from error


def check_weights(weights: dict[str, Any], path: Path) -> None:
    """Raise UserError unless every entry is a tensor without NaN or inf."""
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path} has a {type(value).__name__} as {name!r}; it must be a tensor.")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path} has NaN or inf in {name!r}; use a checkpoint with finite weights.")
