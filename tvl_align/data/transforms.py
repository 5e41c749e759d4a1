"""Image files -> normalised tensors: the transforms of TVL (Fu et al. 2024, arXiv:2402.13232) with torchvision v2.

A photo is cropped to the area under the sensor. A touch image is padded to a square and rotated by 90 degrees. There are
other choices in `ImageOptions`. Both are resized to the input size of their encoder. The augmentation differs from TVL in
one point: flips and the rotation by 90 degrees are sampled once per row and applied to both images. TVL samples them per
image, so the contrastive loss aligns a surface with its mirror image and the shared tokens cannot encode direction.

Shapes: images are (3, S, S) float32, normalised. All randomness derives from the `seed` argument.
"""

import io
import logging
import math
import random
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tvl_align.data.tvl import CROP_FRACTION, PAIRS, PICTURES, Row, TVLData, background_file, file_of
from tvl_align.system.console import UserError, progress
from tvl_align.system.distributed import is_main

CROP_JITTER = 0.05
MAX_PIXELS = 64_000_000
MIN_SIDE = 8  # pixels
GREY_BITS = (8, 10, 12, 14, 16)  # of cameras that write 16-bit grey files
MEASURED = 2_000  # pictures from which the numbers of the normalisation are measured
GREY_FILES = 64  # files of a modality that are opened to find its number of bits
BITS_PER_SAMPLE = 258  # a TIFF tag
TOUCH_SIZE = (240, 320)  # pixels of DIGIT's frames; in a resized copy they are others
DECODER_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, MemoryError, Image.DecompressionBombError)
log = logging.getLogger(__name__)
DARKEST = 64  # 16-bit colours below this, after reduction to 8 bits, are taken for 14 bits or fewer
PLACES = ("ssvtp", "hct", "hct/data3")  # of the sensor in a photo, by data set
DATA3_TOP = 200  # pixels; in HCT's folder data3 the sensor is lower in the photo
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTO_MEAN, PHOTO_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOUCH_MEAN, TOUCH_STD = (0.29174602, 0.29713256, 0.29104046), (0.18764469, 0.19467652, 0.21871583)
SUBTRACTED_MEAN, SUBTRACTED_STD = (-0.00809318, -0.01887447, -0.01843059), (0.04535400, 0.04402917, 0.05332521)


Crop = Literal["tvl", "centre", "none"]
Turn = Literal[0, 90, 180, 270]
Channels = tuple[float, float, float]
Colours = tuple[Channels, Channels]  # mean and standard deviation of each colour channel, values in [0, 1]


@dataclass(frozen=True)
class ImageOptions:
    """Options of the image transforms. The defaults are those of TVL.

    photo_size, touch_size: the input sizes of the encoders in pixels. photo_bits, touch_bits: how many bits the values of
    16-bit grey files have that do not say it themselves; see `inspect_images`. photo_crop: "tvl", the square under the
    sensor, by data set; "centre", the largest square in the centre; "none", the whole picture, resized to a square.
    touch_crop: "tvl", padded with black to a square; "centre" and "none" as for photos. touch_turn: degrees
    counterclockwise. photo_mean ... touch_std: of each colour channel, values in [0, 1], for the normalisation; with
    `subtract_background` TVL's numbers for touch images stand for its numbers for differences. more_bits: {further modality:
    bits of its 16-bit grey files}, where they are not 16. Raises UserError for a value that is none of these.
    """

    photo_size: int = 224
    touch_size: int = 224
    randomize_crop: bool = False
    color_jitter: bool = False
    subtract_background: bool = False
    shared_geometry: bool = True
    augment: bool = True
    photo_bits: int = 16
    touch_bits: int = 16
    photo_crop: Crop = "tvl"
    touch_crop: Crop = "tvl"
    touch_turn: Turn = 90
    photo_mean: Channels = PHOTO_MEAN
    photo_std: Channels = PHOTO_STD
    touch_mean: Channels = TOUCH_MEAN
    touch_std: Channels = TOUCH_STD
    more_bits: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, choices in (("photo_crop", Crop), ("touch_crop", Crop), ("touch_turn", Turn)):
            if (value := getattr(self, name)) not in get_args(choices):
                raise UserError(f"{name} is {value!r}; give one of {', '.join(map(str, get_args(choices)))}.")
        for name in ("photo_mean", "photo_std", "touch_mean", "touch_std"):
            numbers = tuple(getattr(self, name))  # a list where it is read from JSON
            if len(numbers) != 3 or not all(math.isfinite(x) and (x > 0 or "mean" in name) for x in numbers):
                kind = "numbers" if "mean" in name else "numbers above 0"
                raise UserError(f"{name} is {numbers}; give three {kind}, one for each colour channel.")
            object.__setattr__(self, name, numbers)
        if self.randomize_crop and self.photo_crop != "tvl":
            raise UserError(
                f'--randomize_crop shifts the crop of TVL, and --photo_crop is "{self.photo_crop}"; leave out one of them.'
            )

    def colours(self, modality: str) -> Colours:
        """The numbers by which the pictures of "vision" or "tactile" are normalised."""
        return (self.photo_mean, self.photo_std) if modality == "vision" else (self.touch_mean, self.touch_std)

    def normalised_by(self, modality: str, colours: Colours) -> "ImageOptions":
        """These options with other numbers for the pictures of "vision" or "tactile"."""
        mean, std = colours
        if modality == "vision":
            return replace(self, photo_mean=mean, photo_std=std)
        return replace(self, touch_mean=mean, touch_std=std)


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


