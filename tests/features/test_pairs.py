"""Own pairs of pictures and texts: from a table to features, and the identity of their stores."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tvl_align.config import from_plain, parse, to_plain
from tvl_align.data.image_options import PHOTO_MEAN, PHOTO_STD, TOUCH_MEAN, ImageOptions
from tvl_align.data.samples import Samples, TextOptions, make_samples
from tvl_align.data.transforms import picture_tensor
from tvl_align.data.tvl import read_tvl
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features import identity, inputs
from tvl_align.features.identity import Identity, identify, image_ingredients
from tvl_align.features.inputs import DataConfig, load_inputs, load_samples
from tvl_align.system.console import UserError

CPU = torch.device("cpu")

ENCODERS: Any = SimpleNamespace(fingerprint=lambda: "the weights", features="tokens", precision="float32")


def picture(path: Path, value: int) -> None:
    """A picture whose bytes depend on no version of a package."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P6 16 12 255\n" + bytes([value, 2 * value, 3 * value] * (16 * 12)))


@pytest.fixture
def tvl(tmp_path: Path) -> Path:
    """Six rows of SSVTP, the last of the test split."""
    lines = ["url,tactile,caption"]
    for i in range(6):
        picture(tmp_path / f"tvl/ssvtp/images_rgb/image_{i}_rgb.ppm", i + 1)
        picture(tmp_path / f"tvl/ssvtp/images_tac/image_{i}_tac.ppm", i + 40)
        lines.append(f'images_rgb/image_{i}_rgb.ppm,images_tac/image_{i}_tac.ppm,"soft, word{i}"')
    (tmp_path / "tvl/ssvtp/train.csv").write_text("\n".join(lines[:-1]))
    (tmp_path / "tvl/ssvtp/test.csv").write_text("\n".join([lines[0], lines[-1]]))
    return tmp_path / "tvl"


def samples_of(folder: Path, options: ImageOptions) -> dict[str, Samples]:
    return make_samples(read_tvl(folder, ["ssvtp"]), options, TextOptions(), 0)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (ImageOptions(), "503e233e24975b9b"),
        (ImageOptions(64, 32, randomize_crop=True, touch_bits=12), "d92f040017b44b0a"),
    ],
)
def test_stores_of_existing_settings_keep_their_key(
    options: ImageOptions, key: str, tvl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "package_versions", lambda _: {"torch": "2"})
    assert identify(ENCODERS, samples_of(tvl, options), 2, tvl).key == key


def test_options_of_images_are_in_the_key_and_named_where_they_differ(tvl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "package_versions", lambda _: {"torch": "2"})
    plain, other = (
        identify(ENCODERS, samples_of(tvl, options), 2, tvl)
        for options in (ImageOptions(), ImageOptions(photo_crop="none", touch_mean=(0.5, 0.25, 0.125)))
    )
    assert plain.key != other.key
    assert other.differences(plain) == [
        ("images", "photo_crop none (it was tvl)"),
        ("images", f"touch_mean [0.5, 0.25, 0.125] (it was {TOUCH_MEAN})"),
    ]
    assert plain.differences(plain) == []
    for options in (ImageOptions(), ImageOptions(64, touch_turn=0, touch_std=(0.5, 0.25, 0.125))):
        recorded = json.loads(json.dumps(image_ingredients(options)))
        assert ImageOptions(**recorded) == from_plain(ImageOptions, recorded) == options


