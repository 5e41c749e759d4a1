"""A stream of samples becomes a store; a run that is trained on it embeds the same pictures as the same vectors."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tvl_align.data.samples import Samples, TextOptions
from tvl_align.data.text import Sentence
from tvl_align.data.transforms import picture_tensor
from tvl_align.data.tvl import Row, Tolerance
from tvl_align.encoders.own import load_encoders
from tvl_align.encoders.tvl import Stage1, Stage1Config, load_stage1
from tvl_align.evaluation.labels import read_labels
from tvl_align.features import stream
from tvl_align.features.inputs import DataConfig
from tvl_align.features.store import FeatureStore
from tvl_align.features.stream import encode_stream, plain_images
from tvl_align.inference.registers import load
from tvl_align.methods.base import BASE, Stage2Config
from tvl_align.system.console import UserError
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings

ROWS = 40
WORDS = ("soft", "hard, cold", "rough")


@pytest.fixture(scope="module")
def stage1(stage1_checkpoint: Path) -> Stage1:
    return load_stage1(stage1_checkpoint)


def array(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array(seed)).save(file, "PNG")
    return file.getvalue()


def sample(i: int, **other: Any) -> dict[str, Any]:
    return {
        "name": f"s{i}",
        "vision": array(i),
        "tactile": array(1000 + i),
        "text": WORDS[i % 3],
        "group": f"g{i // 2}",
        "labels": {"kind": i % 3, "force": None if i == 1 else i / 8},
    } | other


def samples(count: int = ROWS) -> list[dict[str, Any]]:
    return [sample(i) for i in range(count)]


def place(store: FeatureStore, name: str) -> tuple[Any, int]:
    for split in store.splits.values():
        if name in list(split.names):
            return split, list(split.names).index(name)
    raise KeyError(name)


@pytest.fixture(scope="module")
def store(stage1: Stage1, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Of samples of every kind of picture, in batches of 16."""
    folder = tmp_path_factory.mktemp("stream")
    Image.fromarray(array(3)).save(folder / "photo.png")
    rows = samples()
    rows[3]["vision"], rows[4]["vision"], rows[5]["vision"] = folder / "photo.png", Image.fromarray(array(4)), png(5)
    rows[6] |= {"vision": None, "text": Sentence("A grey thing.")}
    rows[7]["text"] = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BATCH", 16)
        return encode_stream(iter(rows), stage1, folder / "store", quiet=True)


def test_features_are_those_of_the_encoders(stage1: Stage1, store: FeatureStore) -> None:
    assert list(store.specs) == ["vision", "tactile", "text"] and store.specs == stage1.specs
    assert sum(len(split) for split in store.splits.values()) == ROWS
    for i in (0, 3, 4, 5, 17, 39):
        split, row = place(store, f"s{i}")
        features = split.read(torch.tensor([row])).modalities
        images = plain_images(stage1)
        tensors = {m: picture_tensor(array(i + n), m, images)[None] for m, n in (("vision", 0), ("tactile", 1000))}
        sentences = {"soft": "soft.", "hard, cold": "hard and cold.", "rough": "rough."}
        text = stage1.tokenize([f"This image gives tactile feelings of {sentences[WORDS[i % 3]]}"])
        expected = stage1.encode({**tensors, "text": text}).modalities
        for m, tokens in features.items():
            length = int(expected[m].mask.sum())
            assert int(tokens.mask.sum()) == length
            assert torch.allclose(tokens.tokens[0, :length].float(), expected[m].tokens[0, :length], atol=2e-2)
            assert torch.allclose(tokens.pooled, expected[m].pooled, atol=1e-4)


def test_what_a_sample_lacks_is_absent(stage1: Stage1, store: FeatureStore) -> None:
    def has(i: int) -> dict[str, bool]:
        split, row = place(store, f"s{i}")
        return {m: bool(t.present[0]) for m, t in split.read(torch.tensor([row])).modalities.items()}

    assert has(5) == {"vision": True, "tactile": True, "text": True}
    assert has(6) == {"vision": False, "tactile": True, "text": True}
    assert has(7) == {"vision": True, "tactile": True, "text": False}
    split, row = place(store, "s6")
    expected = stage1.encode({"text": stage1.tokenize(["A grey thing."])}).modalities["text"]
    assert torch.allclose(split.read(torch.tensor([row])).modalities["text"].pooled, expected.pooled, atol=1e-4)


