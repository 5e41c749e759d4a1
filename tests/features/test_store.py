"""The feature store: it returns the features of the encoders, and its key depends on all settings."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tvl_align.contract import Batch, Features
from tvl_align.data.image_options import ImageOptions
from tvl_align.data.loading import load_images
from tvl_align.data.samples import Samples, TextOptions, make_samples
from tvl_align.data.tvl import Row, Tolerance, read_tvl
from tvl_align.encoders.tvl import Stage1, load_stage1
from tvl_align.features import encode as encode_module
from tvl_align.features.encode import open_or_encode
from tvl_align.features.identity import HASHES, identify
from tvl_align.features.live import LiveSplit
from tvl_align.features.store import FeatureStore
from tvl_align.features.subset import RowSubset, ShuffledPairs
from tvl_align.system.console import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stage1(stage1_checkpoint: Path) -> Stage1:
    return load_stage1(stage1_checkpoint)


def samples_of(world: Path, shuffle: bool = True, seed: int = 0) -> dict[str, Samples]:
    data = read_tvl(world)
    text = TextOptions("", shuffle, {"ridged": ["lined"]})
    return make_samples(data, ImageOptions(64, 64), text, seed)


@pytest.fixture(scope="module")
def store(world: Path, stage1: Stage1, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return open_or_encode(tmp_path_factory.mktemp("features"), stage1, samples_of(world), 2, 0)


def test_stored_features_are_the_encoders(world: Path, stage1: Stage1, store: FeatureStore) -> None:
    samples = samples_of(world)["train"]
    rows, views = torch.tensor([3, 0, 7]), torch.tensor([0, 2, 1])
    stored = store.splits["train"].read(rows, views).float()
    for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
        batch = {name: image[None] for name, image in samples[row, view].images.items()}
        batch["text"] = stage1.tokenize([samples.sentence(row, view)])
        for name, tokens in stage1.encode(batch).modalities.items():
            read = stored.modalities[name]
            length = tokens.tokens.shape[1]
            assert torch.allclose(read.pooled[i], tokens.pooled[0], atol=1e-5)
            assert torch.allclose(read.tokens[i, :length], tokens.tokens[0], atol=1e-2)
            assert read.mask[i].sum() == tokens.mask[0].sum()


def test_a_store_names_its_rows_and_their_data_sets(world: Path, store: FeatureStore) -> None:
    for name, samples in samples_of(world).items():
        split = store.splits[name]
        assert list(split.names) == [row.name for row in samples.rows]
        datasets = store.manifest["splits"][name]["datasets"]
        assert [datasets[i] for i in split.datasets.tolist()] == [row.dataset for row in samples.rows]
    names = split.names
    assert (names[-1], names[1:3]) == (list(names)[-1], list(names)[1:3])
    with pytest.raises(IndexError):
        names[len(names)]


def resident(folder: Path) -> int:
    """Resident memory of the mapped files under a folder, in KB."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(maxsplit=1)[0].endswith(":"):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_pages_are_released_after_reading(store: FeatureStore) -> None:
    split = store.splits["train"]
    rows = torch.arange(len(split))
    assert split.tables["vision"]["tokens"].sum().isfinite()
    assert resident(store.folder / "train" / "vision") > 0
    before = split.read(rows)
    assert resident(store.folder / "train" / "vision") == 0
    for name, tokens in split.read(rows).modalities.items():
        assert torch.equal(tokens.tokens, before.modalities[name].tokens)


def test_only_training_has_augmented_views(store: FeatureStore) -> None:
    """Validation and test have the plain view only."""
    assert {name: split.views for name, split in store.splits.items()} == {"train": 2, "val": 0, "test": 0}


def test_without_augmentation_images_are_encoded_once_and_sentences_vary(
    world: Path, stage1: Stage1, tmp_path: Path
) -> None:
    images, text = ImageOptions(64, 64, augment=False), TextOptions("", True, {"ridged": ["lined"]})
    samples = make_samples(read_tvl(world), images, text, 0)
    assert torch.equal(samples["train"][3, 0].images["vision"], samples["train"][3, 2].images["vision"])
    split = open_or_encode(tmp_path, stage1, samples, 4, 0).splits["train"]
    index = split.index
    assert all(bool((index[m] == index[m][:, :1]).all()) for m in ("vision", "tactile"))
    assert len(index["vision"].unique()) == len(split)
    assert bool((index["text"] != index["text"][:, :1]).any())
    rows = torch.arange(5)
    plain, other = split.read(rows, torch.zeros(5, dtype=torch.long)), split.read(rows, torch.full((5,), 4))
    assert torch.equal(plain.modalities["tactile"].tokens, other.modalities["tactile"].tokens)
    assert not split.augmented and not other.augmented


