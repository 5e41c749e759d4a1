"""Image files -> pixels, (H, W, 3) uint8: which files can be used, how many bits their values have, and which part is kept.

Nothing here imports torch, so that a report which shows a few pictures is made in seconds.
"""

import logging
import math
import random
import struct
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tvl_align.data.image_options import Crop, ImageOptions
from tvl_align.data.tvl import CROP_FRACTION, PAIRS, PICTURES, Row, TVLData, file_of

CROP_JITTER = 0.05
MAX_PIXELS = 64_000_000
MIN_SIDE = 8  # pixels
GREY_BITS = (8, 10, 12, 14, 16)  # of cameras that write 16-bit grey files
GREY_FILES = 64  # files of a modality that are opened to find its number of bits
BITS_PER_SAMPLE = 258  # a TIFF tag
TOUCH_SIZE = (240, 320)  # pixels of DIGIT's frames; in a resized copy they are others
DARKEST = 64  # 16-bit colours below this, after reduction to 8 bits, are taken for 14 bits or fewer
DATA3_TOP = 200  # pixels; in HCT's folder data3 the sensor is lower in the photo
DECODER_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, MemoryError, Image.DecompressionBombError)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Touch:
    """A touch image, an earlier frame of the same contact, and the touch image without contact; pictures from anywhere, see
    `tvl_align.data.transforms.as_source`. Some encoders take two frames, and from some the background is subtracted.
    """

    image: Any
    earlier: Any = None
    background: Any = None


class BadImage(Exception):
    """An image that cannot be used. The message is the reason; it does not name the file, so that reasons can be counted."""


def check_size(width: int, height: int) -> None:
    """Raise BadImage for a picture of a size that is not supported."""
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"a side of fewer than {MIN_SIDE} pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} million pixels")


def open_picture(source: Path | Image.Image, bits: int = 16) -> np.ndarray:
    """Decode an image file, or a PIL image, and apply its EXIF orientation -> (H, W, 3) uint8.

    The format is detected from the content, not from the file name. The size is checked before decoding. bits: of the values
    of a 16-bit grey file that does not say it itself. Of 16-bit colours Pillow reads the upper 8 bits, where 10, 12 or 14
    bits have few levels. Raises BadImage for such a file, for one that is not a complete image of a supported size, and for
    grey values beyond these bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
            with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as file:
                check_size(file.width, file.height)
                if file.mode == "F":
                    raise BadImage("floating-point grey values of unknown scale")
                image: Image.Image = file
                tiles = getattr(file, "tile", ())  # a PIL image that was not read from a file has none
                reduced = any(";16" in str(tile.args) for tile in tiles) and not file.mode.startswith("I")
                if file.mode.startswith("I"):  # 16-bit grey: Pillow's conversion would clip values at 255
                    grey = np.asarray(file, dtype=np.int64)
                    image = Image.fromarray(_to_8_bits(grey, _stated_bits(file, grey) or bits))
                image = ImageOps.exif_transpose(image)
                pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
                if reduced and (largest := int(pixels.max())) < DARKEST:
                    raise BadImage(
                        f"16-bit colours of which 8 bits hold values up to {largest} only; save it as 8-bit colours"
                    )
                return pixels
    except FileNotFoundError as error:
        raise BadImage("the file is missing") from error
    except PermissionError as error:
        raise BadImage("no permission to read the file") from error
    except UnidentifiedImageError as error:
        raise BadImage("not an image") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} million pixels") from error
    except DECODER_ERRORS as error:
        raise BadImage("corrupt or truncated") from error


def _to_8_bits(grey: np.ndarray, bits: int) -> np.ndarray:
    if grey.min() < 0 or grey.max() >= 2**bits:
        raise BadImage(f"grey values outside of 0 to {2**bits - 1:,}, the range of {bits} bits")
    return (grey >> (bits - 8)).astype(np.uint8)


def _stated_bits(file: Image.Image, grey: np.ndarray) -> int | None:
    """How many bits the grey values (H, W) of a 16-bit image have as its file says, None if it does not."""
    if file.format == "TIFF":
        (depth,) = file.tag_v2.get(BITS_PER_SAMPLE, (16,))[:1]  # type: ignore[attr-defined]
        return int(depth) if 8 <= depth < 16 else None
    path = getattr(file, "filename", "")  # none of an image that was read from memory
    depth = _significant_bits(Path(path)) if file.format == "PNG" and path else None
    if depth is None or not 8 <= depth < 16:
        return depth and 16
    # The standard of PNG scales such values to 16 bits. A writer that does not has small values between the scaled ones.
    step = (2**16 - 1) / (2**depth - 1)
    scaled = grey.max() >= 2**depth or np.abs(grey - np.round(grey / step) * step).max() <= 1
    return 16 if scaled else depth


def _significant_bits(path: Path) -> int | None:
    """The first number in the sBIT chunk of a PNG file, None without one. Pillow does not keep this chunk."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            if kind == b"sBIT":
                return file.read(1)[0]
            if kind == b"IDAT":
                break
            file.seek(size + 4, 1)
    return None