ROWS = 24


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows with photo, touch image, a sentence and a label; the touch images are dark."""
    folder, random = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    lines = ["photo,touch,sentence,force"]
    for i in range(ROWS):
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"p{i}.png")
        Image.fromarray(random.integers(0, 64, (30, 20, 3), np.uint8)).save(folder / f"t{i}.png")
        lines.append(f'p{i}.png,t{i}.png,"A touch, of object {i}.",{i % 3}')
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


def test_own_pairs_are_encoded_with_measured_colours(table: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    """Sentences are as they are, pictures whole, and normalised training pictures have mean 0 and standard deviation 1."""
    data = DataConfig(pairs=table, views=1, num_workers=0, shuffle_text=True, probe_rows=0)
    assert data.datasets_dir == table.parent
    made = load_inputs(Stage1Config(stage1_checkpoint), data, 0, tmp_path, CPU)
    assert {name: len(split) for name, split in made.splits.items()} == {"train": 18, "val": 3, "test": 3}
    samples = made.samples["train"]
    name = samples.rows[0].name
    assert samples.sentence(0, 0) == samples.sentence(0, 1) == f"A touch, of object {name[1:-4]}."
    options = samples.images.options
    assert (options.photo_crop, options.touch_crop, options.touch_turn) == ("none", "none", 0)
    assert (options.photo_mean, options.photo_std) == (PHOTO_MEAN, PHOTO_STD)
    assert all(m < 0.2 for m in options.touch_mean)
    touches = torch.stack([samples[i, 0].images["tactile"] for i in range(len(samples))])
    assert torch.allclose(touches.mean((0, 2, 3)), torch.zeros(3), atol=2e-3)
    assert torch.allclose(touches.std((0, 2, 3)), torch.ones(3), atol=2e-3)
    row = samples.rows[0]
    assert torch.equal(samples[0, 0].images["vision"], picture_tensor(table.parent / name, "vision", options, row))
    assert made.identity.ingredients["images"]["touch_mean"] == list(options.touch_mean)
    assert all(made.splits["train"].read(torch.arange(18)).modalities[m].present.all() for m in made.specs)


def test_a_run_measures_its_colours_once(
    table: Path, stage1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, data = Stage1Config(stage1_checkpoint), DataConfig(pairs=table, views=1, num_workers=0)
    first = load_inputs(frozen, data, 0, tmp_path, CPU)
    measured: list[str] = []
    monkeypatch.setattr(inputs, "measure_colours", lambda rows, modality, options: measured.append(modality) or 1 / 0)
    again = load_inputs(frozen, data, 0, tmp_path, CPU, first.identity)
    assert again.identity.key == first.identity.key and measured == []
    with pytest.raises(ZeroDivisionError):  # a run on TVL's colours has not measured them
        load_inputs(frozen, data, 0, tmp_path, CPU, Identity("x", {"images": image_ingredients(ImageOptions())}))
    assert measured == ["tactile"]


def test_pairs_without_a_modality_need_a_choice_of_modalities(stage1_checkpoint: Path, table: Path) -> None:
    frozen = Stage1Config(stage1_checkpoint)
    path = table.with_name("two.csv")
    path.write_text("\n".join(["photo,touch", *(f"p{i}.png,t{i}.png" for i in range(ROWS))]))
    both = r"has text; give --active_modality_names vision tactile, or name their columns with --caption_column or"
    with pytest.raises(UserError, match=rf"no training row of .*two.csv {both}"):
        load_samples(frozen, DataConfig(pairs=path), 0, CPU)
    with pytest.raises(UserError, match=r"no training row of .*two.csv has text; name their columns"):
        load_samples(frozen, DataConfig(pairs=path, active_modality_names=("vision", "text")), 0, CPU)
    stage1, samples = load_samples(frozen, DataConfig(pairs=path, active_modality_names=("vision", "tactile")), 0, CPU)
    assert set(stage1.specs) == {"vision", "tactile"} and len(samples["train"]) == 18


def test_flags_of_pictures_and_their_defaults(tmp_path: Path) -> None:
    """Without a table the options are TVL's; flags change them with and without a table."""

    def options(*flags: str) -> ImageOptions:
        return parse(DataConfig, [*flags]).image_options(224, 224)

    own = ("--pairs", str(tmp_path / "pairs.csv"))
    half = (0.5, 0.5, 0.5)
    assert options() == ImageOptions()
    assert options(*own) == ImageOptions(photo_crop="none", touch_crop="none", touch_turn=0)
    assert options(*own, "--photo_crop", "tvl", "--touch_crop", "tvl", "--touch_turn", "90") == ImageOptions()
    asked = options("--photo_crop", "centre", "--touch_turn", "0", "--photo_norm", "half", "--touch_norm", "clip")
    expected = {"photo_mean": half, "photo_std": half, "touch_mean": PHOTO_MEAN, "touch_std": PHOTO_STD}
    assert asked == ImageOptions(photo_crop="centre", touch_turn=0, **expected)
    assert parse(DataConfig, []).norms == {"vision": "clip", "tactile": "tvl"}
    assert parse(DataConfig, [*own]).norms == {"vision": "clip", "tactile": "measured"}
    data = parse(DataConfig, [*own, "--label_columns", "a", "b", "--touch_column", "t"])
    assert (data.columns.labels, data.columns.touch, data.datasets_dir) == (("a", "b"), "t", tmp_path)
    assert from_plain(DataConfig, json.loads(json.dumps(to_plain(data)))) == data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_column": "x"}, "--split_column is of a table of your own; give it with --pairs FILE"),
        ({"pairs": Path("p.csv"), "store": Path("s")}, "--store has no meaning with --pairs"),
        ({"pairs": Path("p.csv"), "use_not_contact": True}, "--use_not_contact has no meaning with --pairs"),
        ({"pairs": Path("p.csv"), "datasets": ("hct",)}, "--datasets has no meaning with --pairs"),
        ({"pairs": Path("p.csv"), "randomize_crop": True}, '--photo_crop is "none"; leave out one of them'),
    ],
)
def test_flags_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**options)


@pytest.mark.parametrize("modality", ["vision", "tactile"])
def test_measured_colours_worked_out_by_hand(modality: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half of the pictures have 51 (0.2), half 153 (0.6); the copy of a path and files that cannot be used do not count."""
    lines = ["photo,touch"]
    for i in range(40):
        for kind in "pt":
            Image.new("RGB", (16, 16), (51 + 102 * (i % 2), 51, i)).save(tmp_path / f"{kind}{i}.png")
        lines.append(f"p{i}.png,t{i}.png")
    (tmp_path / "cut.png").write_bytes(b"no image")
    (tmp_path / "pairs.csv").write_text(
        "\n".join([lines[0] + ",split", *(f"{x},train" for x in lines[1:]), "cut.png,cut.png,train"])
    )
    data = inputs.read_pairs(tmp_path / "pairs.csv", tmp_path)
    data.train += [*data.val, *data.test]
    options = ImageOptions(16, 16, photo_crop="none", touch_crop="none", photo_std=(3, 3, 3))
    mean, std = inputs.measure_colours(data, modality, options)
    assert mean[:2] == (0.4, 0.2) and std[:2] == (0.2, round(1 / 255, 4))
    blue = np.arange(40) / 255
    assert (mean[2], std[2]) == (round(blue.mean(), 4), round(blue.std(), 4))
    assert f"colours of 40 {modality} pictures in {tmp_path}: mean {mean}, standard deviation {std}" in caplog.text
    data.train = []
    assert inputs.measure_colours(data, modality, options) == options.colours(modality)
