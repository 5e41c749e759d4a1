"""Figures of results, as PNG bytes. Lines differ in colour and mark; a figure is one panel, so that it fits a phone."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

matplotlib.use("Agg")

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#8c6d00",
)  # Okabe and Ito, for the colour-blind
MARKERS = "osD^vPX"
SIZE = 4.4, 3.0  # inches
Figures = dict[str, bytes]
"""{what a figure shows, its text where it cannot be seen: PNG}."""


def png(figure: Figure) -> bytes:
    """Render and close a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def _panel(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """An empty panel of one figure."""
    figure, axes = plt.subplots(figsize=SIZE)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(i: int) -> dict[str, Any]:
    """Colour and mark of the i-th line of a panel."""
    dashes = ("-", "--", ":")[i // len(COLOURS) % 3]
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linestyle": dashes}


def _drawn(figure: Figure, axes: Axes) -> bytes:
    """Render a panel with its legend below it, where it hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        columns = 1 if max(map(len, axes.get_legend_handles_labels()[1])) > 22 else 2
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=columns)
    return png(figure)


def curves(metrics: Sequence[Mapping[str, Any]], pairs: Sequence[str]) -> Figures:
    """Loss and Acc@1 on the full validation split per epoch; the chance level is dotted."""
    epochs, found = [m["epoch"] + 1 for m in metrics], {}
    figure, axes = _panel("epoch", "total loss")
    axes.plot(epochs, [m["train_total_loss"] for m in metrics], label="train (within batches)", color="#767676")
    axes.plot(epochs, [m["val_total_loss"] for m in metrics], label="validation (full split)", color="black", linestyle="--")
    found["loss of training and validation against the epoch"] = _drawn(figure, axes)
    if pairs := [pair for pair in pairs if f"val_{pair}_acc1" in metrics[0]]:
        figure, axes = _panel("epoch", "validation Acc@1 (%)")
        for i, pair in enumerate(pairs):
            style = _style(i) | {"markevery": max(1, len(epochs) // 8)}
            axes.plot(epochs, [m[f"val_{pair}_acc1"] for m in metrics], label=pair.replace("_", "-"), **style)
            axes.axhline(metrics[-1][f"val_{pair}_chance1"], color=style["color"], linestyle=":", linewidth=1)
        axes.set_ylim(0, None)
        found["Acc@1 of validation rows against the epoch"] = _drawn(figure, axes)
    return found


def against_k(prefixes: Sequence[Mapping[str, Any]]) -> Figures:
    """Acc@1 with the 95% interval of its mean, shared retention and reconstruction error against the kept registers."""
    ks, found = [p["k"] for p in prefixes], {}
    if prefixes[0]["pairs"]:
        figure, axes = _panel("registers kept", "test Acc@1 (%)")
        for i, pair in enumerate(prefixes[0]["pairs"]):
            scores = [p["pairs"][pair] for p in prefixes]
            axes.plot(ks, scores, label=pair.replace("_", "-"), linewidth=1, **_style(i))
        mean = np.array([[p["acc1"], p["low"], p["high"]] for p in prefixes])
        axes.plot(ks, mean[:, 0], color="black", label="mean, 95% interval")
        axes.fill_between(ks, mean[:, 1], mean[:, 2], color="black", alpha=0.15, linewidth=0)
        axes.set(xticks=ks, ylim=(0, None))
        found["Acc@1 against the number of kept registers"] = _drawn(figure, axes)
    if prefixes[0]["shared_retention"] is not None:
        figure, axes = _panel("registers kept", "shared retention (normalised)")
        axes.plot(ks, [p["shared_retention"] for p in prefixes], marker="o", color="black")
        axes.set(xticks=ks, ylim=(0, 110))
        found["shared retention against the number of kept registers"] = _drawn(figure, axes)
    if prefixes[0]["reconstructions"]:
        figure, axes = _panel("registers kept", "reconstruction error (% of variance)")
        for i, modality in enumerate(prefixes[0]["reconstructions"]):
            axes.plot(ks, [p["reconstructions"][modality] for p in prefixes], label=modality, **_style(i))
        axes.set(xticks=ks, ylim=(0, 105))
        found["reconstruction error against the number of kept registers"] = _drawn(figure, axes)
    return found


def methods_against_k(methods: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figures:
    """Mean Acc@1, shared retention and reconstruction error against the number of kept registers.

    One line per method: the mean over its runs at each number that all of them have. Shaded: ± one standard deviation.
    """
    panels = {
        "acc1": "test Acc@1, mean over pairs (%)",
        "shared_retention": "shared retention (normalised)",
        "reconstruction": "reconstruction error (% of variance)",
    }
    figures = {}
    for key, label in panels.items():
        figure, axes = _panel("registers kept", label)
        for i, (name, runs) in enumerate(methods.items()):
            found = [{p["k"]: p[key] for p in run if p[key] is not None} for run in runs]
            ks = sorted(set(found[0]).intersection(*found))
            if not ks:
                continue
            scores = np.array([[run[k] for k in ks] for run in found])
            mean, deviation = scores.mean(0), scores.std(0, ddof=1) if len(runs) > 1 else 0.0
            axes.plot(ks, mean, label=name, **_style(i))
            axes.fill_between(
                ks, mean - deviation, mean + deviation, color=COLOURS[i % len(COLOURS)], alpha=0.15, linewidth=0
            )
        if axes.lines:
            axes.set_xscale("log", base=2)  # methods have 4 to 32 registers
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
            figures[f"{label}, against the number of kept registers, by method"] = _drawn(figure, axes)
        plt.close(figure)
    return figures


def methods_curves(methods: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], pair: str) -> Figures:
    """Validation Acc@1 of one pair per epoch, one line per method, averaged over seeds."""
    label = f"validation {pair.replace('_', '-')} Acc@1 (%)"
    figure, axes = _panel("epoch", label)
    for i, (name, runs) in enumerate(methods.items()):
        scores = [[m.get(f"val_{pair}_acc1", np.nan) for m in run] for run in runs]
        length = min(map(len, scores))
        style = _style(i) | {"markevery": max(1, length // 8)}
        axes.plot(range(1, length + 1), np.mean([s[:length] for s in scores], axis=0), label=name, **style)
    axes.set_ylim(0, None)
    return {f"{label}, against the epoch, by method": _drawn(figure, axes)}


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
