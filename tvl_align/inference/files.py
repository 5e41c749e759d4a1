"""Files on the way in and out of an embedding: pictures in folders -> rows, tokens -> an .npz file."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvl_align.contract import MODALITIES
from tvl_align.data.pictures import Touch
from tvl_align.inference.registers import Embeddings, Registers
from tvl_align.inference.search import find_pictures
from tvl_align.system.console import UserError
from tvl_align.system.files import atomic_file


def picture_rows(
    given: Mapping[str, Sequence[Path]], takes_pictures: Callable[[str], bool] = lambda modality: True
) -> tuple[list[str], dict[str, list[Path | None]]]:
    """Pictures of one or more modalities -> names of the rows, {modality: its picture in each row, or None}.

    given: {modality: files, or one folder}. Files are rows in their order. In folders, files of the same relative name
    without suffix are a row; a row may lack a modality. takes_pictures: whether a modality has pictures; else all files of
    its folder count. Raises UserError for missing files, for files beside folders, and for numbers of files that differ.
    """
    folders = {m: paths[0] for m, paths in given.items() if len(paths) == 1 and paths[0].is_dir()}
    if folders and len(folders) < len(given):
        one, other = next(iter(folders)), next(m for m in given if m not in folders)
        raise UserError(f"{_flag(one)} is a folder and {_flag(other)} is not; give folders or files for both.")
    if not folders:
        missing = next((path for paths in given.values() for path in paths if not path.is_file()), None)
        if missing is not None:
            raise UserError(f"there is no picture {missing}; give existing files, or one folder.")
        if len({len(paths) for paths in given.values()}) > 1:
            counts = ", ".join(f"{len(paths)} of {m}" for m, paths in given.items())
            raise UserError(f"the numbers of pictures differ, {counts}; give as many of each, or folders.")
        return [str(path) for path in next(iter(given.values()))], {m: list(paths) for m, paths in given.items()}
    found: dict[str, dict[str, Path]] = {}
    for m, folder in folders.items():
        found[m] = {}
        for path in find_pictures(folder, of_any_kind=not takes_pictures(m)):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found[m]:
                raise UserError(f"{folder} has two pictures named {name}; rename or remove {path.name}.")
            found[m][name] = path
    names = sorted(set().union(*found.values()))
    return names, {m: [of.get(name) for name in names] for m, of in found.items()}


def with_background(items: Mapping[str, Any], background: Path | None, registers: Registers) -> dict[str, Any]:
    """Items by modality; each touch image with the image without contact, if one is given.

    Raises UserError if it is no file, and if the run does not subtract it.
    """
    if background is None:
        return dict(items)
    if not background.is_file():
        raise UserError(f"there is no picture {background}; give --touch_background an existing file.")
    if not registers.image_options.subtract_background:
        raise UserError("this run subtracts no background from touch images; leave out --touch_background.")
    touched = [None if item is None else Touch(item, background=background) for item in items.get("tactile", ())]
    return {**items, "tactile": touched} if "tactile" in items else dict(items)


def _flag(modality: str) -> str:
    return f"--{modality}" if modality in MODALITIES else f"--more {modality}="


def write_npz(path: Path, names: Sequence[str], out: Embeddings, made_by: str, labels: Mapping[str, Any]) -> None:
    """Write embeddings as an .npz file, atomically.

    Arrays: `names` (B,), for each modality `<modality>.overlapping` (B, No, D), `.complementary` (B, Nc, D), `.pooled`
    (B, D), `.present` (B,) and, if computed, `.attention` (B, N, T); `label.<factor>` (B,) strings; `made_by`.
    """
    arrays: dict[str, Any] = {"names": np.array(list(names)), "made_by": np.array(made_by)}
    for m in out.pooled:
        parts = {"overlapping": out.overlapping, "complementary": out.complementary, "pooled": out.pooled}
        parts |= {"present": out.present, "attention": out.attention}
        arrays |= {f"{m}.{part}": tensors[m].numpy() for part, tensors in parts.items() if m in tensors}
    arrays |= {f"label.{factor}": np.array(column) for factor, column in labels.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.savez(file, **arrays)
