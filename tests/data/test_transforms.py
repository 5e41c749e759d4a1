"""Image files -> tensors."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from tvl_align.data.transforms import TOUCH_MEAN, TOUCH_STD, Geometry, ImageLoader, ImageOptions, crop_photo, pad_and_rotate
from tvl_align.data.tvl import Row, read_tvl
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


def test_touch_images_are_padded_to_a_square_and_rotated() -> None:
    rotated = pad_and_rotate(coordinates(320, 240) + 1)
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
