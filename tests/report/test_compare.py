"""Reports of one run and of several runs; runs that are not comparable are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tvl_align.report.compare import load_results, write_comparison
from tvl_align.synthetic.contest import ContestConfig, contest
from tvl_align.system.console import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def folder(once: Callable[..., Path]) -> Path:
    """Two methods, one of them with two seeds, on a tiny data set."""

    def make(out: Path) -> None:
        small = {
            "train": 160,
            "test": 40,
            "pretrain_epochs": 1,
            "epochs": 1,
            "views": 1,
            "probe_rows": 60,
            "probe_steps": 20,
        }
        contest(ContestConfig(out, methods=("cursor", "disentangled"), seeds=(0,), **small))
        contest(ContestConfig(out, methods=("cursor",), seeds=(0, 1), **small))

    return once("contest", make)


def runs(folder: Path) -> list[Path]:
    return sorted((folder / "runs").glob("*-[0-9]"))


def test_the_page_and_its_markdown(folder: Path, tmp_path: Path) -> None:
    page = write_comparison(runs(folder), tmp_path, "the command")
    html, text = page.read_text(), (tmp_path / "report.md").read_text()
    for document in (html, text):
        for part in (
            "cursor_flux_talk_register_tokens v1",
            "stage2_disentangled v2",
            "Stage 1, frozen",
            "chance",
            "0, 1",
            "±",
        ):
            assert part in document, part
        assert "the command" in document
        assert "ynthetic data" in document
    assert html.count("data:image/png;base64,") >= 4
    assert "http" not in html
    assert text.count("tactile: depth") == 2


def test_seeds_share_the_store_and_differ(folder: Path) -> None:
    first, second = (json.loads((folder / "runs" / f"cursor-{s}" / "results.json").read_text()) for s in (0, 1))
    assert first["run"]["store"] == second["run"]["store"]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["retrieval"] != second["retrieval"]


def test_runs_that_cannot_be_ranked_are_refused(folder: Path, tmp_path: Path) -> None:
    one, two = runs(folder)[:2]
    other = tmp_path / "other"
    shutil.copytree(two, other)
    results = json.loads((other / "results.json").read_text())
    for change, what in (
        ({"run": results["run"] | {"store": "f" * 16}}, "different feature stores"),
        ({"run": results["run"] | {"rows": {"train": 1}}}, "different splits"),
        ({"gallery": 7}, "different sets of test rows"),
    ):
        (other / "results.json").write_text(json.dumps(results | change))
        with pytest.raises(UserError, match=what):
            load_results([one, other])
    (other / "results.json").unlink()
    with pytest.raises(UserError, match=r"has no results\.json; run tvl-align evaluate .* first"):
        load_results([one, other])
    with pytest.raises(UserError, match="at least two different runs"):
        load_results([one, one])


def test_names_are_escaped(folder: Path, tmp_path: Path) -> None:
    one, two = runs(folder)[:2]
    evil = tmp_path / "evil"
    shutil.copytree(two, evil)
    results = json.loads((evil / "results.json").read_text())
    results["run"]["command"] = "<script>alert(1)</script>"
    (evil / "results.json").write_text(json.dumps(results))
    html = write_comparison([one, evil], tmp_path / "out", "x").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_script_in_a_name_is_text_on_the_page(folder: Path, tmp_path: Path) -> None:
    script = "<script>alert(1)</script>"
    run = tmp_path / "<b>run"
    shutil.copytree(runs(folder)[0], run)
    results = json.loads((run / "results.json").read_text())
    results["method"] = script
    results["run"]["command"] = f"{script} --output_dir {run}"
    (run / "results.json").write_text(json.dumps(results))
    page = write_comparison([run, runs(folder)[1]], tmp_path, script).read_text()
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;run" in page
    assert script not in page
    assert "<b>run" not in page
