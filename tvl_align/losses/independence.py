"""Independence of complementary codes from overlapping ones, by predictability minimisation, as pure functions.

Uncorrelated is not independent: an MLP reads what linear regression has removed. So a predictor, a small MLP, learns the
complementary code of a modality from its overlapping one, and the code is trained so that what is predicted does not
correlate with what is there (Schmidhuber 1992, Neural Computation 4(6), 863-879). Units alone would hide what is shared in
their size or in their product, so their squares and products are predicted too.

Shapes: M modalities, B local rows, G rows of all processes, V units of a complementary code, P moments of them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tvl_align.system.distributed import gather_with_grad

SPARE = 0.01  # added to the share of a variance that is not predicted: bounds the penalty
LEAST_VARIANCE = 1e-6  # of a prediction times that of what is predicted


def moment_count(units: int) -> int:
    """P, the number of `moments` of V units."""
    return units + units * (units + 1) // 2


def moments(code: Tensor) -> Tensor:
    """Units (..., V) -> the units, and the products of all pairs of them, their squares among them: (..., P)."""
    first, second = torch.triu_indices(code.shape[-1], code.shape[-1], device=code.device).unbind()
    return torch.cat([code, code.index_select(-1, first) * code.index_select(-1, second)], dim=-1)


def independence(
    codes: Mapping[str, Tensor], predicted: Mapping[str, Tensor], valid: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The predictors' loss and the encoders' penalty, means over the modalities that have rows -> (), ().

    codes {modality: (B, V)}: units of the complementary tokens. predicted {modality: (B, P)}: what the predictor of the
    modality makes of its overlapping code, for `moments` of the units. valid {modality: (B,) bool}: rows that count.
    The loss, the mean squared error of moments, has gradients for predictors only. The penalty, with gradients for codes
    only, is -1/2 log(1 - r^2) summed over moments, for r the correlation of a moment and its prediction in the joined batch:
    the mutual information, in nats, of normal variables with this correlation. Averaged over processes, the results and the
    gradients are those of the joined batch.
    """
    names, width = list(codes), next(iter(codes.values())).shape[1]
    each = [torch.stack([x[m] for m in names], dim=1) for x in (codes, predicted)]  # (B, M, V), (B, M, P)
    rows = torch.stack([valid[m] for m in names], dim=1)[..., None]
    joined = gather_with_grad(torch.cat([torch.where(rows, torch.cat(each, dim=2), 0.0), rows.float()], dim=2))
    code, guess, counted = joined.split([width, joined.shape[2] - width - 1, 1], dim=2)
    count = counted.sum(0)  # (M, 1)

    def mean(x: Tensor) -> Tensor:
        return (x * counted).sum(0) / count.clamp(min=1)

    truth = moments(code)
    loss = mean((guess - truth.detach()).square())
    guess = guess.detach() - mean(guess.detach())
    truth = truth - mean(truth)
    explained = mean(guess * truth).square() / (mean(guess.square()) * mean(truth.square())).clamp(min=LEAST_VARIANCE)
    penalty = -0.5 * torch.log1p(-explained / (1 + SPARE))
    share = (count > 0) / (count > 0).sum().clamp(min=1)
    return (loss * share).sum() / loss.shape[1], (penalty * share).sum()
