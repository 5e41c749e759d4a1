"""Figures of results, as PNG bytes."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from tvl_align.report.tables import GROUPS, entries, plain, score

matplotlib.use("Agg")

COLOURS = {"tactile_vision": "#c44e52", "tactile_text": "#4c72b0", "text_vision": "#55a868"}


def png(figure: Figure) -> bytes:
    """Render and close a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def curves(metrics: Sequence[Mapping[str, Any]], pairs: Sequence[str]) -> bytes:
    """Loss and Acc@1 on the full validation split per epoch; the chance level is dotted."""
    epochs = [m["epoch"] + 1 for m in metrics]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
    left.plot(epochs, [m["train_total_loss"] for m in metrics], label="train (within batches)", color="#888888")
    left.plot(epochs, [m["val_total_loss"] for m in metrics], label="validation (full split)", color="black")
    left.set(xlabel="epoch", ylabel="total loss")
    left.legend(frameon=False)
    pairs = [pair for pair in pairs if f"val_{pair}_acc1" in metrics[0]]
    for pair in pairs:
        colour = COLOURS.get(pair)
        right.plot(epochs, [m[f"val_{pair}_acc1"] for m in metrics], label=pair.replace("_", "-"), color=colour)
        right.axhline(metrics[-1][f"val_{pair}_chance1"], color=colour, linestyle=":", linewidth=1)
    right.set(xlabel="epoch", ylabel="validation Acc@1 (%)", ylim=(0, None))
    if pairs:
        right.legend(frameon=False)
    return png(figure)


def against_k(prefixes: Sequence[Mapping[str, Any]]) -> bytes:
    """Acc@1 with the 95% interval of its mean, shared retention and reconstruction error against the kept registers."""
    ks = [p["k"] for p in prefixes]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.2))
    for pair in prefixes[0]["pairs"]:
        scores = [p["pairs"][pair] for p in prefixes]
        left.plot(ks, scores, marker="o", label=pair.replace("_", "-"), color=COLOURS.get(pair), linewidth=1)
    if prefixes[0]["pairs"]:
        mean = np.array([[p["acc1"], p["low"], p["high"]] for p in prefixes])
        left.plot(ks, mean[:, 0], color="black", label="mean, 95% interval")
        left.fill_between(ks, mean[:, 1], mean[:, 2], color="black", alpha=0.15, linewidth=0)
        left.legend(frameon=False)
    left.set(xlabel="registers kept", ylabel="test Acc@1 (%)", xticks=ks, ylim=(0, None))
    if prefixes[0]["shared_retention"] is not None:
        middle.plot(ks, [p["shared_retention"] for p in prefixes], marker="o", color="black")
    middle.set(xlabel="registers kept", ylabel="shared retention (normalised)", xticks=ks, ylim=(0, 110))
    for modality in prefixes[0]["reconstructions"]:
        right.plot(ks, [p["reconstructions"][modality] for p in prefixes], marker="o", label=modality)
    right.set(xlabel="registers kept", ylabel="reconstruction error (% of variance)", xticks=ks, ylim=(0, 105))
    if prefixes[0]["reconstructions"]:
        right.legend(frameon=False)
    return png(figure)


