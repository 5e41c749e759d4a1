"""The synthetic world: a data set of photos, touch images and captions with known factors, written in the TVL format.

Each sample renders one surface, a textured height map. The photo has an albedo, a painted print and Lambertian shading. The
touch image is the surface pressed into a gel sensor, rendered with the calibration of a real GelSight sensor that maps the
slope of the gel to a colour (Taxim, Si & Yuan 2022, arXiv:2109.04027; tables of the `taxim` package).

Factors are sampled uniformly and independently. Each is visible in known modalities, its owners:

    vision + touch + text   texture, coarseness
    vision + touch          profile (orientation, if the images are registered)
    vision + text           hue
    touch + text            hardness
    vision                  light, print, orientation
    touch                   position, shape, angle
    text                    wording

Misregistration m in [0, 1] decides how photo and touch image lie on each other. At 0 they are registered to the pixel. At 1
the sensor presses anywhere on the photographed patch and at any angle, so that photo and touch share no frame: the grain has
an `orientation` in the photo and an independent `angle` in the touch image. Between, the sensor is moved and turned by up to
this fraction.

Photo and touch image also share the random noise of the texture, a nuisance variable by which samples with equal factors
differ, and at small m its phase. Captions drop words and mix synonyms at random. `factors.csv` and `factors.json` contain
the factors of every sample; training does not read them.

Shapes: B samples, S image side in pixels. Images are float32 (B, S, S, 3) in [0, 1] until they are written as JPEG.
"""

import csv
import io
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tvl_align.data.tvl import CROP_FRACTION
from tvl_align.system.console import UserError, progress

VISION, TACTILE, TEXT = "vision", "tactile", "text"


@dataclass(frozen=True)
class Factor:
    """One ground-truth variable: the names of its levels and the modalities that carry it."""

    levels: tuple[str, ...]
    ownership: tuple[str, ...]


# The owners are those at misregistration 1; `ownership` gives them at any.
FACTORS: dict[str, Factor] = {
    "texture": Factor(
        ("ridged", "wavy", "dotted", "checkered", "woven", "grainy", "cracked", "scaly"), (VISION, TACTILE, TEXT)
    ),
    "coarseness": Factor(("minute", "fine", "medium", "coarse", "bulky"), (VISION, TACTILE, TEXT)),
    "profile": Factor(("plateau", "wide", "even", "narrow", "sharp"), (VISION, TACTILE)),
    "hue": Factor(("red", "yellow", "green", "cyan", "blue", "magenta"), (VISION, TEXT)),
    "hardness": Factor(("hard", "firm", "springy", "soft", "squishy"), (TACTILE, TEXT)),
    "light": Factor(("0", "72", "144", "216", "288"), (VISION,)),
    "print": Factor(("none", "disc", "ring", "bar", "cross"), (VISION,)),
    "orientation": Factor(("0", "36", "72", "108", "144"), (VISION,)),
    "position": Factor(("centre", "left", "right", "up", "down"), (TACTILE,)),
    "shape": Factor(("disc", "square", "triangle", "bar", "cross"), (TACTILE,)),
    "angle": Factor(("0", "36", "72", "108", "144"), (TACTILE,)),
    "wording": Factor(("plain", "second", "third", "fourth", "fifth"), (TEXT,)),
}
TEXT_FACTORS = ("texture", "coarseness", "hardness", "hue")  # named by captions


