"""Image files -> tensors."""

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from tvl_align.data.transforms import (
    TOUCH_MEAN,
    TOUCH_STD,
    BadImage,
    Geometry,
    ImageLoader,
    ImageOptions,
    _framed_photo,
    _framed_touch,
    _open,
    crop_photo,
    inspect_images,
    picture_tensor,
)
from tvl_align.data.tvl import Row, TVLData, read_tvl
from tvl_align.system.console import UserError


def row(dataset: str = "hct", folder: str = "data1") -> Row:
    name = f"{dataset}/{folder}/cup-1/vision/0.jpg"
    return Row(dataset, name, name.replace("vision", "tactile"), None, "soft", "g")


def coordinates(height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y, x, torch.zeros_like(x)])


def test_crops_are_those_of_tvl() -> None:
    image = coordinates(1000, 600)
    side = 255  # ceil(sqrt(2) * 0.18 * 1000)
    for sample, top in ((row("ssvtp"), (1000 - side) // 2), (row(), 0), (row(folder="data3"), 200)):
        crop = crop_photo(image, sample)
        assert crop.shape == (3, side, side)
        assert (int(crop[0, 0, 0]), int(crop[1, 0, 0])) == (top, (600 - side) // 2)


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
    assert crop_photo(coordinates(363, 640), row(folder="data3")).shape == (3, 163, 163)
    for image, sample in (
        (coordinates(362, 640), row(folder="data3")),
        (coordinates(128, 128), row(folder="data3")),
        (coordinates(1000, 200), row()),
        (coordinates(200, 1000), row("ssvtp")),
    ):
        with pytest.raises(BadImage, match="is not inside of the photo; give photos of the original size"):
            crop_photo(image, sample)
    assert all(crop_photo(coordinates(1000, 255) + 1, row(), random.Random(s))[:2].min() >= 1 for s in range(20))


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
    levels = [_open(tmp_path / str(r.tactile), options.touch_bits) for r in data.train]
    assert levels[1].unique().tolist() == list(range(256))
    assert levels[0].unique().tolist() == [10]
    assert _open(tmp_path / str(data.train[1].tactile)).unique().tolist() == list(range(16))  # as 16 bits
    Image.fromarray(ramp.astype(np.uint16) + 1).save(tmp_path / str(data.train[2].vision))
    _, faults = ImageLoader(tmp_path, options)(data.train[2])
    assert faults == {"vision": "grey values outside of 0 to 4,095, the range of 12 bits"}


def test_16_bit_files_that_use_all_bits_are_read_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = np.arange(4096).reshape(64, 64) * 16
    data = grey_files(tmp_path, [full // 64, full])
    assert inspect_images(ImageOptions(), data) == ImageOptions()
    assert not caplog.records
    assert torch.equal(_open(tmp_path / str(data.train[1].vision))[0].long(), torch.from_numpy(full >> 8))


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
    colours = torch.from_numpy(values[..., :3] if channels > 2 else values[..., :1]).permute(2, 0, 1)
    assert torch.equal(_open(tmp_path / "16.png").long(), (colours >> 4).expand(3, -1, -1))
    with pytest.raises(BadImage, match="16-bit colours of which 8 bits hold values up to 15 only; save it as 8-bit colours"):
        _open(tmp_path / "12.png")


def with_significant_bits(path: Path, bits: int) -> None:
    content, chunk = path.read_bytes(), b"sBIT" + bytes([bits])
    start = 8 + 25  # signature and IHDR
    path.write_bytes(content[:start] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[start:])


def test_what_a_file_says_of_its_bits_is_believed(tmp_path: Path) -> None:
    ramp = np.arange(4096).reshape(64, 64)
    data = grey_files(tmp_path, [ramp, ramp * 16 + ramp // 256, ramp[:8] * 16])  # plain, scaled as the standard says, dark
    for sample in data.train:
        with_significant_bits(tmp_path / str(sample.vision), 12)
    plain, scaled, dark = (_open(tmp_path / str(sample.vision))[0] for sample in data.train)
    assert plain.flatten().tolist() == scaled.flatten().tolist() == (ramp // 16).flatten().tolist()
    assert torch.equal(dark, scaled[:8])
    said = inspect_images(ImageOptions(), TVLData(tmp_path, data.train[:1], [], []))
    assert (said.photo_bits, said.touch_bits) == (16, 12)  # the photo says its bits itself, the touch image does not
    tiff = tmp_path / "12.tif"
    packed = np.array([[v >> 4 & 255, (v & 15) << 4 | w >> 8, w & 255] for v, w in ramp.reshape(-1, 2)], np.uint8).tobytes()
    tags = [(256, 4, 64), (257, 4, 64), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, 64)]
    tags += [(279, 4, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    tiff.write_bytes(head + packed + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert _open(tiff)[0].flatten().tolist() == (ramp // 16).flatten().tolist()


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
    rotated = _framed_touch(coordinates(320, 240) + 1, ImageOptions())
    assert rotated.shape == (3, 320, 320)
    assert not rotated[:, :40].any()
    assert not rotated[:, -40:].any()
    assert int(rotated[1, 40, 0]) == 240  # the top right corner moves to the top left
    assert int(rotated[0, 40, 0]) == 1


def test_plain_views_are_exact_and_augmented_views_depend_on_the_seed_only(world: Path) -> None:
    """Validation and test use the plain view."""
    rows = read_tvl(world).train
    load = ImageLoader(world, ImageOptions(64, 64))
    with Image.open(world / rows[0].tactile) as file:
        touch = torch.rot90(F.pil_to_tensor(file.convert("RGB")), 1, (-2, -1)).float() / 255
    mean, std = torch.tensor(TOUCH_MEAN)[:, None, None], torch.tensor(TOUCH_STD)[:, None, None]
    assert torch.allclose(load(rows[0])[0]["tactile"], (touch - mean) / std, atol=1e-5)
    state = torch.get_rng_state()
    one, same, other = (load(rows[0], seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for modality in ("vision", "tactile"):
        assert torch.equal(one[modality], same[modality])
        assert not torch.equal(one[modality], other[modality])


def test_photo_and_touch_share_their_geometry(world: Path) -> None:
    """The geometry that best matches the plain image is the same for both images; with independent sampling it is not."""
    sample = read_tvl(world).train[0]
    plain, _ = ImageLoader(world, ImageOptions(64, 64))(sample)

    def found(shared: bool, seed: int) -> list[int]:
        views, _ = ImageLoader(world, ImageOptions(64, 64, shared_geometry=shared))(sample, seed)
        best = []
        for modality in ("vision", "tactile"):
            candidates = [Geometry(*(bool(g >> i & 1) for i in range(3)))(plain[modality]) for g in range(8)]
            views_mean = views[modality].mean(0)
            errors = [torch.corrcoef(torch.stack([views_mean.flatten(), c.mean(0).flatten()]))[0, 1] for c in candidates]
            best.append(int(torch.stack(errors).argmax()))
        return best

    pairs = [found(True, seed) for seed in range(12)]
    assert all(photo == touch for photo, touch in pairs)
    assert len({photo for photo, _ in pairs}) > 3
    assert any(photo != touch for photo, touch in (found(False, seed) for seed in range(12)))


def test_background_subtraction_removes_an_image_without_contact(world: Path) -> None:
    data = read_tvl(world, use_not_contact=True)
    not_contact = next(r for r in data.train if not r.contact)
    pressed = next(r for r in data.train if r.contact and r.dataset == "hct")
    load = ImageLoader(world, ImageOptions(64, 64, subtract_background=True))
    assert load(not_contact)[0]["tactile"].std() < 0.5 * load(pressed)[0]["tactile"].std()
    without_background = next(r for r in data.train if r.dataset == "ssvtp")
    with pytest.raises(UserError, match="has no background image"):
        load(without_background)


def test_a_modality_that_the_row_lacks_is_not_loaded(world: Path) -> None:
    sample = read_tvl(world).train[0]
    photo_only = Row("hct", sample.vision, None, None, "soft", "g")
    assert set(ImageLoader(world, ImageOptions(64, 64))(photo_only)[0]) == {"vision"}


def test_crops_and_turns_that_are_asked_for() -> None:
    image = coordinates(1000, 600)
    sample = row()

    def corners(photo_crop: str = "tvl", **options: object) -> tuple[tuple[int, ...], list[int], list[int]]:
        made = ImageOptions(photo_crop=photo_crop, **options)
        photo, touch = _framed_photo(image, made, sample), _framed_touch(image, made)
        return tuple(photo.shape[1:]), photo[:2, 0, 0].tolist(), touch[:2, 0, 0].tolist()

    assert corners("centre", touch_crop="centre", touch_turn=0) == ((600, 600), [200, 0], [200, 0])
    assert corners("none", touch_crop="none", touch_turn=0) == ((1000, 600), [0, 0], [0, 0])
    assert corners(touch_crop="none") == ((255, 255), [0, 172], [0, 599])  # counterclockwise: the right side is on top
    assert corners(touch_crop="none", touch_turn=180)[2] == [999, 599]
    assert corners(touch_crop="none", touch_turn=270)[2] == [999, 0]


def test_pictures_are_normalised_by_the_given_numbers() -> None:
    grey = np.full((16, 24, 3), 51, np.uint8)  # 0.2
    numbers = {"photo_mean": [0.1, 0.2, 0.3], "touch_mean": (0, 0, 0), "touch_std": (0.1, 0.2, 0.4)}
    options = ImageOptions(8, 8, photo_crop="none", touch_crop="none", photo_std=(0.5, 0.5, 0.5), **numbers)
    assert options.photo_mean == (0.1, 0.2, 0.3)
    photo, touch = (picture_tensor(grey, m, options) for m in ("vision", "tactile"))
    assert photo.shape == touch.shape == (3, 8, 8)
    assert torch.allclose(photo, torch.tensor([0.2, 0.0, -0.2])[:, None, None].expand(3, 8, 8), atol=1e-6)
    assert torch.allclose(touch, torch.tensor([2.0, 1.0, 0.5])[:, None, None].expand(3, 8, 8), atol=1e-6)
    difference = ImageOptions(8, 8, subtract_background=True, **numbers)
    assert not picture_tensor(grey, "tactile", difference, background=grey).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"photo_crop": "center"}, "photo_crop is 'center'; give one of tvl, centre, none"),
        ({"touch_turn": 45}, "touch_turn is 45; give one of 0, 90, 180, 270"),
        ({"touch_std": (1, 0, 1)}, r"touch_std is \(1, 0, 1\); give three numbers above 0"),
        ({"photo_mean": (0.5,)}, r"photo_mean is \(0.5,\); give three numbers"),
        ({"photo_crop": "none", "randomize_crop": True}, '--photo_crop is "none"; leave out one of them'),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageOptions(**options)


def test_one_picture_from_anywhere_is_what_the_loader_gives(world: Path, tmp_path: Path) -> None:
    """Bit for bit: from a path, a PIL image, arrays and tensors, with uint8 or floats."""
    for options in (
        ImageOptions(64, 32),
        ImageOptions(64, 32, photo_crop="centre", touch_crop="none", touch_turn=0, photo_mean=(0.5, 0.4, 0.3)),
    ):
        for sample in read_tvl(world).train[:6]:
            expected, _ = ImageLoader(world, options)(sample)
            for modality, name in (("vision", sample.vision), ("tactile", sample.tactile)):
                pixels = _open(world / name)
                channels_last = pixels.permute(1, 2, 0)
                with Image.open(world / name) as opened:
                    sources = [world / name, str(world / name), opened, pixels, pixels.numpy(), pixels.float() / 255]
                    sources += [channels_last.numpy(), channels_last.double().numpy() / 255]
                    for source in sources:
                        assert torch.equal(picture_tensor(source, modality, options, sample), expected[modality])
                assert torch.equal(picture_tensor(pixels, modality, options, dataset=sample.dataset), expected[modality])
    path = tmp_path / "hct/data3/cup/vision/0.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 400, 3), np.uint8)).save(path)
    sample = Row("hct", "hct/data3/cup/vision/0.png", None, None, None, "g")
    expected = ImageLoader(tmp_path, ImageOptions(32))(sample)[0]["vision"]
    assert torch.equal(picture_tensor(path, "vision", ImageOptions(32), dataset="hct/data3"), expected)
    assert not torch.equal(picture_tensor(path, "vision", ImageOptions(32)), expected)


def test_a_turned_photo_is_upright_and_the_image_of_the_caller_stays(tmp_path: Path) -> None:
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    stored.save(tmp_path / "turned.png", exif=exif)
    options = ImageOptions(16, photo_crop="none")
    with Image.open(tmp_path / "turned.png") as image:
        for _ in range(2):
            turned = picture_tensor(image, "vision", options)
            assert torch.equal(turned, picture_tensor(tmp_path / "turned.png", "vision", options))
        assert image.size == (24, 16)
    assert torch.equal(turned, picture_tensor(np.rot90(np.asarray(stored), -1), "vision", options))


def test_a_grey_array_has_three_equal_channels() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    options = ImageOptions(16, photo_crop="none")
    assert torch.equal(
        picture_tensor(grey, "vision", options), picture_tensor(np.stack([grey] * 3, axis=-1), "vision", options)
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nowhere.png", "the file is missing"),
        (np.zeros((16, 16, 4), np.uint8), r"an array of shape \(16, 16, 4\), not \(H, W\), \(H, W, 3\) or \(3, H, W\)"),
        (np.zeros((4, 16, 3), np.uint8), "a side of fewer than 8 pixels"),
        (np.full((16, 16, 3), 255.0), r"floating-point values outside of \[0, 1\]"),
        (np.full((16, 16), np.nan), r"floating-point values outside of \[0, 1\]"),
        (np.zeros((16, 16, 3), np.int64), "values of type int64, not uint8 or floating point"),
        (np.full((16, 16), "x"), "an array of type <U1, not uint8"),
        (Image.new("F", (16, 16)), "floating-point grey values of unknown scale"),
        (Image.new("RGB", (16, 4)), "a side of fewer than 8 pixels"),
    ],
)
def test_one_picture_that_cannot_be_used_is_named_with_its_reason(source: object, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        picture_tensor(source, "tactile", ImageOptions())


def test_a_picture_of_no_modality_and_one_without_background_are_refused() -> None:
    image = Image.new("RGB", (16, 16))
    with pytest.raises(UserError, match="'text' has no pictures; give the modality vision or tactile"):
        picture_tensor(image, "text", ImageOptions())
    with pytest.raises(UserError, match="unknown data set 'data3': give one of ssvtp, hct, hct/data3"):
        picture_tensor(image, "vision", ImageOptions(), dataset="data3")
    with pytest.raises(UserError, match="give background"):
        picture_tensor(image, "tactile", ImageOptions(subtract_background=True))


def test_pairs_of_ones_own_have_no_data3(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With TVL's crop the square in the centre is kept, whatever the folders are called."""
    name = "shots/data3/0.png"
    sample = Row("pairs", name, name, None, None, "g")
    assert crop_photo(coordinates(1000, 600), sample)[:2, 0, 0].tolist() == [(1000 - 255) // 2, (600 - 255) // 2]
    (tmp_path / "shots/data3").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / name)
    assert inspect_images(ImageOptions(), TVLData(tmp_path, [sample], [], [])) == ImageOptions()
    assert not caplog.records
