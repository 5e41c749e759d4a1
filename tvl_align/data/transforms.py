"""Image files -> normalised tensors: the transforms of TVL (Fu et al. 2024, arXiv:2402.13232) with torchvision v2.

A photo is cropped to the area under the sensor. A touch image is padded to a square and rotated by 90 degrees. Both are
resized to the input size of their encoder. The augmentation differs from TVL in one point: flips and the rotation by 90
degrees are sampled once per row and applied to both images. TVL samples them per image, so the contrastive loss aligns a
surface with its mirror image and the shared tokens cannot encode direction.

Shapes: images are (3, S, S) float32, normalised. All randomness derives from the `seed` argument.
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
MAX_PIXELS = 64_000_000
MIN_SIDE = 8  # pixels
DATA3_TOP = 200  # pixels; in HCT's folder data3 the sensor is lower in the photo
PHOTO_MEAN, PHOTO_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOUCH_MEAN, TOUCH_STD = (0.29174602, 0.29713256, 0.29104046), (0.18764469, 0.19467652, 0.21871583)
SUBTRACTED_MEAN, SUBTRACTED_STD = (-0.00809318, -0.01887447, -0.01843059), (0.04535400, 0.04402917, 0.05332521)


@dataclass(frozen=True)
class ImageOptions:
    """Options of the image transforms. Sizes are the input sizes of the encoders in pixels."""

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
    """The nearest odd kernel width, at least 3. TVL uses 9 pixels for images of 224 pixels."""
    return max(3, 2 * round((width - 1) / 2) + 1)


_TOUCH_JITTER = v2.ColorJitter(brightness=(0.9, 1.1), contrast=(0.9, 1.1), saturation=0.2, hue=0.05)


@dataclass(frozen=True)
class Geometry:
    """The flips and the rotation by 90 degrees of one augmented image."""

    horizontal_flip: bool = False
    vertical_flip: bool = False
    rotate: bool = False

    @classmethod
    def sample(cls, rng: random.Random) -> "Geometry":
        return cls(*(rng.random() < 0.5 for _ in range(3)))

    def __call__(self, image: Tensor) -> Tensor:
        image = F.horizontal_flip(image) if self.horizontal_flip else image
        image = F.vertical_flip(image) if self.vertical_flip else image
        return torch.rot90(image, 1, (-2, -1)) if self.rotate else image


class ImageLoader:
    """Loads the photo and the touch image of a row, plain or augmented. Paths are relative to `root`."""

    def __init__(self, root: Path, options: ImageOptions) -> None:
        self.root, self.options = root, options

    def __call__(self, row: Row, seed: int | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the images {"vision": (3, S, S), "tactile": (3, S', S')} and {modality: reason} of unusable images.

        Modalities that the row lacks are in neither dict. `seed=None` gives the plain view; without `options.augment` every
        seed does. Otherwise the augmentation depends on the seed alone. Raises UserError if background subtraction is on and
        the row has no background image.
        """
        if seed is None or not self.options.augment:
            return self._views(row, None, Geometry(), Geometry())
        rng = random.Random(seed)
        photo = Geometry.sample(rng)
        # TVL samples them independently and applies only the horizontal flip to photos.
        touch = photo if self.options.shared_geometry else Geometry.sample(rng)
        photo = photo if self.options.shared_geometry else Geometry(horizontal_flip=photo.horizontal_flip)
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
        image = pad_and_rotate(_open(self.root / row.tactile))
        mean, std = TOUCH_MEAN, TOUCH_STD
        jitter = rng is not None and (self.options.color_jitter or not self.options.subtract_background)
        if self.options.subtract_background:
            path = background_file(self.root, row)
            if path is None:
                raise UserError(
                    f"{row.tactile} has no background image (tactile_bg_latent.jpg or digit_background.png); "
                    "add one or leave out --subtract_background."
                )
            background = F.resize(pad_and_rotate(_open(path)), list(image.shape[-2:]), antialias=True)
            pair = torch.stack([image, background])  # both get the same colour jitter
            pair = v2.RandomApply([_TOUCH_JITTER], p=0.8)(pair) if jitter else pair
            pair = F.to_dtype(pair, torch.float32, scale=True)
            image, mean, std = pair[0] - pair[1], SUBTRACTED_MEAN, SUBTRACTED_STD
        elif jitter:
            image = v2.RandomApply([_TOUCH_JITTER], p=0.8)(image)
        size = self.options.touch_size
        image = geometry(F.resize(F.to_dtype(image, torch.float32, scale=True), [size, size], antialias=True))
        return F.normalize(image, list(mean), list(std), inplace=True)


