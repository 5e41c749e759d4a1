"""A run -> results.json: retrieval, probes of each group of registers, prefixes of registers, and controls.

All scores are in percent, with their chance levels. Retrieval is over the full split. Probes are fitted on training rows
only.
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
from tvl_align.evaluation.split_tokens import SplitTokens, all_rows, compute_tokens, stage1_features
from tvl_align.features.store import FeatureSource
from tvl_align.losses.alignment import pair_name
from tvl_align.metrics.retrieval import TVL_THRESHOLDS, retrieval, tvl_protocol
from tvl_align.system.checkpoint import load_checkpoint
from tvl_align.system.console import UserError
from tvl_align.system.provenance import provenance
from tvl_align.system.runtime import pick_device, seed_everything
from tvl_align.training.engine import build_model
from tvl_align.training.run import load_run

EXAMPLES = 8  # number of test rows shown on the page


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a run on the official test split."""

    run: tyro.conf.Positional[Path]
    """Run folder: <output_dir>/<log_name>."""
    checkpoint: str = "checkpoint.pth"
    """Checkpoint in the run folder: checkpoint.pth (last epoch), checkpoint-acc1.pth or checkpoint-acc5.pth (best)."""
    method: str | None = None
    """Method of the run, as for train; default: the one stored in the run folder."""
    labels: Path | None = None
    """CSV with a vision column and one column per factor; default: the labels stored with the data, if any."""
    probe_steps: int = 600
    """Training steps of an attentive probe, which sets the ceiling of a factor. Fewer steps give too low a ceiling."""
    probe_rows: int = 3000
    """Maximal number of training rows that probes are fitted on, drawn with the seed of the run."""
    split: Literal["test", "val"] = "test"
    """Split to evaluate. Use val to choose settings; it writes results-val.json and no page."""
    device: str | None = None
    """cuda or cpu; default: cuda if available, else cpu."""


def measure(options: EvaluateConfig) -> Path:
    """Evaluate a run and write results.json (`--split val`: results-val.json) into its folder; returns the path.

    Raises UserError for a split without rows and for a run folder that cannot be loaded.
    """
    settings, method, config = load_run(options.run, options.method)
    device = pick_device(options.device)
    inputs = settings.open_inputs(device, config["store"])
    if options.split not in inputs.splits:
        where = settings.data.store or settings.data.datasets_dir
        raise UserError(f"{where} has no {options.split} rows; give --split another one of its splits.")
    model = build_model(method, settings.knobs, inputs.specs).to(device)
    model.load_state_dict(load_checkpoint(options.run / options.checkpoint)["model"])
    seed_everything(settings.run.own_seed + 1)
    untrained = build_model(method, settings.knobs, inputs.specs).to(device)
    train, test = inputs.splits["train"], inputs.splits[options.split]
    samples = inputs.samples.get(options.split)  # None for a feature store without images
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
    trained_tokens, untrained_tokens = (compute_tokens(m, test, all_rows(test), device) for m in (model, untrained))
    pooled = {m: t.pooled.cpu() for m, t in frozen["test"].modalities.items()}
    for first, second in combinations(names, 2):
        results["retrieval"][pair_name(first, second)] = _pair(first, second, trained_tokens, pooled)
    results["tvl_protocol"] = _tvl_protocol(trained_tokens, pooled, names) if samples else {}
    results["controls"] = {
        "shuffled_acc1": _shuffled_acc1(trained_tokens, names, settings.run.seed),
        "untrained_acc1": float(np.mean(list(_acc1(untrained_tokens, names).values()))),
    }
    has_pair = {"vision", "tactile"} <= set(names)
    results["confusions"] = _confusions(trained_tokens, samples) if samples and has_pair else []
    default_labels = (
        settings.data.store / "labels.csv" if settings.data.store else settings.data.datasets_dir / "factors.csv"
    )
    path, probes = options.labels or default_labels, None
    if options.labels is not None or path.is_file():
        probes = ProbeData(read_labels(path), train, rows, test, frozen, settings.run.seed, options.probe_steps)
        tokens = {
            prefix: (compute_tokens(m, train, rows, device), on_test)
            for prefix, m, on_test in (("", model, trained_tokens), ("untrained_", untrained, untrained_tokens))
        }
        results["factors"] = probe_factors(tokens, probes)
        results["summary"] = summary(results["factors"])
    results["prefix"] = _prefixes(model, test, device, names, probes, results["factors"])
    results |= {"run": config, "evaluated_by": provenance()}
    written = options.run / ("results.json" if options.split == "test" else f"results-{options.split}.json")
    written.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return written


def _keys(first: str, second: str, tokens: SplitTokens) -> Tensor | None:
    """Caption keys, which define the positives of pairs with text; None for other pairs."""
    return tokens.keys if "text" in (first, second) else None


