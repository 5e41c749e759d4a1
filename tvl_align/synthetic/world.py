"""The synthetic world: a data set of photos, touch images and captions with known factors, written in the TVL format.

Each sample renders one surface, a textured height map. The photo has an albedo, a painted print and Lambertian shading. The
touch image is the surface pressed into a gel sensor, rendered with the calibration of a real GelSight sensor that maps the
slope of the gel to a colour (Taxim, Si & Yuan 2022, arXiv:2109.04027; tables of the `taxim` package).

Factors are sampled uniformly and independently. Each is visible in known modalities, its owners:

    vision + touch + text   texture, coarseness
    vision + touch          orientation
    vision                  hue, light, print
    touch                   depth, position, shape
    text                    wording

Photo and touch image also share the random phase of the texture, a nuisance variable by which samples with equal factors
differ. `factors.csv` and `factors.json` contain the factors of every sample; training does not read them.

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


FACTORS: dict[str, Factor] = {
    "texture": Factor(
        ("ridged", "wavy", "dotted", "checkered", "woven", "grainy", "cracked", "scaly"), (VISION, TACTILE, TEXT)
    ),
    "coarseness": Factor(("minute", "fine", "medium", "coarse", "bulky"), (VISION, TACTILE, TEXT)),
    "orientation": Factor(("0", "36", "72", "108", "144"), (VISION, TACTILE)),
    "hue": Factor(("red", "yellow", "green", "cyan", "blue", "magenta"), (VISION,)),
    "light": Factor(("0", "72", "144", "216", "288"), (VISION,)),
    "print": Factor(("none", "disc", "ring", "bar", "cross"), (VISION,)),
    "depth": Factor(("0.20", "0.35", "0.50", "0.75", "1.00"), (TACTILE,)),
    "position": Factor(("centre", "left", "right", "up", "down"), (TACTILE,)),
    "shape": Factor(("disc", "square", "triangle", "bar", "cross"), (TACTILE,)),
    "wording": Factor(("plain", "second", "third", "fourth", "fifth"), (TEXT,)),
}


# Five synonyms per level. The factor "wording" selects the column; column 0 has the names of the levels.
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
}
CYCLES = np.array([12.0, 9.0, 6.7, 5.0, 3.7], np.float32)  # texture periods across the image, one per coarseness
FRAMES_PER_TRAJECTORY = 4
SSVTP_SHARE = 0.1  # fraction of the samples; about 10% of TVL's rows are SSVTP
NOT_CONTACT_SHARE = 0.1  # not-in-contact rows per training row
START_TIME = 1_700_000_000  # Unix time in the name of the first trajectory
JPEG: dict[str, Any] = {"format": "JPEG", "quality": 92, "subsampling": 0}


def sample_factors(count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Sample a level, (count,) int64, for every factor, uniformly and independently."""
    return {name: rng.integers(len(factor.levels), size=count) for name, factor in FACTORS.items()}


def caption(texture: int, coarseness: int, wording: int) -> str:
    """The caption of one sample: words for its texture and coarseness, selected by its wording."""
    names = FACTORS["texture"].levels[texture], FACTORS["coarseness"].levels[coarseness]
    return ", ".join(WORDS[name][wording] for name in names)


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
            return np.clip(np.cos(tau * u) + np.cos(tau * v / 1.7), 0, 2) / 2
        case "checkered":
            return 0.5 + 0.5 * np.tanh(3 * np.sin(tau * u / 1.2) * np.sin(tau * v / 2.4))
        case "woven":
            over = np.sin(tau * u / 2) * np.sin(tau * v / 4) > 0
            return np.where(over, np.abs(np.sin(tau * u)), 0.6 * np.abs(np.sin(tau * v / 2)))
        case "grainy":
            return 0.5 + 0.5 * np.tanh(1.2 * noise)
        case "cracked":
            return 1 - np.exp(-6 * np.abs(noise))
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