# Five synonyms per level. The factor "wording" prefers a column; column 0 has the names of the levels.
WORDS: dict[str, tuple[str, ...]] = {
    "ridged": ("ridged", "grooved", "corrugated", "furrowed", "lined"),
    "wavy": ("wavy", "rippled", "undulating", "zigzag", "curvy"),
    "dotted": ("dotted", "bumpy", "knobby", "studded", "pebbled"),
    "checkered": ("checkered", "tiled", "chequered", "squared", "gridded"),
    "woven": ("woven", "knitted", "textile", "braided", "plaited"),
    "grainy": ("grainy", "gritty", "sandy", "granular", "speckled"),
    "cracked": ("cracked", "fissured", "creased", "wrinkled", "crinkled"),
    "scaly": ("scaly", "shingled", "flaky", "layered", "stepped"),
    "minute": ("minute", "tiny", "microscopic", "hairline", "silky"),
    "fine": ("fine", "delicate", "thin", "slender", "small"),
    "medium": ("medium", "moderate", "average", "ordinary", "middling"),
    "coarse": ("coarse", "rough", "large", "broad", "thick"),
    "bulky": ("bulky", "huge", "massive", "chunky", "giant"),
    "hard": ("hard", "rigid", "solid", "stony", "unyielding"),
    "firm": ("firm", "stiff", "sturdy", "tough", "tight"),
    "springy": ("springy", "elastic", "rubbery", "resilient", "bouncy"),
    "soft": ("soft", "cushioned", "padded", "spongy", "fluffy"),
    "squishy": ("squishy", "mushy", "pulpy", "doughy", "gooey"),
    "red": ("red", "crimson", "scarlet", "ruby", "cherry"),
    "yellow": ("yellow", "golden", "amber", "lemon", "mustard"),
    "green": ("green", "emerald", "grassy", "leafy", "jade"),
    "cyan": ("cyan", "turquoise", "aqua", "teal", "aquamarine"),
    "blue": ("blue", "azure", "navy", "cobalt", "sapphire"),
    "magenta": ("magenta", "pink", "fuchsia", "purple", "violet"),
}
CYCLES = np.array([12.0, 9.0, 6.7, 5.0, 3.7], np.float32)  # texture periods across the image, one per coarseness
GAINS = np.array([0.3, 0.55, 1.0, 1.8, 3.3], np.float32)  # exponent of the heights, one per profile
DEPTHS = np.array([0.2, 0.35, 0.5, 0.75, 1.0], np.float32)  # how deep the sensor presses, one per hardness
DROPPED, OTHER_WORDING = 0.1, 0.2  # probabilities that a caption drops a word or takes it from another column
GRAIN_STEP, GRAIN_JITTER = 36.0, 4.0  # degrees between the levels of orientation and angle, and around them
REGISTERED = 0.2  # misregistration up to which the touch image shows the orientation of the photo
FRAMES_PER_TRAJECTORY = 4
SSVTP_SHARE = 0.1  # fraction of the samples; about 10% of TVL's rows are SSVTP
NOT_CONTACT_SHARE = 0.1  # not-in-contact rows per training row
START_TIME = 1_700_000_000  # Unix time in the name of the first trajectory
JPEG: dict[str, Any] = {"format": "JPEG", "quality": 92, "subsampling": 0}


