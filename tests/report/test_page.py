"""Reports where the ceiling of a factor is at chance level, so that its normalised score is undefined."""

import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tvl_align.report.compare import write_comparison
from tvl_align.report.page import print_table, score_text, write_page
from tvl_align.report.plots import GROUPS, _show_scores

HUE = {"ownership": ["vision"], "chance": 20.0, "stage1": 80.0} | dict.fromkeys(GROUPS, 50.0)
WOOD = {"ownership": ["vision", "tactile"], "chance": 100.0, "stage1": 100.0} | dict.fromkeys(GROUPS, 100.0)


def write_run(folder: Path, seed: int) -> Path:
    """A run folder with results of one pair and of two factors, of which `wood` has a ceiling at chance level."""
    accuracy = {"acc1": 10.0, "acc5": 30.0, "chance1": 1.0, "stage1_acc1": 9.0, "stage1_acc5": 28.0}
    prefix = {"acc1": 10.0, "shared_retention": math.nan, "reconstruction": 40.0}
    results: dict[str, Any] = {
        "method": "toy",
        "version": "1",
        "seed": seed,
        "split": "test",
        "gallery": 100,
        "checkpoint": "checkpoint.pth",
        "root": str(folder),
        "examples": [],
        "confusions": [],
        "retrieval": {"tactile_vision": accuracy},
        "controls": {"shuffled_acc1": 1.0, "untrained_acc1": 2.0},
        "factors": {"vision": {"hue": HUE, "wood": WOOD}},
        "summary": {"shared_retention": math.nan, "unique_leak": 50.0},
        "prefix": [{"k": 1, "pairs": {"tactile_vision": 10.0}, "reconstructions": {"vision": 40.0}} | prefix],
        "run": {"store": "s", "rows": {"test": 100}, "command": "c", "commit": "d", "folder": "f", "processes": 1},
    }
    metrics = {"epoch": 0, "train_total_loss": 2.0, "val_total_loss": 3.0, "val_tactile_vision_acc1": 9.0}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text(json.dumps(metrics | {"val_tactile_vision_chance1": 1.0}) + "\n")
    return folder


def words(document: str) -> set[str]:
    return set(re.findall(r"\w+", re.sub(r"data:image/png;base64,[^\"]+", "", document)))


def test_a_ceiling_at_chance_is_named_and_never_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / f"run-{seed}", seed) for seed in (0, 1)]
    page = write_page(runs[0]).read_text()
    assert page.count("<td>ceiling at chance</td>") == 1  # shared retention
    assert "<td>50</td>" in page
    print_table(runs[0] / "results.json")
    table = capsys.readouterr().out
    assert re.search(r"shared retention \(normalised\) +│ +ceiling at chance", table)
    html = write_comparison(runs, tmp_path / "out", "command").read_text()
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert html.count("<td>ceiling at chance</td>") == 1
    assert f"| vision: wood | vision, tactile |{' ceiling at chance |' * 4}" in markdown
    assert "| 1 | 10.0 ± 0.0 | ceiling at chance | 40.0 ± 0.0 |" in markdown
    assert all("nan" not in words(document) for document in (page, table, html, markdown))


def test_normalised_scores_as_text() -> None:
    assert [score_text(score) for score in (49.6, -3.0, math.nan)] == ["50", "-3", "ceiling at chance"]


def test_the_heat_map_leaves_a_cell_without_a_score_grey_and_empty() -> None:
    figure, axes = plt.subplots()
    _show_scores(axes, np.array([[50.0, math.nan], [math.nan, 120.0]]))
    assert [text.get_text() for text in axes.texts] == ["50", "120"]
    image = axes.images[0]
    figure.canvas.draw()
    opaque = image.to_rgba(image.get_array())[..., 3]
    assert opaque.tolist() == [[1, 0], [0, 1]]
    red, green, blue, _ = axes.get_facecolor()
    assert red == green == blue
    plt.close(figure)