PLAIN = Geometry()
Source = str | Path | Image.Image | np.ndarray | Tensor  # of one picture; see `picture_tensor`


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
        load = {"vision": partial(self._photo, row), "tactile": partial(self._touch, row)}
        return _views({m: load[m] for m in PICTURES if m in row.files}, self.options, seed)

    def _photo(self, row: Row, rng: random.Random | None, geometry: Geometry) -> Tensor:
        assert row.vision is not None
        return _photo_view(_open(file_of(self.root, row.vision), self.options.photo_bits), self.options, row, rng, geometry)

    def _touch(self, row: Row, rng: random.Random | None, geometry: Geometry) -> Tensor:
        assert row.tactile is not None
        bits, background = self.options.touch_bits, None
        image = _open(file_of(self.root, row.tactile), bits)
        if self.options.subtract_background:
            path = background_file(self.root, row)
            if path is None:
                raise UserError(
                    f"{row.tactile} has no background image (tactile_bg_latent.jpg or digit_background.png); "
                    "add one or leave out --subtract_background."
                )
            background = _open(path, bits)
        return _touch_view(image, self.options, background, rng, geometry)


def source_views(
    sources: Mapping[str, Any], options: ImageOptions, seeds: Sequence[int | None]
) -> tuple[list[dict[str, Tensor]], dict[str, str]]:
    """Views of pictures that are no files of a data folder: one for each seed, as `ImageLoader` gives them.

    sources: {"vision": a photo, "tactile": a touch image}, or one of them, each as `as_source` takes it; cropped as SSVTP's.
    Returns the images of each view, and {modality: reason} of pictures that cannot be used.
    """
    pixels: dict[str, Tensor] = {}
    faults: dict[str, str] = {}
    for modality, bits in zip(PICTURES, (options.photo_bits, options.touch_bits), strict=True):
        if modality in sources:
            try:
                pixels[modality] = _pixels(as_source(sources[modality]), bits)
            except BadImage as error:
                faults[modality] = str(error)

    def load(modality: str, rng: random.Random | None, geometry: Geometry) -> Tensor:
        if modality == "vision":
            return _photo_view(pixels[modality], options, Row("ssvtp", "photo", None, None, None, ""), rng, geometry)
        return _touch_view(pixels[modality], options, None, rng, geometry)

    views = []
    for seed in seeds:
        images, unusable = _views({m: partial(load, m) for m in pixels}, options, seed)
        views.append(images)
        faults |= unusable
    return views, faults