def inspect_images(options: ImageOptions, data: TVLData, more: Sequence[str] = ()) -> ImageOptions:
    """These options with the number of bits of the values in 16-bit grey files, one for each modality of pictures.

    Cameras of 10, 12 or 14 bits write files of 16 bits, which would keep few grey levels if read as such. The number follows
    from the largest value in evenly spaced files of the data folder, so that no single dark picture is brightened; it is
    logged if it is not 16. A copy of HCT's data3 whose images seem to be resized is named in a warning. more: further
    modalities of pictures.
    """
    rows = [*data.train, *data.val, *data.test]
    paths = {m: sorted({row.files[m] for row in rows if m in row.files}) for m in (*PICTURES, *more)}
    first = next((row.tactile for row in rows if row.dataset != PAIRS and _in_data3(row.tactile)), None)
    with suppress(*DECODER_ERRORS):  # counted with its reason when it is used
        if first is not None and (size := _image_size(file_of(data.root, first))) not in (TOUCH_SIZE, TOUCH_SIZE[::-1]):
            sizes = "{} x {} pixels, not {} x {}".format(*size, *TOUCH_SIZE)
            what = f"if the photos were resized too, their crop at row {DATA3_TOP} misses the sensor"
            log.warning("touch images of hct/data3 in %s have %s; %s", data.root, sizes, what)
    whats = {"vision": "photos", "tactile": "touch images", **{m: f"pictures of {m}" for m in more}}
    bits = {m: _grey_bits(what, data.root, paths[m]) for m, what in whats.items()}
    photo_bits, touch_bits = bits.pop("vision"), bits.pop("tactile")
    more_bits = {m: n for m, n in bits.items() if n != 16}
    return replace(options, photo_bits=photo_bits, touch_bits=touch_bits, more_bits=more_bits)


def _grey_bits(what: str, root: Path, paths: Sequence[str]) -> int:
    # JPEG has 8 bits. Names of JPEG files are opened only if there are no others, since a file may have a wrong name.
    paths = [path for path in paths if not path.lower().endswith((".jpg", ".jpeg"))] or paths
    largest = 0
    for i in sorted({int(x) for x in np.linspace(0, len(paths) - 1, GREY_FILES)}) if paths else ():
        path = file_of(root, paths[i])
        with suppress(*DECODER_ERRORS), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if file.mode.startswith("I") and file.width * file.height <= MAX_PIXELS:
                    grey = np.asarray(file, dtype=np.int64)
                    largest = max(largest, int(grey.max()) if _stated_bits(file, grey) is None else 0)
    bits = next((n for n in GREY_BITS if 0 < largest < 2**n), 16)
    if bits < 16:
        log.warning("16-bit grey %s of %s hold values up to %s; read as %d bits", what, root, f"{largest:,}", bits)
    return bits


def _image_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as file:
        return file.size


def _in_data3(path: str | None) -> bool:
    """Whether a path lies in HCT's sub-folder data3, whatever folders above the data or below are called."""
    return "data3" in (path or "").split("/")[1:2]


def crop_photo(image: np.ndarray, row: Row, rng: random.Random | None = None) -> np.ndarray:
    """Crop a photo (H, W, 3) to the square under the sensor: the top centre for HCT, else the centre.

    With `rng` the position of the crop is jittered by up to 5% of its side, inside of the photo. Raises BadImage if the
    square is not inside of the photo.
    """
    height, width = image.shape[:2]
    side = math.ceil(CROP_FRACTION * max(height, width))
    top = 0 if row.dataset == "hct" else (height - side) // 2
    if row.dataset != PAIRS and _in_data3(row.vision):
        top = DATA3_TOP
    left = (width - side) // 2
    if min(top, left) < 0 or top + side > height:
        raise BadImage(f"the crop at row {top} is not inside of the photo; give photos of the original size")
    if rng is not None:
        jitter = int(CROP_JITTER * side)
        top += rng.randint(0, jitter) if row.dataset == "hct" else rng.randint(-jitter // 2, jitter // 2)
        left += rng.randint(-jitter // 2, jitter // 2)
        top, left = min(max(top, 0), height - side), min(max(left, 0), width - side)
    return image[top : top + side, left : left + side]


def framed_photo(image: np.ndarray, options: ImageOptions, row: Row, rng: random.Random | None = None) -> np.ndarray:
    """The part of a photo (H, W, 3) that `options.photo_crop` keeps; see `crop_photo`."""
    return crop_photo(image, row, rng) if options.photo_crop == "tvl" else _cropped(image, options.photo_crop)


def framed_touch(image: np.ndarray, options: ImageOptions) -> np.ndarray:
    """The part of a touch image (H, W, 3) that `options.touch_crop` keeps, rotated by `options.touch_turn`."""
    image = _padded(image) if options.touch_crop == "tvl" else _cropped(image, options.touch_crop)
    return np.rot90(image, options.touch_turn // 90)


def _padded(image: np.ndarray) -> np.ndarray:
    """Pad an image (H, W, 3) with black to a square."""
    height, width = image.shape[:2]
    pad_x, pad_y = (max(height, width) - width) // 2, (max(height, width) - height) // 2
    padded = np.zeros((height + 2 * pad_y, width + 2 * pad_x, 3), image.dtype)
    padded[pad_y : pad_y + height, pad_x : pad_x + width] = image
    return padded


def _cropped(image: np.ndarray, crop: Crop) -> np.ndarray:
    """The largest square in the centre of an image (H, W, 3), or all of it with "none"."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    return image if crop == "none" else image[top : top + side, left : left + side]
