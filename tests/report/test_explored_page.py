"""The explorable page as files: its parts are the arrays and pictures of the run, in one file or served."""

import base64
import io
import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_results import colour_of, made_exploration, write_explored_run, write_run
from PIL import Image

from tvl_align.cli import explore as command
from tvl_align.evaluation.explore_file import NAME
from tvl_align.report import page as module
from tvl_align.report.page import parts_of, render_page, write_page
from tvl_align.report.parts import Parts
from tvl_align.report.server import PageServer
from tvl_align.system.console import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_explored_run(tmp_path / "run")


def parts(run: Path, rows: int = 5) -> Parts:
    return parts_of(run, made_exploration(), rows, side=16)


def test_parts_are_the_arrays(run: Path) -> None:
    found, of_page = made_exploration(), parts(run)
    head = of_page.head()
    for name in ("rank", "first", "answers", "present", "labels", "map.pooled.text"):
        read = np.frombuffer(of_page.read(name)[0], head["arrays"][name]["type"]).reshape(head["arrays"][name]["shape"])
        expected = {
            "rank": found.rank,
            "first": found.finds[..., 0],
            "answers": found.answers,
            "present": np.array(list(found.present.values())),
            "labels": np.array(list(found.labels.values())),
            "map.pooled.text": found.maps["pooled.text"],
        }[name]
        assert np.array_equal(read, expected, equal_nan=read.dtype.kind == "f"), name
    shape = head["arrays"]["finds"]["shape"]
    assert shape == (12, 2, 6, 8)
    last = np.frombuffer(of_page.read("finds/2")[0], np.int16).reshape(2, *shape[1:])  # rows 10 and 11
    expected = np.moveaxis(found.finds, 2, 0)[10:]
    assert np.array_equal(np.where(last < 0, -1, last >> 1), expected)
    assert np.array_equal((last >= 0) & (last % 2 == 1), np.moveaxis(found.right, 2, 0)[10:])
    scores = np.frombuffer(of_page.read("scores/0")[0], np.int8).reshape(5, *shape[1:]) / head["scoreSteps"]
    assert scores == pytest.approx(np.moveaxis(found.scores, 2, 0)[:5].astype(float), abs=6e-3)
    looks = np.frombuffer(of_page.read("attention.text/1")[0], np.uint8).reshape(5, 3, 17).astype(float)
    assert looks / looks.sum(-1, keepdims=True) == pytest.approx(found.attention["text"][5:10].astype(float), abs=2e-3)


def test_numbers_of_many_rows_fit_their_type(run: Path) -> None:
    found = made_exploration()
    many = replace(found, **{name: np.repeat(getattr(found, name), 2000, axis=2) for name in ("finds", "scores", "right")})
    many = replace(many, names=np.repeat(found.names, 2000), finds=np.where(many.finds < 0, -1, many.finds + 23_000))
    of_page = Parts(many, parts(run).pictures, 100, 16)
    kind = of_page.head()["arrays"]["finds"]["type"]
    read = np.frombuffer(of_page.read("finds/0")[0], kind).reshape(100, 2, 6, 8)
    assert np.array_equal(np.where(read < 0, -1, read >> 1), np.moveaxis(many.finds, 2, 0)[:100])


def test_a_sheet_has_the_pictures_of_its_rows(run: Path) -> None:
    content, kind = parts(run).read("picture.tactile/0")
    sheet = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    assert (kind, sheet.shape) == ("image/jpeg", (16, 5 * 16, 3))
    for row in (0, 2, 4):
        assert sheet[8, 16 * row + 8] == pytest.approx(np.array(colour_of("tactile", row)), abs=12)
    assert sheet[8, 16 + 8] == pytest.approx(np.array((232, 232, 228)), abs=12)  # row 1 has no touch image


@pytest.mark.parametrize(
    "name", ["other", "finds", "finds/3", "rank/0", "picture.text/0", "picture.vision", "../x", "a/b/0", ""]
)
def test_there_are_no_other_parts(run: Path, name: str) -> None:
    with pytest.raises(KeyError):
        parts(run).read(name)


def test_a_page_in_one_file_embeds_every_part(run: Path) -> None:
    html = write_page(run).read_text()
    embedded = dict(re.findall(r'data-part="([^"]+)">([^<]*)<', html))
    of_page = parts_of(run, made_exploration(), module.FILE_PART, module.side_of(12))
    assert set(embedded) == set(of_page) and "picture.vision/0" in embedded
    assert all(base64.b64decode(text) == of_page.read(name)[0] for name, text in embedded.items())
    assert "http" not in re.sub(r">[A-Za-z0-9+/=]+<", "><", html).replace("parts/${", "")


def test_pictures_of_few_rows_are_larger() -> None:
    assert [module.side_of(rows) for rows in (0, 12, 1000, 2000)] == [112, 112, 101, 72]


def test_text_of_the_data_cannot_end_a_script(run: Path) -> None:
    found = made_exploration()
    script = "</script><script>alert(1)</script>"
    found.captions[:] = script[: int(found.captions.dtype.itemsize / 4)]
    found.levels["hue"] = np.array([script, "<!--", "b"])
    found.save(run)
    html = write_page(run).read_text()
    assert script not in html
    head = re.search(r'<script id="explore-head"[^>]*>(.*?)</script>', html, re.S)
    assert head is not None and json.loads(head[1])["factors"][0]["levels"][0] == script


