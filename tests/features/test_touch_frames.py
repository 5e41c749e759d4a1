"""Two touch frames and a background, from a table, a TVL folder or a stream to the encoder, in training and afterwards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sparsh_files import sparsh_weights
from torch import Tensor

import tvl_align
from tvl_align.cli.embed import run as embed
from tvl_align.cli.encode import run as encode
from tvl_align.data.pictures import Touch
from tvl_align.data.transforms import picture_tensor
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features.identity import identify
from tvl_align.features.inputs import DataConfig, load_samples
from tvl_align.features.store import FeatureStore
from tvl_align.methods.mlp import MLP, MLPConfig
from tvl_align.system.console import UserError
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings

ROWS = 24
ACTIVE = ("vision", "tactile")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Stage1Config:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict(), folder / "vit.pth")
    torch.save({"model": sparsh_weights("teacher_encoder.backbone.")}, folder / "sparsh.ckpt")
    vision = f"timm:vit_tiny_patch16_224:{folder / 'vit.pth'}"
    return Stage1Config(vision_encoder=vision, tactile_encoder=f"sparsh:{folder / 'sparsh.ckpt'}")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Photos, touch images, earlier frames (none of row 1) and backgrounds of two sensors."""
    draw, lines = np.random.default_rng(0), ["photo,touch,before,still,split"]
    for i in range(ROWS):
        for kind in ("photo", "touch", "before", "still"):
            pixels = draw.integers(0, 256, (40, 30, 3), dtype=np.uint8)
            if kind == "still" and i > 1:
                continue
            Image.fromarray(pixels).save(tmp_path / f"{kind}{i}.png")
        before = "" if i == 1 else f"before{i}.png"
        lines.append(f"photo{i}.png,touch{i}.png,{before},still{i % 2}.png,{('train', 'train', 'val', 'test')[i % 4]}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.csv"


def data(table: Path, **options: Any) -> DataConfig:
    given: dict[str, Any] = {"active_modality_names": ACTIVE, "views": 1, "num_workers": 0, "probe_rows": 0}
    given |= {"subtract_background": "background", "touch_background_column": "still", "earlier_touch_column": "before"}
    return DataConfig(pairs=table, **(given | options))


def touch_of(table: Path, encoders: Stage1Config, row: int = 0, **options: Any) -> Tensor:
    """The touch input of the row of touch<row>.png."""
    _, samples = load_samples(encoders, data(table, **options), 0, torch.device("cpu"))
    for split in samples.values():
        for i, one in enumerate(split.rows):
            if one.tactile == f"touch{row}.png":
                return split[i, 0].images["tactile"]
    raise AssertionError(row)


def pixels(folder: Path, name: str) -> Tensor:
    return torch.from_numpy(np.array(Image.open(folder / f"{name}.png"))).permute(2, 0, 1).float() / 255


def resized(picture: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(picture[None], (224, 224), mode="bilinear", antialias=True)[0]


def test_the_input_is_the_present_frame_and_the_earlier_one_without_the_background(
    table: Path, encoders: Stage1Config, caplog: pytest.LogCaptureFixture
) -> None:
    """Differences in [-1, 1] are shifted by a half; row 1 has no earlier frame, so the present one stands for it."""
    folder, found = table.parent, touch_of(table, encoders, 0)
    assert found.shape == (6, 224, 224)
    for i, name in enumerate(("touch0", "before0")):
        expected = resized(pixels(folder, name) - pixels(folder, "still0")) + 0.5
        assert torch.allclose(found[3 * i : 3 * i + 3], expected, atol=1e-5)
    alone = touch_of(table, encoders, 1)
    assert torch.equal(alone[:3], alone[3:]) and not torch.equal(found[:3], found[3:])
    told = [r.getMessage() for r in caplog.records if "earlier" in r.getMessage()]
    assert set(told) == {f"1 of {ROWS} touch images have no earlier frame: the present one stands for it"}


def test_without_earlier_frames_and_background_the_frame_is_given_twice_as_it_is(
    table: Path, encoders: Stage1Config, caplog: pytest.LogCaptureFixture
) -> None:
    plain = {"subtract_background": "none", "touch_background_column": None, "earlier_touch_column": None}
    found = touch_of(table, encoders, 0, **plain)
    assert torch.allclose(found, resized(pixels(table.parent, "touch0")).repeat(2, 1, 1), atol=1e-5)
    assert f"{ROWS} of {ROWS} touch images have no earlier frame" in caplog.text


def test_views_give_both_frames_the_same_geometry_and_colours(table: Path, encoders: Stage1Config) -> None:
    _, samples = load_samples(encoders, data(table, subtract_background="none"), 0, torch.device("cpu"))
    split = samples["train"]
    twice = next(i for i, row in enumerate(split.rows) if row.earlier is None)
    for view in (1, 2, 3):
        touch = split[twice, view].images["tactile"]
        assert torch.allclose(touch[:3], touch[3:], atol=1e-6) and not torch.equal(touch, split[twice, 0].images["tactile"])


def test_both_frames_and_the_background_are_in_the_key_of_the_store(
    table: Path, encoders: Stage1Config, tmp_path: Path
) -> None:
    def key(**options: Any) -> str | None:
        stage1, samples = load_samples(encoders, data(table, **options), 0, torch.device("cpu"))
        return identify(stage1, samples, 1, tmp_path / "hashes").key

    first, one_frame, as_they_are = key(), key(earlier_touch_column=None), key(subtract_background="none")
    assert len({first, one_frame, as_they_are}) == 3
    for name in ("before5.png", "still1.png"):
        content = (table.parent / name).read_bytes()
        Image.new("RGB", (30, 40)).save(table.parent / name)
        assert key() != first
        (table.parent / name).write_bytes(content)
    assert key() == first


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"subtract_background": None}, "give --subtract_background background or none"),
        ({"earlier_touch_column": "nothing"}, "has no column 'nothing'"),
        ({"earlier_touch_column": "still"}, "the column 'still' of .* is used twice"),
    ],
)
def test_what_is_missing_is_said(options: dict[str, Any], error: str, table: Path, encoders: Stage1Config) -> None:
    with pytest.raises(UserError, match=error):
        load_samples(encoders, data(table, **options), 0, torch.device("cpu"))


