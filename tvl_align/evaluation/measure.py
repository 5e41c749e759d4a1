"""A run -> results.json: retrieval, probes of each group of registers, prefixes of registers, and controls.

All scores are in percent, with their chance levels. Retrieval is over the full split. Probes are fitted on rows that
neither the model nor its closed forms saw: the probe rows, or the validation rows if there are none.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from tvl_align.contract import Features, Method
from tvl_align.data.pairs import pair_labels
from tvl_align.data.split import repeats
from tvl_align.evaluation.cross_reading import cross_readings
from tvl_align.evaluation.explore import by_direction, explore, single_registers
from tvl_align.evaluation.factors import MIN_ROWS, FactorProbes, Group, Rows
from tvl_align.evaluation.labels import Labels, read_labels
from tvl_align.evaluation.oracle import oracle
from tvl_align.evaluation.probes import MAX_STEPS
from tvl_align.evaluation.split_tokens import SplitTokens, all_rows, compute_tokens, joined_features, stage1_features
from tvl_align.evaluation.uncertainty import Estimate, group_weights, interval, mean_estimate, weighted_mean
from tvl_align.features.identity import Identity
from tvl_align.features.inputs import DataConfig, Inputs
from tvl_align.features.store import FeatureSource
from tvl_align.features.subset import ShuffledPairs
from tvl_align.losses.alignment import pair_name
from tvl_align.losses.contrastive import keys_of, positive_mask
from tvl_align.metrics.retrieval import TVL_THRESHOLDS, Retrieval, retrieval, tvl_protocol
from tvl_align.system.bounds import at_least
from tvl_align.system.checkpoint import load_checkpoint
from tvl_align.system.console import UserError
from tvl_align.system.files import write_atomically
from tvl_align.system.provenance import provenance
from tvl_align.system.runtime import generator, pick_device, seed_everything
from tvl_align.training.engine import build_model, calibrate
from tvl_align.training.run import Places, load_run
from tvl_align.training.settings import Settings

CEILING_ROWS = 10_000  # most rows that probes of the frozen features are fitted on


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
    probe_steps: int = MAX_STEPS
    """Most training steps of a probe."""
    probe_rows: int = DataConfig.probe_rows
    """Maximal number of probe rows, drawn with the seed of the run."""
    split: Literal["test", "val"] = "test"
    """Split to evaluate. Use val to choose settings; it writes results-val.json and no page."""
    places: tyro.conf.OmitArgPrefixes[Places] = field(default_factory=Places)
    device: str | None = None
    """cuda or cpu; default: cuda if available, else cpu."""

    def __post_init__(self) -> None:
        at_least(1, self, "probe_steps")
        at_least(MIN_ROWS, self, "probe_rows")


@dataclass(frozen=True)
class OpenedRun:
    """A run to evaluate: its model, the same one untrained, and the splits.

    rows: those of the probe split that are used.
    """

    settings: Settings[Any]
    config: Mapping[str, Any]
    inputs: Inputs
    device: torch.device
    model: nn.Module
    untrained: nn.Module
    checkpoint: Mapping[str, Any]
    test: FeatureSource
    probe_split: str
    rows: Tensor

    @property
    def probe(self) -> FeatureSource:
        return self.inputs.splits[self.probe_split]

    def on_test(self, model: nn.Module) -> SplitTokens:
        return compute_tokens(model, self.test, all_rows(self.test), self.device)

    def on_probe(self, model: nn.Module) -> SplitTokens:
        return compute_tokens(model, self.probe, self.rows, self.device)


def measure(options: EvaluateConfig) -> Path:
    """Evaluate a run and write results.json (`--split val`: results-val.json) into its folder; returns the path.

    Raises UserError for a split without rows and for a run folder that cannot be loaded.
    """
    run = open_run(options)
    test, names, device, seed = run.test, list(run.inputs.specs), run.device, run.settings.run.seed
    samples = run.inputs.samples.get(options.split)  # None for a feature store without images
    weights, labels = group_weights(test.groups, seed), labels_of(options, run.settings.data)
    trained, untrained = run.on_test(run.model), run.on_test(run.untrained)
    frozen = stage1_features(test, all_rows(test), device)
    pooled = {m: t.pooled for m, t in frozen.modalities.items()}
    meanings = Meanings(labels, list(test.names), trained.keys, test.content_keys)
    results = _identity(run, options)
    results["retrieval"] = {
        pair_name(a, b): _pair(a, b, trained, untrained, pooled, meanings, weights) for a, b in combinations(names, 2)
    }
    results["tvl_protocol"] = _tvl_protocol(trained, pooled, names) if samples else {}
    results["repeated"] = {m: repeats(keys.numpy()) for m, keys in test.content_keys.items()}
    results["controls"] = {"shuffled_acc1": _shuffled_acc1(trained, names, meanings, seed)}
    on_probe = run.on_probe(run.model)
    on_groups = run.probe.groups[run.rows]
    results["label_free"] = cross_readings(on_probe, trained, seed, device, options.probe_steps, on_groups, weights)
    prefixes = {k: _first(k, run.model, test, all_rows(test), device, trained) for k in _lengths(run.model)}
    factors = None if labels is None else _read_factors(run, options, labels, frozen, on_probe, untrained, prefixes)
    results["prefix"] = _prefixes(prefixes, names, meanings, weights, factors)
    if factors is not None:
        results |= {"summary": factors.summary(weights), "left_out": factors.left_out}
    results["factors"] = factors.as_json() if factors is not None else {}
    explored = explore(run.model, test, prefixes, frozen, meanings.of, labels, samples, device)
    results["directions"] = by_direction(explored, pooled, meanings.of, weights)
    results |= {"run": run.config, "evaluated_by": provenance()}
    if options.split == "test":
        explored.save(options.run)
    written = options.run / ("results.json" if options.split == "test" else f"results-{options.split}.json")
    write_atomically(written, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return written


def open_run(options: EvaluateConfig) -> OpenedRun:
    settings, method, config = load_run(options.run, options.method, options.places)
    device = pick_device(options.device)
    inputs = settings.open_inputs(device, Identity(config["store"], config.get("features", {})))
    if options.split not in inputs.splits:
        where = settings.data.store or settings.data.datasets_dir
        raise UserError(f"{where} has no {options.split} rows; give --split another one of its splits.")
    model = build_model(method, settings.knobs, inputs.specs).to(device)
    checkpoint = _load_weights(model, options.run / options.checkpoint, config["implementation"]["version"], method)
    seed_everything(settings.run.own_seed + 1)
    untrained = build_model(method, settings.knobs, inputs.specs).to(device)
    calibrate(untrained, inputs.splits["train"], device)  # the floor has the closed forms that the trained model has
    probe_split = "probe" if "probe" in inputs.splits else "val"
    if probe_split == options.split:
        raise UserError(
            "this run set no probe rows aside, and probes cannot be fitted and tested on the same validation rows; evaluate "
            "--split test, or train with --probe_rows above 0."
        )
    order = torch.randperm(len(inputs.splits[probe_split]), generator=generator(settings.run.seed, 5))
    test, rows = inputs.splits[options.split], order[: options.probe_rows]
    return OpenedRun(settings, config, inputs, device, model, untrained, checkpoint, test, probe_split, rows)


def _identity(run: OpenedRun, options: EvaluateConfig) -> dict[str, Any]:
    """What was measured, on what."""
    samples = run.inputs.samples.get(options.split)
    return {
        "method": run.config["implementation"]["experiment_id"],
        "version": run.config["implementation"]["version"],
        "seed": run.settings.run.own_seed,
        "split": options.split,
        "gallery": len(run.test),
        "groups": len(run.test.groups.unique()),
        "probe_rows": {"split": run.probe_split, "rows": len(run.rows)},
        "checkpoint": options.checkpoint,
        "progress": {name: (run.checkpoint.get("progress") or {}).get(name) for name in ("epoch", "step")},
        "root": str((samples.root if samples else run.settings.data.store or Path()).resolve()),
    }


def factor_probes(run: OpenedRun, options: EvaluateConfig, labels: Labels, frozen: Features) -> FactorProbes:
    """The factors of a run with their ceilings; no tokens have been read yet. frozen: of test rows."""
    sides = Rows(
        [run.probe.names[i] for i in run.rows.tolist()],
        stage1_features(run.probe, run.rows, run.device).to(run.device),
        run.probe.groups[run.rows],
    )
    factors = FactorProbes(
        labels,
        sides,
        Rows(list(run.test.names), frozen.to(run.device)),
        run.settings.run.seed,
        options.probe_steps,
        _ceiling_rows(run.inputs.splits["train"], sides, run.device),
    )
    factors.read_ceilings(run.settings.data.store or run.settings.feature_dir)
    return factors


def _read_factors(
    run: OpenedRun,
    options: EvaluateConfig,
    labels: Labels,
    frozen: Features,
    on_probe: SplitTokens,
    untrained: SplitTokens,
    prefixes: Mapping[int, SplitTokens],
) -> FactorProbes:
    """What probes read from the frozen features and from each group of registers.

    frozen, untrained: of test rows. on_probe: the trained tokens of probe rows. prefixes: {k: tokens of test rows}.
    """
    trained = prefixes[max(prefixes)]
    factors = factor_probes(run, options, labels, frozen)
    floor = run.on_probe(run.untrained)
    groups: dict[str, Group] = {}
    for name in ("overlapping", "complementary"):
        on_rows, on_test = getattr(on_probe, name), getattr(trained, name)
        groups[name] = Group(on_rows, on_test)
        groups[f"half_{name}"] = Group(on_rows, on_test, share=0.5)
        groups[f"untrained_{name}"] = Group(getattr(floor, name), getattr(untrained, name))
    groups["all_registers"] = Group(_joined(on_probe), _joined(trained), only="unique")
    groups["untrained_all_registers"] = Group(_joined(floor), _joined(untrained), only="unique")
    for k, tokens in prefixes.items():
        if k < _overlapping(trained):
            on_rows = _first_overlapping(k, run.model, run.probe, run.rows, run.device, on_probe)
            groups[f"first_{k}_registers"] = Group(on_rows, tokens.overlapping, only="shared")
    factors.read(groups)
    factors.read(single_registers(on_probe, trained), ("linear",))
    return factors


def _joined(tokens: SplitTokens) -> dict[str, Tensor]:
    """{modality: (M, F)}: both groups of tokens."""
    groups = tokens.overlapping, tokens.complementary
    return {m: torch.cat([group[m].flatten(1) for group in groups], dim=1) for m in tokens.overlapping}


def _load_weights(model: nn.Module, path: Path, version: str, method: Method) -> Mapping[str, Any]:
    """Load the weights of a checkpoint into a model; returns the checkpoint. version: of the method, as the run was trained.

    Raises UserError if the weights do not fit."""
    checkpoint = load_checkpoint(path)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(
            f"{path} was written by version {version} of the method and does not fit version "
            f"{method.implementation.version}; train again, or evaluate with the package of that run."
        ) from error
    return checkpoint


def labelled_rows(train: FeatureSource, most: int) -> tuple[FeatureSource, Tensor]:
    """Up to `most` training rows, evenly spaced, and their source: of shuffled pairs that of the rows with their labels."""
    count = min(len(train), max(0, most))
    return train.source if isinstance(train, ShuffledPairs) else train, torch.arange(count) * len(train) // max(1, count)


def _ceiling_rows(train: FeatureSource, probe: Rows, device: torch.device) -> Rows:
    """The probe rows and training rows, evenly spaced, up to CEILING_ROWS."""
    train, rows = labelled_rows(train, CEILING_ROWS - len(probe.names))
    if not len(rows):
        return probe
    more = stage1_features(train, rows, device).to(device)
    names = [*probe.names, *(train.names[i] for i in rows.tolist())]
    groups = torch.cat([probe.groups, train.groups[rows]]) if probe.groups is not None else None
    return Rows(names, joined_features([probe.frozen, more]), groups)


def labels_of(options: EvaluateConfig, data: DataConfig) -> Labels | None:
    """The labels of `--labels`, else those of the table of pairs or beside the data; None if there are none."""
    if options.labels is None and data.pairs and data.label_columns:
        return read_labels(data.pairs, pair_labels(data.pairs, data.columns))
    default = data.store / "labels.csv" if data.store else data.datasets_dir / "factors.csv"
    path = options.labels or default
    return read_labels(path) if options.labels is not None or path.is_file() else None


def needed_labels(options: EvaluateConfig, data: DataConfig) -> Labels:
    """As `labels_of`; raises UserError if there are none."""
    labels = labels_of(options, data)
    if labels is None:
        raise UserError(f"{options.run} was trained on data without labels, so there are no factors to read.")
    return labels


class Meanings:
    """What is known about the partners of test rows: which rows have equal content, and what an oracle would find.

    keys: (M, K) int64 caption keys of the rows; with labels that name the factors of the captions, a key of their levels.
    content: {modality: (M,) int64} content keys of the rows.
    """

    def __init__(
        self, labels: Labels | None, names: Sequence[str], keys: Tensor, content: Mapping[str, Tensor] | None = None
    ) -> None:
        self.labels, self.names, self.keys, self.content = labels, names, keys, content or {}
        if labels is not None and labels.text_factors:
            levels = np.stack([labels.of(f, names) for f in labels.text_factors], axis=1)
            levels[(levels < 0).any(1)] = -1 - np.arange(len(levels))[(levels < 0).any(1), None]  # a meaning of its own
            self.keys = torch.from_numpy(np.unique(levels, axis=0, return_inverse=True)[1].reshape(-1, 1).astype(np.int64))

    def of(self, first: str, second: str) -> Tensor | None:
        """Keys that define the positives of the pair; None: only the own row is positive."""
        return keys_of((first, second), self.keys, self.content)

    def oracle(self, first: str, second: str, valid: Tensor) -> tuple[float, float] | None:
        """Acc@1 and Acc@5 of tvl_align.evaluation.oracle; None if no factor is known to be in both."""
        if self.labels is None:
            return None
        shared = [f for f, owners in self.labels.ownership.items() if {first, second} <= set(owners)]
        rows = [name for name, known in zip(self.names, valid.tolist(), strict=True) if known]
        if not shared or not rows:
            return None
        keys = self.of(first, second)
        ids = torch.arange(len(rows))[:, None] if keys is None else keys[valid]
        one, other = (torch.from_numpy(self.labels.told(m, shared, rows)) for m in (first, second))
        return oracle(one, other, positive_mask(ids, ids))


def _pair(
    first: str,
    second: str,
    trained: SplitTokens,
    untrained: SplitTokens,
    stage1: Mapping[str, Tensor],
    meanings: Meanings,
    weights: Tensor,
) -> dict[str, float | None]:
    """Retrieval of a pair with the registers, trained and not, and, if their widths agree, with the frozen features."""
    valid, keys = trained.present[first] & trained.present[second], meanings.of(first, second)
    entry: dict[str, float | None] = {}
    comparable = stage1[first].shape[1] == stage1[second].shape[1]  # otherwise there is no common embedding space
    for prefix, pooled, known in (
        ("", trained.pooled, True),
        ("untrained_", untrained.pooled, True),
        ("stage1_", stage1, comparable),
    ):
        found = retrieval(pooled[first], pooled[second], valid, keys, trained.scale) if known and valid.any() else None
        low, high = interval(100 * weighted_mean(found.hits, weights[:, valid])) if found else (None, None)
        values = {"acc1": found.acc1, "acc5": found.acc5} if found else {"acc1": None, "acc5": None}
        entry |= {f"{prefix}{name}": v for name, v in (values | {"low": low, "high": high}).items()}
        if not prefix:
            entry["chance1"] = found.chance1 if found else None
    best = meanings.oracle(first, second, valid)
    return entry | {"oracle_acc1": best[0] if best else None, "oracle_acc5": best[1] if best else None}


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


def _lengths(model: nn.Module) -> list[int]:
    """The numbers k of registers that prefixes are measured with: all, or with more than 8 registers powers of two."""
    count = len(model.get_parameter("registers"))
    return [k for k in range(1, count + 1) if count <= 8 or k & (k - 1) == 0 or k == count]


def _overlapping(tokens: SplitTokens) -> int:
    """The number of overlapping registers."""
    return next(iter(tokens.overlapping.values())).shape[1]


def _first(
    k: int, model: nn.Module, source: FeatureSource, rows: Tensor, device: torch.device, every: SplitTokens
) -> SplitTokens:
    """The tokens of the first k registers. every: those of all registers, which are not computed again."""
    return every if k == len(model.get_parameter("registers")) else compute_tokens(model, source, rows, device, k)


def _first_overlapping(
    k: int, model: nn.Module, source: FeatureSource, rows: Tensor, device: torch.device, every: SplitTokens
) -> dict[str, Tensor]:
    """The overlapping tokens of the first k registers. Those of causal registers do not depend on later ones, which are
    zero then."""
    if not getattr(model, "causal", False):
        return compute_tokens(model, source, rows, device, k).overlapping
    kept = torch.arange(_overlapping(every))[:, None] < k
    return {m: tokens * kept for m, tokens in every.overlapping.items()}


def _prefixes(
    prefixes: Mapping[int, SplitTokens],
    names: Sequence[str],
    meanings: Meanings,
    weights: Tensor,
    factors: FactorProbes | None,
) -> list[dict[str, Any]]:
    """Results for the first k registers, of {k: their tokens of the test rows}, each with its interval and what it is above
    that of the prefix before.

    Mean Acc@1 over the pairs, shared retention and usable bits of the shared factors in percent (None without labels), and
    the error of rebuilding the frozen tokens in percent of their variance (None without a decoder).
    """
    results: list[dict[str, Any]] = []
    before: dict[str, Estimate] = {}
    for k, tokens in prefixes.items():
        found = _retrievals(tokens, names, meanings)
        rebuilt = tokens.reconstruction(weights)
        group = f"first_{k}_registers" if k < _overlapping(tokens) else "overlapping"
        measured = factors.shared_scores(group, weights) if factors is not None else {}
        if found:
            hits = [(r.acc1, 100 * weighted_mean(r.hits, weights[:, valid])) for r, valid in found.values()]
            measured["acc1"] = mean_estimate([Estimate(*each) for each in hits])
        if rebuilt:
            measured["reconstruction"] = mean_estimate(list(rebuilt.values()))
        entry: dict[str, Any] = {"k": k}
        for name in ("acc1", "shared_retention", "shared_bits", "reconstruction"):
            prefix = "" if name == "acc1" else f"{name}_"
            if name in measured:
                entry |= measured[name].entries(name, prefix)
            else:
                entry |= dict.fromkeys((name, f"{prefix}low", f"{prefix}high"))
            if name in measured and name in before:
                entry |= measured[name].minus(before[name]).entries(f"{prefix}added")
        each = {m: error.value for m, error in rebuilt.items()}
        results.append(entry | {"pairs": {pair: r.acc1 for pair, (r, _) in found.items()}, "reconstructions": each})
        before = measured
    return results


def _retrievals(tokens: SplitTokens, names: Sequence[str], meanings: Meanings) -> dict[str, tuple[Retrieval, Tensor]]:
    """{pair: (retrieval, (M,) bool rows that have both)}, of pairs that have rows."""
    found = {}
    for a, b in combinations(names, 2):
        valid = tokens.present[a] & tokens.present[b]
        if valid.any():
            scores = retrieval(tokens.pooled[a], tokens.pooled[b], valid, meanings.of(a, b), tokens.scale)
            found[pair_name(a, b)] = scores, valid
    return found


def _shuffled_acc1(tokens: SplitTokens, names: Sequence[str], meanings: Meanings, seed: int) -> float | None:
    """Control: mean Acc@1 over the pairs with the test rows of the second modality shuffled. Must be at chance level."""
    scores = []
    for a, b in combinations(names, 2):
        valid = tokens.present[a] & tokens.present[b]
        order = torch.randperm(int(valid.sum()), generator=torch.Generator().manual_seed(seed))
        x, y = tokens.pooled[a][valid], tokens.pooled[b][valid][order]
        keys = meanings.of(a, b)
        keys = keys[valid] if keys is not None else None
        if len(x):
            scores.append(retrieval(x, y, torch.ones(len(x), dtype=torch.bool), keys, tokens.scale).acc1)
    return float(np.mean(scores)) if scores else None