def sample_factors(count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Sample a level, (count,) int64, for every factor, uniformly and independently."""
    return {name: rng.integers(len(factor.levels), size=count) for name, factor in FACTORS.items()}


def ownership(misregistration: float) -> dict[str, tuple[str, ...]]:
    """{factor: modalities that carry it} at this misregistration; () for a factor that none carries without error."""
    owners = {name: factor.ownership for name, factor in FACTORS.items()}
    if misregistration < 1:
        owners |= {"orientation": (VISION, TACTILE) if misregistration <= REGISTERED else (), "angle": ()}
    return owners


@dataclass(frozen=True)
class Poses:
    """How grain and sensor lie on the patch: grain (B,) degrees in the photo's frame, turn (B,) degrees and shift (B, 2) of
    the sensor in half sides of the patch, float64. The grain that the sensor feels is at grain + turn, modulo 180."""

    grain: np.ndarray
    turn: np.ndarray
    shift: np.ndarray

    def __getitem__(self, part: slice) -> "Poses":
        return Poses(self.grain[part], self.turn[part], self.shift[part])

    def felt(self) -> np.ndarray:
        """(B,) int64: the level of the factor `angle` that is nearest to the felt grain."""
        return np.rint((self.grain + self.turn) / GRAIN_STEP).astype(np.int64) % len(FACTORS["angle"].levels)


def sample_poses(factors: dict[str, np.ndarray], misregistration: float, rng: np.random.Generator) -> Poses:
    """Poses of the samples. At misregistration 1 the felt grain is that of the factor `angle`, else the turn is uniform.

    The grain is modulo 180 but scales have a front and a back. Half turns at random keep them from telling one frame's grain
    in the other.
    """
    count = len(factors["orientation"])
    jitter = GRAIN_JITTER * np.clip(rng.standard_normal((count, 2)), -2, 2)
    shift = misregistration * rng.uniform(-1, 1, (count, 2))
    turn = 90 * misregistration * rng.uniform(-1, 1, count)
    half_turns = 180.0 * rng.integers(2, size=(count, 2))
    grain = GRAIN_STEP * factors["orientation"] + jitter[:, 0] + half_turns[:, 0]
    if misregistration >= 1:
        turn = (GRAIN_STEP * factors["angle"] + jitter[:, 1] + half_turns[:, 1] - grain + 180) % 360 - 180
    return Poses(grain, turn, shift)


def captions(factors: dict[str, np.ndarray], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Per sample its caption, "word, word", and the factors that it names, in the order of TEXT_FACTORS, space separated.

    A word is dropped with probability DROPPED, but one stays. With probability OTHER_WORDING it is a synonym of another
    column than that of the factor `wording`. The order of the words is random.
    """
    count, columns = len(factors["wording"]), len(FACTORS["wording"].levels)
    kept = rng.random((count, len(TEXT_FACTORS))) >= DROPPED
    spared = rng.integers(len(TEXT_FACTORS), size=count)
    kept[np.arange(count), spared] |= ~kept.any(axis=1)
    other = rng.integers(1, columns, size=kept.shape) * (rng.random(kept.shape) < OTHER_WORDING)
    column = (factors["wording"][:, None] + other) % columns
    order = rng.permuted(np.tile(np.arange(len(TEXT_FACTORS)), (count, 1)), axis=1)
    result = []
    for i in range(count):
        words = {
            j: WORDS[FACTORS[name].levels[factors[name][i]]][column[i, j]]
            for j, name in enumerate(TEXT_FACTORS)
            if kept[i, j]
        }
        named = " ".join(TEXT_FACTORS[j] for j in words)
        result.append((", ".join(words[j] for j in order[i] if j in words), named))
    return result


def synonyms() -> dict[str, list[str]]:
    """{word: the other words of the same level} for every word of the captions, as in `ssvtp/synonyms.json`."""
    return {word: [other for other in row if other != word] for row in WORDS.values() for word in row}


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) coordinates of the pixel centres, (S, S) each, in [-1, 1]."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis, indexing="xy")
    return x, y


def _smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _textures(u: np.ndarray, v: np.ndarray, noise: np.ndarray, texture: int) -> np.ndarray:
    """Heights (S, S) in [0, 1] of one texture.

    u, v: (S, S) coordinates in periods, u across the grain. noise: (S, S) of unit variance.
    """
    tau = np.float32(2 * np.pi)
    match FACTORS["texture"].levels[texture]:
        case "ridged":
            return 0.5 + 0.5 * np.sin(tau * u)
        case "wavy":
            return 0.5 + 0.5 * np.sin(tau * (u + 0.45 * np.sin(tau * v / 2.2)))
        case "dotted":
            across, along = np.mod(u, 1) - 0.5, np.mod(v / 1.7, 1) - 0.5
            return np.clip(1 - (across**2 + along**2) / 0.42**2, 0, 1)
        case "checkered":
            across, along = np.sin(tau * u / 1.2), np.sin(tau * v / 2.4)
            edge = np.minimum(1, 1.5 * np.minimum(np.abs(across), np.abs(along)))
            return 0.5 + 0.5 * np.sign(across * along) * edge
        case "woven":
            over = np.sin(tau * u / 2) * np.sin(tau * v / 4) > 0
            return np.where(over, np.abs(np.sin(tau * u)), 0.6 * np.abs(np.sin(tau * v / 2)))
        case "grainy":
            return 0.5 + 0.5 * np.tanh(1.2 * noise)
        case "cracked":
            return 1 - np.exp(-3.5 * np.abs(noise))
        case _:
            return np.mod(u + 0.5 * np.abs(np.cos(tau * v / 3)), 1.0)