class BadImage(Exception):
    """An image that cannot be used. The message is the reason; it does not name the file, so that reasons can be counted."""


def _open(path: Path) -> Tensor:
    """Decode an image file and apply its EXIF orientation -> (3, H, W) uint8.

    The format is detected from the content, not from the file name. The size is checked before decoding. Raises BadImage for
    a file that is not a complete image of a supported size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
            with Image.open(path) as file:
                if min(file.size) < MIN_SIDE:
                    raise BadImage(f"a side of fewer than {MIN_SIDE} pixels")
                if file.width * file.height > MAX_PIXELS:
                    raise BadImage(f"more than {MAX_PIXELS // 10**6} million pixels")
                if file.mode == "F":
                    raise BadImage("floating-point grey values of unknown scale")
                image: Image.Image = file
                if file.mode.startswith("I"):  # 16-bit grey: Pillow's conversion would clip values at 255
                    grey16 = np.clip(np.asarray(file, dtype=np.int64), 0, 2**16 - 1)
                    image = Image.fromarray((grey16 >> 8).astype(np.uint8))
                ImageOps.exif_transpose(image, in_place=True)
                return F.pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))
    except FileNotFoundError as error:
        raise BadImage("the file is missing") from error
    except PermissionError as error:
        raise BadImage("no permission to read the file") from error
    except UnidentifiedImageError as error:
        raise BadImage("not an image") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} million pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, MemoryError) as error:  # raised by Pillow's decoders
        raise BadImage("corrupt or truncated") from error


def crop_photo(image: Tensor, row: Row, rng: random.Random | None = None) -> Tensor:
    """Crop a photo (3, H, W) to the square under the sensor: the centre for SSVTP, the top centre for HCT.

    With `rng` the position of the crop is jittered by up to 5% of its side.
    """
    height, width = image.shape[-2:]
    side = math.ceil(CROP_FRACTION * max(height, width))
    top = (height - side) // 2 if row.dataset == "ssvtp" else 0
    if "data3" in (row.vision or "").split("/")[1:2]:  # the row's sub-folder of HCT, not a folder above the data
        top = DATA3_TOP
    left = (width - side) // 2
    if rng is not None:
        jitter = int(CROP_JITTER * side)
        top += rng.randint(0, jitter) if row.dataset == "hct" else rng.randint(-jitter // 2, jitter // 2)
        left += rng.randint(-jitter // 2, jitter // 2)
    return F.crop(image, top, left, side, side)


def pad_and_rotate(image: Tensor) -> Tensor:
    """Pad a touch image (3, H, W) with black to a square and rotate it by 90 degrees counterclockwise."""
    height, width = image.shape[-2:]
    pad_x, pad_y = (max(height, width) - width) // 2, (max(height, width) - height) // 2
    return torch.rot90(F.pad(image, [pad_x, pad_y]), 1, (-2, -1))


def preview(root: Path, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """The cropped photo and the rotated touch image of a row for display, each (S, S, 3) uint8.

    If either file cannot be used, both are 8 x 8 grey images.
    """
    assert row.vision is not None and row.tactile is not None
    try:
        photo, touch = crop_photo(_open(root / row.vision), row), pad_and_rotate(_open(root / row.tactile))
    except BadImage:
        photo = touch = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    return photo.permute(1, 2, 0).numpy(), touch.permute(1, 2, 0).numpy()
