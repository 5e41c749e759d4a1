"""python docs/pictures.py DEMO: draws docs/images/search.png, what one touch image of the synthetic demo finds.

The touch image is the first test row, not a chosen one. Below each photo are its shared factors, those of the touch image in
bold. The partner, the photo of the same sample, is framed if it is among the nearest.
"""

import csv
import sys
import textwrap
from pathlib import Path

import matplotlib
import torch
from PIL import Image

import tvl_align
from tvl_align.data.tvl import Row, read_tvl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHARED = ("texture", "coarseness", "profile")  # factors that photo and touch image both show
TEAL, RED, GREY = "#00897b", "#c2513f", "#607d8b"
PHOTOS, CAPTIONS = 5, 4


def draw(demo: Path, out: Path, query: int = 0) -> None:
    """Draw what test row `query` of a demo folder finds among the photos and captions of all test rows."""
    registers = tvl_align.load(demo / "runs" / "base", device="cpu")
    split = registers.open_store().splits["test"]
    tokens = registers.embed_split(split)
    world = demo / "world"
    rows = {row.name: row for row in read_tvl(world, ("ssvtp", "hct")).test}
    with open(world / "factors.csv", newline="", encoding="utf-8") as file:
        factors = {line["vision"]: line for line in csv.DictReader(file)}
    found = [rows[name] for name in split.names]
    touch = tokens.pooled["tactile"][query]
    photos, texts = (tokens.pooled[m] @ touch for m in ("vision", "text"))
    rank = int((photos > photos[query]).sum()) + 1

    figure = plt.figure(figsize=(11, 3.1), dpi=120)
    grid = figure.add_gridspec(
        1, PHOTOS + 2, width_ratios=[*[1] * (PHOTOS + 1), 1.7], left=0.01, right=0.995, top=0.8, bottom=0.31
    )
    own = factors[found[query].name]
    show(figure.add_subplot(grid[0]), world / str(found[query].tactile), "touch image", own, own, RED)
    for i, row in enumerate(photos.topk(PHOTOS).indices.tolist()):
        axis = figure.add_subplot(grid[1 + i])
        title = f"photo {i + 1}: {photos[row]:.2f}" + (", partner" if row == query else "")
        show(axis, world / str(found[row].vision), title, factors[found[row].name], own, TEAL if row == query else None)
    write_captions(figure.add_subplot(grid[-1]), found, texts)
    figure.text(
        0.01, 0.95, "One touch image of the synthetic test set, and what it finds", fontsize=12, weight="bold", va="center"
    )
    note = f"""Synthetic data: photos and touch images are renderings. The query is the first test row, not a chosen one.
Its own photo is number {rank} of {len(photos):,}. Numbers: cosine similarities. Bold: the same factor as the touch image."""
    figure.text(0.01, 0.06, note, fontsize=8.5, color=GREY, va="center")
    figure.savefig(out)
    plt.close(figure)


def show(axis: plt.Axes, path: Path, title: str, factors: dict[str, str], own: dict[str, str], frame: str | None) -> None:
    """A picture, its title, and its shared factors; those equal to `own` in bold."""
    picture = Image.open(path)
    side = min(picture.size)
    axis.imshow(picture.crop((0, 0, side, side)))  # of a tall photo, the part under the sensor
    axis.set_title(title, fontsize=9)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=frame is not None, edgecolor=frame, linewidth=3)
    for i, name in enumerate(SHARED):
        same = factors[name] == own[name]
        axis.text(
            0.5, -0.06 - 0.125 * i, factors[name], transform=axis.transAxes, ha="center", va="top", fontsize=8.5,
            weight="bold" if same else "normal", color="black" if same else GREY,
        )  # fmt: skip


def write_captions(axis: plt.Axes, rows: list[Row], scores: torch.Tensor) -> None:
    """The nearest captions, each once."""
    axis.axis("off")
    axis.set_title("nearest captions", fontsize=9, loc="left")
    order = scores.argsort(descending=True).tolist()
    captions = dict.fromkeys(f"{scores[i]:.2f}  {rows[i].caption}" for i in order if rows[i].caption)
    lines = [textwrap.fill(text, 34, subsequent_indent="         ") for text in list(captions)[:CAPTIONS]]
    axis.text(0, 0.97, "\n\n".join(lines), fontsize=8.5, va="top", transform=axis.transAxes)


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"), Path(__file__).parent / "images" / "search.png")
