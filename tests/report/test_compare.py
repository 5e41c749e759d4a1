"""Comparisons of runs: means, paired differences over stores and seeds, floors; runs that are not comparable are refused."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_results import colour_of, factor, made_exploration, made_results, write_explored_run, write_run
from PIL import Image
from scipy import stats

from tvl_align.report.compare import (
    by_method,
    leaderboard,
    load_results,
    mean_factors,
    retrieval_errors,
    write_comparison,
)
from tvl_align.synthetic.contest import ContestConfig, contest, worlds_of
from tvl_align.synthetic.demo import run_name, with_options
from tvl_align.system.console import UserError


def several(folder: Path, methods: dict[str, list[float]], **changes: object) -> list[Path]:
    """A run for each Acc@1 of each method: stores a and b, each with seeds 0, 1, ..."""
    runs = []
    for method, scores in methods.items():
        for i, acc1 in enumerate(scores):
            where = {"store": "ab"[i % 2], "seed": i // 2, "acc1": acc1, "method": method}
            runs.append(write_run(folder / f"{method}-{i}", **(where | changes)))  # type: ignore[arg-type]
    return runs


def board(runs: list[Path]) -> dict[str, dict[str, str]]:
    """{method: {column: cell}}, with ** around bold ones, and the differences as "<column> difference"."""
    made = leaderboard(by_method(load_results(runs)))
    found = {}
    for i, row in enumerate(made.rows):
        found[row[0]] = {
            c: f"**{x}**" if (i, j) in made.bold else x for j, (c, x) in enumerate(zip(made.columns, row, strict=True))
        }
    for row in made.differences:
        found[row[0]] |= {f"{c} difference": x for c, x in zip(made.columns[3:], row[1:], strict=True)}
    return found


PAIR = "tactile-vision Acc@1"


def test_means_and_paired_differences_over_stores_and_seeds(tmp_path: Path) -> None:
    good, near, bad = [40.0, 60.0, 42.0, 62.0], [39.0, 61.0, 43.0, 60.0], [35.5, 55.0, 37.0, 57.0]
    found = board(several(tmp_path, {"bad": bad, "near": near, "good": good}))
    assert list(found)[:3] == ["good v1", "near v1", "bad v1"]  # best first
    assert found["good v1"][PAIR] == f"51.0 ± {np.std(good, ddof=1):.1f}"  # not bold: near does not differ
    assert (found["good v1"]["stores"], found["good v1"]["seeds"]) == ("2", "0, 1")
    assert found["good v1"][f"{PAIR} difference"] == "best"
    assert found["near v1"][f"{PAIR} difference"] == "none"
    stores = np.subtract(bad, good).reshape(2, 2).mean(0)  # seeds of a store are not independent
    low, high = stats.t.interval(0.95, 1, stores.mean(), stats.sem(stores))
    assert found["bad v1"][f"{PAIR} difference"] == f"{stores.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def test_the_best_is_bold_if_all_others_differ(tmp_path: Path) -> None:
    """The spread over worlds is large, that of the differences small."""
    found = board(several(tmp_path, {"good": [40.0, 60.0, 42.0, 62.0], "bad": [35.0, 55.5, 37.0, 57.0]}))
    assert found["good v1"][PAIR].startswith("**51.0")
    assert not found["bad v1"][PAIR].startswith("**")


def test_other_options_are_a_method_of_their_own(tmp_path: Path) -> None:
    """Their runs are not averaged with those of the first options, and the options are in the name."""
    knobs = {"units": 24, "linear": True}
    changes = {"plain": {}, "wide": {"units": 32}, "bare": {"units": 32, "linear": False}}
    runs = [
        write_run(tmp_path / f"{name}-{seed}", seed=seed, acc1=float(10 * i + seed), knobs=knobs | changed)
        for i, (name, changed) in enumerate(changes.items())
        for seed in (0, 1)
    ]
    found = board(runs)
    for name, mean in {"toy v1": "0.5", "toy v1 --units 32": "10.5", "toy v1 --units 32 --no_linear": "20.5"}.items():
        assert found[name][PAIR].strip("*").startswith(f"{mean} ±"), name


def test_options_follow_the_name_of_a_method() -> None:
    name, knobs = with_options("base --no_linear --units 32")
    assert (name, knobs.linear, knobs.units, knobs.register_token_dim) == ("base", False, 32, 256)
    assert with_options("cursor")[1].register_token_dim == 256
    assert run_name("base --no_linear --units 32") == "base-no_linear-units-32"
    assert run_name("my.package:MINE --lr 0.1") == "MINE-lr-0.1"
    with pytest.raises(UserError, match="unknown method 'bse'"):
        with_options("bse --units 32")
    with pytest.raises(SystemExit):
        with_options("base --unit 32")


def test_less_leak_is_better(tmp_path: Path) -> None:
    runs = []
    for method, leaks in {"leaky": (30.0, 31.0), "tight": (20.0, 20.5)}.items():
        runs += [
            write_run(tmp_path / f"{method}{i}", method=method, store="ab"[i], unique_leak=x) for i, x in enumerate(leaks)
        ]
    found = board(runs)
    assert found["tight v1"]["unique leak"].startswith("**20.2")
    assert found["tight v1"]["unique leak difference"] == "best"
    assert found["leaky v1"]["unique leak difference"] == "+10.2 [+7.1, +13.4]"
    assert found["leaky v1"]["shared from complementary (R2)"] == "0.40 ± 0.00"


def test_one_store_has_no_interval_and_nothing_is_bold(tmp_path: Path) -> None:
    """However many seeds it has; without a common seed there is no difference either."""
    runs = [
        write_run(tmp_path / f"{m}{i}", method=m, seed=i, acc1=a + i)
        for m, a in (("good", 40.0), ("bad", 10.0))
        for i in (0, 1)
    ]
    runs.append(write_run(tmp_path / "late", method="late", seed=2, acc1=5.0))
    found = board(runs)
    assert found["bad v1"][f"{PAIR} difference"] == "-30.0"
    assert found["late v1"][f"{PAIR} difference"] == "-"
    assert found["good v1"][PAIR] == "40.5 ± 0.7"  # not bold


def test_differences_are_between_runs_of_the_same_store_and_seed(tmp_path: Path) -> None:
    """The order of the runs does not matter, and a run without a partner is left out of the difference and named."""
    runs = several(tmp_path, {"good": [40.0, 60.0, 42.0, 62.0], "bad": [35.0, 55.0, 37.0]})
    found = board(runs[::-1])
    assert found["bad v1"][f"{PAIR} difference"] == "-5.0 [-5.0, -5.0]"
    write_comparison(runs, tmp_path / "out", "command")
    assert "Without some of the stores or seeds: bad v1." in (tmp_path / "out" / "report.md").read_text()


def test_runs_on_shuffled_pairs_are_a_control(tmp_path: Path) -> None:
    """It is a method of its own, stands last, and is never the best, not even in leak."""
    runs = [write_run(tmp_path / f"run{i}", seed=i, acc1=20.0 + i) for i in range(2)]
    runs += [write_run(tmp_path / f"c{i}", seed=i, acc1=50.0 - i, unique_leak=1.0 + i, shuffle_pairs=True) for i in range(2)]
    found = board(runs)
    assert list(found)[:2] == ["toy v1", "toy v1, shuffled pairs"]
    assert found["toy v1"][f"{PAIR} difference"] == found["toy v1"]["unique leak difference"] == "best"
    assert found["toy v1, shuffled pairs"][PAIR] == "49.5 ± 0.7"


def test_the_untrained_floor_is_not_that_of_controls(tmp_path: Path) -> None:
    """Closed forms of shuffled pairs know nothing of the partners."""
    runs = [write_run(tmp_path / "run"), write_run(tmp_path / "control", shuffle_pairs=True)]
    for path, acc1 in zip(runs, (30.0, 0.5), strict=True):
        results = json.loads((path / "results.json").read_text())
        results["retrieval"]["tactile_vision"]["untrained_acc1"] = acc1
        (path / "results.json").write_text(json.dumps(results))
    assert board(runs)["untrained, mean of methods"][PAIR] == "30.0"


def test_the_time_of_training_is_a_column(tmp_path: Path) -> None:
    slow, quick = (write_run(tmp_path / name, method=name) for name in ("slow", "quick"))
    (slow / "times.jsonl").write_text(
        '{"epoch": 0, "train": 40.5, "validate": 9}\n{"epoch": 1, "train": 30, "validate": 9}\n'
    )
    found = board([slow, quick])
    assert (found["slow v1"]["training, s"], found["quick v1"]["training, s"]) == ("70", "")


def test_floors_and_ceilings(tmp_path: Path) -> None:
    found = board(several(tmp_path, {"toy": [40.0, 60.0]}))
    rows = ("Stage 1, frozen", "untrained, mean of methods", "oracle", "chance")
    assert [found[name][PAIR] for name in rows] == ["3.5", "2.5", "66.0", "1.25"]
    assert found["untrained, mean of methods"]["unique leak"] == "33.0"
    assert found["oracle"]["unique leak"] == ""


def test_factors_are_averaged_and_a_ceiling_at_chance_hides_one() -> None:
    other = made_results()
    other["factors"]["vision"]["hue"] = factor(["vision"], overlapping={"linear": 20.0, "mlp": 80.0})
    other["factors"]["tactile"] = {}
    found = mean_factors([made_results(), other])
    assert found["vision: hue"]["overlapping"] == pytest.approx(75)  # of 50 and 100
    assert found["vision: wood"]["overlapping"] is None
    assert found["tactile: shape"]["overlapping"] is None  # left out in one run


def test_the_page_and_its_markdown_say_the_same(tmp_path: Path) -> None:
    runs = several(tmp_path, {"<b>good": [40.0, 60.0, 42.0, 62.0], "bad": [35.0, 55.0, 37.0, 57.5]})
    html = write_comparison(runs, tmp_path / "out", "the <command>").read_text()
    text = (tmp_path / "out" / "report.md").read_text()
    head = "| method | stores | seeds | tactile-vision Acc@1 | unique retention | unique leak |"
    assert head in text
    row = next(line for line in text.splitlines() if line.startswith("| <b>good v1 | 2 | 0, 1 |"))
    assert row.split(" | ")[3] == "**51.0 ± 11.6**"
    assert "| 51.0" not in html and "<b>51.0 ± 11.6</b>" in html
    assert "| <b>good v1 | unique leak | 75.0 ± 0.0 | 11.0 ± 0.0 | 22.0 ± 0.0 | 33.0 ± 0.0 | 44.0 ± 0.0 |" in text
    assert f"| vision: wood | vision, tactile |{' ceiling at chance |' * 4}" in text
    assert "| 1 | 5.0 ± 0.0 |  |  | 61.0 ± 0.0 | 40.0 ± 0.0 |" in text
    assert "| 2 | 10.0 ± 0.0 | 5.0 ± 0.0 |  | 61.0 ± 0.0 | 40.0 ± 0.0 |" in text
    assert "feature store a, b;" in text
    assert "&lt;b&gt;good v1" in html and "<b>good" not in html
    assert "the &lt;command&gt;" in html
    assert html.count("data:image/png;base64,") == 3
    assert "http" not in html
    for document in (re.sub(r"base64,[^\"]+", "", html), text):
        assert not {"nan", "None"} & set(re.findall(r"\w+", document))


def test_retrieval_errors_are_pictures_of_the_first_wrong_finds(tmp_path: Path) -> None:
    """Row by row: the touch images, their photos, and the photos that were found first; on the page as one JPEG a method."""
    runs = [write_explored_run(tmp_path / name, results={"method": name}) for name in ("one", "other")]
    found = made_exploration()
    d = [[found.modalities[i] for i in pair] for pair in found.directions.tolist()].index(["tactile", "vision"])
    first, right = found.finds[-1, d, :, 0], found.right[-1, d, :, 0]
    wrong = [row for row in range(len(found)) if first[row] >= 0 and not right[row]][:8]
    assert len(wrong) == 8 and 1 not in wrong  # row 1 has no touch image
    made = retrieval_errors({**made_results(), "folder": str(runs[0]), "root": str(runs[0] / "pictures")})
    assert made is not None
    pixels = np.asarray(Image.open(io.BytesIO(made)))
    assert pixels.shape == (3 * 112, 8 * 112, 3)
    for i, row in enumerate(wrong):
        shown = colour_of("tactile", row), colour_of("vision", row), colour_of("vision", int(first[row]))
        for line, colour in enumerate(shown):
            assert np.abs(pixels[56 + 112 * line, 56 + 112 * i].astype(int) - colour).max() <= 4
    html = write_comparison(runs, tmp_path / "out", "command").read_text()
    assert html.count("data:image/jpeg;base64,") == 2
    (runs[0] / "explore.npz").unlink()
    assert write_comparison(runs, tmp_path / "out", "command").read_text().count("data:image/jpeg;base64,") == 1


def test_a_script_in_a_name_is_text_on_the_page(tmp_path: Path) -> None:
    script = "<script>alert(1)</script>"
    runs = several(tmp_path, {"good": [40.0, 60.0]})
    results = json.loads((runs[0] / "results.json").read_text())
    results["method"] = script
    results["run"]["command"] = f"{script} --output_dir <b>run"
    (runs[0] / "results.json").write_text(json.dumps(results))
    page = write_comparison(runs, tmp_path / "out", script).read_text()
    assert "&lt;script&gt;" in page and "&lt;b&gt;run" in page
    assert script not in page and "<b>run" not in page


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"gallery": 7}, "different sets of test rows"),
        ({"retrieval": {}}, "different pairs"),
        ({"factors": {}}, "different label columns"),
        ({"probe_rows": {"split": "val", "rows": 80}}, "different probe rows"),
        ({"run": made_results()["run"] | {"rows": {"train": 1}}}, "different splits"),
    ],
)
def test_runs_that_cannot_be_ranked_are_refused(tmp_path: Path, change: dict[str, object], what: str) -> None:
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", **change)]
    with pytest.raises(UserError, match=what):
        load_results(runs)


def test_other_stores_may_have_other_numbers_of_training_rows(tmp_path: Path) -> None:
    run = made_results()["run"]
    world = write_run(
        tmp_path / "world", run=run | {"rows": {"train": 1}}, store="t", probe_rows={"split": "probe", "rows": 9}
    )
    same = write_run(tmp_path / "same", store="t")
    assert len(load_results([write_run(tmp_path / "one"), world])) == 2
    with pytest.raises(UserError, match="world and .*same were made on different splits"):
        load_results([tmp_path / "one", world, same])


def test_a_factor_that_was_left_out_is_no_mismatch(tmp_path: Path) -> None:
    results = made_results()
    factors = results["factors"] | {"tactile": {}}
    left_out = {"tactile": {"fur": "few", "shape": "few"}}
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1, factors=factors, left_out=left_out)]
    assert len(load_results(runs)) == 2


def test_missing_and_old_results_are_refused(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    with pytest.raises(UserError, match="at least two different runs"):
        load_results([one, one])
    old = made_results()
    del old["label_free"]
    (two / "results.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="older version; run tvl-align evaluate .*two again"):
        load_results([one, two])
    (two / "results.json").unlink()
    with pytest.raises(UserError, match=r"has no results\.json; run tvl-align evaluate .* first"):
        load_results([one, two])


def test_worlds_of_a_contest_have_seeds_and_folders_of_their_own(tmp_path: Path) -> None:
    one, three = ContestConfig(tmp_path, seed=4), ContestConfig(tmp_path, seed=4, worlds=3)
    assert [(w.seed, w.out) for w in worlds_of(one)] == [(4, tmp_path)]
    assert [(w.seed, w.out) for w in worlds_of(three)] == [(s, tmp_path / f"world-{s}") for s in (4, 5, 6)]
    with pytest.raises(UserError, match="--worlds 0 is out of range"):
        worlds_of(replace(one, worlds=0))


def test_only_missing_runs_and_their_worlds_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr("tvl_align.synthetic.contest.run_in_processes", lambda jobs, *_: calls.append(sorted(jobs)))
    monkeypatch.setattr("tvl_align.synthetic.contest.write_comparison", lambda *_: tmp_path / "report.html")
    for run in ("closed-0", "closed-0-shuffled-pairs"):
        (tmp_path / "world-0" / "runs" / run).mkdir(parents=True)
        (tmp_path / "world-0" / "runs" / run / "results.json").touch()
    contest(ContestConfig(tmp_path, worlds=2, methods=("closed",), seeds=(0,)))
    made, world = (
        [f"{tmp_path}/world-1/runs/closed-0", f"{tmp_path}/world-1/runs/closed-0-shuffled-pairs"],
        tmp_path / "world-1",
    )
    assert calls == [[str(world)], made]


@pytest.mark.slow
def test_a_contest_ends_in_a_report(once: Callable[..., Path]) -> None:
    """One method with two seeds, on a tiny data set: real results make a page, and seeds share the store and differ."""

    def make(out: Path) -> None:
        small = {"train": 160, "test": 40, "pretrain_epochs": 1, "epochs": 1, "views": 1, "probe_rows": 60, "probe_steps": 5}
        contest(ContestConfig(out, methods=("cursor",), seeds=(0, 1), jobs=1, **small))

    folder = once("contest", make)
    first, second = (json.loads((folder / "runs" / f"cursor-{s}" / "results.json").read_text()) for s in (0, 1))
    assert first["run"]["store"] == second["run"]["store"]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["retrieval"] != second["retrieval"]
    html, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for document in (html, text):
        for part in (
            "cursor",
            "Stage 1, frozen",
            "oracle",
            "untrained, mean of methods",
            "shuffled pairs",
            "0, 1",
            "±",
            "make compare",
        ):
            assert part in document, part
        assert "ynthetic data" in document
    assert html.count("data:image/png;base64,") == 3  # Acc@1 and retention against k, curves
    assert html.count("data:image/jpeg;base64,") == 2  # retrieval errors of the method and of its control