def _pair(first: str, second: str, tokens: SplitTokens, stage1: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Retrieval of a pair with the registers and, if their widths agree, with the frozen features."""
    valid, keys = tokens.present[first] & tokens.present[second], _keys(first, second, tokens)
    ours = retrieval(tokens.pooled[first], tokens.pooled[second], valid, keys, tokens.scale)
    one, other = stage1[first].cpu(), stage1[second].cpu()
    comparable = one.shape[1] == other.shape[1]  # otherwise the encoders have no common embedding space
    frozen = retrieval(one, other, valid, keys, tokens.scale) if comparable else None
    return {
        "acc1": ours.acc1,
        "acc5": ours.acc5,
        "chance1": ours.chance1,
        "stage1_acc1": frozen.acc1 if frozen else None,
        "stage1_acc5": frozen.acc5 if frozen else None,
    }


def _tvl_protocol(
    tokens: SplitTokens, stage1: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, list[dict[str, float]]]:
    """Acc@1 and Acc@5 under TVL's protocol for every pair with text, of registers and of frozen features."""
    results: dict[str, list[dict[str, float]]] = {}
    for other in (name for name in names if name != "text" and "text" in names):
        valid = tokens.present[other] & tokens.present["text"]
        text = stage1["text"][valid]
        sources = {"": tokens.pooled, "stage1_": stage1}
        results[pair_name(other, "text")] = [
            {"threshold": threshold}
            | {
                f"{prefix}acc{k}": tvl_protocol(pooled[other][valid], pooled["text"][valid], text, threshold, k)
                for prefix, pooled in sources.items()
                for k in (1, 5)
            }
            for threshold in TVL_THRESHOLDS
        ]
    return results


def _prefixes(
    model: nn.Module,
    test: FeatureSource,
    device: torch.device,
    names: Sequence[str],
    probes: ProbeData | None,
    factors: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """Results for every number k of kept registers (with more than 8 registers: powers of two).

    Mean Acc@1 over the pairs, shared retention (None without labels) and the reconstruction error in percent of the variance
    of the frozen tokens (None without a decoder).
    """
    results: list[dict[str, Any]] = []
    previous: SplitTokens | None = None
    count = len(model.get_parameter("registers"))
    for k in [k for k in range(1, count + 1) if count <= 8 or k & (k - 1) == 0 or k == count]:
        tokens = compute_tokens(model, test, all_rows(test), device, k)
        scores = _acc1(tokens, names)
        errors = list(tokens.reconstruction_error.values())
        entry = {
            "k": k,
            "acc1": float(np.mean(list(scores.values()))),
            "shared_retention": None,
            "reconstruction": float(np.mean(errors)) if errors else None,
            "pairs": scores,
            "reconstructions": tokens.reconstruction_error,
        }
        if probes is not None and previous is not None and _equal(tokens.overlapping, previous.overlapping):
            entry["shared_retention"] = results[-1]["shared_retention"]  # only complementary registers were added
        elif probes is not None:
            on_train = compute_tokens(model, probes.train, probes.rows, device, k)
            entry["shared_retention"] = shared_retention(on_train, tokens, probes, factors)
        results.append(entry)
        previous = tokens
    return results


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(x, second[m]) for m, x in first.items())


def _acc1(tokens: SplitTokens, names: Sequence[str]) -> dict[str, float]:
    """Acc@1 of every pair."""
    return {
        pair_name(a, b): retrieval(
            tokens.pooled[a], tokens.pooled[b], tokens.present[a] & tokens.present[b], _keys(a, b, tokens), tokens.scale
        ).acc1
        for a, b in combinations(names, 2)
    }


def _confusions(tokens: SplitTokens, samples: Samples) -> list[dict[str, Any]]:
    """The first touch images for which a wrong photo is retrieved: the query row and the retrieved row of each."""
    valid = (tokens.present["tactile"] & tokens.present["vision"]).nonzero().squeeze(1)
    retrieved = (tokens.pooled["tactile"][valid] @ tokens.pooled["vision"][valid].T).argmax(1)
    wrong = (retrieved != torch.arange(len(retrieved))).nonzero().squeeze(1)[:EXAMPLES].tolist()
    pairs = [(int(valid[i]), int(valid[retrieved[i]])) for i in wrong]
    return [{"query": asdict(samples.rows[a]), "found": asdict(samples.rows[b])} for a, b in pairs]


def _shuffled_acc1(tokens: SplitTokens, names: Sequence[str], seed: int) -> float:
    """Control: mean Acc@1 over the pairs with the rows of the second modality shuffled. Must be at chance level."""
    scores = []
    for a, b in combinations(names, 2):
        valid = tokens.present[a] & tokens.present[b]
        order = torch.randperm(int(valid.sum()), generator=torch.Generator().manual_seed(seed))
        x, y = tokens.pooled[a][valid], tokens.pooled[b][valid][order]
        keys = _keys(a, b, tokens)
        keys = keys[valid] if keys is not None else None
        scores.append(retrieval(x, y, torch.ones(len(x), dtype=torch.bool), keys, tokens.scale).acc1)
    return float(np.mean(scores))