def height_maps(factors: dict[str, np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """The surfaces of the samples: heights (B, S, S) float32 in [0, 1]."""
    x, y = _grid(size)
    count = len(factors["texture"])
    heights = np.empty((count, size, size), np.float32)
    phase = rng.random((count, 2), dtype=np.float32)
    jitter = rng.standard_normal((count, 2), dtype=np.float32)
    for i in range(count):
        angle = math.radians(36 * int(factors["orientation"][i]) + 4 * float(np.clip(jitter[i, 0], -2, 2)))
        cycles = float(CYCLES[factors["coarseness"][i]] * np.exp(0.03 * np.clip(jitter[i, 1], -2, 2)))
        cos, sin = math.cos(angle), math.sin(angle)
        u = (x * cos + y * sin) * np.float32(cycles / 2) + phase[i, 0]
        v = (-x * sin + y * cos) * np.float32(cycles / 2) + phase[i, 1]
        texture = int(factors["texture"][i])
        noisy = FACTORS["texture"].levels[texture] in ("grainy", "cracked")
        noise = _anisotropic_noise(cos, sin, cycles, size, rng) if noisy else x
        heights[i] = _textures(u, v, noise, texture)
    return heights


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
    image = (0.12 + 0.95 * shade * ink)[..., None] * albedo[:, None, None, :]
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
    """Touch images (B, S, S, 3) of the surfaces, pixel-aligned with the photos. `factors=None`: images without contact."""
    table, basis, background = _gel(size)
    if factors is None:
        image = np.repeat(background[None], len(heights), axis=0)
    else:
        levels = np.array([float(level) for level in FACTORS["depth"].levels], np.float32)
        depth = (levels[factors["depth"]] * (1 + 0.03 * rng.uniform(-1, 1, len(heights))))[:, None, None]
        press = _press_masks(size)[factors["shape"], factors["position"]]
        texture = heights * (0.3 * size / CYCLES[factors["coarseness"]])[:, None, None]
        gel = press * depth * (size * 0.09 + texture)
        dx, dy = _slopes(gel.astype(np.float32))
        bins = len(table) - 1
        magnitude = np.floor(np.arctan(np.hypot(dx, dy)) / (np.pi / 2) * bins).astype(np.intp)
        direction = np.floor((np.arctan2(dx, dy) + np.pi) / (2 * np.pi) * bins).astype(np.intp)
        coefficients = table[magnitude, direction].reshape(*dx.shape, 3, 6)
        image = np.einsum("bijcf,ijf->bijc", coefficients, basis, optimize=False) + background
    image = image + 0.01 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 1).astype(np.float32)


def render(factors: dict[str, np.ndarray], size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Render photos and touch images, both (B, S, S, 3) uint8, of the given factor levels. Deterministic in `seed`."""
    rng = np.random.default_rng(seed)
    heights = height_maps(factors, size, rng)
    photos = render_photos(factors, heights, size, rng)
    touch_images = render_touch(factors, heights, size, rng)
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
    dataset: list[str]
    vision: list[str]
    tactile: list[str]
    contact: bool = True


def _write_chunk(chunk: _Chunk) -> int:
    photos, touch_images = render(chunk.factors, chunk.size, chunk.seed)
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
    out: Path | str, train: int, test: int, seed: int = 0, image_size: int = 64, workers: int = 2, quiet: bool = False
) -> Path:
    """Write `train` + `test` samples to `out` in the TVL format, and one not-in-contact row per 10 training samples.

    image_size: side of the surface and of the touch image in pixels. workers: number of processes. The files depend only on
    the sizes and the seed. Raises UserError if `out` is not empty or the sizes are too small. Returns the folder.
    """
    root = Path(out)
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} is not empty; give --out a new folder or empty it first.")
    if train < 20 or test < 10 or image_size < 32:
        raise UserError(
            f"{train} training and {test} test samples of {image_size} pixels are too small; give at least 20, 10 and 32."
        )
    not_contact = int(train * NOT_CONTACT_SHARE)
    splits = [("train", train, True), ("test", test, True), ("not_contact", not_contact, False)]
    streams = np.random.SeedSequence(seed).spawn(len(splits))
    chunks: list[_Chunk] = []
    tables: dict[str, list[dict[str, str]]] = {}
    first = 0
    for (split, count, contact), stream in zip(splits, streams, strict=True):
        factor_seed, chunk_seeds = stream.spawn(2)
        factors = sample_factors(count, np.random.default_rng(factor_seed))
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
                    dataset=[row["dataset"] for row in rows[part]],
                    vision=[row["vision"] for row in rows[part]],
                    tactile=[row["tactile"] for row in rows[part]],
                    contact=contact,
                )
            )
        for i, row in enumerate(rows):
            row |= {name: FACTORS[name].levels[levels[i]] for name, levels in factors.items()}
            row["caption"] = caption(*(int(factors[name][i]) for name in ("texture", "coarseness", "wording")))
        tables[split] = rows
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        with progress(train + test + not_contact, "render", "sample", quiet) as bar:
            for written in pool.map(_write_chunk, chunks):
                bar.update(written)
    _write_tables(root, tables, image_size, seed)
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


def _write_tables(root: Path, tables: dict[str, list[dict[str, str]]], size: int, seed: int) -> None:
    background_jpeg = _jpeg(_to_uint8(np.rot90(_gel(size)[2], -1)))
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
    samples = [
        [split, row["vision"], *(row[name] for name in FACTORS)] for split in ("train", "test") for row in tables[split]
    ]
    _write_csv(root / "factors.csv", ["split", "vision", *FACTORS], samples)
    legend = {name: {"levels": factor.levels, "ownership": factor.ownership} for name, factor in FACTORS.items()}
    metadata = {"synthetic": True, "seed": seed, "image_size": size, "factors": legend}
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
