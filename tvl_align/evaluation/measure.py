"""A run -> results.json: retrieval, what each group of registers holds, nested order, controls, on the test split.

Every number is in percent and stands beside its chance level; the test split is one gallery; probes are fitted on
training rows only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from tvl_align.data.samples import Samples
from tvl_align.evaluation.factors import ProbeData, probe_factors, shared_retention, summary
from tvl_align.evaluation.labels import read_labels
from tvl_align.evaluation.readings import SplitTokens, all_rows, compute_tokens, stage1_features
from tvl_align.features.store import FeatureSource
from tvl_align.losses.alignment import pair_name
from tvl_align.metrics.retrieval import TVL_THRESHOLDS, retrieval, tvl_protocol
from tvl_align.system.checkpoint import load_checkpoint
from tvl_align.system.console import UserError
from tvl_align.system.provenance import provenance
from tvl_align.system.runtime import pick_device, seed_everything
from tvl_align.training.engine import build_model
from tvl_align.training.run import load_run

EXAMPLES = 8  # test rows shown on the page


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a run, on the official test split."""

    run: tyro.conf.Positional[Path]
    """Run folder: <output_dir>/<log_name>."""
    checkpoint: str = "checkpoint.pth"
    """Checkpoint in the run folder: the last epoch, or checkpoint-acc1.pth, checkpoint-acc5.pth."""
    method: str | None = None
    """Method of the run, where it is one of your own; default: what the run remembers."""
    labels: Path | None = None
    """CSV with a vision column and one per factor; default: what came with the data, where there are labels."""
    probe_rows: int = 3000
    """Training rows that probes are fitted on, at most: the first so many of a seeded order."""
    split: Literal["test", "val"] = "test"
    """Split to measure on. val: for choosing settings; writes results-val.json and no page."""
    device: str | None = None
    """cuda or cpu; default: cuda where there is one, else cpu."""