def test_augmented_rows_are_marked(world: Path, stage1: Stage1, store: FeatureStore) -> None:
    """In a store and on the fly, also of some rows and of shuffled pairs; validation has none."""
    rows, views = torch.arange(4), torch.tensor([0, 1, 2, 0])
    train = store.splits["train"]
    live = LiveSplit(stage1, samples_of(world)["train"], 0, train=True)
    for source in (train, RowSubset(train, rows), ShuffledPairs(train, ["vision", "tactile", "text"], 0), live):
        (found,) = source.batches([rows], [views], CPU)
        assert set(source.augmented) == set(found.augmented) == {"vision", "tactile"}  # text has other sentences
        assert all(flags.tolist() == [False, True, True, False] for flags in found.augmented.values())
    assert not store.splits["val"].augmented and not store.splits["val"].read(torch.arange(2)).augmented
    assert FeatureStore(store.folder).only(["text", "tactile"]).splits["train"].augmented == ("tactile",)


def test_an_interrupted_encode_goes_on_where_it_stopped(
    world: Path, stage1: Stage1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interruption only the missing batches are encoded, and the store equals that of an uninterrupted encode."""
    monkeypatch.setattr(encode_module, "ENCODE_BATCH", 8)
    samples, encode, calls = samples_of(world), Stage1.encode, []

    def counted(self: Stage1, batch: Batch) -> Features:
        calls.append(batch)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return encode(self, batch)

    monkeypatch.setattr(Stage1, "encode", counted)
    stop = 0
    uninterrupted = open_or_encode(tmp_path / "uninterrupted", stage1, samples, 1, 0)
    total = len(calls)
    calls.clear()
    stop = total // 2
    with pytest.raises(KeyboardInterrupt):
        open_or_encode(tmp_path / "interrupted", stage1, samples, 1, 0)
    assert list((tmp_path / "interrupted").glob("*.partial"))
    calls.clear()
    stop = 0
    resumed = open_or_encode(tmp_path / "interrupted", stage1, samples, 1, 0)
    assert len(calls) < 0.65 * total
    assert resumed.key == uninterrupted.key
    for name, split in uninterrupted.splits.items():
        one, other = (s.read(torch.arange(len(split))) for s in (split, resumed.splits[name]))
        for m, tokens in one.modalities.items():
            assert torch.equal(tokens.pooled, other.modalities[m].pooled), (name, m)
            assert torch.equal(tokens.tokens, other.modalities[m].tokens), (name, m)
        assert not (resumed.folder / name / "done").exists()


def test_features_that_are_not_finite_stop_the_encode_and_are_not_marked_as_done(
    world: Path, stage1: Stage1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are checked and written in a thread, while the next batch is encoded."""
    encode = Stage1.encode

    def broken(self: Stage1, batch: Batch) -> Features:
        features = encode(self, batch)
        return features.map(lambda t: t * torch.inf if t.is_floating_point() else t) if "tactile" in batch else features

    monkeypatch.setattr(Stage1, "encode", broken)
    assert stage1.specs
    with pytest.raises(UserError, match="NaN, inf or above 65,504; use another Stage-1 checkpoint"):
        open_or_encode(tmp_path, stage1, samples_of(world), 0, 0)
    flags = next(tmp_path.glob("*.partial/train/done/images.memmap")).read_bytes()
    assert flags and not any(flags)
    assert not list(tmp_path.glob("*/manifest.json"))


def test_evaluation_views_do_not_depend_on_the_seed(world: Path) -> None:
    one, other = samples_of(world, seed=0), samples_of(world, seed=9)
    for name in ("val", "test"):
        assert torch.equal(one[name][0, 0].images["tactile"], other[name][0, 0].images["tactile"])
        assert one[name].sentence(0, 0) == other[name].sentence(0, 0)
    drawn = [one["train"][0, view].images["vision"] for view in (1, 2)]
    assert not torch.equal(*drawn)


def test_views_follow_rows_not_their_order(world: Path) -> None:
    """The augmentation of a row does not depend on its position in the split."""
    samples = samples_of(world)["train"]
    reversed_ = Samples(samples.root, samples.rows[::-1], samples.images.options, samples.text, samples.seed)
    assert torch.equal(samples[2, 1].images["vision"], reversed_[len(reversed_) - 3, 1].images["vision"])
    assert samples.sentence(2, 1) == reversed_.sentence(len(reversed_) - 3, 1)


def test_sentences_are_stored_once(store: FeatureStore) -> None:
    split = store.splits["train"]
    assert len(split.tables["text"]) < split.index["text"].numel()
    keys = split.index["caption_keys"]
    assert torch.equal(keys[..., 1] == keys[0, 0, 1], split.index["text"] == split.index["text"][0, 0])


def test_reading_twice_encodes_once(world: Path, stage1: Stage1, store: FeatureStore) -> None:
    manifest = store.folder / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert open_or_encode(store.folder.parent, stage1, samples_of(world), 2, 0).key == store.key
    assert manifest.stat().st_mtime_ns == before


def test_the_key_depends_on_all_settings_and_files(
    world: Path, stage1: Stage1, stage1_checkpoint: Path, tmp_path: Path
) -> None:
    def key(samples: dict[str, Samples], encoders: Stage1 = stage1, views: int = 2) -> str:
        return identify(encoders, samples, views, tmp_path).key

    world = shutil.copytree(world, tmp_path / "world")
    first = key(samples_of(world))
    assert key(samples_of(world)) == first
    changed = [
        key(samples_of(world, shuffle=False)),
        key(samples_of(world, seed=1)),
        key(samples_of(world), views=3),
        key(samples_of(world), load_stage1(stage1_checkpoint, features="pooled")),
        key(
            make_samples(
                read_tvl(world),
                ImageOptions(64, 64, randomize_crop=True),
                TextOptions("", True, {"ridged": ["lined"]}),
                0,
            )
        ),
    ]
    image = world / read_tvl(world).test[0].vision
    content, stat = image.read_bytes(), image.stat()
    image.write_bytes(content[:-1] + b"x")
    changed.append(key(samples_of(world)))
    image.write_bytes(content)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert key(samples_of(world)) == first  # the time is no content
    (tmp_path / HASHES).write_text("{damaged")
    assert key(samples_of(world)) == first
    assert len({first, *changed}) == 1 + len(changed)


def test_another_store_in_its_place_is_refused(world: Path, stage1: Stage1, tmp_path: Path) -> None:
    store = open_or_encode(tmp_path, stage1, samples_of(world), 1, 0)
    path = store.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key": "0" * 16}))
    with pytest.raises(UserError, match="contains the store 0000"):
        open_or_encode(tmp_path, stage1, samples_of(world), 1, 0)
    path.unlink()
    with pytest.raises(UserError, match=r"is not a feature store \(no manifest.json\)"):
        FeatureStore(store.folder)
    assert open_or_encode(tmp_path, stage1, samples_of(world), 1, 0).key == store.key


def test_absent_captions_and_images_are_masked(world: Path, stage1: Stage1, tmp_path: Path) -> None:
    rows = read_tvl(world).train[:4]
    rows[1] = Row("hct", rows[1].vision, rows[1].tactile, None, None, "g")
    rows[2] = Row("hct", rows[2].vision, None, None, rows[2].caption, "g")
    samples = {"train": Samples(world, rows, ImageOptions(64, 64), TextOptions(), 0)}
    stored = open_or_encode(tmp_path, stage1, samples, 1, 0).splits["train"].read(torch.arange(4))
    live = next(
        LiveSplit(stage1, samples["train"], 0, train=False).batches([torch.arange(4)], [torch.zeros(4, dtype=int)], CPU)
    )
    for features in (stored, live):
        assert features.modalities["text"].present.tolist() == [True, False, True, True]
        assert features.modalities["tactile"].present.tolist() == [True, True, False, True]
        assert (features.caption_keys[1, 0] == features.caption_keys[[0, 2, 3], 0]).sum() == 0
    assert not stored.modalities["text"].mask[1].any()


def test_workers_change_neither_images_nor_the_random_state(world: Path) -> None:
    samples = samples_of(world)["train"]
    batches = [[(i, 0), (i + 1, 1)] for i in range(9)]
    found = []
    for workers in (0, 2):
        torch.manual_seed(0)
        found.append((list(load_images(samples, batches, workers, ("vision", "tactile"))), torch.rand(1)))
    (without_workers, number), (with_workers, same_number) = found
    assert len(without_workers) == len(with_workers) == 9
    assert torch.equal(number, same_number)
    for a, b in zip(without_workers, with_workers, strict=True):
        for modality, (positions, images) in a.images.items():
            assert b.images[modality][0] == positions
            assert torch.equal(b.images[modality][1], images)
    assert list(load_images(samples, [], 2, ("vision",))) == []


def test_on_the_fly_equals_the_store_on_plain_views(world: Path, stage1: Stage1, store: FeatureStore) -> None:
    rows = torch.arange(5)
    live = LiveSplit(stage1, samples_of(world)["test"], 0, train=False)
    (computed,) = live.batches([rows], [torch.zeros_like(rows)], CPU)
    stored = store.splits["test"].read(rows).float()
    for name, tokens in computed.modalities.items():
        read = stored.modalities[name]
        length = read.tokens.shape[1]
        assert torch.allclose(read.pooled, tokens.pooled, atol=1e-5)
        assert torch.equal(read.mask, tokens.mask[:, :length])
    same = [(f.caption_keys[:, None] == f.caption_keys[None]).any(-1) for f in (computed, stored)]
    assert torch.equal(*same)


def test_an_image_that_cannot_be_used_is_absent_and_counted(world: Path, stage1: Stage1, tmp_path: Path) -> None:
    rows = [replace(row) for row in read_tvl(world).train[:40]]
    (tmp_path / "cut.jpg").write_bytes((world / rows[3].vision).read_bytes()[:300])
    (tmp_path / "data").symlink_to(world)
    bad = replace(rows[3], vision="cut.jpg")
    moved = [replace(row, vision=f"data/{row.vision}", tactile=f"data/{row.tactile}") for row in rows]
    moved[3] = replace(bad, tactile=moved[3].tactile)
    samples = {"train": Samples(tmp_path, moved, ImageOptions(64, 64), TextOptions(), 0, {"vision file is missing": 2})}
    store = open_or_encode(tmp_path / "features", stage1, samples, 1, 0)
    present = store.splits["train"].read(torch.arange(40)).modalities
    assert present["vision"].present.tolist() == [i != 3 for i in range(40)]
    assert present["tactile"].present.all()
    assert store.manifest["skipped"]["train"] == [{"row": "cut.jpg", "modality": "vision", "reason": "corrupt or truncated"}]
    assert store.manifest["dropped"] == {"vision file is missing": 2}
    for tolerance, message in (
        (Tolerance(strict=True), "--strict allows no bad row"),
        (Tolerance(max_skipped=0.02), "1 of 40 rows"),
    ):
        for encode in (
            lambda t=tolerance: open_or_encode(tmp_path / "others", stage1, samples, 1, 0, tolerance=t),
            lambda t=tolerance: list(
                LiveSplit(stage1, samples["train"], 0, False, t).batches([torch.arange(8)], [torch.zeros(8, dtype=int)], CPU)
            ),
        ):
            with pytest.raises(UserError, match=rf"{message}.*"):
                encode()


def test_data_that_change_while_they_are_encoded_are_refused(
    world: Path, stage1: Stage1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world, tmp_path / "world")
    samples, encode = samples_of(tmp_path / "world"), Stage1.encode

    def encode_and_modify_data(self: Stage1, batch: Batch) -> Features:
        image = tmp_path / "world" / samples["test"].rows[0].vision
        image.write_bytes(image.read_bytes() + b"\0")
        return encode(self, batch)

    monkeypatch.setattr(Stage1, "encode", encode_and_modify_data)
    with pytest.raises(UserError, match="the data changed while they were encoded"):
        open_or_encode(tmp_path / "features", stage1, samples, 0, 0)
    assert not list((tmp_path / "features").glob("*/manifest.json"))


def test_a_modality_that_every_row_lacks_is_left_out(store: FeatureStore, tmp_path: Path) -> None:
    """Even if its table exists."""
    shutil.copytree(store.folder, tmp_path / "store")
    index = tmp_path / "store/train/index/vision.memmap"
    index.write_bytes(b"\xff" * index.stat().st_size)
    for file in (tmp_path / "store/train/vision").glob("*.memmap"):
        file.write_bytes(b"")
    rows = torch.arange(3)
    assert "vision" not in FeatureStore(tmp_path / "store").splits["train"].read(rows).modalities


def test_a_damaged_store_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    """Wrong file sizes, an index out of range, and an invalid manifest are errors."""

    def damaged(name: str, damage: Callable[[Path], None]) -> None:
        folder = tmp_path / name
        shutil.copytree(store.folder, folder)
        damage(folder)
        with pytest.raises(UserError, match="damaged|not the manifest|store format"):
            FeatureStore(folder)

    def edit(folder: Path, **more: object) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    damaged("cut", lambda f: os.truncate(f / "train/vision/tokens.memmap", 1000))
    damaged("gone", lambda f: (f / "val/index/text.memmap").unlink())
    index = (store.folder / "train/index/vision.memmap").stat().st_size
    damaged("far", lambda f: (f / "train/index/vision.memmap").write_bytes(b"\x00\x00\x00\x7f" * (index // 4)))
    damaged("names", lambda f: os.truncate(f / "train/rows/names.memmap", 10))
    dataset = (store.folder / "train/rows/dataset.memmap").stat().st_size
    damaged("dataset", lambda f: (f / "train/rows/dataset.memmap").write_bytes(b"\xff" * dataset))
    damaged("list", lambda f: (f / "manifest.json").write_text("[]"))
    damaged("text", lambda f: (f / "manifest.json").write_text("{"))
    damaged("outside", lambda f: edit(f, splits={"../train": {}}))
    damaged("shapes", lambda f: edit(f, modalities={"vision": {"width": "x", "tokens": 1, "pooled_width": 1}}))
    damaged("format", lambda f: edit(f, format=99))