def _views(
    load: Mapping[str, Callable[[random.Random | None, Geometry], Tensor]], options: ImageOptions, seed: int | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One view of the pictures of a row, each by its function of random draws and geometry; see `ImageLoader`."""
    rng, photo, touch = None, PLAIN, PLAIN
    if seed is not None and options.augment:
        rng = random.Random(seed)
        photo = Geometry.sample(rng)
        # TVL samples them independently and applies only the horizontal flip to photos.
        touch = photo if options.shared_geometry else Geometry.sample(rng)
        photo = photo if options.shared_geometry else Geometry(horizontal_flip=photo.horizontal_flip)
    views: dict[str, Tensor] = {}
    faults: dict[str, str] = {}
    with nullcontext() if rng is None else torch.random.fork_rng(devices=[]):
        if rng is not None:
            torch.manual_seed(rng.getrandbits(62))
        for modality, geometry in (("vision", photo), ("tactile", touch)):
            if modality in load:
                try:
                    views[modality] = load[modality](rng, geometry)
                except BadImage as error:
                    faults[modality] = str(error)
    return views, faults


def _photo_view(
    image: Tensor, options: ImageOptions, row: Row, rng: random.Random | None = None, geometry: Geometry = PLAIN
) -> Tensor:
    """(3, H, W) uint8 -> (3, S, S) float32. `row` says which crop of TVL; with `rng` the view is augmented."""
    size = options.photo_size
    image = _framed_photo(image, options, row, rng if options.randomize_crop else None)
    image = geometry(F.resize(image, [size, size], antialias=True))
    if rng is not None:
        image = _photo_augmentation(size)(image)
    return _normalized(F.to_dtype(image, torch.float32, scale=True), options.photo_mean, options.photo_std)


def _touch_view(
    image: Tensor,
    options: ImageOptions,
    background: Tensor | None,
    rng: random.Random | None = None,
    geometry: Geometry = PLAIN,
) -> Tensor:
    """(3, H, W) uint8 -> (3, S, S) float32; a background (3, H', W') uint8 is subtracted. With `rng` it is augmented."""
    image = _framed_touch(image, options)
    mean, std = options.touch_mean, options.touch_std
    jitter = rng is not None and (options.color_jitter or background is None)
    if background is not None:
        background = F.resize(_framed_touch(background, options), list(image.shape[-2:]), antialias=True)
        pair = torch.stack([image, background])  # both get the same colour jitter
        pair = v2.RandomApply([_TOUCH_JITTER], p=0.8)(pair) if jitter else pair
        pair = F.to_dtype(pair, torch.float32, scale=True)
        image = pair[0] - pair[1]
        if (mean, std) == (TOUCH_MEAN, TOUCH_STD):
            mean, std = SUBTRACTED_MEAN, SUBTRACTED_STD
    elif jitter:
        image = v2.RandomApply([_TOUCH_JITTER], p=0.8)(image)
    size = options.touch_size
    image = geometry(F.resize(F.to_dtype(image, torch.float32, scale=True), [size, size], antialias=True))
    return _normalized(image, mean, std)


def _normalized(image: Tensor, mean: Channels, std: Channels) -> Tensor:
    return F.normalize(image, list(mean), list(std), inplace=True)


def picture_tensor(
    source: Source,
    modality: str,
    options: ImageOptions,
    row: Row | None = None,
    dataset: str = "ssvtp",
    background: Source | None = None,
) -> Tensor:
    """The plain view of one picture, as an encoder takes it -> (3, S, S) float32, normalised.

    For a file it equals what `ImageLoader` gives, bit for bit. source: a path, a PIL image, or an array or tensor (H, W),
    (H, W, 3) or (3, H, W), of uint8 or of floats in [0, 1], which are rounded to 256 levels. modality: "vision" or
    "tactile". row: with photo_crop "tvl" its data set says where the sensor is; without a row `dataset` does, one of
    "ssvtp", "hct" and "hct/data3". background: the touch image without contact, for `options.subtract_background`.
    Raises BadImage, with the reason, for a picture that cannot be used, and UserError for another modality or data set and
    for a background that is missing.
    """
    if modality not in PICTURES:
        raise UserError(f"{modality!r} has no pictures; give the modality vision or tactile.")
    if dataset not in PLACES:
        raise UserError(f"unknown data set {dataset!r}: give one of {', '.join(PLACES)}.")
    if modality == "vision":
        place = row or Row(dataset.partition("/")[0], f"{dataset}/photo", None, None, None, "")
        return _photo_view(_pixels(source, options.photo_bits), options, place)
    if not options.subtract_background:
        return _touch_view(_pixels(source, options.touch_bits), options, None)
    if background is None:
        raise UserError("a touch image from which the background is subtracted needs it; give background.")
    return _touch_view(_pixels(source, options.touch_bits), options, _pixels(background, options.touch_bits))


def whole_picture(source: Source, size: int, colours: Colours, bits: int = 16) -> Tensor:
    """All of a picture, resized to a square and normalised -> (3, size, size) float32. source: as for `picture_tensor`.

    Raises BadImage, with the reason, for a picture that cannot be used.
    """
    image = F.resize(_pixels(source, bits), [size, size], antialias=True)
    return _normalized(F.to_dtype(image, torch.float32, scale=True), *colours)


def as_source(given: Any) -> Source:
    """A picture as `picture_tensor` takes it, from one or from the bytes of an image file. Raises BadImage for others."""
    if isinstance(given, bytes):
        try:
            given = Image.open(io.BytesIO(given))
        except UnidentifiedImageError as error:
            raise BadImage("not an image") from error
        except DECODER_ERRORS as error:
            raise BadImage("corrupt or truncated") from error
    if not isinstance(given, Source):
        raise BadImage(f"a {type(given).__name__}, not a picture")
    return given


class BadImage(Exception):
    """An image that cannot be used. The message is the reason; it does not name the file, so that reasons can be counted."""


def _pixels(source: Source, bits: int) -> Tensor:
    """The pixels of a picture from any source -> (3, H, W) uint8. Raises BadImage for one that cannot be used."""
    if isinstance(source, (str, Path)):
        return _open(Path(source), bits)
    if isinstance(source, Image.Image):
        return _open(source, bits)
    try:
        values = source.detach().cpu() if isinstance(source, Tensor) else torch.from_numpy(np.array(source))
    except TypeError as error:
        raise BadImage(f"an array of type {source.dtype}, not uint8 or floating point in [0, 1]") from error
    if values.ndim == 3 and values.shape[-1] == 3 != values.shape[0]:
        values = values.permute(2, 0, 1)
    if values.ndim == 2:
        values = values.expand(3, -1, -1)
    if values.ndim != 3 or values.shape[0] != 3:
        raise BadImage(f"an array of shape {tuple(values.shape)}, not (H, W), (H, W, 3) or (3, H, W)")
    _check_size(values.shape[2], values.shape[1])
    if values.is_floating_point():
        values = values.float()
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise BadImage("floating-point values outside of [0, 1]")
        values = (values * 255).round().to(torch.uint8)
    if values.dtype != torch.uint8:
        raise BadImage(f"values of type {str(values.dtype).removeprefix('torch.')}, not uint8 or floating point in [0, 1]")
    return values.contiguous()


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"a side of fewer than {MIN_SIDE} pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} million pixels")


def _open(source: Path | Image.Image, bits: int = 16) -> Tensor:
    """Decode an image file, or a PIL image, and apply its EXIF orientation -> (3, H, W) uint8.

    The format is detected from the content, not from the file name. The size is checked before decoding. bits: of the values
    of a 16-bit grey file that does not say it itself. Of 16-bit colours Pillow reads the upper 8 bits, where 10, 12 or 14
    bits have few levels. Raises BadImage for such a file, for one that is not a complete image of a supported size, and for
    grey values beyond these bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
            with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as file:
                _check_size(file.width, file.height)
                if file.mode == "F":
                    raise BadImage("floating-point grey values of unknown scale")
                image: Image.Image = file
                tiles = getattr(file, "tile", ())  # a PIL image that was not read from a file has none
                reduced = any(";16" in str(tile.args) for tile in tiles) and not file.mode.startswith("I")
                if file.mode.startswith("I"):  # 16-bit grey: Pillow's conversion would clip values at 255
                    grey = np.asarray(file, dtype=np.int64)
                    image = Image.fromarray(_to_8_bits(grey, _stated_bits(file, grey) or bits))
                image = ImageOps.exif_transpose(image)
                pixels = F.pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))
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


