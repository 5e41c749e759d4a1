"""The report of one run: a self-contained HTML page and a table for the terminal."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from tvl_align.data.transforms import preview
from tvl_align.data.tvl import Row
from tvl_align.evaluation.probes import normalised_score


def write_page(run: Path) -> Path:
    """Write report.html into a run folder from its results.json and metrics.jsonl; returns its path.

    The page is self-contained: it loads nothing from the network.
    """
    from tvl_align.report import plots

    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    figures = {
        "curves": plots.curves(read_metrics(run), list(results["retrieval"])),
        "order": plots.against_k(results["prefix"]),
    }
    if results["factors"]:
        figures["heat"] = plots.heat_map(results["factors"])
    strip = _strip(Path(results["root"]), [Row(**row) for row in results["examples"]])
    if strip:
        figures["strip"] = plots.samples(strip)
    urls = {name: as_url(image) for name, image in figures.items()}
    synthetic = is_synthetic(Path(results["root"]))
    page = fill_template("run.html", r=results, synthetic=synthetic, score_text=score_text, **urls)
    (run / "report.html").write_text(page, encoding="utf-8")
    return run / "report.html"


def fill_template(name: str, **values: Any) -> str:
    """Render a template of tvl_align/report/templates; values are HTML-escaped."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    pages = Environment(loader=PackageLoader("tvl_align.report"), autoescape=select_autoescape())
    return pages.get_template(name).render(**values)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run folder, one dict per epoch, from metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def as_url(image: bytes) -> str:
    """PNG bytes as a data URL."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def is_synthetic(root: Path) -> bool:
    """True for the data folder of a synthetic world."""
    legend = root / "factors.json"
    return legend.is_file() and bool(json.loads(legend.read_text(encoding="utf-8")).get("synthetic"))


def number(value: float | None, digits: int = 1) -> str:
    """A number as text for tables; None is a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def score_text(score: float) -> str:
    """A normalised score as text for tables; it is NaN if the ceiling is not above chance."""
    return "ceiling at chance" if math.isnan(score) else f"{score:.0f}"


def _strip(root: Path, examples: list[Row]) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Photo, touch image and caption of every example row whose image files exist."""
    rows = []
    for row in examples:
        if row.vision and row.tactile and (root / row.vision).is_file() and (root / row.tactile).is_file():
            rows.append((*preview(root, row), row.caption or ""))
    return rows


def print_table(path: Path) -> None:
    """Print the main results of a results.json as a table."""
    from rich.console import Console
    from rich.table import Table

    results = json.loads(path.read_text(encoding="utf-8"))
    synthetic = is_synthetic(Path(results["root"]))
    title = f"{results['method']} v{results['version']}, seed {results['seed']}"
    title += f", {results['gallery']} {results['split']} rows" + (" (synthetic data)" if synthetic else "")
    table = Table(title=title, title_justify="left")
    for column in ("in percent", "registers", "Stage 1", "chance"):
        table.add_column(column, justify="left" if column == "in percent" else "right")
    for pair, n in results["retrieval"].items():
        for k in (1, 5):
            chance = f"{n['chance1']:.2f}" if k == 1 else ""
            table.add_row(f"{pair.replace('_', '-')} Acc@{k}", f"{n[f'acc{k}']:.1f}", number(n[f"stage1_acc{k}"]), chance)
    for name, value in results.get("summary", {}).items():
        table.add_row(name.replace("_", " ") + " (normalised)", score_text(value), "100", "0")
    if results["factors"]:
        lowest, name = min(
            (normalised_score(entry["stage1"], entry["chance"]), f"{modality} {factor}")
            for modality, factors in results["factors"].items()
            for factor, entry in factors.items()
        )
        table.add_row(f"lowest ceiling: {name}", "", score_text(lowest), "0")
    table.add_row("shuffled partners Acc@1", f"{results['controls']['shuffled_acc1']:.2f}", "", "")
    Console().print(table)
