"""The report of one run: a self-contained HTML page and tables for the terminal."""

import base64
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvl_align.evaluation.explore_file import NAME, Exploration
from tvl_align.report import tables
from tvl_align.report.parts import Parts
from tvl_align.report.pictures import Pictures
from tvl_align.report.results import image_options, is_synthetic, read_metrics, read_results
from tvl_align.system.console import UserError
from tvl_align.system.files import write_atomically

FILE_ROWS = 2000  # test rows of a page in one file; more are served
FILE_PIXELS = FILE_ROWS * 72**2  # of all pictures of a modality in a file: with fewer rows they are larger
FILE_SIDE, SERVED_SIDE = 112, 224  # most pixels of a side of a picture
FILE_PART = 100  # rows of a part that is embedded
log = logging.getLogger(__name__)


def write_page(run: Path, images: Path | None = None) -> Path:
    """Write report.html into a run folder from its results.json, explore.npz and metrics.jsonl; returns its path.

    The page is self-contained: it loads nothing from the network. It has what there is to explore, if explore.npz exists and
    has no more than FILE_ROWS rows. images: data folder of the pictures; default: the recorded one.
    """
    found = Exploration.load(run) if (run / NAME).is_file() else None
    small = found is not None and len(found) <= FILE_ROWS
    parts = parts_of(run, found, FILE_PART, side_of(len(found)), images) if found is not None and small else None
    write_atomically(run / "report.html", render_page(run, found, parts, embed=True))
    return run / "report.html"


def side_of(rows: int) -> int:
    """Pixels of a side of a picture in a file of so many rows."""
    return min(FILE_SIDE, math.isqrt(FILE_PIXELS // max(1, rows)))


def parts_of(run: Path, found: Exploration, rows: int, side: int, images: Path | None = None) -> Parts:
    """The data of an explorable page. rows, side, images: see `Parts` and `write_page`."""
    return Parts(found, pictures_of(found, read_results(run), images), rows, side)


def pictures_of(found: Exploration, results: Mapping[str, Any], images: Path | None) -> Pictures:
    """The pictures of an exploration, from the recorded data folder or from `images`. Says so if none can be shown; raises
    UserError if `images` is no folder."""
    if images is not None and not images.is_dir():
        raise UserError(f"there is no folder {images}; give --datasets_dir the data folder of the pictures.")
    root = images or Path(results["root"])
    pictures = Pictures(found, root, image_options(results))
    if found.files and not pictures.modalities:
        log.warning("no pictures of the test rows are in %s; give --datasets_dir the folder where they are", root)
    return pictures


def render_page(run: Path, found: Exploration | None, parts: Parts | None, embed: bool) -> str:
    """The page of a run as HTML. parts: what can be explored; embed: in the page, not fetched from a server."""
    from tvl_align.report import plots

    results = read_results(run)
    explorable: dict[str, Any] = {}
    if parts is not None:
        contents = {name: base64.b64encode(parts.read(name)[0]).decode() for name in parts} if embed else {}
        explorable = {"head": parts.head(), "embedded": contents}
    elif found is not None:
        explorable = {"notice": f"With {len(found):,} test rows, run tvl-align explore {run} to explore them."}
    registers = tables.register_table(results["factors"], int(found.overlapping)) if found is not None else None
    return fill_template(
        "run.html",
        r=results,
        synthetic=is_synthetic(results),
        tables=tables,
        registers=registers,
        curves=as_urls(plots.curves(read_metrics(run), list(results["retrieval"]))),
        order=as_urls(plots.against_k(results["prefix"])),
        **explorable,
    )


def fill_template(name: str, **values: Any) -> str:
    """Render a template of tvl_align/report/templates; values are HTML-escaped."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    pages = Environment(loader=PackageLoader("tvl_align.report"), autoescape=select_autoescape())
    return pages.get_template(name).render(shades=tables.shades(), **values)


def as_urls(images: Mapping[str, bytes], kind: str = "png") -> dict[str, str]:
    """Images by name as data URLs. kind: png or jpeg."""
    return {name: f"data:image/{kind};base64,{base64.b64encode(image).decode()}" for name, image in images.items()}


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
        scores = tables.summary_rows(results, bounded=False)
        show("Normalised: 0 = chance, 100 = ceiling", tables.SUMMARY_COLUMNS, scores)
    leaks = [(name, tables.leak(results, name)) for name in tables.LEAKS]
    rows = [[name, tables.number(value, 2)] for name, value in leaks]
    show("Leak without labels: R2, 1 = everything", ("read", "strongest probe"), rows)
    named = tables.unreadable(results)
    if named:
        console.print(escape(f"Ceiling at chance, not in the scores: {'; '.join(named)}."), highlight=False)
    low = tables.above_ceiling(results)
    if low:
        console.print(
            escape(f"Above 102, so the ceiling is too low, or test rows are few: {'; '.join(low)}."), highlight=False
        )
