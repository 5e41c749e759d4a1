"""Image files -> tensors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from tvl_align.data.image_options import TOUCH_MEAN, TOUCH_STD, ImageOptions
from tvl_align.data.pictures import BadImage, Touch, open_picture
from tvl_align.data.transforms import Geometry, ImageLoader, picture_tensor
from tvl_align.data.tvl import Row, read_tvl
from tvl_align.system.console import UserError


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


def test_augmentation_leaves_the_seed_of_a_gpu_alone(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread may load images while the main thread has seeded a training step."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(0)
    assert seeds == [0]  # this is how a GPU would be seeded
    ImageLoader(world, ImageOptions(64, 64))(read_tvl(world).train[0], 1)
    assert seeds == [0]


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
    assert not picture_tensor(Touch(grey, background=grey), "tactile", difference).any()


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
                channels_last = torch.tensor(open_picture(world / name))
                pixels = channels_last.permute(2, 0, 1)
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
    with pytest.raises(UserError, match=r"give Touch\(image, background=...\) of .*, or --touch_background"):
        picture_tensor(image, "tactile", ImageOptions(subtract_background=True))
