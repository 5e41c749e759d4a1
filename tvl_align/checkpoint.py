"""Stage-2 checkpoints: plain containers and tensors, written whole or not at all, loaded without running anything."""

import os
from pathlib import Path
from typing import Any

import torch

from tvl_align.console import UserError
from tvl_align.files import replacing


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """A reader sees the old file or the new one, never half of one."""
    with replacing(path) as file:
        torch.save(content, file)


def keep_as(path: Path, name: str) -> None:
    """Keep today's content of `path` under another name beside it. A link: nothing is written twice, and replacing
    `path` later leaves it alone."""
    temporary = path.with_name(name + ".tmp")
    temporary.unlink(missing_ok=True)
    os.link(path, temporary)
    os.replace(temporary, path.with_name(name))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote (torch's `weights_only`). Raises UserError for anything else."""
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}; give --resume an existing checkpoint.pth.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a broken or foreign file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is not a checkpoint that can be loaded safely ({reason}).") from error
    if not isinstance(content, dict) or "model" not in content:
        raise UserError(f"{path} is not a Stage-2 checkpoint: it has no 'model' entry.")
    return content
