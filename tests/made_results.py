"""Run folders with made-up results and explorations, for tests of tables, pages and comparisons."""

import copy
import json
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tvl_align.evaluation.explore_file import Exploration

CEILING = {"attentive": 70.0, "linear on tokens": 80.0, "mlp on tokens": 75.0}
GROUPS = ("overlapping", "complementary", "untrained_overlapping", "untrained_complementary")


def factor(owners: list[str], readable: bool = True, **accuracy: dict[str, float]) -> dict[str, Any]:
    """Results of a factor with chance 20 and, if readable, ceiling 80. Groups that are not given: linear 35, mlp 50."""
    found = {g: {"linear": 35.0, "mlp": 50.0} for g in GROUPS} | accuracy
    found["stage1"] = CEILING if readable else {"attentive": 20.0, "linear on tokens": 21.0}
    return {
        "ownership": owners,
        "chance": 20.0,
        "entropy": 2.32,
        "readable": readable,
        "accuracy": found,
        "bits": {g: {kind: 0.125 for kind in kinds} for g, kinds in found.items()},
        "r2": {},
        "score": {g: (max(kinds.values()) - 20) / 0.6 for g, kinds in found.items()} if readable else {},
    }


def summary(score: float) -> dict[str, float]:
    return {
        "score": score,
        "low": score - 4,
        "high": score + 5,
        "linear": 11.0,
        "bits": 44.0,
        "half": 22.0,
        "half_low": 20.0,
        "half_high": 23.0,
        "untrained": 33.0,
    }


def pair(acc1: float | None) -> dict[str, float | None]:
    values = {"acc1": acc1, "acc5": 30.0, "low": 8.0, "high": 13.0, "chance1": 1.25}
    for n, prefix in enumerate(("untrained_", "stage1_"), 2):
        values |= {f"{prefix}{name}": n + 0.5 for name in ("acc1", "acc5", "low", "high")}
    return values | {"oracle_acc1": 66.0, "oracle_acc5": 99.0}


def made_results(**changes: Any) -> dict[str, Any]:
    """Results of one pair and of three factors, of which vision: wood has a ceiling at chance and touch: fur no probe."""
    bits = {"shared_bits": 61.0, "shared_bits_low": 60.0, "shared_bits_high": 63.0}
    prefix = bits | {"low": 9.0, "high": 12.0, "pairs": {"tactile_vision": 10.0}, "reconstructions": {"vision": 40.0}}
    results: dict[str, Any] = {
        "method": "toy",
        "version": "1",
        "seed": 0,
        "split": "test",
        "gallery": 100,
        "groups": 50,
        "probe_rows": {"split": "probe", "rows": 80},
        "checkpoint": "checkpoint.pth",
        "root": "nowhere",
        "retrieval": {"tactile_vision": pair(10.0)},
        "controls": {"shuffled_acc1": 1.5},
        "label_free": {
            "vision": {
                "shared from complementary": {"linear": 0.1, "mlp": 0.3, "half": 0.25, "low": 0.2, "high": 0.6},
                "unique from overlapping": {"linear": -0.2, "mlp": -0.4},
            },
            "tactile": {"shared from complementary": {"linear": 0.5, "mlp": 0.4}},
        },
        "factors": {
            "vision": {"hue": factor(["vision"]), "wood": factor(["vision", "tactile"], readable=False)},
            "tactile": {"shape": factor(["tactile"], overlapping={"linear": 20.0, "mlp": 80.0})},
        },
        "left_out": {"tactile": {"fur": "3 labelled probe rows with 1 levels, 2 test rows"}},
        "summary": {"unique_retention": summary(50.0), "unique_leak": summary(75.0)},
        "prefix": [
            {"k": k, "acc1": acc1, "shared_retention": None, "reconstruction": 40.0} | added | prefix
            for k, acc1, added in ((1, 5.0, {}), (2, 10.0, {"added": 5.0, "added_low": -1.0, "added_high": 7.0}))
        ],
        "run": {
            "settings": {"data": {"shuffle_pairs": False}},
            "store": "s",
            "rows": {"train": 300, "test": 100},
            "command": "tvl-align train",
            "commit": "d" * 40,
            "folder": "f",
            "processes": 1,
        },
    }
    return copy.deepcopy(results) | changes


