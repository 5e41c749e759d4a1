"""Checkpoint files: plain containers and tensors, written atomically and loaded without executing code from the file.

Two kinds: what torch.save writes, with all that a training resumes from; and safetensors, with weights alone.
"""

import argparse
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
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


class _NumpyType:
    """Takes the place of numpy.dtype in a file: the code of a type, with its byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = state[1] + self.code


def _number(dtype: _NumpyType, data: bytes) -> Any:
    return np.frombuffer(data, dtype.code, count=1)[0].item()


def _posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


# Beside what torch allows (tensors, containers, torch.device, torch.dtype). The functions take the place of the classes, so
# nothing of numpy or pathlib is called with arguments from the file.
ALLOWED: list[Any] = [
    argparse.Namespace,
    (_NumpyType, "numpy.dtype"),
    *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_posix_path, f"{module}.{kind}PosixPath") for module in ("pathlib", "pathlib._local") for kind in ("", "Pure")),
    *((_windows_path, f"{module}.{kind}WindowsPath") for module in ("pathlib", "pathlib._local") for kind in ("", "Pure")),
]


def load_safely(path: Path) -> Any:
    """Read a file written by torch.save, or, if its name ends in .safetensors, by safetensors. No code in it is executed.

    Tensors, plain containers, argparse.Namespace, torch.device and torch.dtype are returned as they are, numpy scalars as
    numbers and paths as text. Raises UserError for every other file, with the name of a class that is not among these, and
    for an archive that unpacks to much more than its file size.
    """
    try:
        if path.suffix == ".safetensors":
            return load(path.read_bytes())  # a mapped file must not change while its tensors are used
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(part.file_size for part in archive.infolist())
            if unpacked > path.stat().st_size + MAX_EXPANSION:
                raise UserError(
                    f"{path} would unpack to {unpacked} bytes; give a file written by torch.save, which is not compressed."
                )
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises many types for a damaged or foreign file
        reason = " ".join(str(error).split()) or type(error).__name__
        named = re.search(r"GLOBAL (\S+)", reason)
        if named:
            reason = f"it holds {named[1]}; save it with tensors, numbers, text, lists and dicts only"
        raise UserError(f"{path} is not a checkpoint that can be loaded safely ({reason[:300]}).") from error


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a state_dict with safetensors, atomically. A tensor of several names is in the file once.

    As in safetensors.torch.save_model, the metadata map each further name to the one in the file.
    """
    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    for name, value in weights.items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        if (kept := first.setdefault(place, name)) != name:
            metadata[name] = kept
        else:
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
    with atomic_file(path) as file:
        file.write(save(tensors, metadata))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a file written by `save_weights`, from anyone: safetensors hold numbers and no code.

    Raises UserError for a missing or damaged file and for numbers that are not finite.
    """
    if not path.is_file():
        raise UserError(f"no such file of weights: {path}; give a folder that has it.")
    weights = dict(load_safely(path))
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    names = header.get("__metadata__") or {}
    weights |= {name: weights[kept] for name, kept in names.items() if kept in weights and name not in weights}
    check_weights(weights, path)
    return weights


def check_weights(weights: Mapping[str, Any], path: Path) -> None:
    """Raise UserError unless every entry is a tensor without NaN or inf."""
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path} has a {type(value).__name__} as {name!r}; it must be a tensor.")
        numbers = value.float() if value.element_size() == 1 else value  # torch has no isfinite for numbers of 8 bits
        if not numbers.isfinite().all():
            raise UserError(f"{path} has NaN or inf in {name!r}; use a checkpoint with finite weights.")
