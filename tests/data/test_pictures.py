"""Image files -> pixels: bits, sizes, crops and turns."""

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tvl_align.data.image_options import ImageOptions
from tvl_align.data.pictures import BadImage, crop_photo, framed_photo, framed_touch, inspect_images, open_picture
from tvl_align.data.transforms import ImageLoader
from tvl_align.data.tvl import Row, TVLData


def row(dataset: str = "hct", folder: str = "data1") -> Row:
    name = f"{dataset}/{folder}/cup-1/vision/0.jpg"
    return Row(dataset, name, name.replace("vision", "tactile"), None, "soft", "g")


def coordinates(height: int, width: int) -> np.ndarray:
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([y, x, np.zeros_like(x)], axis=-1)


def test_crops_are_those_of_tvl() -> None:
    image = coordinates(1000, 600)
    side = 255  # ceil(sqrt(2) * 0.18 * 1000)
    for sample, top in ((row("ssvtp"), (1000 - side) // 2), (row(), 0), (row(folder="data3"), 200)):
        crop = crop_photo(image, sample)
        assert crop.shape == (side, side, 3)
        assert tuple(crop[0, 0, :2]) == (top, (600 - side) // 2)


def test_the_data3_crop_depends_on_the_subfolder_only() -> None:
    """A trajectory or file named data3 has no effect."""
    name = "hct/data1/data3-cup-1/vision/data3.jpg"
    assert int(crop_photo(coordinates(1000, 600), Row("hct", name, name, None, "x", "g"))[0, 0, 0]) == 0


def test_jittered_crop_moves_by_at_most_a_twentieth() -> None:
    tops = {int(crop_photo(coordinates(1000, 600), row(), random.Random(s))[0, 0, 0]) for s in range(60)}
    assert len(tops) > 5
    assert min(tops) >= 0
    assert max(tops) <= 0.05 * 255


def test_a_crop_that_leaves_the_photo_is_refused() -> None:
    """Nothing black is added: a photo of data3 needs 200 rows above the crop, and no photo may be narrower than its crop."""
    assert crop_photo(coordinates(363, 640), row(folder="data3")).shape == (163, 163, 3)
    for image, sample in (
        (coordinates(362, 640), row(folder="data3")),
        (coordinates(128, 128), row(folder="data3")),
        (coordinates(1000, 200), row()),
        (coordinates(200, 1000), row("ssvtp")),
    ):
        with pytest.raises(BadImage, match="is not inside of the photo; give photos of the original size"):
            crop_photo(image, sample)
    assert all(crop_photo(coordinates(1000, 255) + 1, row(), random.Random(s))[..., :2].min() >= 1 for s in range(20))


def grey_files(folder: Path, values: list[np.ndarray], name: str = "png") -> TVLData:
    rows = []
    for i, pixels in enumerate(values):
        for kind in ("vision", "tactile"):
            path = folder / f"hct/data1/press-{i}/{kind}/0.{name}"
            path.parent.mkdir(parents=True)
            Image.fromarray(pixels.astype(np.uint16)).save(path)
        names = [f"hct/data1/press-{i}/{kind}/0.{name}" for kind in ("vision", "tactile")]
        rows.append(Row("hct", *names, None, "soft", str(i)))
    return TVLData(folder, rows, [], [])


def test_16_bit_files_of_12_bits_keep_256_levels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The number of bits follows from all files, so that a dark one stays dark; a later file beyond it is not used."""
    ramp, dark = np.arange(4096).reshape(64, 64), np.full((64, 64), 160)
    data = grey_files(tmp_path, [dark, ramp, dark])
    options = inspect_images(ImageOptions(64, 64), data)
    assert (options.photo_bits, options.touch_bits) == (12, 12)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"16-bit grey {what} of {tmp_path} hold values up to 4,095; read as 12 bits" for what in ("photos", "touch images")
    ]
    levels = [open_picture(tmp_path / str(r.tactile), options.touch_bits) for r in data.train]
    assert np.unique(levels[1]).tolist() == list(range(256))
    assert np.unique(levels[0]).tolist() == [10]
    assert np.unique(open_picture(tmp_path / str(data.train[1].tactile))).tolist() == list(range(16))  # as 16 bits
    Image.fromarray(ramp.astype(np.uint16) + 1).save(tmp_path / str(data.train[2].vision))
    _, faults = ImageLoader(tmp_path, options)(data.train[2])
    assert faults == {"vision": "grey values outside of 0 to 4,095, the range of 12 bits"}


def test_16_bit_files_that_use_all_bits_are_read_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = np.arange(4096).reshape(64, 64) * 16
    data = grey_files(tmp_path, [full // 64, full])
    assert inspect_images(ImageOptions(), data) == ImageOptions()
    assert not caplog.records
    assert np.array_equal(open_picture(tmp_path / str(data.train[1].vision))[..., 0], full >> 8)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colours_of_12_bits_are_refused_and_those_of_16_are_read(channels: int, tmp_path: Path) -> None:
    """Pillow keeps the upper 8 bits of 16-bit colours, in which 12-bit values have 16 levels."""
    values = np.random.default_rng(0).integers(0, 4096, (64, 64, channels))
    for name, shift in (("12", 0), ("16", 4)):
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values << shift)
        header = struct.pack(">IIBBBBB", 64, 64, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    colours = values[..., :3] if channels > 2 else values[..., :1]
    assert np.array_equal(open_picture(tmp_path / "16.png"), np.broadcast_to(colours >> 4, (64, 64, 3)))
    with pytest.raises(BadImage, match="16-bit colours of which 8 bits hold values up to 15 only; save it as 8-bit colours"):
        open_picture(tmp_path / "12.png")


def with_significant_bits(path: Path, bits: int) -> None:
    content, chunk = path.read_bytes(), b"sBIT" + bytes([bits])
    start = 8 + 25  # signature and IHDR
    path.write_bytes(content[:start] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[start:])


def test_what_a_file_says_of_its_bits_is_believed(tmp_path: Path) -> None:
    ramp = np.arange(4096).reshape(64, 64)
    data = grey_files(tmp_path, [ramp, ramp * 16 + ramp // 256, ramp[:8] * 16])  # plain, scaled as the standard says, dark
    for sample in data.train:
        with_significant_bits(tmp_path / str(sample.vision), 12)
    plain, scaled, dark = (open_picture(tmp_path / str(sample.vision))[..., 0] for sample in data.train)
    assert plain.flatten().tolist() == scaled.flatten().tolist() == (ramp // 16).flatten().tolist()
    assert np.array_equal(dark, scaled[:8])
    said = inspect_images(ImageOptions(), TVLData(tmp_path, data.train[:1], [], []))
    assert (said.photo_bits, said.touch_bits) == (16, 12)  # the photo says its bits itself, the touch image does not
    tiff = tmp_path / "12.tif"
    packed = np.array([[v >> 4 & 255, (v & 15) << 4 | w >> 8, w & 255] for v, w in ramp.reshape(-1, 2)], np.uint8).tobytes()
    tags = [(256, 4, 64), (257, 4, 64), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, 64)]
    tags += [(279, 4, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    tiff.write_bytes(head + packed + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert open_picture(tiff)[..., 0].flatten().tolist() == (ramp // 16).flatten().tolist()


def test_a_resized_data3_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "hct/data3/cup/tactile/0.png"
    path.parent.mkdir(parents=True)
    data = TVLData(tmp_path, [Row("hct", None, "hct/data3/cup/tactile/0.png", None, "soft", "g")], [], [])
    for size in ((240, 320), (320, 240), (64, 64)):
        Image.new("RGB", size).save(path)
        inspect_images(ImageOptions(), data)
    (record,) = caplog.records
    assert "touch images of hct/data3" in record.getMessage() and "have 64 x 64 pixels, not 240 x 320" in record.getMessage()


def test_touch_images_are_padded_to_a_square_and_rotated() -> None:
    rotated = framed_touch(coordinates(320, 240) + 1, ImageOptions())
    assert rotated.shape == (320, 320, 3)
    assert not rotated[:40].any()
    assert not rotated[-40:].any()
    assert int(rotated[40, 0, 1]) == 240  # the top right corner moves to the top left
    assert int(rotated[40, 0, 0]) == 1


def test_crops_and_turns_that_are_asked_for() -> None:
    image = coordinates(1000, 600)
    sample = row()

    def corners(photo_crop: str = "tvl", **options: object) -> tuple[tuple[int, ...], list[int], list[int]]:
        made = ImageOptions(photo_crop=photo_crop, **options)
        photo, touch = framed_photo(image, made, sample), framed_touch(image, made)
        return photo.shape[:2], photo[0, 0, :2].tolist(), touch[0, 0, :2].tolist()

    assert corners("centre", touch_crop="centre", touch_turn=0) == ((600, 600), [200, 0], [200, 0])
    assert corners("none", touch_crop="none", touch_turn=0) == ((1000, 600), [0, 0], [0, 0])
    assert corners(touch_crop="none") == ((255, 255), [0, 172], [0, 599])  # counterclockwise: the right side is on top
    assert corners(touch_crop="none", touch_turn=180)[2] == [999, 599]
    assert corners(touch_crop="none", touch_turn=270)[2] == [999, 0]


def test_pairs_of_ones_own_have_no_data3(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With TVL's crop the square in the centre is kept, whatever the folders are called."""
    name = "shots/data3/0.png"
    sample = Row("pairs", name, name, None, None, "g")
    assert crop_photo(coordinates(1000, 600), sample)[0, 0, :2].tolist() == [(1000 - 255) // 2, (600 - 255) // 2]
    (tmp_path / "shots/data3").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / name)
    assert inspect_images(ImageOptions(), TVLData(tmp_path, [sample], [], [])) == ImageOptions()
    assert not caplog.records
