"""Image files -> normalised tensors: the transforms of TVL (Fu et al. 2024, arXiv:2402.13232) with torchvision v2.

A photo is cropped to the area under the sensor. A touch image is padded to a square and rotated by 90 degrees. There are
other choices in `ImageOptions`. Both are resized to the input size of their encoder. The augmentation differs from TVL in
one point: flips and the rotation by 90 degrees are sampled once per row and applied to both images. TVL samples them per
image, so the contrastive loss aligns a surface with its mirror image and the shared tokens cannot encode direction.

Shapes: images are (3, S, S) float32, normalised. All randomness derives from the `seed` argument.
"""

import io
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tvl_align.data.image_options import TOUCH_MEAN, TOUCH_STD, Channels, Colours, ImageOptions
from tvl_align.data.pictures import DECODER_ERRORS, BadImage, Touch, check_size, framed_photo, framed_touch, open_picture
from tvl_align.data.tvl import PICTURES, Row, TVLData, background_file, file_of
from tvl_align.system.console import UserError, progress
from tvl_align.system.distributed import is_main

MEASURED = 2_000  # pictures from which the numbers of the normalisation are measured
log = logging.getLogger(__name__)
PLACES = ("ssvtp", "hct", "hct/data3")  # of the sensor in a photo, by data set
SUBTRACTED_MEAN, SUBTRACTED_STD = (-0.00809318, -0.01887447, -0.01843059), (0.04535400, 0.04402917, 0.05332521)


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
        """Returns the images {"vision": (3, S, S), "tactile": (3 * options.touch_frames, S', S')} and {modality: reason} of
        unusable images.

        Modalities that the row lacks are in neither dict. `seed=None` gives the plain view; without `options.augment` every
        seed does. Otherwise the augmentation depends on the seed alone. Raises UserError if background subtraction is on and
        the row has no background image.
        """
        load = {"vision": partial(self._photo, row), "tactile": partial(self._touch, row)}
        return _views({m: load[m] for m in PICTURES if m in row.files}, self.options, seed)

    def _photo(self, row: Row, rng: random.Random | None, geometry: Geometry) -> Tensor:
        assert row.vision is not None
        return _photo_view(
            open_picture(file_of(self.root, row.vision), self.options.photo_bits), self.options, row, rng, geometry
        )

    def _touch(self, row: Row, rng: random.Random | None, geometry: Geometry) -> Tensor:
        assert row.tactile is not None
        background = None
        if self.options.subtract_background:
            background = background_file(self.root, row)
            if background is None:
                raise UserError(
                    f"{row.tactile} has no background image (tactile_bg_latent.jpg or digit_background.png); "
                    "add one, name the column of a table with --touch_background_column, or give --subtract_background none."
                )
        named = row.earlier if self.options.earlier_touch else None
        earlier = None if named is None else file_of(self.root, named)
        touch = Touch(file_of(self.root, row.tactile), earlier, background)
        return _touch_view(_touch_pixels(touch, self.options), self.options, rng, geometry)


def source_views(
    sources: Mapping[str, Any], options: ImageOptions, seeds: Sequence[int | None]
) -> tuple[list[dict[str, Tensor]], dict[str, str]]:
    """Views of pictures that are no files of a data folder: one for each seed, as `ImageLoader` gives them.

    sources: {"vision": a photo, "tactile": a touch image or a `Touch`}, or one of them, as `as_source` takes pictures;
    photos are cropped as SSVTP's. Returns the images of each view, and {modality: reason} of pictures that cannot be used.
    Raises UserError for a background that is missing.
    """
    pixels: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for modality in PICTURES:
        if modality in sources:
            try:
                if modality == "vision":
                    pixels[modality] = _pixels(as_source(sources[modality]), options.photo_bits)
                else:
                    pixels[modality] = _touch_pixels(sources[modality], options)
            except BadImage as error:
                faults[modality] = str(error)

    def load(modality: str, rng: random.Random | None, geometry: Geometry) -> Tensor:
        if modality == "vision":
            return _photo_view(pixels[modality], options, Row("ssvtp", "photo", None, None, None, ""), rng, geometry)
        return _touch_view(pixels[modality], options, rng, geometry)

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
            torch.default_generator.manual_seed(rng.getrandbits(62))  # torch.manual_seed would seed a GPU too
        for modality, geometry in (("vision", photo), ("tactile", touch)):
            if modality in load:
                try:
                    views[modality] = load[modality](rng, geometry)
                except BadImage as error:
                    faults[modality] = str(error)
    return views, faults


def _photo_view(
    image: np.ndarray, options: ImageOptions, row: Row, rng: random.Random | None = None, geometry: Geometry = PLAIN
) -> Tensor:
    """(H, W, 3) uint8 -> (3, S, S) float32. `row` says which crop of TVL; with `rng` the view is augmented."""
    size = options.photo_size
    framed = _tensor(framed_photo(image, options, row, rng if options.randomize_crop else None))
    view = geometry(F.resize(framed, [size, size], antialias=True))
    if rng is not None:
        view = _photo_augmentation(size)(view)
    return _normalized(F.to_dtype(view, torch.float32, scale=True), options.photo_mean, options.photo_std)