def measure(options: EvaluateConfig) -> Path:
    """Measure a run; writes results.json (results-val.json for `--split val`) into its folder and returns its path."""
    settings, method, config = load_run(options.run, options.method)
    device = pick_device(options.device)
    inputs = settings.open_inputs(device, config["store"])
    if options.split not in inputs.splits:
        where = settings.data.store or settings.data.datasets_dir
        raise UserError(f"{where} has no {options.split} rows, so there is nothing to measure on.")
    model = build_model(method, settings.knobs, inputs.specs).to(device)
    model.load_state_dict(load_checkpoint(options.run / options.checkpoint)["model"])
    seed_everything(settings.run.own_seed + 1)
    untrained = build_model(method, settings.knobs, inputs.specs).to(device)
    train, test = inputs.splits["train"], inputs.splits[options.split]
    samples = inputs.samples.get(options.split)  # None: features of the user's own, whose pictures are not known
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.run.seed))
    rows = order[: options.probe_rows].sort().values
    frozen = {"train": stage1_features(train, rows, device), "test": stage1_features(test, all_rows(test), device)}
    results: dict[str, Any] = {
        "method": config["implementation"]["experiment_id"],
        "version": config["implementation"]["version"],
        "seed": settings.run.own_seed,
        "split": options.split,
        "gallery": len(test),
        "checkpoint": options.checkpoint,
        "root": str((samples.root if samples else settings.data.store or Path()).resolve()),
        "examples": [asdict(row) for row in samples.rows[:: max(1, len(test) // EXAMPLES)][:EXAMPLES]] if samples else [],
        "retrieval": {},
        "factors": {},
    }
    names = list(inputs.specs)
    read, untrained_read = (compute_tokens(m, test, all_rows(test), device) for m in (model, untrained))
    pooled = {m: t.pooled.cpu() for m, t in frozen["test"].modalities.items()}
    for first, second in combinations(names, 2):
        results["retrieval"][pair_name(first, second)] = _pair(first, second, read, pooled)
    results["tvl_protocol"] = _tvl_protocol(read, pooled, names) if samples else {}
    results["controls"] = {
        "shuffled_acc1": _shuffled(read, names, settings.run.seed),
        "untrained_acc1": float(np.mean(list(_acc1(untrained_read, names).values()))),
    }
    results["confusions"] = _confusions(read, samples) if samples and {"vision", "tactile"} <= set(names) else []
    beside = settings.data.store / "labels.csv" if settings.data.store else settings.data.datasets_dir / "factors.csv"
    path, probes = options.labels or beside, None
    if options.labels is not None or path.is_file():
        probes = ProbeData(read_labels(path), train, rows, test, frozen, settings.run.seed)
        readings = {
            who: (compute_tokens(m, train, rows, device), on_test)
            for who, m, on_test in (("", model, read), ("untrained_", untrained, untrained_read))
        }
        results["factors"] = probe_factors(readings, probes)
        results["summary"] = summary(results["factors"])
    results["prefix"] = _prefixes(model, test, device, names, probes, results["factors"])
    results |= {"run": config, "evaluated_by": provenance()}
    written = options.run / ("results.json" if options.split == "test" else f"results-{options.split}.json")
    written.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return written


def _keys(first: str, second: str, read: SplitTokens) -> Tensor | None:
    return read.keys if "text" in (first, second) else None


def _pair(first: str, second: str, read: SplitTokens, stage1: Mapping[str, Tensor]) -> dict[str, float | None]:
    valid, keys = read.present[first] & read.present[second], _keys(first, second, read)
    ours = retrieval(read.pooled[first], read.pooled[second], valid, keys, read.scale)
    one, other = stage1[first].cpu(), stage1[second].cpu()
    comparable = one.shape[1] == other.shape[1]  # features of unrelated encoders have no common space
    frozen = retrieval(one, other, valid, keys, read.scale) if comparable else None
    return {
        "acc1": ours.acc1,
        "acc5": ours.acc5,
        "chance1": ours.chance1,
        "stage1_acc1": frozen.acc1 if frozen else None,
        "stage1_acc5": frozen.acc5 if frozen else None,
    }


def _tvl_protocol(
    read: SplitTokens, stage1: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, list[dict[str, float]]]:
    """TVL's own Acc@1 and Acc@5 for every pair with text, from registers and from the frozen features."""
    found: dict[str, list[dict[str, float]]] = {}
    for other in (name for name in names if name != "text" and "text" in names):
        valid = read.present[other] & read.present["text"]
        text = stage1["text"][valid]
        sources = {"": read.pooled, "stage1_": stage1}
        found[pair_name(other, "text")] = [
            {"threshold": threshold}
            | {
                f"{who}acc{k}": tvl_protocol(of[other][valid], of["text"][valid], text, threshold, k)
                for who, of in sources.items()
                for k in (1, 5)
            }
            for threshold in TVL_THRESHOLDS
        ]
    return found


def _prefixes(
    model: nn.Module,
    test: FeatureSource,
    device: torch.device,
    names: Sequence[str],
    probes: "ProbeData | None",
    factors: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """For every number k of kept registers: Acc@1 (mean over the pairs), shared retention (where there are labels), and
    the share of the frozen tokens' variance left (where the method rebuilds them)."""
    found: list[dict[str, Any]] = []
    before: SplitTokens | None = None
    count = model.registers.shape[0]
    for k in [k for k in range(1, count + 1) if count <= 8 or k & (k - 1) == 0 or k == count]:  # many: powers of two
        read = compute_tokens(model, test, all_rows(test), device, k)
        scores = _acc1(read, names)
        errors = list(read.reconstruction_error.values())
        entry = {
            "k": k,
            "acc1": float(np.mean(list(scores.values()))),
            "shared_retention": None,
            "reconstruction": float(np.mean(errors)) if errors else None,
            "pairs": scores,
            "reconstructions": read.reconstruction_error,
        }
        if probes is not None and before is not None and _same(read.overlapping, before.overlapping):
            entry["shared_retention"] = found[-1]["shared_retention"]  # a complementary register more changed none of them
        elif probes is not None:
            on_train = compute_tokens(model, probes.train, probes.rows, device, k)
            entry["shared_retention"] = shared_retention(on_train, read, probes, factors)
        found.append(entry)
        before = read
    return found


def _same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(x, others[m]) for m, x in some.items())


def _acc1(read: SplitTokens, names: Sequence[str]) -> dict[str, float]:
    """Acc@1 of every pair."""
    return {
        pair_name(a, b): retrieval(
            read.pooled[a], read.pooled[b], read.present[a] & read.present[b], _keys(a, b, read), read.scale
        ).acc1
        for a, b in combinations(names, 2)
    }


def _confusions(read: SplitTokens, samples: Samples) -> list[dict[str, Any]]:
    """The first touch images for which another photo is retrieved: which row asked, which was found."""
    valid = (read.present["tactile"] & read.present["vision"]).nonzero().squeeze(1)
    found = (read.pooled["tactile"][valid] @ read.pooled["vision"][valid].T).argmax(1)
    wrong = (found != torch.arange(len(found))).nonzero().squeeze(1)[:EXAMPLES].tolist()
    pairs = [(int(valid[i]), int(valid[found[i]])) for i in wrong]
    return [{"query": asdict(samples.rows[a]), "found": asdict(samples.rows[b])} for a, b in pairs]


def _shuffled(read: SplitTokens, names: Sequence[str], seed: int) -> float:
    """Acc@1 (mean over the pairs) after the second modality's rows were put in another order: must be chance."""
    scores = []
    for a, b in combinations(names, 2):
        valid = read.present[a] & read.present[b]
        order = torch.randperm(int(valid.sum()), generator=torch.Generator().manual_seed(seed))
        x, y = read.pooled[a][valid], read.pooled[b][valid][order]
        keys = _keys(a, b, read)
        keys = keys[valid] if keys is not None else None
        scores.append(retrieval(x, y, torch.ones(len(x), dtype=torch.bool), keys, read.scale).acc1)
    return float(np.mean(scores))