def test_other_encoders_take_one_frame(table: Path, encoders: Stage1Config) -> None:
    other = Stage1Config(vision_encoder=encoders.vision_encoder, tactile_encoder=encoders.vision_encoder)
    with pytest.raises(UserError, match="--earlier_touch_column is for touch encoders of two frames, and this one"):
        load_samples(other, data(table), 0, torch.device("cpu"))
    with pytest.raises(UserError, match="--touch_background_column is for --subtract_background background; give it too"):
        load_samples(other, data(table, earlier_touch_column=None, subtract_background=None), 0, torch.device("cpu"))
    _, samples = load_samples(other, data(table, earlier_touch_column=None), 0, torch.device("cpu"))
    assert samples["train"][0, 0].images["tactile"].shape == (3, 32, 32)


def test_rows_whose_earlier_frame_is_missing_or_outside_are_dropped(table: Path, encoders: Stage1Config) -> None:
    (table.parent / "before4.png").unlink()
    text = table.read_text().replace("before8.png", "../before8.png")
    table.write_text(text)
    with pytest.raises(UserError, match="2 of 24 rows are bad"):
        load_samples(encoders, data(table), 0, torch.device("cpu"))
    _, samples = load_samples(encoders, data(table, max_skipped=0.1), 0, torch.device("cpu"))
    assert samples["train"].dropped == {
        "earlier touch file is missing": 1,
        "earlier touch path is outside the data folder": 1,
    }