def _touch_pixels(source: Any, options: ImageOptions) -> tuple[list[np.ndarray], np.ndarray | None]:
    """A touch image, or a `Touch` -> the frames that the encoder takes, the present one first, and the background if it is
    subtracted, each (H, W, 3) uint8. Raises BadImage for a picture that cannot be used, UserError for no background.
    """
    touch = source if isinstance(source, Touch) else Touch(source)
    frames = [touch.image, touch.earlier][: options.touch_frames]
    pixels = [_pixels(as_source(frame), options.touch_bits) for frame in frames if frame is not None]
    if not options.subtract_background:
        return pixels, None
    if touch.background is None:
        raise UserError(
            "a touch image from which the background is subtracted needs it; give Touch(image, background=...) of "
            "tvl_align.data.pictures, or --touch_background."
        )
    return pixels, _pixels(as_source(touch.background), options.touch_bits)


def _touch_view(
    pixels: tuple[Sequence[np.ndarray], np.ndarray | None],
    options: ImageOptions,
    rng: random.Random | None = None,
    geometry: Geometry = PLAIN,
) -> Tensor:
    """What `_touch_pixels` gives -> (3 * options.touch_frames, S, S) float32. With `rng` it is augmented.

    All frames have the same geometry and colour jitter, and the background is subtracted from each. The present frame stands
    for an earlier one that is not there.
    """
    frames, background = pixels
    first, *others = (_tensor(framed_touch(x, options)) for x in (frames if background is None else [*frames, background]))
    size = list(first.shape[-2:])
    view = torch.stack([first, *(F.resize(x, size, antialias=True) for x in others)]) if others else first[None]
    if rng is not None and (options.color_jitter or background is None):
        view = v2.RandomApply([_TOUCH_JITTER], p=0.8)(view)
    view = F.to_dtype(view, torch.float32, scale=True)
    mean, std = options.touch_mean, options.touch_std
    if background is not None:
        view = view[:-1] - view[-1]
        if (mean, std) == (TOUCH_MEAN, TOUCH_STD):
            mean, std = SUBTRACTED_MEAN, SUBTRACTED_STD
    view = _normalized(geometry(F.resize(view, [options.touch_size] * 2, antialias=True)), mean, std)
    return torch.cat([view] * (options.touch_frames // len(view))).flatten(0, 1)


def _tensor(pixels: np.ndarray) -> Tensor:
    """Pixels (H, W, 3) -> (3, H, W), a copy."""
    return torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)


def _normalized(image: Tensor, mean: Channels, std: Channels) -> Tensor:
    return F.normalize(image, list(mean), list(std), inplace=True)


def picture_tensor(
    source: Source | Touch,
    modality: str,
    options: ImageOptions,
    row: Row | None = None,
    dataset: str = "ssvtp",
) -> Tensor:
    """The plain view of one picture, as an encoder takes it -> (3, S, S) float32, normalised; (6, S, S) of two touch frames.

    For a file it equals what `ImageLoader` gives, bit for bit. source: a path, a PIL image, or an array or tensor (H, W),
    (H, W, 3) or (3, H, W), of uint8 or of floats in [0, 1], which are rounded to 256 levels. modality: "vision" or
    "tactile". row: with photo_crop "tvl" its data set says where the sensor is; without a row `dataset` does, one of
    "ssvtp", "hct" and "hct/data3". A `Touch` also has the touch image without contact, for `options.subtract_background`,
    and an earlier frame, for encoders that take two; without it the frame stands for both. Raises BadImage, with the reason,
    for a picture that cannot be used, and UserError for another modality or data set and for a background that is missing.
    """
    if modality not in PICTURES:
        raise UserError(f"{modality!r} has no pictures; give the modality vision or tactile.")
    if dataset not in PLACES:
        raise UserError(f"unknown data set {dataset!r}: give one of {', '.join(PLACES)}.")
    if modality == "vision":
        place = row or Row(dataset.partition("/")[0], f"{dataset}/photo", None, None, None, "")
        return _photo_view(_pixels(as_source(source), options.photo_bits), options, place)
    return _touch_view(_touch_pixels(source, options), options)


def whole_picture(source: Source, size: int, colours: Colours, bits: int = 16) -> Tensor:
    """All of a picture, resized to a square and normalised -> (3, size, size) float32. source: as for `picture_tensor`.

    Raises BadImage, with the reason, for a picture that cannot be used.
    """
    image = F.resize(_tensor(_pixels(source, bits)), [size, size], antialias=True)
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


def _pixels(source: Source, bits: int) -> np.ndarray:
    """The pixels of a picture from any source -> (H, W, 3) uint8. Raises BadImage for one that cannot be used."""
    if isinstance(source, (str, Path)):
        return open_picture(Path(source), bits)
    if isinstance(source, Image.Image):
        return open_picture(source, bits)
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    values = np.asarray(source)
    if values.dtype.kind not in "fiub":
        raise BadImage(f"an array of type {values.dtype}, not uint8 or floating point in [0, 1]")
    if values.ndim == 3 and values.shape[-1] != 3 == values.shape[0]:
        values = values.transpose(1, 2, 0)
    if values.ndim == 2:
        values = np.broadcast_to(values[..., None], (*values.shape, 3))
    if values.ndim != 3 or values.shape[-1] != 3:
        raise BadImage(f"an array of shape {values.shape}, not (H, W), (H, W, 3) or (3, H, W)")
    check_size(values.shape[1], values.shape[0])
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
        if not ((values >= 0) & (values <= 1)).all():
            raise BadImage("floating-point values outside of [0, 1]")
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8:
        raise BadImage(f"values of type {values.dtype}, not uint8 or floating point in [0, 1]")
    return values


def raw_colours(options: ImageOptions, modality: str) -> ImageOptions:
    """These options without normalisation of a modality's pictures, whose values are then in [0, 1]; one frame of touch."""
    return replace(options.normalised_by(modality, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))), touch_frames=1)


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
