"""Further modalities (depth, force ...), from files that a table lists to features: they take part as vision does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import own_encoders
import pytest
import torch
from PIL import Image

from tvl_align.config import from_plain, parse, to_plain
from tvl_align.data.transforms import picture_tensor
from tvl_align.data.tvl import Row
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features.inputs import DataConfig, Inputs, load_inputs
from tvl_align.features.store import FeatureStore
from tvl_align.system.console import UserError

CPU = torch.device("cpu")
ROWS = 24
ENCODERS = Stage1Config(
    vision_encoder="own_encoders:Colours",
    text_encoder="own_encoders:Letters",
    more_encoders=("depth=own_encoders:Colours", "force=own_encoders:Curves"),
)
NAMES = ("vision", "text", "depth", "force")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """24 rows with a photo, a sentence, a depth picture of 16 bits that hold 12, and a force curve."""
    folder, draw = tmp_path / "mine", np.random.default_rng(0)
    folder.mkdir()
    lines = ["photo,sentence,z,newton,split"]
    for i in range(ROWS):
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"p{i}.png")
        Image.fromarray(draw.integers(0, 2**12, (20, 30), np.uint16)).save(folder / f"z{i}.png")
        np.save(folder / f"f{i}.npy", draw.normal(size=12))
        split = "train" if i < 18 else "val" if i < 21 else "test"
        lines.append(f"p{i}.png,Object {i}.,z{i}.png,f{i}.npy,{split}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


def options(table: Path, **changes: Any) -> DataConfig:
    given: dict[str, Any] = {"views": 2, "num_workers": 0, "probe_rows": 0, "active_modality_names": NAMES}
    return DataConfig(**{"pairs": table, "more_columns": ("depth=z", "force=newton")} | given | changes)


def opened(table: Path, encoders: Stage1Config = ENCODERS, **changes: Any) -> Inputs:
    return load_inputs(encoders, options(table, **changes), 0, table.parent.parent / "features", CPU)


def test_files_are_encoded_once_and_are_the_same_in_all_views(table: Path) -> None:
    made = opened(table)
    train, samples = made.splits["train"], made.samples["train"]
    assert tuple(made.specs) == NAMES and {m: s.tokens for m, s in made.specs.items()}["force"] == 3
    assert {m: len(t["mask"]) for m, t in train.tables.items()} == {"vision": 54, "text": 18, "depth": 18, "force": 18}
    rows = torch.arange(18)
    views = [train.read(rows, torch.full_like(rows, v)).modalities for v in range(3)]
    assert all(torch.equal(views[v][m].tokens, views[0][m].tokens) for m in ("depth", "force") for v in (1, 2))
    assert not torch.equal(views[1]["vision"].tokens, views[0]["vision"].tokens)
    folder, names = table.parent, [row.more["force"] for row in samples.rows]
    assert samples.rows[0].more == {"depth": "z0.png", "force": "f0.npy"} and samples.rows[0].name == "p0.png"
    curves = torch.from_numpy(np.stack([np.load(folder / name) for name in names])).float()
    assert torch.allclose(views[0]["force"].tokens.float().flatten(1), curves, atol=2e-3)
    grey = np.asarray(Image.open(folder / "z0.png")).astype(np.int64) >> 4  # 12 of 16 bits
    options = replace(samples.images.options, photo_mean=(0.5,) * 3, photo_std=(0.25,) * 3)
    depth = picture_tensor(grey.astype(np.uint8), "vision", options)
    assert torch.equal(samples[0, 0].images["depth"], depth)
    assert made.identity.ingredients["images"]["more_bits"] == {"depth": 12}


def test_features_on_the_fly_are_those_of_the_store(table: Path) -> None:
    (table.parent / "f1.npy").unlink()
    stored, live = (opened(table, views=views, max_skipped=0.1) for views in (1, 0))
    rows = torch.arange(len(stored.splits["train"]))
    for view in (0, 1):
        expected = stored.splits["train"].read(rows, torch.full_like(rows, view)).modalities
        (found,) = live.splits["train"].batches([rows], [torch.full_like(rows, view)], CPU)
        for m in ("depth", "force"):
            assert torch.equal(found.modalities[m].present, expected[m].present)
            assert torch.allclose(found.modalities[m].tokens, expected[m].tokens.float(), atol=2e-3)
    assert stored.specs == live.specs


def test_an_interrupted_encode_goes_on(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photos that are done are not encoded again, and the store is that of an encode at once."""
    with monkeypatch.context() as patch:
        patch.setattr(own_encoders.Curves, "encode", stops_after_two_batches(own_encoders.Curves.encode))
        with pytest.raises(KeyboardInterrupt):
            opened(table)
    loaded: list[int] = []
    transform = own_encoders.Curves.transform
    monkeypatch.setattr(own_encoders.Curves, "transform", lambda self, x: loaded.append(1) or transform(self, x))
    made = opened(table)
    assert 0 < len(loaded) < ROWS
    again = load_inputs(ENCODERS, options(table), 0, table.parent / "other", CPU)
    rows = torch.arange(18)
    for m, tokens in again.splits["train"].read(rows, rows % 3).modalities.items():
        assert torch.equal(made.splits["train"].read(rows, rows % 3).modalities[m].tokens, tokens.tokens)