def _anisotropic_noise(cos: float, sin: float, cycles: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Unit-variance noise (S, S) with `cycles` periods across the grain and 2.5 times longer structures along it."""
    frequency = np.fft.fftfreq(size, 1 / size).astype(np.float32)
    fx, fy = np.meshgrid(frequency, np.fft.rfftfreq(size, 1 / size).astype(np.float32), indexing="ij")
    fx, fy = fy, fx  # rfft2 halves the last axis, which is x
    across, along = fx * cos + fy * sin, -fx * sin + fy * cos
    radius = np.sqrt(across**2 + (2.5 * along) ** 2) / cycles
    band = np.exp(-0.5 * ((radius - 1) / 0.18) ** 2)
    spectrum = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32)) * band
    field = np.fft.irfft2(spectrum, s=(size, size)).astype(np.float32)
    return field / (field.std() + 1e-6)


def height_maps(
    factors: dict[str, np.ndarray], poses: Poses, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The surfaces of the samples in the frames of the photo and of the sensor: heights (B, S, S) float32 in [0, 1] each."""
    x, y = _grid(size)
    count = len(factors["texture"])
    photo, touch = np.empty((count, size, size), np.float32), np.empty((count, size, size), np.float32)
    phase = rng.random((count, 2), dtype=np.float32)
    jitter = rng.standard_normal(count, dtype=np.float32)
    for i in range(count):
        angle = math.radians(poses.grain[i])
        cycles = float(CYCLES[factors["coarseness"][i]] * np.exp(0.03 * np.clip(jitter[i], -2, 2)))
        cos, sin = math.cos(angle), math.sin(angle)
        texture = int(factors["texture"][i])
        noisy = FACTORS["texture"].levels[texture] in ("grainy", "cracked")
        noise = _anisotropic_noise(cos, sin, cycles, size, rng) if noisy else x
        for heights, moved in ((photo, False), (touch, bool(poses.turn[i] or poses.shift[i].any()))):
            px, py = _on_the_patch(x, y, poses.turn[i], poses.shift[i]) if moved else (x, y)
            u = (px * cos + py * sin) * np.float32(cycles / 2) + phase[i, 0]
            v = (-px * sin + py * cos) * np.float32(cycles / 2) + phase[i, 1]
            field = _resample(noise, px, py) if noisy and moved else noise
            heights[i] = _textures(u, v, field, texture) ** GAINS[factors["profile"][i]]
    return photo, touch


def _on_the_patch(x: np.ndarray, y: np.ndarray, turn: float, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (S, S) in the sensor's frame -> coordinates in the photo's, of a sensor turned by -turn degrees."""
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    px, py = x * cos + y * sin + shift[0], -x * sin + y * cos + shift[1]
    return px.astype(np.float32), py.astype(np.float32)


def _resample(field: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The periodic field (S, S) at coordinates (x, y), (S, S) each, of which [-1, 1] is one period."""
    from scipy import ndimage

    size = len(field)
    return ndimage.map_coordinates(
        field, [(y + 1) * (size / 2) - 0.5, (x + 1) * (size / 2) - 0.5], order=1, mode="grid-wrap"
    )


def _slopes(surface: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finite differences (d/dx, d/dy) of heights (B, S, S) in pixels, central in the interior and one-sided at the edges."""
    dx, dy = np.empty_like(surface), np.empty_like(surface)
    dx[..., 1:-1] = (surface[..., 2:] - surface[..., :-2]) / 2
    dx[..., 0], dx[..., -1] = surface[..., 1] - surface[..., 0], surface[..., -1] - surface[..., -2]
    dy[..., 1:-1, :] = (surface[..., 2:, :] - surface[..., :-2, :]) / 2
    dy[..., 0, :], dy[..., -1, :] = (
        surface[..., 1, :] - surface[..., 0, :],
        surface[..., -1, :] - surface[..., -2, :],
    )
    return dx, dy


def _print_mask(kind: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radius = np.hypot(x, y)
    match FACTORS["print"].levels[kind]:
        case "none":
            return np.zeros_like(x)
        case "disc":
            return (radius < 0.5).astype(np.float32)
        case "ring":
            return ((radius > 0.5) & (radius < 0.8)).astype(np.float32)
        case "bar":
            return (np.abs(y) < 0.25).astype(np.float32)
        case _:
            return ((np.abs(x - y) < 0.25) | (np.abs(x + y) < 0.25)).astype(np.float32)


@cache
def _print_masks(size: int) -> np.ndarray:
    x, y = _grid(size)
    return np.stack([_print_mask(kind, x, y) for kind in range(len(FACTORS["print"].levels))])


def _rgb_from_hue(hue: np.ndarray, saturation: float, value: float) -> np.ndarray:
    """HSV -> RGB, (B,) hues in [0, 1] -> (B, 3) float32."""
    channel = np.abs((hue[:, None] * 6 + np.array([0, 4, 2], np.float32)) % 6 - 3) - 1
    return (value * (1 - saturation + saturation * np.clip(channel, 0, 1))).astype(np.float32)


def render_photos(factors: dict[str, np.ndarray], heights: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Photos (B, S, S, 3) of the surfaces under one directional light.

    The surfaces are slightly convex, so that the shading shows the direction of the light for every texture.
    """
    x, y = _grid(size)
    count = len(heights)
    relief = heights * (0.3 * size / CYCLES[factors["coarseness"]])[:, None, None] - 0.32 * size * (x * x + y * y)[None] / 2
    dx, dy = _slopes(relief)
    azimuth = np.radians(72.0 * factors["light"] + 6 * rng.uniform(-1, 1, count)).astype(np.float32)
    lx, ly, lz = np.cos(azimuth)[:, None, None] * 0.75, np.sin(azimuth)[:, None, None] * 0.75, np.float32(0.66)
    shade = np.clip((-dx * lx - dy * ly + lz) / np.sqrt(dx * dx + dy * dy + 1), 0, None)
    hue = factors["hue"] / len(FACTORS["hue"].levels) + rng.uniform(-0.03, 0.03, count)
    albedo = _rgb_from_hue(hue.astype(np.float32), 0.55, 0.95)
    ink = 1 - 0.55 * _print_masks(size)[factors["print"]]
    shade *= 0.45 + 0.55 * heights  # less light reaches the grooves
    image = (0.12 + 1.1 * shade * ink)[..., None] * albedo[:, None, None, :]
    image += 0.015 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 1)


def _contact_distance(kind: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) to the outline of the contact area of a shape."""
    match FACTORS["shape"].levels[kind]:
        case "disc":
            return np.hypot(x, y) - 0.58
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.52
        case "triangle":
            return np.maximum(np.abs(x) * 0.866 - y * 0.5, y) - 0.38
        case "bar":
            return np.maximum(np.abs(x) - 0.36, np.abs(y) - 0.8)
        case _:
            return np.minimum(np.maximum(np.abs(x) - 0.24, np.abs(y) - 0.74), np.maximum(np.abs(x) - 0.74, np.abs(y) - 0.24))


@cache
def _press_masks(size: int) -> np.ndarray:
    """Contact masks (shapes, positions, S, S) float32: 1 inside the contact area, smoothly falling to 0 at its edge."""
    x, y = _grid(size)
    offset = 0.34
    centres = [(0, 0), (-offset, 0), (offset, 0), (0, -offset), (0, offset)]
    return np.stack(
        [
            np.stack([_smoothstep(0.5 - _contact_distance(kind, x - cx, y - cy) / 0.2) for cx, cy in centres])
            for kind in range(len(FACTORS["shape"].levels))
        ]
    ).astype(np.float32)


@cache
def _gel(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The calibration of the sensor: (bins, bins, 18) table, (S, S, 6) position basis, (S, S, 3) background in [0, 1].

    For each bin of slope magnitude and direction Taxim fits a quadratic function of the pixel position per colour channel.
    Its file has the red and blue tables swapped, which is corrected here. Only the central 480 x 480 pixels are used.
    background: the image without contact.
    """
    from scipy import ndimage
    from taxim import CALIB_GELSIGHT

    tables = np.load(CALIB_GELSIGHT / "polycalib.npz", allow_pickle=False)
    table = np.concatenate([tables["grad_b"], tables["grad_g"], tables["grad_r"]], axis=-1).astype(np.float32) / 255
    column = np.linspace(80, 560, size, endpoint=False, dtype=np.float32)
    row = np.linspace(0, 480, size, endpoint=False, dtype=np.float32)
    x, y = np.meshgrid(column, row, indexing="xy")
    basis = np.stack([x * x, y * y, x * y, x, y, np.ones_like(x)], axis=-1)
    frame = np.load(CALIB_GELSIGHT / "dataPack.npz", allow_pickle=False)["f0"][:, 80:560, ::-1].astype(np.uint8)
    resized = Image.fromarray(np.ascontiguousarray(frame)).resize((size, size), Image.Resampling.BOX)
    background = ndimage.gaussian_filter(np.asarray(resized, np.float32) / 255, (size / 12, size / 12, 0))
    return table, basis, background


def render_touch(
    factors: dict[str, np.ndarray] | None, heights: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Touch images (B, S, S, 3) of the surfaces, heights in the sensor's frame. `factors=None`: without contact."""
    table, basis, background = _gel(size)
    if factors is None:
        image = np.repeat(background[None], len(heights), axis=0)
    else:
        depth = (DEPTHS[factors["hardness"]] * (1 + 0.03 * rng.uniform(-1, 1, len(heights))))[:, None, None]
        press = _press_masks(size)[factors["shape"], factors["position"]]
        texture = heights * (0.3 * size / CYCLES[factors["coarseness"]])[:, None, None]
        gel = press * depth * (size * 0.09 + texture)
        dx, dy = _slopes(gel.astype(np.float32))
        bins = len(table) - 1
        magnitude = np.floor(np.arctan(np.hypot(dx, dy)) / (np.pi / 2) * bins).astype(np.intp)
        direction = np.floor((np.arctan2(dx, dy) + np.pi) / (2 * np.pi) * bins).astype(np.intp)
        coefficients = table[magnitude, direction].reshape(*dx.shape, 3, 6)
        image = np.einsum("bijcf,ijf->bijc", coefficients, basis, optimize=False) + background
        image *= 1 - 0.35 * (press * (1 - heights))[..., None]  # less light reaches the grooves
    image = image + 0.01 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 1).astype(np.float32)


def render(factors: dict[str, np.ndarray], poses: Poses, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Render photos and touch images, both (B, S, S, 3) uint8, of the given factor levels. Deterministic in `seed`."""
    rng = np.random.default_rng(seed)
    seen, felt = height_maps(factors, poses, size, rng)
    photos = render_photos(factors, seen, size, rng)
    touch_images = render_touch(factors, felt, size, rng)
    return _to_uint8(photos), _to_uint8(touch_images)


def _to_uint8(images: np.ndarray) -> np.ndarray:
    return (images * 255 + 0.5).astype(np.uint8)


def _photo_canvas(photo: np.ndarray) -> tuple[np.ndarray, int]:
    """An empty photo around the surface, sized so that TVL's crop is exactly the surface, and the left edge of the crop."""
    size = photo.shape[0]
    longer = int(size / CROP_FRACTION)
    assert math.ceil(CROP_FRACTION * longer) == size
    margin = max(2, size // 16)
    canvas = np.empty((longer, size + 2 * margin, 3), np.uint8)
    canvas[:] = photo.reshape(-1, 3).mean(0).astype(np.uint8)
    return canvas, margin


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **JPEG)
    return buffer.getvalue()


@dataclass(frozen=True)
class _Chunk:
    """Consecutive samples that are rendered and written in one process."""

    root: Path
    size: int
    seed: int
    factors: dict[str, np.ndarray]
    poses: Poses
    dataset: list[str]
    vision: list[str]
    tactile: list[str]
    contact: bool = True


def _write_chunk(chunk: _Chunk) -> int:
    photos, touch_images = render(chunk.factors, chunk.poses, chunk.size, chunk.seed)
    if not chunk.contact:
        rng = np.random.default_rng(chunk.seed)
        touch_images = _to_uint8(render_touch(None, photos, chunk.size, rng))
    for i, photo in enumerate(photos):
        canvas, left = _photo_canvas(photo)
        top = 0 if chunk.dataset[i] == "hct" else (len(canvas) - len(photo)) // 2
        canvas[top : top + len(photo), left : left + len(photo)] = photo
        (chunk.root / chunk.vision[i]).write_bytes(_jpeg(canvas))
        # Stored rotated by -90 degrees, since the reader rotates touch images by 90 degrees.
        (chunk.root / chunk.tactile[i]).write_bytes(_jpeg(np.rot90(touch_images[i], -1)))
    return len(photos)


def write_world(
    out: Path | str,
    train: int,
    test: int,
    seed: int = 0,
    image_size: int = 64,
    workers: int = 2,
    quiet: bool = False,
    misregistration: float = 1.0,
) -> Path:
    """Write `train` + `test` samples to `out` in the TVL format, and one not-in-contact row per 10 training samples.

    image_size: side of the surface and of the touch image in pixels. workers: number of processes. misregistration: 0 for
    photo and touch image registered to the pixel, up to 1 for a sensor that is put down anywhere and at any angle. The files
    depend only on the sizes, the seed and the misregistration. Raises UserError if `out` is not empty, the sizes are too
    small or the misregistration is not in [0, 1]. Returns the folder.
    """
    root = Path(out)
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} is not empty; give --out a new folder or empty it first.")
    if train < 20 or test < 10 or image_size < 32:
        raise UserError(
            f"{train} training and {test} test samples of {image_size} pixels are too small; give at least 20, 10 and 32."
        )
    if not 0 <= misregistration <= 1:  # also refuses NaN
        raise UserError(f"misregistration {misregistration} is not possible; give --misregistration a number from 0 to 1.")
    not_contact = int(train * NOT_CONTACT_SHARE)
    splits = [("train", train, True), ("test", test, True), ("not_contact", not_contact, False)]
    streams = np.random.SeedSequence(seed).spawn(len(splits))
    chunks: list[_Chunk] = []
    tables: dict[str, list[dict[str, str]]] = {}
    first = 0
    for (split, count, contact), stream in zip(splits, streams, strict=True):
        factor_seed, chunk_seeds, pose_seed, caption_seed = stream.spawn(4)
        factors = sample_factors(count, np.random.default_rng(factor_seed))
        poses = sample_poses(factors, misregistration, np.random.default_rng(pose_seed))
        if misregistration < 1:
            factors["angle"] = poses.felt()
        rows = [_row(first + i, i < SSVTP_SHARE * count and contact) for i in range(count)]
        first += math.ceil(count / FRAMES_PER_TRAJECTORY) * FRAMES_PER_TRAJECTORY  # no trajectory spans two splits
        for row in rows:
            for path in (row["vision"], row["tactile"]):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
        for start, child in zip(range(0, count, 64), chunk_seeds.spawn(math.ceil(count / 64)), strict=True):
            part = slice(start, start + 64)
            chunks.append(
                _Chunk(
                    root,
                    image_size,
                    seed=int(child.generate_state(1, np.uint64)[0]),
                    factors={name: levels[part] for name, levels in factors.items()},
                    poses=poses[part],
                    dataset=[row["dataset"] for row in rows[part]],
                    vision=[row["vision"] for row in rows[part]],
                    tactile=[row["tactile"] for row in rows[part]],
                    contact=contact,
                )
            )
        texts = captions(factors, np.random.default_rng(caption_seed))
        for i, (row, (caption, named)) in enumerate(zip(rows, texts, strict=True)):
            row |= {name: FACTORS[name].levels[levels[i]] for name, levels in factors.items()}
            row |= {"caption": caption, "named": named}
        tables[split] = rows
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        with progress(train + test + not_contact, "render", "sample", quiet) as bar:
            for written in pool.map(_write_chunk, chunks):
                bar.update(written)
    _write_tables(root, tables, {"seed": seed, "image_size": image_size, "misregistration": misregistration})
    return root


def _row(number: int, ssvtp: bool) -> dict[str, str]:
    if ssvtp:
        return {
            "dataset": "ssvtp",
            "number": str(number),
            "vision": f"ssvtp/images_rgb/image_{number}_rgb.jpg",
            "tactile": f"ssvtp/images_tac/image_{number}_tac.jpg",
        }
    trajectory, frame = divmod(number, FRAMES_PER_TRAJECTORY)
    folder = f"hct/data{1 + trajectory % 2}/surface-{START_TIME + trajectory}"
    name = f"{frame}-{0.1 * frame:.6f}.jpg"
    return {"dataset": "hct", "vision": f"{folder}/vision/{name}", "tactile": f"{folder}/tactile/{name}"}


def _write_tables(root: Path, tables: dict[str, list[dict[str, str]]], options: dict[str, Any]) -> None:
    background_jpeg = _jpeg(_to_uint8(np.rot90(_gel(options["image_size"])[2], -1)))
    for split in ("train", "test"):
        ssvtp = [row for row in tables[split] if row["dataset"] == "ssvtp"]
        columns = ["url", "tactile", "caption"] if split == "train" else ["url", "caption"]
        lines = [[_below(row["vision"], 1), _below(row["tactile"], 1), row["caption"]] for row in ssvtp]
        _write_csv(root / f"ssvtp/{split}.csv", columns, [line if split == "train" else line[::2] for line in lines])
        (root / "ssvtp/text").mkdir(exist_ok=True)
        for row in ssvtp:
            (root / f"ssvtp/text/labels_{row['number']}.txt").write_text(row["caption"] + "\n", encoding="utf-8")
    (root / "ssvtp/synonyms.json").write_text(json.dumps(synonyms(), indent=1) + "\n", encoding="utf-8")
    for data in ("data1", "data2"):
        part = {split: [row for row in rows if row["vision"].startswith(f"hct/{data}/")] for split, rows in tables.items()}
        for row in (row for rows in part.values() for row in rows):
            background = root / _background(row["vision"])
            background.write_bytes(background_jpeg)
        for split in ("train", "test"):
            columns = ["url", "tactile", "tactile_background", "caption"]
            lines = [[*_hct_paths(row), row["caption"]] for row in part[split]]
            _write_csv(root / f"hct/{data}/{split}.csv", columns, lines)
        for file, split in (("contact", "train"), ("not_contact", "not_contact")):
            paths = [_hct_paths(row) for row in part[split]]
            lists = {name: [row[i] for row in paths] for i, name in enumerate(("vision", "tactile", "background"))}
            (root / f"hct/{data}/{file}.json").write_text(json.dumps(lists, indent=1) + "\n", encoding="utf-8")
    columns = [*FACTORS, "named"]
    samples = [
        [split, row["vision"], *(row[name] for name in columns)] for split in ("train", "test") for row in tables[split]
    ]
    _write_csv(root / "factors.csv", ["split", "vision", *columns], samples)
    owners = ownership(options["misregistration"])
    legend = {name: {"levels": factor.levels, "ownership": owners[name]} for name, factor in FACTORS.items()}
    metadata = {"synthetic": True, **options, "text_factors": TEXT_FACTORS, "factors": legend}
    (root / "factors.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")


def _below(path: str, levels: int) -> str:
    """The path without its first folders: _below("a/b/c.jpg", 1) is "b/c.jpg"."""
    return path.split("/", levels)[levels]


def _background(vision: str) -> str:
    return vision.rsplit("/", 2)[0] + "/tactile_bg_latent.jpg"


def _hct_paths(row: dict[str, str]) -> tuple[str, str, str]:
    return _below(row["vision"], 2), _below(row["tactile"], 2), _below(_background(row["vision"]), 2)


def _write_csv(path: Path, columns: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