def test_without_pictures_rows_have_names(tmp_path: Path) -> None:
    run = write_explored_run(tmp_path / "run", modalities=("force", "sound"), files=False)
    of_page = parts_of(run, made_exploration(modalities=("force", "sound"), files=False), 100, 16)
    assert [m["pictures"] for m in of_page.head()["modalities"]] == [False, False]
    assert not [name for name in of_page if name.startswith("picture")]
    assert 'id="explore"' in write_page(run).read_text()


def test_pictures_that_are_gone_become_names(run: Path) -> None:
    (run / "pictures").rename(run / "moved")
    of_page = parts_of(run, made_exploration(), 100, 16)
    assert not of_page.pictures.modalities


def test_runs_that_cannot_be_explored_keep_their_tables(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_page(write_run(tmp_path / "plain")).read_text()
    assert "By factor" in plain and 'id="explore"' not in plain
    monkeypatch.setattr(module, "FILE_ROWS", 11)
    large = write_page(run).read_text()
    assert f"With 12 test rows, run tvl-align explore {run} to explore them." in " ".join(large.split())
    assert 'id="explore"' not in large and "data-part" not in large


def test_the_command_writes_a_small_page_and_prints_its_path(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.run([str(run)])
    assert capsys.readouterr().out.strip() == str((run / "report.html").resolve())


def test_the_command_names_what_is_missing(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match="has no results.json; run tvl-align evaluate"):
        command.run([str(tmp_path)])
    (run / NAME).unlink()
    with pytest.raises(UserError, match="has no explore.npz; run tvl-align evaluate"):
        command.run([str(run)])
    with pytest.raises(UserError, match="--port 70000 is out of range"):
        command.run([str(run), "--port", "70000"])
    with pytest.raises(UserError, match="there is no folder nowhere; give --datasets_dir"):
        write_page(write_explored_run(tmp_path / "other"), Path("nowhere"))


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "an array", "text"])
def test_a_damaged_exploration_is_named(run: Path, damage: str) -> None:
    path = run / NAME
    whole = path.read_bytes()
    flipped = bytearray(whole)
    for i in range(200, len(whole) - 4000, 97):  # in the compressed arrays, not in the directory at the end
        flipped[i] ^= 255
    array = io.BytesIO()
    np.save(array, np.ones(3))
    contents = {"empty": b"", "cut": whole[:-100], "flipped": bytes(flipped), "an array": array.getvalue(), "text": b"no"}
    path.write_bytes(contents[damage])
    with pytest.raises(UserError, match=r"explore\.npz is damaged; run tvl-align evaluate .*run again\.$"):
        command.run([str(run)])
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("results.json", "{", r"results\.json is damaged; run tvl-align evaluate"),
        ("results.json", "[]", r"results\.json is from an older version; run tvl-align evaluate"),
        ("metrics.jsonl", "{", r"metrics\.jsonl is damaged; give the whole run folder"),
        ("metrics.jsonl", None, r"has no metrics\.jsonl, which training writes; give the whole run folder"),
    ],
)
def test_a_damaged_run_is_named(run: Path, name: str, content: str | None, said: str) -> None:
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(UserError, match=said):
        command.run([str(run)])
    assert not (run / "report.html").exists()


def test_a_page_without_its_pictures_says_where_they_were(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "pictures").rename(run / "moved")
    assert "picture.vision/0" not in write_page(run).read_text()
    assert f"no pictures of the test rows are in {run}/pictures; give --datasets_dir" in caplog.text
    caplog.clear()
    assert "picture.vision/0" in write_page(run, run / "moved").read_text()
    assert not caplog.text


@pytest.fixture
def server(run: Path) -> Iterator[PageServer]:
    of_page = parts(run, rows=1)
    with PageServer(render_page(run, made_exploration(), of_page, embed=False), of_page, port=0) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_a_server_gives_the_page_and_its_parts(server: PageServer, run: Path) -> None:
    def get(path: str) -> tuple[str, bytes]:
        with urllib.request.urlopen(server.address + path, timeout=30) as answer:
            return answer.headers["Content-Type"], answer.read()

    assert server.server_address[0] == "127.0.0.1"
    kind, html = get("")
    assert (
        kind == "text/html; charset=utf-8" and b'id="explore"' in html and b"data-part" not in html.split(b"<script type")[0]
    )
    of_page = parts(run, rows=1)
    for name in ("rank", "map.pooled.text", "finds/7", "picture.vision/11"):
        assert get(f"parts/{name}") == of_page.read(name)[::-1]
    for path in ("parts/finds/12", "parts/../results.json", "results.json", "parts/%2e%2e/results.json"):
        with pytest.raises(urllib.error.HTTPError, match="404") as missing:
            get(path)
        missing.value.close()


def test_a_taken_port_is_named(server: PageServer) -> None:
    with pytest.raises(UserError, match=f"port {server.server_port} is taken.*give another --port"):
        PageServer("", server.parts, server.server_port)