def write_run(folder: Path, **changes: Any) -> Path:
    """A run folder with `made_results`. acc1, unique_leak, store, shuffle_pairs, knobs: shorthands for what lies deeper."""
    shorthands = ("acc1", "unique_leak", "store", "shuffle_pairs", "knobs")
    deep = {name: changes.pop(name) for name in shorthands if name in changes}
    results = made_results(**changes)
    if "acc1" in deep:
        results["retrieval"]["tactile_vision"] = pair(deep["acc1"])
    if "unique_leak" in deep:
        results["summary"]["unique_leak"] = summary(deep["unique_leak"])
    results["run"]["store"] = deep.get("store", results["run"]["store"])
    results["run"]["settings"]["data"]["shuffle_pairs"] = deep.get("shuffle_pairs", False)
    results["run"]["settings"]["knobs"] = deep.get("knobs", {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, allow_nan=False))
    epoch = {"epoch": 0, "train_total_loss": 2.0, "val_total_loss": 3.0, "val_tactile_vision_acc1": 9.0}
    (folder / "metrics.jsonl").write_text(json.dumps(epoch | {"val_tactile_vision_chance1": 1.0}) + "\n")
    return folder


LEVELS = ("red", "green", "blue")


def made_exploration(
    rows: int = 12,
    modalities: tuple[str, ...] = ("vision", "tactile", "text"),
    files: bool = True,
    look_step: int = 1,
) -> Exploration:
    """Random finds of `rows` test rows, with 1 and with both overlapping registers; row 1 lacks the second modality.

    files: with photos and touch images, see `draw_pictures`, and captions; else features of one's own.
    """
    rng, pairs = np.random.default_rng(0), list(permutations(range(len(modalities)), 2))
    present = {m: np.ones(rows, bool) for m in modalities}
    present[modalities[1]][1] = False
    shape = 2, len(pairs), rows, 8
    finds, scores = np.full(shape, -1, np.int32), np.zeros(shape, np.float16)
    rank = np.full(shape[:3], -1, np.int32)
    for k in range(2):
        for d, (a, b) in enumerate(pairs):
            valid = np.flatnonzero(present[modalities[a]] & present[modalities[b]])
            for row in valid:
                order = rng.permutation(valid)
                finds[k, d, row, : min(8, len(order))] = order[:8]
                scores[k, d, row, : min(8, len(order))] = np.linspace(0.9, 0.2, 8)[: len(order)]
                rank[k, d, row] = int(np.flatnonzero(order == row)[0])
    shades = rng.random((rows, 3, 17)).astype(np.float16)
    shares = shades / shades.sum(-1, keepdims=True) * (np.arange(rows) % look_step == 0)[:, None, None]
    pictures = [m for m in modalities if m in ("vision", "tactile")] if files else []
    return Exploration(
        modalities=np.array(modalities),
        names=np.array([f"row-{i}" for i in range(rows)]),
        datasets=np.array(["ssvtp" if files else ""] * rows),
        captions=np.array([f"soft, word{i}" if files else "" for i in range(rows)]),
        lengths=np.array([1, 2]),
        overlapping=np.array(2),
        directions=np.array(pairs),
        finds=finds,
        scores=scores,
        right=finds == np.arange(rows)[None, None, :, None],
        rank=rank,
        answers=np.where(rank[-1] < 0, 0, 1).astype(np.int32),
        look_step=np.array(look_step),
        present=present,
        files={m: np.array([f"{m}-{i}.png" if present[m][i] else "" for i in range(rows)]) for m in pictures},
        attention={m: shares for m in modalities},
        maps={
            f"{g}.{m}": np.where(present[m][:, None], rng.normal(size=(rows, 4)), np.nan).astype(np.float16)
            for g in ("pooled", "complementary")
            for m in modalities
        },
        variance={f"{g}.{m}": np.array([0.4, 0.3, 0.2, 0.1]) for g in ("pooled", "complementary") for m in modalities},
        levels={"hue": np.array(LEVELS), "size": np.array([f"quantile {i + 1}" for i in range(5)])},
        labels={"hue": (np.arange(rows) % 3).astype(np.int16), "size": (np.arange(rows) % 5 - 1).astype(np.int16)},
        owners={"hue": np.array(modalities[:2]), "size": np.array([], dtype=np.str_)},
    )


def colour_of(modality: str, row: int) -> tuple[int, int, int]:
    """The colour of a made picture."""
    return 10 * (row % 24), 200 if modality == "vision" else 40, 100


def draw_pictures(root: Path, found: Exploration) -> None:
    """Pictures of one colour for all files of an exploration, 24 pixels wide."""
    root.mkdir(parents=True, exist_ok=True)
    for m, paths in found.files.items():
        for row, path in enumerate(paths.tolist()):
            if path:
                Image.new("RGB", (24, 24), colour_of(m, row)).save(root / path)


def write_explored_run(folder: Path, rows: int = 12, results: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """A run folder with made results, an exploration and its pictures; options: those of `made_exploration`."""
    found = made_exploration(rows, **options)
    draw_pictures(folder / "pictures", found)
    run = write_run(folder, root=str(folder / "pictures"), gallery=rows, **(results or {}))
    found.save(run)
    return run
