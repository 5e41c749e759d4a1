"""What a run is worth, on the test split: retrieval, where the information is, order, controls -> results.json, a page.

Every number is in percent and stands beside its chance level; the test split is one gallery; probes are fitted on
training rows only.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from experiments.stage2.engine_stage2 import load_inputs
from experiments.stage2.methods import METHODS
from tvl_align.alignment import pair_name
from tvl_align.checkpoint import load_checkpoint
from tvl_align.config import DataConfig, OptimConfig, RunConfig, Settings, Stage1Config, from_plain
from tvl_align.console import UserError, progress
from tvl_align.contract import Features, Method, Output
from tvl_align.data.samples import Samples
from tvl_align.evaluation import (
    TVL_THRESHOLDS,
    Labels,
    attentive_probe,
    linear_probe,
    probe_all,
    read_labels,
    retrieval,
    tvl_protocol,
    way,
)
from tvl_align.features import FeatureSource
from tvl_align.nested import prefix
from tvl_align.registers import pooled_overlapping
from tvl_align.report import write_page
from tvl_align.runtime import pick_device, provenance, seed_everything

BATCH = 256
EXAMPLES = 8  # test rows shown on the page
LEAST_OTHERS = 10  # rows of another level than the most common: by chance a fifth of the rows never has them all


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a run, on the official test split."""

    run: tyro.conf.Positional[Path]
    """Run folder: <output_dir>/<log_name>."""
    checkpoint: str = "checkpoint.pth"
    """Checkpoint in the run folder: the last epoch, or checkpoint-acc1.pth, checkpoint-acc5.pth."""
    labels: Path | None = None
    """CSV with a vision column and one per factor; default: what came with the data, where there are labels."""
    probe_rows: int = 3000
    """Training rows that probes are fitted on, at most: the first so many of a seeded order."""
    split: Literal["test", "val"] = "test"
    """Split to measure on. val: for choosing settings; writes results-val.json and no page."""
    device: str | None = None
    """cuda or cpu; default: cuda where there is one, else cpu."""


@dataclass(frozen=True)
class Readings:
    """What one model makes of one split, on the CPU: overlapping, complementary {modality: (M, n, D)}, pooled."""

    overlapping: dict[str, Tensor]
    complementary: dict[str, Tensor]
    pooled: dict[str, Tensor]
    present: dict[str, Tensor]
    keys: Tensor
    scale: float
    unexplained: dict[str, float]


