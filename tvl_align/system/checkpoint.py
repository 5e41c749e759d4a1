"""Checkpoints: plain containers and tensors, written whole or not at all, loaded without running anything of theirs."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvl_align.system.console import UserError
from tvl_align.system.files import atomic_file

SLACK = 2**20  # bytes by which the parts of an archive may exceed its file: torch stores them uncompressed


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """A reader sees the old file or the new one, never half of one."""
    with atomic_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch's own complaint covers what went wrong: a full disk
                raise error.__context__ from error
            raise


def link_as(path: Path, name: str) -> None:
    """Keep today's content of `path` under another name beside it. A link: nothing is written twice, and replacing
    `path` later leaves it alone."""
    temporary = path.with_name(name + ".tmp")
    temporary.unlink(missing_ok=True)
    os.link(path, temporary)
    os.replace(temporary, path.with_name(name))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote. Raises UserError for anything else, and for weights that are not numbers."""
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}; give --resume an existing checkpoint.pth.")
    content = load_safely(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is not a Stage-2 checkpoint: it has no 'model' entry with weights.")
    check_weights(content["model"], path)
    return content


def load_safely(path: Path, classes: Sequence[type] = ()) -> Any:
    """The content of a file that torch.save wrote: tensors, plain containers and `classes`, nothing else is allowed (torch's
    `weights_only`). Raises UserError for every other file, and for an archive that would unpack to far more than it is."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(part.file_size for part in archive.infolist())
            if unpacked > path.stat().st_size + SLACK:
                raise UserError(f"{path} would unpack to {unpacked} bytes; no checkpoint is compressed, so it is refused.")
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises a dozen kinds for a broken or foreign file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is not a checkpoint that can be loaded safely ({reason}).") from error


def check_weights(weights: dict[str, Any], path: Path) -> None:
    """Raises UserError unless every entry is a tensor without NaN or inf."""
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path} holds {type(value).__name__} under {name!r}, where a tensor is needed.")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path} holds NaN or inf in {name!r}; such weights are of no use.")
