"""Leak without labels: how much of one group of tokens is read from the other.

Complementary tokens must not tell what modalities share, and overlapping tokens must not tell what a modality keeps to
itself. So the OTHER modalities' overlapping tokens are predicted from the complementary tokens of a modality, and its
complementary tokens from its overlapping ones. The score is R2 on test rows: 0 = nothing is read, 1 = everything. A small R2
can still hide a class (see docs/DESIGN.md), so it orders methods; it does not replace labels.
"""

import torch
from torch import Tensor

from tvl_align.evaluation.factors import KINDS
from tvl_align.evaluation.probes import Components, Problem, Target, fit_probes, r2
from tvl_align.evaluation.split_tokens import SplitTokens

CODE_WIDTH = 32  # principal components of the tokens that are predicted
MIN_ROWS = 20  # paired probe rows
LEAST_VARIANCE = 1e-4  # of a code whose mean square on the probe rows is 1; of less there is nothing to read


def cross_readings(
    probe: SplitTokens, test: SplitTokens, seed: int, device: torch.device | None = None, steps: int = 400
) -> dict[str, dict[str, dict[str, float]]]:
    """{modality: {"shared from complementary" or "unique from overlapping": {kind of probe: R2}}}.

    Modalities with fewer than MIN_ROWS paired rows are left out.
    """
    problems, tests, places = [], [], []
    result: dict[str, dict[str, dict[str, float]]] = {}
    for m in probe.overlapping:
        others = [o for o in probe.overlapping if o != m]
        for name, source, wanted in (
            ("shared from complementary", "complementary", [(o, "overlapping") for o in others]),
            ("unique from overlapping", "overlapping", [(m, "complementary")]),
        ):
            if not wanted:
                continue
            rows = [torch.stack([t.present[o] for o in (m, *(o for o, _ in wanted))]).all(0) for t in (probe, test)]
            if rows[0].sum() < MIN_ROWS or not rows[1].any():
                continue
            codes = [_code(getattr(probe, g)[o], getattr(test, g)[o], *rows) for o, g in wanted]
            target, tested = (torch.cat(parts, dim=1) for parts in zip(*codes, strict=True))
            x, x_test = (getattr(t, source)[m][at].flatten(1) for t, at in zip((probe, test), rows, strict=True))
            result.setdefault(m, {})[name] = dict.fromkeys(KINDS, 0.0)
            if min(part.var(0, correction=0).mean() for part in (target, tested)) >= LEAST_VARIANCE:
                on_device = [t.to(device) for t in (x, target, x_test)]
                problems.append(Problem(on_device[:1], [Target(on_device[1])], on_device[2:], thorough=False))
                tests.append(tested)
                places.append((m, name))
    found = fit_probes(problems, KINDS, seed, steps, "probe without labels")
    for (m, name), problem, tested, by_kind in zip(places, problems, tests, found, strict=True):
        mean = problem.targets[0].values.mean(0).cpu()
        result[m][name] = {kind: r2(probed, tested, mean) for kind, (probed,) in by_kind.items()}
    return result


def _code(probe: Tensor, test: Tensor, rows: Tensor, test_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Leading principal components of tokens (M, n, D), (Q, n, D), fitted on the probe rows, with a mean square of 1."""
    x, y = probe[rows].flatten(1).float(), test[test_rows].flatten(1).float()
    components = Components(x)
    a, b = ((components(t) * components.weights(1.0))[:, :CODE_WIDTH] for t in (x, y))
    scale = a.square().mean().sqrt().clamp(min=1e-12)
    return a / scale, b / scale