def load_run(folder: Path) -> tuple[Settings[Any], Method, dict[str, Any]]:
    """The settings, the method and the config.json of a run folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder (no config.json); give <output_dir>/<log_name>.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        made_by, plain, _ = config["implementation"]["experiment_id"], config["settings"], config["store"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not the configuration of a run ({type(error).__name__}: {error}).") from error
    found = [m for m in METHODS.values() if m.implementation.experiment_id == made_by]
    if not found:
        known = ", ".join(m.implementation.experiment_id for m in METHODS.values())
        raise UserError(f"{folder} was made by {made_by}, which METHODS does not list ({known}).")
    method = found[0]
    groups = {"stage1": Stage1Config, "knobs": method.knobs, "data": DataConfig, "optim": OptimConfig, "run": RunConfig}
    try:
        return Settings(**{name: from_plain(cls, plain[name]) for name, cls in groups.items()}), method, config
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds settings that cannot be read ({type(error).__name__}: {error}).") from error


def evaluate_run(options: EvaluateConfig) -> Path:
    """Measure a run; writes results.json and report.html into its folder and returns the page's path.

    With `--split val` it writes and returns results-val.json.
    """
    settings, method, config = load_run(options.run)
    device = pick_device(options.device)
    inputs = load_inputs(settings, device, config["store"])
    if options.split not in inputs.splits:
        where = settings.data.store or settings.data.datasets_dir
        raise UserError(f"{where} has no {options.split} rows, so there is nothing to measure on.")
    model = method.model(settings.knobs, inputs.specs).to(device)
    model.load_state_dict(load_checkpoint(options.run / options.checkpoint)["model"])
    seed_everything(settings.run.own_seed + 1)
    untrained = method.model(settings.knobs, inputs.specs).to(device)
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
    read, untrained_read = (read_split(m, test, all_rows(test), device) for m in (model, untrained))
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
        probes = Probes(read_labels(path), train, rows, test, frozen, settings.run.seed)
        readings = {
            who: (read_split(m, train, rows, device), on_test)
            for who, m, on_test in (("", model, read), ("untrained_", untrained, untrained_read))
        }
        results["factors"] = _factors(readings, probes)
        results["summary"] = summary(results["factors"])
    results["prefix"] = _prefixes(model, test, device, names, probes, results["factors"])
    results |= {"run": config, "evaluated_by": provenance()}
    on_test = options.split == "test"
    written = options.run / ("results.json" if on_test else f"results-{options.split}.json")
    written.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return write_page(options.run) if on_test else written


def all_rows(source: FeatureSource) -> Tensor:
    return torch.arange(len(source))


def _plain(source: FeatureSource, rows: Tensor, device: torch.device) -> Any:
    parts = list(rows.split(BATCH))
    return source.batches(parts, [torch.zeros_like(p) for p in parts], device)


def stage1_features(source: FeatureSource, rows: Tensor, device: torch.device) -> Features:
    """The frozen features of the given rows, plain view, joined on the CPU; text padded to its longest sentence."""
    parts = [batch.to("cpu") for batch in _plain(source, rows, device)]
    joined = {}
    for name in parts[0].modalities:
        longest = max(p.modalities[name].tokens.shape[1] for p in parts)

        def padded(x: Tensor, longest: int = longest) -> Tensor:
            return torch.cat([x, x.new_zeros(len(x), longest - x.shape[1], *x.shape[2:])], dim=1)

        tokens = [p.modalities[name] for p in parts]
        joined[name] = type(tokens[0])(
            torch.cat([padded(t.tokens) for t in tokens]),
            torch.cat([padded(t.mask) for t in tokens]),
            torch.cat([t.pooled for t in tokens]),
            torch.cat([t.present for t in tokens]),
        )
    return Features(joined, torch.cat([p.caption_keys for p in parts]), torch.cat([p.rows for p in parts]))


@torch.no_grad()
def read_split(
    model: nn.Module, source: FeatureSource, rows: Tensor, device: torch.device, length: int | None = None
) -> Readings:
    """Read rows (plain view) with a model in evaluation mode, keeping the first `length` registers (None: all)."""
    model.eval()
    outputs: list[Output] = []
    error: dict[str, list[float]] = {}
    for features in _plain(source, rows, device):
        registers = model.registers.shape[0]
        kept = None if length is None else prefix(len(features), registers, length)
        output = model(features, kept=kept, joint=False)
        for name, r in output.get("reconstruction", {}).items():
            sums = error.setdefault(name, [0.0, 0.0])
            sums[0] += float(r.error[r.mask].sum())
            sums[1] += float(r.mask.sum())
        outputs.append({"pooled": pooled_overlapping(output)} | {k: output[k] for k in _KEPT})

    def joined(entry: str, name: str) -> Tensor:
        return torch.cat([output[entry][name] for output in outputs]).cpu()

    names = list(outputs[0]["overlapping_tokens"])
    return Readings(
        {m: joined("overlapping_tokens", m) for m in names},
        {m: joined("complementary_tokens", m) for m in names},
        {m: joined("pooled", m) for m in names},
        {m: joined("present", m) for m in names},
        torch.cat([output["caption_keys"] for output in outputs]).cpu(),
        float(outputs[0]["logit_scale"]),
        {m: 100 * wrong / max(total, 1e-9) for m, (wrong, total) in error.items()},
    )


_KEPT = ("overlapping_tokens", "complementary_tokens", "present", "caption_keys", "logit_scale")


def _keys(first: str, second: str, read: Readings) -> Tensor | None:
    return read.keys if "text" in (first, second) else None


def _pair(first: str, second: str, read: Readings, stage1: Mapping[str, Tensor]) -> dict[str, float | None]:
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


def _tvl_protocol(read: Readings, stage1: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, list[dict[str, float]]]:
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
    probes: "Probes | None",
    factors: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """For every number k of kept registers: Acc@1 (mean over the pairs), shared retention (where there are labels), and
    the share of the frozen tokens' variance left (where the method rebuilds them)."""
    found: list[dict[str, Any]] = []
    before: Readings | None = None
    count = model.registers.shape[0]
    for k in [k for k in range(1, count + 1) if count <= 8 or k & (k - 1) == 0 or k == count]:  # many: powers of two
        read = read_split(model, test, all_rows(test), device, k)
        scores = _acc1(read, names)
        errors = list(read.unexplained.values())
        entry = {
            "k": k,
            "acc1": float(np.mean(list(scores.values()))),
            "shared_retention": None,
            "reconstruction": float(np.mean(errors)) if errors else None,
            "pairs": scores,
            "reconstructions": read.unexplained,
        }
        if probes is not None and before is not None and _same(read.overlapping, before.overlapping):
            entry["shared_retention"] = found[-1]["shared_retention"]  # a complementary register more changed none of them
        elif probes is not None:
            on_train = read_split(model, probes.train, probes.rows, device, k)
            entry["shared_retention"] = _shared_retention(on_train, read, probes, factors)
        found.append(entry)
        before = read
    return found


