"""Samples of common formats, written on the spot by the libraries made for them."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tvl_align.cli.encode import run
from tvl_align.data.sources import Keys, open_source
from tvl_align.data.text import Sentence
from tvl_align.features.store import FeatureStore
from tvl_align.system.console import UserError

pyarrow = pytest.importorskip("pyarrow", reason="needs the extra lerobot")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra lerobot")
COLUMNS = Keys("image", "touch", text="words", group="object", labels=("material", "force"))
FRAMES, SIDE = 12, 32
V2 = {
    "codebase_version": "v2.1",
    "chunks_size": 1000,
    "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
V3 = {
    "codebase_version": "v3.0",
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}


def picture(i: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), 20 * (i % 12) + 10, np.uint8)


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(i)).save(file, "PNG")
    return file.getvalue()


def shade(value: Any) -> int:
    """The number of the picture in a sample: its shade, which survives compression."""
    value = Image.open(io.BytesIO(value)) if isinstance(value, bytes) else value
    return round((float(np.asarray(value).mean()) - 10) / 20)


def table(count: int, start: int = 0) -> dict[str, list[Any]]:
    rows = range(start, start + count)
    return {
        "image": [Image.fromarray(picture(i)) for i in rows],
        "touch": [picture(i + 1).tolist() for i in rows],
        "words": [["soft", "warm"] if i % 2 else None for i in rows],
        "object": [i // 2 for i in rows],
        "material": [i % 2 for i in rows],
        "force": [i / 4 for i in rows],
    }


def dataset(count: int, start: int = 0) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "touch": datasets.Array3D((SIDE, SIDE, 3), "uint8"),
            "words": datasets.Sequence(datasets.Value("string")),
            "object": datasets.Value("int64"),
            "material": datasets.ClassLabel(names=["felt", "steel"]),
            "force": datasets.Value("float64"),
        }
    )
    return datasets.Dataset.from_dict(table(count, start), features)


def saved_dict(folder: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    datasets.DatasetDict({"train": dataset(4), "validation": dataset(2, 4)}).save_to_disk(str(folder))


def parquet_files(folder: Path) -> None:
    folder.mkdir()
    dataset(4).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    dataset(2, 4).to_parquet(str(folder / "validation-00000-of-00001.parquet"))


def arrow_files(folder: Path) -> None:
    dataset(4).save_to_disk(str(folder / "train"))
    dataset(2, 4).save_to_disk(str(folder / "validation"))
    for name in ("train", "validation"):
        (file,) = (folder / name).glob("*.arrow")
        file.rename(folder / f"{name}-0.arrow")
        for other in (folder / name).iterdir():
            other.unlink()


@pytest.mark.parametrize("write", [saved_dict, parquet_files, arrow_files])
def test_datasets(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "d")
    source = open_source(f"datasets:{tmp_path / 'd'}", COLUMNS)
    samples = list(source.samples)
    assert source.total == len(samples) == 6 and len({s["name"] for s in samples}) == 6
    assert [s["split"] for s in samples] == ["train"] * 4 + ["validation"] * 2
    for i, s in enumerate(samples):
        assert (shade(s["vision"]), shade(s["tactile"]), s["group"]) == (i, i + 1, i // 2)
        assert s["tactile"].dtype == np.uint8
        assert s["text"] == ("soft, warm" if i % 2 else None)
        assert s["labels"] == {"material": ["felt", "steel"][i % 2], "force": i / 4}


def test_a_damaged_picture_of_a_dataset_does_not_end_the_stream(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    data = datasets.Dataset.from_dict(
        {"photo": [{"bytes": png(i)[: 60 if i == 1 else None], "path": None} for i in range(3)]}
    )
    data.cast_column("photo", datasets.Image()).save_to_disk(str(tmp_path / "d"))
    samples = list(open_source(f"datasets:{tmp_path / 'd'}", Keys("photo", "photo")).samples)
    assert [len(s["vision"]) == 60 for s in samples] == [False, True, False] and shade(samples[2]["vision"]) == 2


def test_one_dataset_has_no_split_and_paths_are_of_its_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    data = datasets.Dataset.from_dict({"photo": ["a.png", ""], "touch": [png(1), png(2)], "what": ["nan", "A cup."]})
    data.save_to_disk(str(tmp_path / "d"))
    first, second = open_source(f"datasets:{tmp_path / 'd'}", Keys("photo", "touch", sentence="what")).samples
    assert first["split"] is None and first["vision"] == tmp_path / "d/a.png" and first["text"] is None
    assert second["vision"] is None and shade(second["tactile"]) == 2
    assert second["text"] == "A cup." and isinstance(second["text"], Sentence)


def write_shards(folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="needs the extra webdataset")
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"s-{shard}.tar")) as tar:
            for i in range(3):
                about = {"material": "felt", "force": i / 2, "split": "train"}
                files = {"photo.png": png(i), "touch.png": png(i + 1), "txt": "A cup.", "json": about}
                tar.write({"__key__": f"{i:03d}", **files} if i < 2 else {"__key__": f"{i:03d}", "photo.png": png(i)})


def test_webdataset(tmp_path: Path) -> None:
    write_shards(tmp_path / "w")
    keys = Keys("photo.png", "touch.png", sentence="txt", split="json.split", labels=("json.material", "json.force"))
    source = open_source(f"webdataset:{tmp_path}/w/s-{{0..1}}.tar", keys)
    samples = list(source.samples)
    assert source.total is None
    assert [s["name"] for s in samples] == [f"s-{shard}/{i:03d}" for shard in range(2) for i in range(3)]
    assert shade(samples[4]["vision"]) == 1 and shade(samples[4]["tactile"]) == 2 and samples[4]["split"] == "train"
    assert samples[4]["labels"] == {"json.material": "felt", "json.force": 0.5} and isinstance(samples[4]["text"], Sentence)
    assert samples[5]["tactile"] is samples[5]["text"] is samples[5]["split"] is None


def write_video(file: Path, shades: list[int], fps: int = 10) -> None:
    av = pytest.importorskip("av", reason="needs the extra video")
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as video:
        stream = video.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.gop_size = "yuv420p", 5
        for i in shades:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")):
                video.mux(packet)
        for packet in stream.encode():
            video.mux(packet)


def write_videos(folder: Path) -> None:
    for name in ("a", "b"):
        write_video(folder / "camera" / f"{name}.mp4", list(range(FRAMES)))
        write_video(folder / "touch" / f"{name}.mp4", [i + 1 for i in range(FRAMES - 1)])
        (folder / "what").mkdir(exist_ok=True)
        (folder / "what" / f"{name}.txt").write_text(f"A cup {name}.\n")


def test_video(tmp_path: Path) -> None:
    write_videos(tmp_path)
    samples = list(open_source(f"video:{tmp_path}", Keys("camera", "touch", sentence="what", labels=("what",)), 3).samples)
    assert [s["name"] for s in samples] == [f"{name}/{i}" for name in "ab" for i in (0, 3, 6, 9)]
    assert [shade(s["vision"]) for s in samples] == [0, 3, 6, 9] * 2
    assert [shade(s["tactile"]) for s in samples] == [1, 4, 7, 10] * 2
    assert {(s["group"], s["text"], s["labels"]["what"]) for s in samples} == {
        (n, f"A cup {n}.", f"A cup {n}.") for n in "ab"
    }


def write_lerobot(folder: Path, version: str, **about: Any) -> None:
    """Three episodes of 4 frames, of touch images in parquet and photos in videos: one file each, or one file of all."""
    features = {"cam": {"dtype": "video"}, "gel": {"dtype": "image"}}
    features |= {"force": {"dtype": "float32"}, "state": {"dtype": "float32"}}
    info = {"fps": 10, "features": features, "splits": {"train": "0:3"}} | (V2 if version == "v2.1" else V3) | about
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    tasks = [{"task_index": i, "task": f"Press {i}."} for i in range(3)]
    rows = [
        {
            "episode_index": e,
            "frame_index": i,
            "timestamp": i / 10,
            "task_index": e,
            "force": [float(i)],
            "state": [i + e / 2 for i in range(12)],
            "gel": {"bytes": png(4 * e + i), "path": None},
        }
        for e in range(3)
        for i in range(4)
    ]
    if version == "v2.1":
        (folder / "data/chunk-000").mkdir(parents=True)
        for e in range(3):
            write_video(folder / f"videos/chunk-000/cam/episode_{e:06d}.mp4", [4 * e + i for i in range(4)])
            own = [row for row in rows if row["episode_index"] == e]
            parquet.write_table(pyarrow.Table.from_pylist(own), folder / f"data/chunk-000/episode_{e:06d}.parquet")
        (folder / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
        lengths = [{"episode_index": e, "length": 4} for e in range(3)]
        (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lengths)))
        return
    for part in ("data/chunk-000", "meta/episodes/chunk-000"):
        (folder / part).mkdir(parents=True)
    write_video(folder / "videos/cam/chunk-000/file-000.mp4", list(range(12)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data/chunk-000/file-000.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(tasks), folder / "meta/tasks.parquet")
    here = {"data/chunk_index": 0, "data/file_index": 0, "videos/cam/chunk_index": 0, "videos/cam/file_index": 0}
    episodes = [{"episode_index": e, "length": 4, "videos/cam/from_timestamp": 0.4 * e, **here} for e in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(episodes), folder / "meta/episodes/chunk-000/file-000.parquet")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot(version: str, tmp_path: Path) -> None:
    write_lerobot(tmp_path / "r", version)
    source = open_source(f"lerobot:{tmp_path / 'r'}", Keys("cam", "gel", labels=("force",)), 3)
    samples = list(source.samples)
    assert source.total == len(samples) == 6
    at = [(e, i) for e in range(3) for i in (0, 3)]
    assert [s["name"] for s in samples] == [f"episode_{e:06d}/{i}" for e, i in at]
    assert [shade(s["vision"]) for s in samples] == [shade(s["tactile"]) for s in samples] == [4 * e + i for e, i in at]
    assert [s["text"] for s in samples] == [f"Press {e}." for e, _ in at] and isinstance(samples[0]["text"], Sentence)
    assert [s["group"] for s in samples] == [f"episode {e}" for e, _ in at]
    assert [s["labels"]["force"] for s in samples] == [float(i) for _, i in at]
    assert {s["split"] for s in samples} == {None}


def test_splits_of_lerobot(tmp_path: Path) -> None:
    write_lerobot(tmp_path / "r", "v2.1", splits={"train": "0:2", "test": "2:3"})
    samples = open_source(f"lerobot:{tmp_path / 'r'}", Keys("cam", "gel")).samples
    assert [s["split"] for s in samples] == ["train"] * 8 + ["test"] * 4


@pytest.mark.parametrize(("fps", "lacks"), [(10, "0.200"), (5, "0.100")])
def test_a_frame_that_a_video_lacks_is_an_error(fps: int, lacks: str, tmp_path: Path) -> None:
    write_lerobot(tmp_path / "r", "v2.1")
    write_video(tmp_path / "r/videos/chunk-000/cam/episode_000001.mp4", [0, 1], fps)
    with pytest.raises(UserError, match=rf"episode_000001.mp4 cannot be read \(ValueError: no frame at {lacks} seconds\)"):
        list(open_source(f"lerobot:{tmp_path / 'r'}", Keys("cam", "gel")).samples)


def damaged(folder: Path) -> None:
    write_shards(folder / "w")
    (folder / "w/s-1.tar").write_bytes((folder / "w/s-1.tar").read_bytes()[:2000])
    write_videos(folder / "v")
    write_video(folder / "v/touch/b.mp4", [1, 2], fps=25)
    (folder / "broken/camera").mkdir(parents=True)
    (folder / "broken/camera/a.mp4").write_bytes(b"no video")
    write_lerobot(folder / "r", "v2.1")
    write_lerobot(folder / "old", "v2.1", codebase_version="v1.6")
    write_lerobot(folder / "out", "v2.1", data_path="../r/data/chunk-000/episode_000000.parquet")
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad/train.parquet").write_bytes(b"no parquet")
    if not (folder / "d").exists():
        saved_dict(folder / "d")


MISTAKES: dict[str, tuple[Keys, str]] = {
    "files:x": (COLUMNS, r"--source files:x names no source; give datasets:PLACE"),
    "datasets:": (COLUMNS, r"names no source"),
    "datasets:none": (COLUMNS, "no such folder: none"),
    "datasets:empty": (COLUMNS, "empty has no dataset"),
    "datasets:bad": (COLUMNS, r"bad cannot be read \(ArrowInvalid"),
    "datasets:d": (Keys("photo", "touch"), "d has no 'photo'; it has image, touch"),
    "webdataset:w/s-{0..2}.tar": (Keys("photo.png", "touch.png"), "no such shard: w/s-2.tar"),
    "webdataset:w/s-{0..1}.tar": (Keys("photo.png", "touch.png"), r"s-1.tar cannot be read \(ReadError"),
    "video:v": (Keys("camera", "touch"), r"videos of b differ in frames per second \(camera has 10.00, touch has 25.00\)"),
    "video:d": (Keys("camera", "touch"), "d has no 'camera'; it has train, validation"),
    "video:broken": (Keys("camera"), r"a.mp4 cannot be read \(InvalidDataError"),
    "lerobot:r": (Keys("cam", "force"), "force of r is float32, not pictures"),
    "lerobot:old": (Keys("cam", "gel"), "old has the LeRobot version v1.6; convert it to version 2 or 3"),
    "lerobot:out": (Keys("cam", "gel"), "is outside of the folder"),
    "lerobot:d": (Keys("cam", "gel"), r"info.json cannot be read \(FileNotFoundError"),
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    damaged(folder)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, mistakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mistakes)
    keys, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as caught:
        list(open_source(name, keys).samples)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [
        ("datasets", "datasets", "datasets"),
        ("webdataset", "webdataset", "webdataset"),
        ("video", "av", "video"),
        ("lerobot", "pyarrow", "lerobot"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    kind: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"^{package} is not installed; run pip install 'tvl-align\[{extra}\]'\.$"):
        open_source(f"{kind}:{tmp_path}", COLUMNS)


def test_the_command(stage1_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lerobot(tmp_path / "r", "v3.0")
    flags = ["--source", f"lerobot:{tmp_path / 'r'}", "--vision_key", "cam", "--tactile_key", "gel", "--label_keys", "force"]
    encoders = [
        "--stage1_checkpoint",
        str(stage1_checkpoint),
        "--device",
        "cpu",
        "--touch_turn",
        "90",
        "--photo_norm",
        "half",
    ]
    run([*flags, *encoders, "--out", str(tmp_path / "store")])
    store = FeatureStore(tmp_path / "store")
    assert capsys.readouterr().out.splitlines()[-1] == str(store.folder)
    assert sum(len(split) for split in store.splits.values()) == 12 and list(store.specs) == ["vision", "tactile", "text"]
    images = store.manifest["ingredients"]["images"]
    assert images["photo_mean"] == [0.5, 0.5, 0.5] and images["touch_crop"] == "none" and "touch_turn" not in images  # TVL's


def test_further_modalities_of_a_robot(tmp_path: Path) -> None:
    """Depth is a video, the state a list of numbers; without an encoder of text the tasks are left out."""
    write_lerobot(tmp_path / "r", "v2.1")
    flags = ["--source", f"lerobot:{tmp_path / 'r'}", "--more_keys", "depth=cam", "state=state", "--device", "cpu"]
    flags += ["--more_encoders", "depth=own_encoders:Colours", "state=own_encoders:Curves"]
    run([*flags, "--out", str(tmp_path / "store")])
    store = FeatureStore(tmp_path / "store")
    assert list(store.specs) == ["depth", "state"]
    found = {}
    for split in store.splits.values():
        features = split.read(torch.arange(len(split))).modalities
        for i, name in enumerate(split.names):
            found[name] = [features[m].tokens[i].float().flatten() for m in ("depth", "state")]
    assert len(found) == 12
    depth, state = found["episode_000002/1"]
    assert torch.allclose(state, torch.arange(12) + 1.0, atol=1e-2)
    shade = 2 * ((20 * 9 + 10) / 255 - 0.5) / 0.5
    assert torch.allclose(depth, torch.full((12,), shade), atol=0.1)  # compression changes shades a little
    with pytest.raises(UserError, match="has no 'gone'"):
        run([*flags[:2], "--more_keys", "depth=cam", "state=gone", *flags[5:], "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="state has no encoder; give --more_encoders state="):
        run([*flags[:7], "--more_encoders", "depth=own_encoders:Colours", "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="--more_keys 'state' names no modality and value"):
        run([*flags[:2], "--more_keys", "depth=cam", "state", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_a_file_of_sound_is_given_as_its_bytes(tmp_path: Path) -> None:
    """And a list of JSON as an array."""
    wds = pytest.importorskip("webdataset", reason="needs the extra webdataset")
    with wds.TarWriter(str(tmp_path / "s.tar")) as tar:
        tar.write({"__key__": "a", "wav": b"RIFF", "json": {"curve": [1.0, 2.0], "kind": [3]}})
    keys = Keys(labels=("json.kind",), more={"sound": "wav", "force": "json.curve"})
    (sample,) = open_source(f"webdataset:{tmp_path / 's.tar'}", keys).samples
    assert sample["sound"] == b"RIFF" and sample["labels"] == {"json.kind": [3]}
    assert isinstance(sample["force"], np.ndarray) and sample["force"].tolist() == [1.0, 2.0]
    assert keys.modalities == ("sound", "force")


def test_sound_of_a_dataset_is_not_decoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    rows = datasets.Dataset.from_dict({"sound": [{"bytes": b"RIFF", "path": None}], "curve": [[1, 2, 3]]})
    rows.cast_column("sound", datasets.Audio(decode=False)).save_to_disk(tmp_path / "d")
    (sample,) = open_source(f"datasets:{tmp_path / 'd'}", Keys(more={"sound": "sound", "curve": "curve"})).samples
    assert sample["sound"] == b"RIFF" and sample["curve"].tolist() == [1, 2, 3] and sample["curve"].dtype.kind == "i"


REFUSED = {
    "--vision_key cam --every 0": "--every 0 is out of range",
    "--vision_key cam --views -1": "--views -1 is out of range",
    "--vision_key cam --tactile_key gel --worker_cpus 2": "--worker_cpus is of an encode on Ray; give it with --ray",
    "--vision_key cam --tactile_key gel --ray local": "lerobot is read by one process; leave out --ray and torchrun",
    "--vision_key cam --ray local --block_rows 0": "--block_rows 0 is out of range",
    "--label_keys force": "registers align two or more modalities, and there are keys of text",
    "--vision_key cam": "encoding needs the Stage-1 encoders of vision, text",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_are_refused(flags: str, tmp_path: Path) -> None:
    write_lerobot(tmp_path / "r", "v2.1")
    with pytest.raises(UserError, match=REFUSED[flags]):
        run(["--source", f"lerobot:{tmp_path / 'r'}", "--out", str(tmp_path / "store"), *flags.split()])
    assert not (tmp_path / "store").exists()


def test_tasks_of_slurm_without_torchrun_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    flags = ["--source", "video:v", "--out", str(tmp_path / "s"), "--vision_key", "a", "--tactile_key", "b"]
    with pytest.raises(UserError, match="2 tasks of Slurm would each encode all of the source; start torchrun in one task"):
        run(flags)
    monkeypatch.setenv("WORLD_SIZE", "4")  # of torchrun in each of the two tasks
    with pytest.raises(UserError, match="video is read by one process; leave out --ray and torchrun"):
        run(flags)
    with pytest.raises(UserError, match="--ray starts processes of its own; give it without torchrun"):
        run([*flags, "--ray", "local"])
