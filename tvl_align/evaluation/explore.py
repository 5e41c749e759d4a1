"""What the page of a run lets a reader explore: which rows each row finds, where registers look, a map of the tokens.

Shapes: Q test rows, G rows of a gallery, K numbers of kept registers, D directions, F finds, N registers, C axes of a map.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tvl_align.contract import Features
from tvl_align.data.samples import Samples
from tvl_align.evaluation.explore_file import Exploration
from tvl_align.evaluation.factors import Group
from tvl_align.evaluation.labels import Labels
from tvl_align.evaluation.split_tokens import SplitTokens, all_rows, plain_batches
from tvl_align.evaluation.uncertainty import interval, weighted_mean
from tvl_align.features.store import FeatureSource
from tvl_align.losses.contrastive import positive_mask
from tvl_align.metrics.retrieval import CHUNK, TIE
from tvl_align.registers.attention import attention_maps
from tvl_align.registers.principal import leading_eigenvectors

FINDS = 8  # nearest rows that are kept of every query
AXES = 8  # principal components of a map
LOOKS = 32_000  # most rows x registers^2 whose attention is measured: a gradient for each register, through all of them
MAX_TOKENS = 256  # of a modality; where registers look among more is not kept
Positives = Callable[[str, str], Tensor | None]
"""Two modalities -> (Q, J) int64 keys, as `tvl_align.losses.contrastive.keys_of`; None: only the own row is positive."""


@dataclass(frozen=True)
class Found:
    """What Q queries find: rows (Q, F) int32, scores (Q, F) float16, right (Q, F) bool, rank and answers (Q,) int32. See
    Exploration."""

    rows: np.ndarray
    scores: np.ndarray
    right: np.ndarray
    rank: np.ndarray
    answers: np.ndarray


def explore(
    model: nn.Module,
    source: FeatureSource,
    prefixes: Mapping[int, SplitTokens],
    frozen: Features,
    positives: Positives,
    labels: Labels | None,
    samples: Samples | None,
    device: torch.device,
) -> Exploration:
    """Explore the tokens of the test rows. prefixes: {k: tokens of the first k registers}, the last of which has all.

    frozen: the frozen features of the same rows. samples: their pictures and sentences; None for features of one's own.
    """
    tokens = list(prefixes.values())[-1]
    names, overlapping = list(tokens.pooled), next(iter(tokens.overlapping.values())).shape[1]
    by_length = {k: t for k, t in prefixes.items() if k < overlapping} | {overlapping: tokens}
    pairs, present = list(permutations(names, 2)), tokens.present
    contents = _contents(source, samples, names)
    found = [
        [
            nearest(t.pooled[a].to(device), t.pooled[b].to(device), present[a] & present[b], positives(a, b), contents[b])
            for a, b in pairs
        ]
        for t in by_length.values()
    ]
    maps, variance = token_maps(tokens, frozen)
    step = -(-len(source) * len(model.get_parameter("registers")) ** 2 // LOOKS)
    rows = samples.rows if samples else []
    factors = labels.levels if labels is not None else {}

    def stacked(name: str) -> np.ndarray:
        shape = (len(found), len(pairs), len(source)) + ((FINDS,) if name in ("rows", "scores", "right") else ())
        return np.array([[getattr(f, name) for f in of_length] for of_length in found]).reshape(shape)

    return Exploration(
        modalities=np.array(names),
        names=np.array(list(source.names)),
        datasets=np.array([row.dataset for row in rows] or [""] * len(source)),
        captions=np.array([str(row.caption or "") for row in rows] or [""] * len(source)),
        lengths=np.array(list(by_length)),
        overlapping=np.array(overlapping),
        directions=np.array([[names.index(a), names.index(b)] for a, b in pairs]).reshape(-1, 2),
        finds=stacked("rows"),
        scores=stacked("scores"),
        right=stacked("right"),
        rank=stacked("rank"),
        answers=stacked("answers")[-1],
        look_step=np.array(step),
        present={m: x.numpy() for m, x in present.items()},
        files={m: np.array([row.files.get(m, "") for row in rows]) for m in names if any(m in row.files for row in rows)},
        attention=_attention(model, source, step, device),
        maps=maps,
        variance=variance,
        levels={f: np.array(x) for f, x in factors.items()},
        labels={f: labels.of(f, source.names).astype(np.int16) for f in factors} if labels is not None else {},
        owners={f: np.array(labels.ownership[f], dtype=np.str_) for f in factors} if labels is not None else {},
    )


def nearest(
    x: Tensor, y: Tensor, valid: Tensor, keys: Tensor | None, contents: Tensor, count: int = FINDS, chunk: int = CHUNK
) -> Found:
    """What the rows of x (Q, D) find among those of y (Q, D), both L2-normalised.

    valid (Q,) bool: the rows that have both modalities; the others are no queries and are not found. keys: see Positives.
    contents (Q,) int64: of rows with equal content in y one is found, the first; it is right if any of them is a positive.
    The rank is over all rows, and negatives that tie with the nearest positive come first, as in `retrieval`.
    """
    at = valid.nonzero().squeeze(1)
    ids = at[:, None] if keys is None else keys[at]
    first, column = _first_of_each(contents[at])
    shown = at[first]
    size, width = len(valid), min(count, len(shown))
    rows, scores = np.full((size, count), -1, np.int32), np.zeros((size, count), np.float16)
    right, rank, answers = np.zeros((size, count), bool), np.full(size, -1, np.int32), np.zeros(size, np.int32)
    gallery, first, column, all_ids = y[at.to(y.device)], first.to(y.device), column.to(y.device), ids.to(y.device)
    for start in range(0, len(at), chunk):
        part = at[start : start + chunk]
        similar = x[part.to(x.device)] @ gallery.T
        positive = positive_mask(all_ids[start : start + chunk], all_ids)
        best = similar.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
        rank[part] = ((similar >= best - TIE) & ~positive).sum(1).cpu()
        of_content = similar.new_zeros(len(part), len(first)).index_add_(1, column, positive.to(similar.dtype)) > 0
        answers[part] = of_content.sum(1).cpu()
        top = similar[:, first].topk(width, dim=1)
        rows[part, :width] = shown[top.indices.cpu()]
        scores[part, :width] = top.values.cpu()
        right[part, :width] = of_content.gather(1, top.indices).cpu()
    return Found(rows, scores, right, rank, answers)


def _first_of_each(contents: Tensor) -> tuple[Tensor, Tensor]:
    """(G,) -> (U,) the first row of each distinct content, in the order of the rows; (G,) which of them a row is like."""
    index = contents.unique(return_inverse=True)[1]
    rows = torch.arange(len(index))
    first = rows.new_full((int(index.max()) + 1 if len(index) else 0,), len(index))
    first = first.scatter_reduce(0, index, rows, "amin")
    order = first.argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return first[order], place[index]


def _contents(source: FeatureSource, samples: Samples | None, names: Sequence[str]) -> dict[str, Tensor]:
    """{modality: (Q,) int64}, equal for rows that would be shown as the same picture or sentence."""
    known = {m: source.content_keys.get(m, torch.arange(len(source))) for m in names}
    if samples is not None and "text" in known:
        sentences: dict[str, int] = {}
        known["text"] = torch.tensor([sentences.setdefault(row.caption or "", len(sentences)) for row in samples.rows])
    return known


def _attention(model: nn.Module, source: FeatureSource, step: int, device: torch.device) -> dict[str, np.ndarray]:
    """{modality: (Q, N, T) float16} of modalities with 2 to MAX_TOKENS tokens, of every step-th row; zero for the others,
    and for absent rows and tokens."""
    parts: dict[str, list[np.ndarray]] = {}
    for features in plain_batches(source, all_rows(source)[::step], device):
        for m, x in attention_maps(model, features).items():
            parts.setdefault(m, []).append((x * features.modalities[m].present[:, None, None]).half().cpu().numpy())
    found = {}
    for m, of_batch in parts.items():
        longest = max(x.shape[2] for x in of_batch)
        if 1 < longest <= MAX_TOKENS:
            seen = np.concatenate([np.pad(x, ((0, 0), (0, 0), (0, longest - x.shape[2]))) for x in of_batch])
            found[m] = np.zeros((len(source), *seen.shape[1:]), np.float16)
            found[m][::step] = seen
    return found


def token_maps(tokens: SplitTokens, frozen: Features) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Principal components of the tokens: ({"group.modality": (Q, C) float16}, {"group.modality": (C,) shares of variance}).

    Groups: pooled, for which all modalities have the same axes, overlapping, complementary, and frozen, the pooled features
    of Stage 1. A group without tokens has no map.
    """
    groups = {
        "pooled": tokens.pooled,
        "overlapping": {m: x.flatten(1) for m, x in tokens.overlapping.items()},
        "complementary": {m: x.flatten(1) for m, x in tokens.complementary.items() if x.shape[1]},
        "frozen": {m: t.pooled for m, t in frozen.modalities.items()},
    }
    maps, variance = {}, {}
    for group, of_group in groups.items():
        known = {m: x.float().cpu() for m, x in of_group.items()}
        shared = _axes(torch.cat([x[tokens.present[m]] for m, x in known.items()])) if group == "pooled" else None
        for m, x in known.items():
            mean, vectors, share = shared or _axes(x[tokens.present[m]])
            at = (x - mean) @ vectors
            at[~tokens.present[m]] = torch.nan
            maps[f"{group}.{m}"], variance[f"{group}.{m}"] = at.half().numpy(), share.numpy()
    return maps, variance