def _same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(x, others[m]) for m, x in some.items())


def _acc1(read: Readings, names: Sequence[str]) -> dict[str, float]:
    """Acc@1 of every pair."""
    return {
        pair_name(a, b): retrieval(
            read.pooled[a], read.pooled[b], read.present[a] & read.present[b], _keys(a, b, read), read.scale
        ).acc1
        for a, b in combinations(names, 2)
    }


def _shared_retention(
    on_train: Readings, on_test: Readings, probes: "Probes", factors: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> float | None:
    """The summary's number, from the overlapping tokens of these readings."""
    jobs, ends = [], []
    for modality, entries in factors.items():
        fit_rows, read_rows = probes.rows_of(modality, list(entries))
        for factor, entry in entries.items():
            if len(entry["ownership"]) > 1:
                y, y_test = probes.truth(factor, fit_rows, read_rows)
                x, x_test = (r.overlapping[modality].flatten(1) for r in (on_train, on_test))
                jobs.append((x[fit_rows], y, x_test[read_rows], y_test))
                ends.append((entry["chance"], entry["stage1"]))
    scores = list(probe_all(linear_probe, jobs, probes.seed))
    return float(np.mean([way(s, *e) for s, e in zip(scores, ends, strict=True)])) if scores else None


def _confusions(read: Readings, samples: Samples) -> list[dict[str, Any]]:
    """The first touch images for which another photo is retrieved: which row asked, which was found."""
    valid = (read.present["tactile"] & read.present["vision"]).nonzero().squeeze(1)
    found = (read.pooled["tactile"][valid] @ read.pooled["vision"][valid].T).argmax(1)
    wrong = (found != torch.arange(len(found))).nonzero().squeeze(1)[:EXAMPLES].tolist()
    pairs = [(int(valid[i]), int(valid[found[i]])) for i in wrong]
    return [{"query": asdict(samples.rows[a]), "found": asdict(samples.rows[b])} for a, b in pairs]


def _shuffled(read: Readings, names: Sequence[str], seed: int) -> float:
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


@dataclass(frozen=True)
class Probes:
    """What every probe shares: labels, the training rows it is fitted on, the rows it reads, their frozen features."""

    labels: Labels
    train: FeatureSource
    rows: Tensor
    test: FeatureSource
    frozen: Mapping[str, Features]
    seed: int

    def rows_of(self, modality: str, factors: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(M,) bool masks of the fitted and the read rows that have this modality and every one of its labels."""
        masks = []
        for split, names in (("train", self._names), ("test", list(self.test.names))):
            known = np.all([self.labels.of(f, names) >= 0 for f in factors], axis=0)
            masks.append(self.frozen[split].modalities[modality].present & torch.from_numpy(known))
        return masks[0], masks[1]

    def truth(self, factor: str, fit_rows: Tensor, read_rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The levels of a factor in the masked rows. Raises UserError where no probe can learn them."""
        y, y_test = self.labels.of(factor, self._names), self.labels.of(factor, list(self.test.names))
        y, y_test = y[fit_rows.numpy()], y_test[read_rows.numpy()]
        others, needed = len(y) - int(np.bincount(y, minlength=1).max()), min(LEAST_OTHERS, len(y) // 5 + 2)
        if others < needed or not len(y_test):
            raise UserError(
                f"the label {factor!r} cannot be probed: of its {len(y)} training rows {needed} must have another level "
                f"than the most common one ({others} have), and some row must be read ({len(y_test)} are); leave out its "
                "column or raise --probe_rows."
            )
        return y, y_test

    @property
    def _names(self) -> list[str]:
        return [self.train.names[i] for i in self.rows.tolist()]


def _factors(readings: Mapping[str, tuple[Readings, Readings]], probes: Probes) -> dict[str, dict[str, dict[str, Any]]]:
    """Probe every factor in every modality that may carry it. All groups are read from the same rows.

    readings: {"": of the trained model, "untrained_": of an untrained one}, each of training and of test rows.
    """
    labels, groups = probes.labels, [who + group for who in readings for group in ("overlapping", "complementary")]
    plan = {
        m: [f for f in labels.levels if not labels.ownership[f] or m in labels.ownership[f]]
        for m in readings[""][0].overlapping
    }
    modalities = [m for m in plan if plan[m]]
    rows = {m: probes.rows_of(m, plan[m]) for m in modalities}
    truth = {m: {f: probes.truth(f, *rows[m]) for f in plan[m]} for m in modalities}

    def tokens(modality: str) -> tuple[Any, ...]:
        fit_rows, read_rows = rows[modality]
        a, b = (probes.frozen[split].modalities[modality] for split in ("train", "test"))
        answers = truth[modality].values()
        return (
            *(a.tokens[fit_rows], a.mask[fit_rows], [y for y, _ in answers]),
            *(_fitted(b.tokens, a.tokens)[read_rows], _fitted(b.mask, a.mask)[read_rows], [y for _, y in answers]),
        )

    def features(modality: str, factor: str) -> Iterator[tuple[Any, ...]]:
        (fit_rows, read_rows), (y, y_test) = rows[modality], truth[modality][factor]
        yield (
            *(probes.frozen["train"].modalities[modality].pooled[fit_rows], y),
            *(probes.frozen["test"].modalities[modality].pooled[read_rows], y_test),
        )
        for on_train, on_test in readings.values():
            for group in ("overlapping", "complementary"):
                x, x_test = (getattr(reading, group)[modality].flatten(1) for reading in (on_train, on_test))
                yield x[fit_rows], y, x_test[read_rows], y_test

    found: dict[str, dict[str, dict[str, Any]]] = {}
    with progress(sum(map(len, plan.values())), "probe", "factor") as bar:
        ceilings = list(probe_all(attentive_probe, (tokens(m) for m in modalities), probes.seed))
        scores = probe_all(linear_probe, (job for m in modalities for f in plan[m] for job in features(m, f)), probes.seed)
        for modality, attentive in zip(modalities, ceilings, strict=True):
            found[modality] = {}
            for factor, ceiling in zip(plan[modality], attentive, strict=True):
                y_test = truth[modality][factor][1]
                entry: dict[str, Any] = {name: next(scores) for name in ("stage1_pooled", *groups)}
                entry |= {
                    "ownership": list(labels.ownership[factor]),
                    "chance": 100 * float(np.bincount(y_test).max() / len(y_test)),
                    "stage1": max(ceiling, entry["stage1_pooled"]),
                }
                found[modality][factor] = entry
                bar.update()
    return found


def _fitted(x: Tensor, like: Tensor) -> Tensor:
    """Cut or zero-pad the token axis of x to that of `like`."""
    missing = like.shape[1] - x.shape[1]
    return x[:, : like.shape[1]] if missing <= 0 else torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], 1)


def summary(factors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Retention and leak in percent of the way from chance to the ceiling, averaged over modalities and factors.

    shared: factors of two or more modalities; unique: of one. retention: shared read from overlapping, unique from
    complementary tokens; leak: the other way round.
    """
    groups: dict[str, list[float]] = {}
    for modality in factors.values():
        for entry in modality.values():
            if not entry["ownership"]:
                continue
            shared = len(entry["ownership"]) > 1
            over, comp = (way(entry[g], entry["chance"], entry["stage1"]) for g in ("overlapping", "complementary"))
            groups.setdefault("shared_retention" if shared else "unique_leak", []).append(over)
            groups.setdefault("shared_leak" if shared else "unique_retention", []).append(comp)
    return {name: float(np.mean(groups[name])) for name in sorted(groups)}
