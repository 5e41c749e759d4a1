"""`tvl-align embed` and `tvl-align search`, as typed."""

import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import processes as child
import pytest
import torch

from tvl_align.data.tvl import Row
from tvl_align.inference.files import picture_rows
from tvl_align.inference.registers import Registers
from tvl_align.system.console import UserError

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return lambda *words: child.tvl_align(words, tmp_path / "said")


@pytest.fixture(scope="module")
def folders(world: Path, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ of rows 0 to 3 and touches/ of rows 1 to 4, of the same names, and a file that is no picture."""
    root = tmp_path_factory.mktemp("pictures")
    for folder in ("photos/wood", "touches/wood"):
        (root / folder).mkdir(parents=True)
    for i, row in enumerate(rows[:5]):
        if i < 4:
            shutil.copyfile(world / str(row.vision), root / f"photos/wood/{i}{Path(str(row.vision)).suffix}")
        if i > 0:
            shutil.copyfile(world / str(row.tactile), root / f"touches/wood/{i}{Path(str(row.tactile)).suffix}")
    (root / "photos/notes.txt").write_text("no picture")
    return root


def test_folders_are_paired_by_name_and_embedded(
    command: Command, folders: Path, run: Path, registers: Registers, tmp_path: Path
) -> None:
    code, said = command(
        "embed", run, "--vision", folders / "photos", "--tactile", folders / "touches", "--out", tmp_path / "x.npz"
    )
    assert code == 0 and "5 rows of vision, tactile" in said, said
    out = np.load(tmp_path / "x.npz")
    assert out["names"].tolist() == [f"wood/{i}" for i in range(5)]
    assert out["vision.present"].tolist() == [True, True, True, True, False]
    assert out["tactile.present"].tolist() == [False, True, True, True, True]
    _, given = picture_rows({"vision": [folders / "photos"], "tactile": [folders / "touches"]})
    expected = registers.embed(**given)
    assert np.allclose(out["tactile.pooled"], expected.pooled["tactile"], atol=1e-4)
    assert out["tactile.overlapping"].shape == (5, 3, 32) and out["tactile.complementary"].shape == (5, 1, 32)
    assert str(out["made_by"]) == registers.key


def test_a_split_has_names_and_labels(command: Command, run: Path, registers: Registers, tmp_path: Path) -> None:
    code, said = command("embed", run, "--split", "test", "--out", tmp_path / "t.npz", "--json")
    assert code == 0, said
    told = json.loads(said.strip().splitlines()[-1])
    source = registers.open_store().splits["test"]
    out = np.load(tmp_path / "t.npz")
    assert told["rows"] == len(source) and out["names"].tolist() == list(source.names)
    assert "texture" in told["labels"] and len(set(out["label.texture"].tolist())) > 1
    assert np.allclose(out["text.pooled"], registers.embed_split(source).pooled["text"], atol=1e-5)


def test_search_ranks_the_gallery_by_similarity_and_keeps_its_index(
    command: Command, folders: Path, run: Path, registers: Registers, tmp_path: Path
) -> None:
    query = sorted((folders / "touches/wood").iterdir())[0]
    given = [
        "search",
        run,
        "--tactile",
        query,
        "--gallery",
        folders / "photos",
        "--top",
        "3",
        "--index",
        tmp_path / "i",
        "--json",
    ]
    code, said = command(*given)
    assert code == 0, said
    (result,) = json.loads(said.strip().splitlines()[-1])
    photos = sorted((folders / "photos/wood").iterdir())
    scores = registers.embed(tactile=[query]).pooled["tactile"] @ registers.embed(vision=photos).pooled["vision"].T
    best = scores[0].argsort(descending=True)[:3]
    assert [hit["name"] for hit in result["found"]] == [str(photos[i]) for i in best]
    assert torch.allclose(torch.tensor([hit["score"] for hit in result["found"]]), scores[0, best], atol=1e-2)
    search = importlib.import_module("tvl_align.cli.search").run
    with pytest.raises(UserError, match="is an index of another gallery than"):
        search([str(run), "--tactile", str(query), "--gallery", str(folders / "touches"), "--index", str(tmp_path / "i")])
    with pytest.raises(UserError, match="is an index of vision; give --gallery_modality vision"):
        search([str(run), "--tactile", str(query), "--index", str(tmp_path / "i"), "--gallery_modality", "text"])
    code, again = command("search", run, "--tactile", query, "--index", tmp_path / "i", "--top", "3", "--json")
    assert code == 0 and json.loads(again.strip().splitlines()[-1]) == json.loads(said.strip().splitlines()[-1])


def test_a_gallery_of_sentences(command: Command, folders: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("soft, woven\n\nhard\n")
    query = sorted((folders / "touches/wood").iterdir())[0]
    code, said = command(
        "search", run, "--tactile", query, "--gallery", tmp_path / "captions.txt", "--gallery_modality", "text"
    )
    assert code == 0 and {"soft, woven", "hard"} <= {line[9:].strip() for line in said.splitlines()}, said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["embed", "RUN", "--out", "OUT"], "nothing to embed, or two kinds"),
        (["embed", "RUN", "--out", "OUT", "--split", "none"], "has no split 'none'; give --split one of"),
        (["embed", "RUN", "--out", "OUT", "--vision", "no.png"], "there is no picture no.png"),
        (["embed", "nowhere", "--out", "OUT", "--text", "soft"], "nowhere is not a run folder"),
        (["search", "RUN", "--tactile", "t.png"], "there is nothing to search in"),
        (["search", "RUN", "--vision", "t.png", "--gallery", "x"], "the gallery is of vision; give queries of one other"),
        (["search", "RUN", "--text", "soft", "--index", "OUT"], "there is no index"),
        (["search", "RUN", "--text", "soft", "--gallery", "x", "--top", "0"], "--top 0 is out of range"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str], sentence: str, run: Path, tmp_path: Path
) -> None:
    places = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    with pytest.raises(UserError, match=re.escape(sentence)):
        importlib.import_module(f"tvl_align.cli.{arguments[0]}").run([places.get(a, a) for a in arguments[1:]])
    assert not list(tmp_path.iterdir())


def test_pictures_that_make_no_rows(folders: Path, tmp_path: Path) -> None:
    a, b = sorted((folders / "photos/wood").iterdir())[:2]
    for given, sentence in (
        ({"vision": [folders / "photos"], "tactile": [a]}, "--vision is a folder and --tactile is not"),
        ({"vision": [a, b], "tactile": [a]}, "the numbers of pictures differ, 2 of vision, 1 of tactile"),
    ):
        with pytest.raises(UserError, match=sentence):
            picture_rows(given)
    for suffix in (".png", ".bmp"):
        (tmp_path / f"a{suffix}").write_bytes(b"x")
    with pytest.raises(UserError, match="has two pictures named a"):
        picture_rows({"vision": [tmp_path]})
