"""Two annotators' captions of the same pictures: the copies of a picture are positives of each other."""

import csv
import logging
import shutil
from pathlib import Path

import pytest
import torch

from tvl_align.contract import Features
from tvl_align.data.image_options import ImageOptions
from tvl_align.data.samples import Samples, TextOptions, make_samples
from tvl_align.data.tvl import read_tvl
from tvl_align.encoders.tvl import Stage1, load_stage1
from tvl_align.evaluation.measure import Meanings
from tvl_align.features.encode import open_or_encode
from tvl_align.features.live import LiveSplit
from tvl_align.features.store import FeatureSource, FeatureStore
from tvl_align.metrics.retrieval import Retrieval, retrieval

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two_captions(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world with every row of every table a second time, with one more adjective in the caption."""
    root = tmp_path_factory.mktemp("twice") / "data"
    shutil.copytree(world, root)
    for path in (p for p in root.rglob("*.csv") if p.name != "factors.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows, *([*row[:-1], "firm, " + row[-1]] for row in rows)])
    return root


@pytest.fixture(scope="module")
def stage1(stage1_checkpoint: Path) -> Stage1:
    return load_stage1(stage1_checkpoint)


def samples_of(root: Path) -> dict[str, Samples]:
    return make_samples(read_tvl(root), ImageOptions(64, 64), TextOptions(), 0)


def features_of(source: FeatureSource) -> Features:
    rows = torch.arange(len(source))
    return next(source.batches([rows], [torch.zeros_like(rows)], CPU))


def stage1_retrieval(source: FeatureSource, pair: tuple[str, str]) -> Retrieval:
    """Retrieval of the frozen pooled features, with the positives of the evaluation."""
    features = features_of(source)
    keys = Meanings(None, list(source.names), features.caption_keys, source.content_keys).of(*pair)
    x, y = (features.modalities[m].pooled for m in pair)
    return retrieval(x, y, torch.ones(len(x), dtype=torch.bool), keys)


def test_a_second_caption_of_every_picture_changes_no_accuracy(
    world: Path, two_captions: Path, stage1: Stage1, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Acc@1 is that of the world with one caption a picture, and not 0. The log and the manifest count the copies."""
    once = open_or_encode(tmp_path, stage1, samples_of(world), 1, 0)
    assert all(split.content_keys == {} for split in once.splits.values())
    assert once.manifest["splits"]["test"]["repeated"] == {}
    with caplog.at_level(logging.WARNING):
        samples = samples_of(two_captions)
        twice = open_or_encode(tmp_path, stage1, samples, 1, 0)
    count = len(once.splits["test"])
    assert len(twice.splits["test"]) == 2 * count
    assert f"test: {count} rows repeat the tactile of another row" in caplog.text
    assert twice.manifest["splits"]["test"]["repeated"] == {"vision": count, "tactile": count}
    pair = ("tactile", "vision")
    one, two = (stage1_retrieval(store.splits["test"], pair) for store in (once, twice))
    assert one.acc1 > 0
    assert (two.acc1, two.chance1) == pytest.approx((one.acc1, one.chance1))
    live = LiveSplit(stage1, samples["test"], 0, train=False)
    assert stage1_retrieval(live, pair).acc1 == pytest.approx(one.acc1)


def test_a_store_without_content_keys_is_read(two_captions: Path, stage1: Stage1, tmp_path: Path) -> None:
    """As it was written before they existed: all rows differ."""
    folder = open_or_encode(tmp_path, stage1, samples_of(two_captions), 1, 0).folder
    manifest = (folder / "manifest.json").read_text(encoding="utf-8")
    (folder / "manifest.json").write_text(manifest.replace('"repeated"', '"unknown"'), encoding="utf-8")
    shutil.rmtree(folder / "test" / "rows" / "content_keys")
    split = FeatureStore(folder).splits["test"]
    assert split.content_keys == features_of(split).content_keys == {}


def test_the_keys_of_a_batch_are_those_of_its_rows(two_captions: Path, stage1: Stage1, tmp_path: Path) -> None:
    samples = samples_of(two_captions)["train"]
    split = open_or_encode(tmp_path, stage1, samples_of(two_captions), 1, 0).splits["train"]
    assert list(split.names) == [row.name for row in samples.rows]
    rows, view = torch.tensor([3, -1, 0, 5]), torch.ones(4, dtype=torch.int64)
    for source in (split, LiveSplit(stage1, samples, 0, train=True)):
        (found,) = source.batches([rows], [view], CPU)
        for m, column in (
            ("vision", [row.vision for row in samples.rows]),
            ("tactile", [row.tactile for row in samples.rows]),
        ):
            equal = source.content_keys[m][:, None] == source.content_keys[m]
            assert equal.tolist() == [[a == b for b in column] for a in column]
            assert found.content_keys[m][[0, 2, 3]].tolist() == source.content_keys[m][[3, 0, 5]].tolist()