@pytest.mark.slow
def test_a_run_embeds_touch_as_it_was_trained(table: Path, encoders: Stage1Config, tmp_path: Path) -> None:
    fit(
        Settings(
            encoders,
            MLPConfig(register_token_dim=32, hidden=8),
            data(table),
            OptimConfig(batch_size=4, epochs=1, warmup_epochs=0, lr=1e-3),
            RunConfig(tmp_path / "out", "run", device="cpu", method="mlp"),
        ),
        MLP,
    )
    folder = table.parent
    images = json.loads((tmp_path / "out/run/config.json").read_text())["features"]["images"]
    assert (images["touch_frames"], images["earlier_touch"], images["subtract_background"]) == (2, True, True)
    registers = tvl_align.load(tmp_path / "out/run", device="cpu")
    split = registers.open_store().splits["test"]
    stored = registers.embed_split(split).pooled["tactile"][list(split.names).index("photo3.png")]
    given = Touch(folder / "touch3.png", folder / "before3.png", folder / "still1.png")
    assert torch.allclose(registers.embed(tactile=given).pooled["tactile"][0], stored, atol=1e-4)
    once = registers.embed(tactile=[Touch(folder / "touch3.png", background=folder / "still1.png")]).pooled["tactile"][0]
    other = registers.embed(tactile=[Touch(given.image, given.earlier, folder / "still0.png")]).pooled["tactile"][0]
    assert (once - stored).abs().max() > 1e-4 and (other - stored).abs().max() > 1e-4
    with pytest.raises(UserError, match=r"needs it; give Touch\(image, background=...\) .* or --touch_background"):
        registers.embed(tactile=[folder / "touch3.png"])
    flags = [str(tmp_path / "out/run"), "--tactile", str(folder / "touch3.png"), "--out", str(tmp_path / "t.npz")]
    embed([*flags, "--touch_background", str(folder / "still1.png"), "--device", "cpu"])
    with np.load(tmp_path / "t.npz") as written:
        assert np.allclose(written["tactile.pooled"][0], once.numpy(), atol=1e-5)
    with pytest.raises(UserError, match="there is no picture nowhere.png; give --touch_background"):
        embed([*flags, "--touch_background", "nowhere.png", "--device", "cpu"])
    config = json.loads((tmp_path / "out/run/config.json").read_text())
    config["features"]["images"]["subtract_background"] = False
    (tmp_path / "out/run/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="subtracts no background .*; leave out --touch_background"):
        embed([*flags, "--touch_background", str(folder / "still1.png"), "--device", "cpu"])


STREAM = "--vision_key photo --tactile_key touch --split_key split --device cpu"


def test_a_stream_has_the_features_of_the_table(table: Path, encoders: Stage1Config, tmp_path: Path) -> None:
    names = f"--vision_encoder {encoders.vision_encoder} --tactile_encoder {encoders.tactile_encoder}"
    flags = ["--source", f"pairs:{table}", *f"{STREAM} {names}".split()]
    with pytest.raises(UserError, match="give --subtract_background background or none"):
        encode([*flags, "--out", str(tmp_path / "a")])
    with pytest.raises(UserError, match="needs touch images without contact; give --touch_background_key"):
        encode([*flags, "--out", str(tmp_path / "b"), "--subtract_background", "background"])
    beside = ["--earlier_touch_key", "before", "--touch_background_key", "still", "--subtract_background", "background"]
    encode([*flags, *beside, "--out", str(tmp_path / "c")])
    store = FeatureStore(tmp_path / "c")
    images = store.manifest["ingredients"]["images"]
    assert (images["touch_frames"], images["earlier_touch"]) == (2, True)
    stage1, samples = load_samples(encoders, data(table), 0, torch.device("cpu"))
    row = next(i for i, r in enumerate(samples["test"].rows) if r.tactile == "touch7.png")
    expected = stage1.encode({"tactile": samples["test"][row, 0].images["tactile"][None]}).modalities["tactile"]
    split = store.splits["test"]
    found = split.read(torch.tensor([list(split.names).index("pairs/7")])).modalities["tactile"]
    assert torch.allclose(found.pooled, expected.pooled, atol=1e-5)


def test_the_background_of_a_tvl_folder_is_subtracted(world: Path, encoders: Stage1Config) -> None:
    given = DataConfig(world, ("hct",), active_modality_names=ACTIVE, num_workers=0, subtract_background="background")
    _, samples = load_samples(encoders, given, 0, torch.device("cpu"))
    split = samples["train"]
    row, touch = split.rows[0], split[0, 0].images["tactile"]
    assert row.background is not None
    alone = Touch(world / str(row.tactile), background=world / row.background)
    assert torch.equal(picture_tensor(alone, "tactile", split.images.options), touch)
    assert touch.shape == (6, 224, 224) and torch.equal(touch[:3], touch[3:])
    assert touch.mean() == pytest.approx(0.5, abs=0.1)  # little differs from the background