def test_groups_captions_and_labels(store: FeatureStore) -> None:
    sides: dict[int, set[str]] = {}
    captions: dict[int, set[int]] = {}
    for name, split in store.splits.items():
        assert split.views == 0
        keys = split.read(torch.arange(len(split))).caption_keys[:, 0]
        for row, key in zip(split.names, keys.tolist(), strict=True):
            i = int(row[1:])
            sides.setdefault(i // 2, set()).add(name)
            captions.setdefault(i % 3 if i not in (6, 7) else -i, set()).add(key)
    assert all(len(s) == 1 for s in sides.values())
    train = store.splits["train"]
    keys = {n: k for n, k in zip(train.names, train.read(torch.arange(len(train))).caption_keys[:, 0].tolist(), strict=True)}
    of_word = [{k for n, k in keys.items() if int(n[1:]) % 3 == w and n not in ("s6", "s7")} for w in range(3)]
    assert [len(k) for k in of_word] == [1, 1, 1] and len(set.union(*of_word)) == 3
    labels = read_labels(store.folder / "labels.csv")
    assert labels.levels["kind"] == ["0", "1", "2"]
    lines = dict(line.split(",", 1) for line in (store.folder / "labels.csv").read_text().splitlines())
    assert lines["s1"] == "1," and lines["s5"] == "2,0.625"
    assert json.loads((store.folder / "labels.json").read_text())["factors"]["force"]["kind"] == "number"


def test_given_splits_are_kept(stage1: Stage1, tmp_path: Path) -> None:
    names = ["training", "validation", "test", "train"]
    rows = [sample(i, group=None, split=names[i]) for i in range(4)]
    store = encode_stream(rows, stage1, tmp_path / "store", quiet=True)
    assert {n: list(s.names) for n, s in store.splits.items()} == {"train": ["s0", "s3"], "val": ["s1"], "test": ["s2"]}


def test_samples_are_read_as_they_are_needed(stage1: Stage1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few batches are in memory, however long the stream."""
    monkeypatch.setattr(stream, "BATCH", 2)
    encoded, ahead, encode = [0], [], stream.encode_batch

    def counted(batch: Any, *rest: Any) -> Any:
        encoded[0] += len(batch)
        return encode(batch, *rest)

    def endless() -> Iterator[dict[str, Any]]:
        for i in range(60):
            ahead.append(i - encoded[0])
            yield sample(i)

    monkeypatch.setattr(stream, "encode_batch", counted)
    encode_stream(endless(), stage1, tmp_path / "store", quiet=True)
    assert encoded[0] == 60 and max(ahead) <= 2 * 8


def test_two_modalities_are_those_of_their_encoders(stage1_checkpoint: Path, tmp_path: Path) -> None:
    """A run on the store with --active_modality_names loads encoders of this fingerprint."""
    names = ("vision", "tactile")
    store = encode_stream(samples(6), load_stage1(stage1_checkpoint, modalities=names), tmp_path / "store", quiet=True)
    expected = load_encoders(Stage1Config(stage1_checkpoint), names).fingerprint()
    assert tuple(store.specs) == names and store.manifest["ingredients"]["encoders"] == expected


def test_bad_pictures_are_absent_and_counted(stage1: Stage1, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = samples()
    rows[3]["vision"], rows[9]["tactile"], rows[20]["vision"] = b"no picture", tmp_path / "none.png", {"bytes": png(20)}
    rows[12] = {"name": "s12", "vision": array(1)}
    with caplog.at_level(logging.WARNING):
        store = encode_stream(rows, stage1, tmp_path / "store", tolerance=Tolerance(max_skipped=0.1), quiet=True)
    reasons = (
        *("sample: fewer than two modalities", "vision: not an image"),
        *("tactile: the file is missing", "vision: a dict, not a picture"),
    )
    said = caplog.text
    assert "4 of 40 samples are bad, by reason" in said and all(
        f"{reason}': 1" in said.replace('"', "'") for reason in reasons
    )
    assert sum(len(split) for split in store.splits.values()) == 39
    split, row = place(store, "s3")
    assert not split.read(torch.tensor([row])).modalities["vision"].present[0]
    for total in (None, 40):
        with pytest.raises(UserError, match=r"[34] of 40 rows are bad, more than 5%.*raise --max_skipped"):
            encode_stream(rows, stage1, tmp_path / "strict", total=total, quiet=True)
    with pytest.raises(UserError, match="of s(3|9|12|20): .*, and --strict allows no bad row"):
        encode_stream(rows, stage1, tmp_path / "strict", tolerance=Tolerance(strict=True), quiet=True)
    assert not any((tmp_path / "strict").iterdir())


def test_views_are_those_of_rows_of_a_table(stage1: Stage1, tmp_path: Path) -> None:
    """The same pictures in files give the same views; validation rows have none."""
    rows = [sample(i, split="train" if i < 6 else "val", vision=png(i), tactile=png(1000 + i)) for i in range(8)]
    rows[2]["tactile"] = None
    store = encode_stream(rows, stage1, tmp_path / "store", views=2, seed=5, quiet=True)
    assert (store.splits["train"].views, store.splits["val"].views) == (2, 0)
    assert store.manifest["ingredients"]["views"] == 2 and store.manifest["ingredients"]["seed"] == 5
    for i in range(8):
        (tmp_path / f"s{i}").write_bytes(png(i))
        (tmp_path / f"t{i}").write_bytes(png(1000 + i))
    table = [Row("pairs", f"s{i}", None if i == 2 else f"t{i}", None, None, "g") for i in range(6)]
    expected = Samples(tmp_path, table, plain_images(stage1), TextOptions(), seed=5)
    train = store.splits["train"]
    for view in range(3):
        found = train.read(torch.arange(6), torch.full((6,), view)).modalities
        assert found["tactile"].present.tolist() == [i != 2 for i in range(6)]
        for i, name in enumerate(train.names):
            for m, image in expected[int(name[1:]), view].images.items():
                encoded = stage1.encode({m: image[None]}).modalities[m]
                assert torch.allclose(found[m].tokens[i].float(), encoded.tokens[0], atol=2e-2)
                assert torch.allclose(found[m].pooled[i], encoded.pooled[0], atol=1e-4)
    first, second = (train.read(torch.arange(6), torch.full((6,), v)).modalities["vision"].pooled for v in (0, 1))
    assert (first - second).abs().amax(1).min() > 1e-3
    again = encode_stream(rows, stage1, tmp_path / "again", views=2, seed=6, quiet=True)
    assert again.key != store.key


def test_colours_measured_on_training_samples(stage1: Stage1) -> None:
    """Half of the training pictures have 51 (0.2), half 153 (0.6); others, and pictures that are bad, do not count."""
    shades = [51, 153, 51, 153, 255]
    rows = [
        {"name": f"s{i}", "vision": np.full((16, 16, 3), shade, np.uint8), "split": "train" if i < 4 else "test"}
        for i, shade in enumerate(shades)
    ]
    rows.insert(1, {"name": "bad", "vision": b"none", "split": "train"})
    images = stream.measured_colours(iter(rows), plain_images(stage1), ["vision"])
    assert (images.photo_mean, images.photo_std) == ((0.4,) * 3, (0.2,) * 3)
    assert images.touch_mean == plain_images(stage1).touch_mean
    with pytest.raises(UserError, match=r"and s0 has no split; name the key of the splits, or the colours"):
        stream.measured_colours([sample(0)], plain_images(stage1), ["vision"])
    with pytest.raises(UserError, match="no training sample has a picture of tactile; name its colours"):
        stream.measured_colours(rows, plain_images(stage1), ["tactile"])


WRONG = {
    "there are no samples": [],
    "sample 0 has no name": [{"vision": array(0)}],
    "the name 's0' is given twice": [sample(0), sample(0)],
    "has the split 'extra'; give train, val or test": [sample(0, split="extra")],
    "some samples have a split and some have none": [sample(0, split="train"), sample(1)],
    "s1 has the label colour, which the first sample lacks": [sample(0), sample(1, labels={"colour": 1})],
    "the label force is a number and then not": [sample(0), sample(1, labels={"force": "strong"})],
    "the text of s0 is 3": [sample(0, text=3)],
    "no sample has tactile": [sample(i, tactile=None) for i in range(4)],
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_stream_is_one_sentence_and_no_store(message: str, stage1: Stage1, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        encode_stream(WRONG[message], stage1, tmp_path / "store", quiet=True)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.*")) and not (tmp_path / "store/manifest.json").exists()


def test_other_options_are_another_store(stage1: Stage1, tmp_path: Path) -> None:
    """Also where the features are equal: the store says what a new picture needs."""
    rows = [sample(i, text=None) | {"text": Sentence("same")} for i in range(4)]
    one, other = (encode_stream(rows, stage1, tmp_path / prompt, prompt=prompt, quiet=True) for prompt in ("a ", "b "))
    assert one.key != other.key
    assert one.manifest["ingredients"]["text"]["prompt"] == "a "
    with pytest.raises(UserError, match="is a feature store already; give a new folder"):
        encode_stream(rows, stage1, tmp_path / "a ", quiet=True)


def test_a_run_on_the_store_embeds_new_pictures(store: FeatureStore, stage1_checkpoint: Path, tmp_path: Path) -> None:
    data = DataConfig(store=store.folder, num_workers=0, probe_rows=0)
    knobs, optim = Stage2Config(register_token_dim=32, num_heads=4), OptimConfig(batch_size=8, epochs=1, warmup_epochs=0)
    fit(Settings(Stage1Config(), knobs, data, optim, RunConfig(tmp_path, "run", device="cpu")), BASE)
    registers = load(tmp_path / "run", stage1_checkpoint=stage1_checkpoint, device="cpu")
    train = registers.open_store().splits["train"]
    rows = [int(name[1:]) for name in train.names if name not in ("s6", "s7")]
    at = [list(train.names).index(f"s{i}") for i in rows]
    expected = registers.embed_split(train).pooled
    out = registers.embed([array(i) for i in rows], [array(1000 + i) for i in rows], [WORDS[i % 3] for i in rows])
    for m in ("vision", "tactile", "text"):
        assert (out.pooled[m] - expected[m][at]).abs().max() < 1e-3, m
    assert (out.pooled["vision"][0] - out.pooled["vision"][1]).abs().max() > 1e-3
    with pytest.raises(UserError, match="was trained with"):
        load(tmp_path / "run", stage1=load_stage1(stage1_checkpoint, features="pooled")).embed(text="soft")
