"""The report of one run: a self-contained HTML page and tables for the terminal."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvl_align.config import from_plain
from tvl_align.data import tvl
from tvl_align.data.image_options import ImageOptions
from tvl_align.data.pictures import preview
from tvl_align.data.tvl import Row, file_of
from tvl_align.report import tables


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
    strip = _strip(Path(results["root"]), image_options(results), [Row(**row) for row in results["examples"]])
    if strip:
        figures["strip"] = plots.samples(strip)
    urls = {name: as_url(image) for name, image in figures.items()}
    page = fill_template("run.html", r=results, synthetic=is_synthetic(results), tables=tables, **urls)
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


def is_synthetic(results: Mapping[str, Any]) -> bool:
    """True for results on the data folder of a synthetic world."""
    return tvl.is_synthetic(Path(results["root"]))


def image_options(results: Mapping[str, Any]) -> ImageOptions | None:
    """The transforms of the run's images; None for imported features and for runs of earlier versions."""
    images = results["run"].get("features", {}).get("images")
    return from_plain(ImageOptions, images) if images else None


def _strip(root: Path, options: ImageOptions | None, examples: list[Row]) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Photo, touch image and caption of every example row whose image files exist."""
    rows = []
    for row in examples:
        if row.vision and row.tactile and all(file_of(root, path).is_file() for path in (row.vision, row.tactile)):
            rows.append((*preview(root, row, options), row.caption or ""))
    return rows


def print_table(path: Path) -> None:
    """Print the main results of a results.json as tables."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    results = json.loads(path.read_text(encoding="utf-8"))
    console = Console()

    def show(title: str, columns: Sequence[str], rows: tables.Cells) -> None:
        table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)

    title = f"{results['method']} v{results['version']}, seed {results['seed']}"
    title += f", {results['gallery']} {results['split']} rows" + (" (synthetic data)" if is_synthetic(results) else "")
    show(f"{title}, in percent", tables.RETRIEVAL_COLUMNS, tables.retrieval_rows(results))
    shuffled = tables.number(results["controls"]["shuffled_acc1"], 2)
    console.print(
        f"Untrained: random weights with closed forms. Shuffled partners: mean Acc@1 {shuffled}.\n", highlight=False
    )
    if results.get("summary"):
        show("Normalised: 0 = chance, 100 = ceiling", tables.SUMMARY_COLUMNS, tables.summary_rows(results))
    leaks = [(name, tables.leak(results, name)) for name in tables.LEAKS]
    rows = [[name, tables.number(value, 2)] for name, value in leaks]
    show("Leak without labels: R2, 1 = everything", ("read", "strongest probe"), rows)
    named = tables.unreadable(results)
    if named:
        console.print(escape(f"Ceiling at chance, not in the scores: {'; '.join(named)}."), highlight=False)
