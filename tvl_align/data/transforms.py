"""Images on disk -> normalised tensors, by the rules of TVL, with torchvision v2.

A photo is cropped to the part under the sensor; a touch image is padded to a square and turned by 90 degrees; both are
resized to what their encoder takes. Augmented views differ from TVL in one thing: flips and the quarter turn are drawn
ONCE per sample and applied to photo and touch alike. TVL draws them per image, which asks the contrastive loss to align
a surface with its own mirror image and so forbids the shared tokens to know any direction.

Shapes: images are (3, S, S) float32, normalised. Randomness comes from the seed handed in, never from global state.
"""

import math
import random
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tvl_align.data.tvl import CROP_FRACTION, Row, background_file
from tvl_align.system.console import UserError

CROP_JITTER = 0.05
MOST_PIXELS = 64_000_000
LEAST_SIDE = 8
DATA3_TOP = 200  # pixels; HCT's third part was filmed with the sensor lower in the image
PHOTO_MEAN, PHOTO_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOUCH_MEAN, TOUCH_STD = (0.29174602, 0.29713256, 0.29104046), (0.18764469, 0.19467652, 0.21871583)
SUBTRACTED_MEAN, SUBTRACTED_STD = (-0.00809318, -0.01887447, -0.01843059), (0.04535400, 0.04402917, 0.05332521)


@dataclass(frozen=True)
class ImageOptions:
    """Everything that shapes pixels. Sizes are in pixels and come from the encoders."""

    photo_size: int = 224
    touch_size: int = 224
    randomize_crop: bool = False
    color_jitter: bool = False
    subtract_background: bool = False
    shared_geometry: bool = True
    augment: bool = True


@lru_cache(maxsize=4)
def _photo_augmentation(size: int) -> Callable[[Tensor], Tensor]:
    return v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(brightness=(0.8, 1.1), contrast=(0.7, 1.3), saturation=0.2)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(_odd(9 * size / 224), sigma=(0.5, 1.0))], p=0.5),
        ]
    )


def _odd(width: float) -> int:
    """The nearest odd kernel width, at least 3: TVL's 9 pixels belong to images of 224."""
    return max(3, 2 * round((width - 1) / 2) + 1)


_TOUCH_JITTER = v2.ColorJitter(brightness=(0.9, 1.1), contrast=(0.9, 1.1), saturation=0.2, hue=0.05)


@dataclass(frozen=True)
class Geometry:
    """The flips and quarter turns of one augmented image."""

    mirror: bool = False
    flip: bool = False
    turn: bool = False

    @classmethod
    def draw(cls, rng: random.Random) -> "Geometry":
        return cls(*(rng.random() < 0.5 for _ in range(3)))

    def __call__(self, image: Tensor) -> Tensor:
        image = F.horizontal_flip(image) if self.mirror else image
        image = F.vertical_flip(image) if self.flip else image
        return torch.rot90(image, 1, (-2, -1)) if self.turn else image