def stops_after_two_batches(encode: Any) -> Any:
    calls = [0]

    def stopping(self: Any, curves: torch.Tensor) -> Any:
        calls[0] += 1
        if calls[0] > 4:  # the check of the encoder, the shapes, and two batches
            raise KeyboardInterrupt
        return encode(self, curves)

    return stopping


def test_a_file_that_cannot_be_read_is_absent_and_counted(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = table.parent
    (folder / "z0.png").write_bytes(b"no picture")
    (folder / "f1.npy").write_bytes(b"no curve")
    np.save(folder / "f2.npy", np.zeros(13))
    np.save(folder / "f3.npy", np.full(12, np.nan))
    made = opened(table, max_skipped=0.3)
    skipped = FeatureStore(table.parent.parent / "features" / str(made.identity.key)).manifest["skipped"]["train"]
    found = {(s["row"], s["modality"]): s["reason"] for s in skipped}
    assert found.keys() == {("p0.png", "depth"), ("p1.png", "force"), ("p2.png", "force"), ("p3.png", "force")}
    assert found["p0.png", "depth"] == "not an image"
    assert found["p1.png", "force"].startswith("ValueError: ") and "f1.npy" not in found["p1.png", "force"]
    assert found["p2.png", "force"] == "its transform gives torch.float32 (13,), not floats (12,)"
    assert found["p3.png", "force"] == "its transform gives numbers that are not finite"
    assert "files that cannot be used, by reason" in caplog.text
    names, index = list(made.splits["train"].names), made.splits["train"].index
    for modality, bad in (("depth", {"p0.png"}), ("force", {"p1.png", "p2.png", "p3.png"})):
        absent = index[modality] < 0
        assert {names[i] for i in absent.all(1).nonzero()} == {names[i] for i in absent.any(1).nonzero()} == bad
    with pytest.raises(UserError, match=r"1 of 18 rows are bad, .* \(for example: depth of p0.png: not an image\)"):
        opened(table, views=1)


def test_rows_that_lack_a_file_and_rows_of_one_modality(table: Path) -> None:
    """A cell for no value is an absent modality; a missing file makes the row bad, as it does for photos."""
    text = table.read_text().replace("z5.png", "n/a").replace("p6.png,Object 6.,z6.png", ",,").replace("f7.npy", "gone.npy")
    table.write_text(text)
    made = opened(table, max_skipped=0.2)
    names = list(made.splits["train"].names)
    assert "p7.png" not in names and len(names) == 16
    assert made.samples["train"].dropped == {"fewer than two modalities": 1, "force file is missing": 1}
    present = made.splits["train"].read(torch.arange(16)).modalities["depth"].present
    assert [n for n, p in zip(names, present.tolist(), strict=True) if not p] == ["p5.png"]


def test_copies_of_a_file_are_positives_and_one_group(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    (table.parent / "f1.npy").write_bytes((table.parent / "f0.npy").read_bytes())
    made = opened(table)
    keys = made.splits["train"].content_keys
    assert list(keys) == ["force"] and keys["force"][0] == keys["force"][1]
    assert len(keys["force"].unique()) == 17
    groups = made.splits["train"].groups
    assert groups[0] == groups[1] and len(groups.unique()) == 17
    assert "train: 1 rows repeat the force of another row" in caplog.text


def test_pictures_of_one_colour_are_named(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(ROWS):
        Image.new("L", (20, 20), 3 * i).save(table.parent / f"z{i}.png")
    opened(table)
    assert "all 24 pictures of depth are of one colour each; nothing can be learned from them" in caplog.text


def test_the_key_depends_on_files_and_encoders_and_not_on_the_order_of_flags(table: Path) -> None:
    def key(encoders: Stage1Config = ENCODERS, **changes: Any) -> str | None:
        return opened(table, encoders, views=0, **changes).identity.key

    first, data = key(), options(table, views=0)
    swapped = replace(data, more_columns=("force=newton", "depth=z"))
    assert load_inputs(ENCODERS, swapped, 0, table.parent, CPU).identity.key == first
    other = ("depth=own_encoders:Colours", "force=own_encoders:OtherCurves")
    assert key(replace(ENCODERS, more_encoders=other)) != first
    np.save(table.parent / "f3.npy", np.zeros(12))
    assert key() != first


def test_rows_without_further_modalities_are_written_as_before() -> None:
    """Keys of existing stores hash this text."""
    row = Row("pairs", "p.png", None, None, "soft", "g")
    text = "Row(dataset='pairs', vision='p.png', tactile=None, background=None, caption='soft', group='g', contact=True"
    assert repr(row) == f"{text})"
    assert repr(replace(row, more={"depth": "z.png"})) == f"{text}, more={{'depth': 'z.png'}})"
    assert hash(row) == hash(replace(row)) and len({row, replace(row, more={"depth": "z.png"})}) == 2


def test_modalities_follow_from_the_columns_unless_they_are_named(table: Path) -> None:
    flags = ["--pairs", str(table), "--more_columns", "depth=z", "force=newton"]
    data = parse(DataConfig, flags)
    assert data.active_modality_names == ("vision", "tactile", "text", "depth", "force")
    assert data.columns.more == {"depth": "z", "force": "newton"}
    assert from_plain(DataConfig, json.loads(json.dumps(to_plain(data)))) == data
    assert parse(DataConfig, [*flags, "--active_modality_names", "force", "depth"]).active_modality_names == (
        "force",
        "depth",
    )
    with pytest.raises(UserError, match=r"has tactile; give --active_modality_names vision text depth force"):
        load_inputs(ENCODERS, replace(data, active_modality_names=(*NAMES[:1], "tactile", *NAMES[1:])), 0, table.parent, CPU)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"more_columns": ("depth",)}, "--more_columns 'depth' names no modality and value; give NAME=VALUE"),
        ({"more_columns": ("vision=z",)}, "vision has a flag of its own"),
        ({"more_columns": ("a-b=z",)}, "modality 'a-b' is not a valid name"),
        ({"more_columns": ("keys=z",)}, "modality 'keys' has a reserved name"),
        ({"more_columns": ("quiet=z",)}, "modality 'quiet' has a reserved name"),
        ({"more_columns": ("depth=z", "depth=y")}, "--more_columns has depth twice"),
        ({"active_modality_names": ("vision", "sound")}, "modality 'sound' is not supported: .* --more_columns sound=C"),
        ({"more_columns": ("a=z", "a_b=z", "b_c=z", "c=z")}, "would both be named a_b_c; rename a modality"),
        ({"pairs": None}, "--more_columns is of a table of your own"),
    ],
)
def test_names_are_checked(table: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        DataConfig(**{"pairs": table, "more_columns": ("depth=z",)} | given)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_modality_without_an_encoder_is_refused(table: Path) -> None:
    with pytest.raises(UserError, match=r"force has no encoder; give --more_encoders force=timm:NAME or force=package"):
        opened(table, replace(ENCODERS, more_encoders=ENCODERS.more_encoders[:1]))
    assert not (table.parent.parent / "features").exists()