def raw_colours(options: ImageOptions, modality: str) -> ImageOptions:
    """These options without normalisation of a modality's pictures, whose values are then in [0, 1]."""
    return options.normalised_by(modality, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))


class ColourSums:
    """Mean and standard deviation of each colour channel of all pixels of pictures, one picture in memory at a time."""

    def __init__(self) -> None:
        self.sums, self.count = torch.zeros(2, 3, dtype=torch.float64), 0

    def add(self, picture: Tensor) -> None:
        """Add a picture (3, S, S), values in [0, 1]."""
        self.sums += torch.stack([(picture.double() ** power).mean((1, 2)) for power in (1, 2)])
        self.count += 1

    def colours(self, modality: str, place: object) -> Colours | None:
        """The numbers, rounded to 4 digits, which are logged; None without any picture. place: where they are from."""
        if not self.count:
            return None
        mean, square = self.sums / self.count
        std = (square - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)  # above 0 also where all are of one colour
        (r, g, b), (r_std, g_std, b_std) = ([round(x, 4) for x in numbers.tolist()] for numbers in (mean, std))
        found = (r, g, b), (r_std, g_std, b_std)
        log.warning("colours of %d %s pictures in %s: mean %s, standard deviation %s", self.count, modality, place, *found)
        return found


def measure_colours(data: TVLData, modality: str, options: ImageOptions) -> Colours:
    """Mean and standard deviation of each colour channel of the training pictures, for their normalisation.

    They are those of all pixels of at most 2,000 plain pictures, values in [0, 1], rounded to 4 digits, and are logged. The
    pictures are drawn with a fixed seed; those that cannot be used do not count. Without any, the options' own are returned.
    """
    rows = {row.files[modality]: row for row in data.train if modality in row.files}
    paths = sorted(rows)
    raw, sums = ImageLoader(data.root, raw_colours(options, modality)), ColourSums()
    with progress(min(len(paths), MEASURED), f"measure colours of {modality}", "image", quiet=not is_main()) as bar:
        for path in random.Random(0).sample(paths, min(len(paths), MEASURED)):
            row = rows[path]
            row = replace(row, tactile=None) if modality == "vision" else replace(row, vision=None)
            if (picture := raw(row)[0].get(modality)) is not None:
                sums.add(picture)
            bar.update()
    return sums.colours(modality, data.root) or options.colours(modality)


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


