"""Leak without labels: how much of one group of tokens is read from the other.

Complementary tokens must not tell what modalities share, and overlapping tokens must not tell what a modality keeps to
itself. So the OTHER modalities' overlapping tokens are predicted from the complementary tokens of a modality, each from the
rows that have both, and its complementary tokens from its overlapping ones. The score is R2 on test rows: 0 = nothing is
read, 1 = everything. A small R2 can still hide a class (see docs/DESIGN.md), so it orders methods and does not replace
labels.
"""

import math

import torch
from torch import Tensor

from tvl_align.evaluation.factors import KINDS
from tvl_align.evaluation.probes import MAX_STEPS, Components, Problem, Target, fit_probes, r2, squares
from tvl_align.evaluation.split_tokens import SplitTokens
from tvl_align.evaluation.uncertainty import interval

CODE_WIDTH = 32  # principal components of the tokens that are predicted
MIN_ROWS = 20  # paired probe rows
LEAST_VARIANCE = 1e-4  # of a code whose mean square on the probe rows is 1; of less there is nothing to read


def cross_readings(
    probe: SplitTokens,
    test: SplitTokens,
    seed: int,
    device: torch.device | None = None,
    steps: int = MAX_STEPS,
    groups: Tensor | None = None,
    weights: Tensor | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """{modality: {"shared from complementary" or "unique from overlapping": {kind of probe: R2, "half": R2}}}.

    half: of the strongest of probes that are fitted on half of the rows. groups: (M,) int64 of the probe rows. weights:
    (R, Q) bootstrap weights of the test rows, which add "low" and "high", the 95% interval of the strongest probe. Pairs of
    modalities with fewer than MIN_ROWS paired probe rows are left out.
    """
    names = [*KINDS, "half", *(("low", "high") if weights is not None else ())]
    problems, tests, places = [], [], []
    result: dict[str, dict[str, dict[str, float]]] = {}
    for m in probe.overlapping:
        for name, source, wanted in (
            ("shared from complementary", "complementary", [(o, "overlapping") for o in probe.overlapping if o != m]),
            ("unique from overlapping", "overlapping", [(m, "complementary")]),
        ):
            wanted = [(o, g) for o, g in wanted if _paired(probe, m, o) >= MIN_ROWS and _paired(test, m, o)]
            if not wanted:
                continue
            result.setdefault(m, {})[name] = dict.fromkeys(names, 0.0)
            codes = [code for o, g in wanted if (code := _code(probe, test, m, o, g)) is not None]
            if codes:
                target, tested = (torch.cat(parts, dim=1) for parts in zip(*codes, strict=True))
                x, x_test = (getattr(t, source)[m][t.present[m]].flatten(1) for t in (probe, test))
                own = groups[probe.present[m]] if groups is not None else None
                paired = target.isfinite().any(1)
                x, target, own = x[paired], target[paired], own[paired] if own is not None else None
                x, target, x_test = (t.to(device) for t in (x, target, x_test))
                for rows in (len(x), math.ceil(len(x) / 2)):
                    of_rows = own[:rows] if own is not None else None
                    problems.append(Problem((x[:rows],), [Target(target[:rows])], (x_test,), of_rows))
                    tests.append(tested)
                    places.append((m, name, rows < len(x)))
    found = fit_probes(problems, KINDS, seed, steps, "probe without labels")
    for (m, name, half), problem, tested, by_kind in zip(places, problems, tests, found, strict=True):
        mean = problem.targets[0].values.nanmean(0).cpu()
        scores: dict[str, float] = {kind: r2(probed, tested, mean) for kind, (probed,) in by_kind.items()}
        result[m][name] |= {"half": max(scores.values())} if half else scores
        if weights is not None and not half:
            (best,) = by_kind[max(KINDS, key=lambda kind: scores[kind])]
            error, spread = (weights[:, test.present[m]] @ part for part in squares(best, tested, mean))
            low, high = interval(1 - error / spread.clamp(min=1e-12))
            result[m][name] |= {"low": low, "high": high}
    return result


def _paired(tokens: SplitTokens, first: str, second: str) -> int:
    """The number of rows that have both modalities."""
    return int((tokens.present[first] & tokens.present[second]).sum())


def _code(probe: SplitTokens, test: SplitTokens, of: str, modality: str, group: str) -> tuple[Tensor, Tensor] | None:
    """Leading principal components (M, C), (Q, C) of the tokens of a modality in the rows of another one, `of`.

    They are fitted on the probe rows that have both, where their mean square is 1; NaN in rows without the modality. None if
    they are constant on either side.
    """
    both = [t.present[of] & t.present[modality] for t in (probe, test)]
    x, y = (getattr(t, group)[modality][at].flatten(1).float() for t, at in zip((probe, test), both, strict=True))
    components = Components(x)
    a, b = ((components(t) * components.weights(1.0))[:, :CODE_WIDTH] for t in (x, y))
    scale = a.square().mean().sqrt().clamp(min=1e-12)
    if min((part / scale).var(0, correction=0).mean() for part in (a, b)) < LEAST_VARIANCE:
        return None
    sides = []
    for part, t, at in zip((a, b), (probe, test), both, strict=True):
        code = torch.full((len(at), part.shape[1]), torch.nan)
        code[at] = part / scale
        sides.append(code[t.present[of]])
    return sides[0], sides[1]