def _axes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (F,), leading principal directions (F, C) and their shares of the variance (C,) of rows (R, F). The largest entry
    of a direction is positive, so that a map is not mirrored by rounding."""
    mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
    centred = x - mean
    values, vectors = leading_eigenvectors(centred.T @ centred / max(1, len(x)), min(AXES, x.shape[1]))
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return mean, vectors * largest.sign(), values / centred.square().sum(1).mean().clamp(min=1e-12)


def single_registers(probe: SplitTokens, test: SplitTokens) -> dict[str, Group]:
    """Each register alone, as groups for `FactorProbes.read`: register_1 ... register_N, overlapping ones first."""
    one, other = (
        {m: torch.cat([t.overlapping[m], t.complementary[m]], dim=1) for m in t.overlapping} for t in (probe, test)
    )
    count = next(iter(one.values())).shape[1]
    return {
        f"register_{n + 1}": Group(
            {m: x[:, n : n + 1] for m, x in one.items()}, {m: x[:, n : n + 1] for m, x in other.items()}
        )
        for n in range(count)
    }


def by_direction(
    found: Exploration, stage1: Mapping[str, Tensor], positives: Positives, weights: Tensor
) -> list[dict[str, Any]]:
    """Retrieval of every direction, with all registers: over all queries, and where there are several data sets over those
    of each, always in the full gallery. [{query, gallery, dataset, rows, acc1, low, high, acc5, chance1, stage1_acc1}].

    All numbers are in percent; low, high: 95% interval of acc1. dataset is None for all queries. stage1 {modality: (Q, E)}:
    the frozen features, whose Acc@1 is None if their widths differ. weights: (R, Q) bootstrap weights of the rows.
    """
    names = [str(m) for m in found.modalities]
    datasets = sorted(set(found.datasets.tolist()))
    of_dataset = {d: torch.from_numpy(found.datasets == d) for d in (datasets if len(datasets) > 1 else [])}
    everyone = torch.ones(len(found), dtype=torch.bool)
    results = []
    for d, (a, b) in enumerate([(names[i], names[j]) for i, j in found.directions.tolist()]):
        rank, valid = torch.from_numpy(found.rank[-1, d]), torch.from_numpy(found.present[a] & found.present[b])
        before, keys = None, positives(a, b)
        if stage1[a].shape[1] == stage1[b].shape[1]:
            before = torch.from_numpy(
                nearest(stage1[a], stage1[b], valid, keys, torch.zeros(len(found), dtype=torch.int64)).rank
            )
        chances = _chances(keys, valid)
        for dataset, chosen in {None: everyone, **of_dataset}.items():
            rows = valid & chosen
            if not rows.any():
                continue
            hits = torch.where(rows, (rank == 0).float(), torch.nan)
            low, high = interval(100 * weighted_mean(hits, weights))
            results.append(
                {
                    "query": a,
                    "gallery": b,
                    "dataset": dataset,
                    "rows": int(rows.sum()),
                    "acc1": 100 * float(hits.nanmean()),
                    "low": low,
                    "high": high,
                    "acc5": 100 * float((rank[rows] < 5).float().mean()),
                    "chance1": 100 * float(chances[rows].mean()),
                    "stage1_acc1": None if before is None else 100 * float((before[rows] == 0).float().mean()),
                }
            )
    return results


def _chances(keys: Tensor | None, valid: Tensor) -> Tensor:
    """(Q,): the share of valid rows that are positives of each row."""
    at = valid.nonzero().squeeze(1)
    if keys is None:
        return torch.full((len(valid),), 1 / max(1, len(at)))
    share = torch.zeros(len(valid))
    for part in at.split(CHUNK):
        share[part] = positive_mask(keys[part], keys[at]).float().mean(1)
    return share
