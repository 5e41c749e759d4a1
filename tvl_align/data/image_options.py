"""What is done to photos and touch images, as options; `tvl_align.data.transforms` does it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from tvl_align.system.console import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTO_MEAN, PHOTO_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOUCH_MEAN, TOUCH_STD = (0.29174602, 0.29713256, 0.29104046), (0.18764469, 0.19467652, 0.21871583)

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
    bits of its 16-bit grey files}, where they are not 16. touch_frames: how many frames of a contact the touch encoder
    takes, 1 or 2, of which the second is an earlier one. earlier_touch: whether rows name the earlier frame; where none is
    named the present one stands for it. Raises UserError for a value that is none of these.
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
    touch_frames: int = 1
    earlier_touch: bool = False

    def __post_init__(self) -> None:
        chosen = ("photo_crop", Crop), ("touch_crop", Crop), ("touch_turn", Turn), ("touch_frames", Literal[1, 2])
        for name, choices in chosen:
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