class ImageLoader:
    """Loads the photo and the touch image of a row, plain or augmented."""

    def __init__(self, root: Path, options: ImageOptions) -> None:
        self.root, self.options = root, options

    def __call__(self, row: Row, seed: int | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
        """{"vision": (3, S, S), "tactile": (3, S', S')} without what the row lacks, and {modality: reason} for an image
        that cannot be used.

        `seed=None` is the plain view, and the only one without `augment`. Otherwise every draw follows from the seed alone.
        """
        if seed is None or not self.options.augment:
            return self._views(row, None, Geometry(), Geometry())
        rng = random.Random(seed)
        photo = Geometry.draw(rng)
        # Independent draws, as TVL has them: a photo is only mirrored there.
        touch = photo if self.options.shared_geometry else Geometry.draw(rng)
        photo = photo if self.options.shared_geometry else Geometry(mirror=photo.mirror)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.getrandbits(62))
            return self._views(row, rng, photo, touch)

    def _views(
        self, row: Row, rng: random.Random | None, photo: Geometry, touch: Geometry
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        views: dict[str, Tensor] = {}
        faults: dict[str, str] = {}
        for modality, path, load, geometry in (
            ("vision", row.vision, self._photo, photo),
            ("tactile", row.tactile, self._touch, touch),
        ):
            if path is not None:
                try:
                    views[modality] = load(row, rng, geometry)
                except BadImage as error:
                    faults[modality] = str(error)
        return views, faults

    def _photo(self, row: Row, rng: random.Random | None, geometry: Geometry) -> Tensor:
        assert row.vision is not None
        size = self.options.photo_size
        image = crop_photo(_open(self.root / row.vision), row, rng if self.options.randomize_crop else None)
        image = geometry(F.resize(image, [size, size], antialias=True))
        if rng is not None:
            image = _photo_augmentation(size)(image)
        return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(PHOTO_MEAN), list(PHOTO_STD), inplace=True)

    def _touch(self, row: Row, rng: random.Random | None, geometry: Geometry) -> Tensor:
        assert row.tactile is not None
        image = square_turn(_open(self.root / row.tactile))
        mean, std = TOUCH_MEAN, TOUCH_STD
        jitter = rng is not None and (self.options.color_jitter or not self.options.subtract_background)
        if self.options.subtract_background:
            path = background_file(self.root, row)
            if path is None:
                raise UserError(
                    f"{row.tactile} has no background image (tactile_bg_latent.jpg or digit_background.png); "
                    "leave out --subtract_background or add one."
                )
            idle = F.resize(square_turn(_open(path)), list(image.shape[-2:]), antialias=True)
            pair = torch.stack([image, idle])  # jittered together, so that the difference stays a difference
            pair = v2.RandomApply([_TOUCH_JITTER], p=0.8)(pair) if jitter else pair
            pair = F.to_dtype(pair, torch.float32, scale=True)
            image, mean, std = pair[0] - pair[1], SUBTRACTED_MEAN, SUBTRACTED_STD
        elif jitter:
            image = v2.RandomApply([_TOUCH_JITTER], p=0.8)(image)
        size = self.options.touch_size
        image = geometry(F.resize(F.to_dtype(image, torch.float32, scale=True), [size, size], antialias=True))
        return F.normalize(image, list(mean), list(std), inplace=True)


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, the same for all of its kind."""


def _open(path: Path) -> Tensor:
    """An image file, upright -> (3, H, W) uint8. Raises BadPicture for what is not a whole image of a usable size.

    The kind is told by content, not by name. Sizes are looked at before anything is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS is stricter
            with Image.open(path) as file:
                if min(file.size) < LEAST_SIDE:
                    raise BadImage(f"a side of fewer than {LEAST_SIDE} pixels")
                if file.width * file.height > MOST_PIXELS:
                    raise BadImage(f"more than {MOST_PIXELS // 10**6} million pixels")
                if file.mode == "F":
                    raise BadImage("fractional grey values, whose scale is unknown")
                if file.mode.startswith("I"):  # 16 bits of grey: Pillow would cut them off at 255
                    wide = np.clip(np.asarray(file, dtype=np.int64), 0, 2**16 - 1)
                    file = Image.fromarray((wide >> 8).astype(np.uint8))
                ImageOps.exif_transpose(file, in_place=True)
                return F.pil_to_tensor(file if file.mode == "RGB" else file.convert("RGB"))
    except FileNotFoundError as error:
        raise BadImage("the file is missing") from error
    except PermissionError as error:
        raise BadImage("the file may not be read") from error
    except UnidentifiedImageError as error:
        raise BadImage("not an image") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MOST_PIXELS // 10**6} million pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, MemoryError) as error:  # what decoders raise
        raise BadImage("broken or cut off") from error


def crop_photo(image: Tensor, row: Row, rng: random.Random | None = None) -> Tensor:
    """(3, H, W) -> the square under the sensor: centre for SSVTP, top centre for HCT. `rng` jitters it by 5%."""
    height, width = image.shape[-2:]
    side = math.ceil(CROP_FRACTION * max(height, width))
    top = (height - side) // 2 if row.dataset == "ssvtp" else 0
    if "data3" in (row.vision or "").split("/")[1:2]:  # the row's own sub-folder, not any folder above the data
        top = DATA3_TOP
    left = (width - side) // 2
    if rng is not None:
        reach = int(CROP_JITTER * side)
        top += rng.randint(0, reach) if row.dataset == "hct" else rng.randint(-reach // 2, reach // 2)
        left += rng.randint(-reach // 2, reach // 2)
    return F.crop(image, top, left, side, side)


def square_turn(image: Tensor) -> Tensor:
    """Pad a touch image with black to a square and turn it by 90 degrees counterclockwise."""
    height, width = image.shape[-2:]
    across, down = (max(height, width) - width) // 2, (max(height, width) - height) // 2
    return torch.rot90(F.pad(image, [across, down]), 1, (-2, -1))


def preview(root: Path, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """The photo's crop and the turned touch image as (S, S, 3) uint8, for people to look at; grey where one is bad."""
    assert row.vision is not None and row.tactile is not None
    try:
        photo, touch = crop_photo(_open(root / row.vision), row), square_turn(_open(root / row.tactile))
    except BadImage:
        photo = touch = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    return photo.permute(1, 2, 0).numpy(), touch.permute(1, 2, 0).numpy()