def crop_photo(image: Tensor, row: Row, rng: random.Random | None = None) -> Tensor:
    """Crop a photo (3, H, W) to the square under the sensor: the top centre for HCT, else the centre.

    With `rng` the position of the crop is jittered by up to 5% of its side, inside of the photo. Raises BadImage if the
    square is not inside of the photo.
    """
    height, width = image.shape[-2:]
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
    return F.crop(image, top, left, side, side)


def _framed_photo(image: Tensor, options: ImageOptions, row: Row, rng: random.Random | None = None) -> Tensor:
    """The part of a photo (3, H, W) that `options.photo_crop` keeps; see `crop_photo`."""
    return crop_photo(image, row, rng) if options.photo_crop == "tvl" else _cropped(image, options.photo_crop)


def _framed_touch(image: Tensor, options: ImageOptions) -> Tensor:
    """The part of a touch image (3, H, W) that `options.touch_crop` keeps, rotated by `options.touch_turn`."""
    image = _padded(image) if options.touch_crop == "tvl" else _cropped(image, options.touch_crop)
    return torch.rot90(image, options.touch_turn // 90, (-2, -1))


def _padded(image: Tensor) -> Tensor:
    """Pad an image (3, H, W) with black to a square."""
    height, width = image.shape[-2:]
    pad_x, pad_y = (max(height, width) - width) // 2, (max(height, width) - height) // 2
    return F.pad(image, [pad_x, pad_y])


def _cropped(image: Tensor, crop: Crop) -> Tensor:
    """The largest square in the centre of an image (3, H, W), or all of it with "none"."""
    return image if crop == "none" else F.center_crop(image, [min(image.shape[-2:])])


def preview(root: Path, row: Row, options: ImageOptions | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The cropped photo and the rotated touch image of a row for display, each (H, W, 3) uint8.

    If either file cannot be used, both are 8 x 8 grey images. options: their crops, rotation and numbers of bits are used.
    """
    options = options or ImageOptions()
    assert row.vision is not None and row.tactile is not None
    try:
        photo = _framed_photo(_open(file_of(root, row.vision), options.photo_bits), options, row)
        touch = _framed_touch(_open(file_of(root, row.tactile), options.touch_bits), options)
    except BadImage:
        photo = touch = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    return photo.permute(1, 2, 0).numpy(), touch.permute(1, 2, 0).numpy()