def heat_map(factors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bytes:
    """Normalised scores (0 = chance, 100 = ceiling) of every factor and group of tokens, by the linear and strongest probe.

    A cell is grey if the ceiling is at chance.
    """
    rows = entries(factors)
    columns = [(group, kind) for group in GROUPS for kind in ("linear", None)]
    values = np.array([[score(e, group, kind) for group, kind in columns] for _, e in rows], dtype=float)
    figure, axes = plt.subplots(figsize=(11, 0.36 * len(rows) + 1))
    _show_scores(axes, values)
    axes.set_yticks(range(len(rows)), [_with_owners(name, entry) for name, entry in rows])
    axes.set_xticks(
        range(len(columns)), [f"{_wrapped(group)}\n{kind or 'strongest'}" for group, kind in columns], fontsize=8
    )
    axes.xaxis.tick_top()
    for x in range(2, len(columns), 2):
        axes.axvline(x - 0.5, color="white", linewidth=3)
    return png(figure)


def _with_owners(name: str, entry: Mapping[str, Any]) -> str:
    owners = len(entry["ownership"])
    return f"{name} ({'shared' if owners > 1 else 'unique'})" if owners else name


def _show_scores(axes: Axes, values: np.ndarray) -> None:
    """Draw normalised scores as coloured cells with numbers; NaN cells stay grey and empty."""
    axes.set_facecolor("lightgrey")
    axes.imshow(np.clip(values, 0, 100), cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(x, y, f"{value:z.0f}", ha="center", va="center", color="white" if value < 60 else "black", fontsize=9)


def samples(rows: Sequence[tuple[np.ndarray, np.ndarray, str]]) -> bytes:
    """Samples in columns: photo (top) with its caption as title, touch image (bottom)."""
    figure, axes = plt.subplots(2, len(rows), figsize=(1.6 * len(rows), 3.4), squeeze=False)
    for column, (photo, touch, caption) in enumerate(rows):
        axes[0, column].imshow(photo)
        axes[1, column].imshow(touch)
        axes[0, column].set_title(textwrap.fill(caption, 16), fontsize=7)
        for axis in axes[:, column]:
            axis.axis("off")
    return png(figure)


def methods_heat_map(methods: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bytes:
    """Scores of several methods by the strongest probe: overlapping and complementary tokens of each method side by side.

    methods: {method: {"modality: factor": {"ownership": ..., group: score or None}}}.
    """
    some = next(iter(methods.values()))
    columns = [(name, group) for name in methods for group in GROUPS[:2]]
    values = np.array([[methods[name][factor][group] for name, group in columns] for factor in some], dtype=float)
    figure, axes = plt.subplots(figsize=(1.5 * len(columns) + 3, 0.36 * len(some) + 1.2))
    _show_scores(axes, values)
    axes.set_yticks(range(len(some)), [_with_owners(name, entry) for name, entry in some.items()])
    axes.set_xticks(range(len(columns)), [f"{_wrapped(name)}\n{group}" for name, group in columns], fontsize=7)
    axes.xaxis.tick_top()
    return png(figure)


def _wrapped(name: str) -> str:
    """A name, wrapped to the width of a column."""
    return textwrap.fill(plain(name), 18)


def methods_against_k(methods: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> bytes:
    """Mean Acc@1, shared retention and reconstruction error against the number of kept registers.

    One line per method: the mean over its runs at each number that all of them have. Shaded: ± one standard deviation.
    """
    panels = {
        "acc1": "test Acc@1, mean over pairs (%)",
        "shared_retention": "shared retention (normalised)",
        "reconstruction": "reconstruction error (% of variance)",
    }
    figure, row = plt.subplots(1, len(panels), figsize=(14, 3.4))
    for axes, (key, label) in zip(row, panels.items(), strict=True):
        for i, (name, runs) in enumerate(methods.items()):
            found = [{p["k"]: p[key] for p in run if p[key] is not None} for run in runs]
            ks = sorted(set(found[0]).intersection(*found))
            if not ks:
                continue
            scores = np.array([[run[k] for k in ks] for run in found])
            mean, deviation = scores.mean(0), scores.std(0, ddof=1) if len(runs) > 1 else 0.0
            axes.plot(ks, mean, marker="o", label=name, color=f"C{i}")
            axes.fill_between(ks, mean - deviation, mean + deviation, color=f"C{i}", alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)  # methods have 4 to 32 registers
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set(xlabel="registers kept", ylabel=label, ylim=(0, None))
    handles, labels = row[0].get_legend_handles_labels()
    if handles:
        row[0].legend(handles, labels, frameon=False, fontsize=7)
    return png(figure)


def methods_curves(methods: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], pair: str) -> bytes:
    """Validation Acc@1 of one pair per epoch, one line per method, averaged over seeds."""
    figure, axes = plt.subplots(figsize=(7, 3.4))
    for name, runs in methods.items():
        scores = [[m.get(f"val_{pair}_acc1", np.nan) for m in run] for run in runs]
        length = min(map(len, scores))
        axes.plot(range(1, length + 1), np.mean([s[:length] for s in scores], axis=0), label=name)
    axes.set(xlabel="epoch", ylabel=f"validation {pair.replace('_', '-')} Acc@1 (%)", ylim=(0, None))
    axes.legend(frameon=False, fontsize=7)
    return png(figure)


def growth_curves(measurements: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """Seconds (left axis) and peak memory in MB (right axis) against problem size, on logarithmic axes.

    measurements: {name of the size: [{"at": size, "seconds": ..., "megabytes": ...}]}. Slope 1 is linear growth.
    """
    figure, axes = plt.subplots(1, len(measurements), figsize=(3.4 * len(measurements), 3.0))
    for axis, (name, points) in zip(axes, measurements.items(), strict=True):
        at = [p["at"] for p in points]
        axis.loglog(at, [p["seconds"] for p in points], marker="o", color="#c44e52")
        _few_labels(axis)
        memory = axis.twinx()
        memory.loglog(at, [p["megabytes"] for p in points], marker="s", linestyle="--", color="#4c72b0")
        memory.set_ylabel("MB (dashed)", color="#4c72b0")
        _few_labels(memory)
        axis.xaxis.set_minor_locator(NullLocator())  # after twinx, which resets the shared axis
        axis.set_xticks(at, [f"{x:g}" for x in at], rotation=40)
        axis.set(xlabel=name)
    axes[0].set_ylabel("seconds", color="#c44e52")
    figure.tight_layout()
    return png(figure)


def _few_labels(axis: Any) -> None:
    """Label a logarithmic y axis at 1, 2 and 5 times powers of ten, in plain numbers."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_locator(NullLocator())
