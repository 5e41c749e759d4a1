"""Independence of complementary codes from overlapping ones, by predictability minimisation, as pure functions.

Uncorrelated is not independent: an MLP reads what linear regression has removed. So a predictor, a small MLP, learns the
complementary code of a modality from its overlapping one, and the code is trained so that what is predicted does not
correlate with what is there (Schmidhuber 1992, Neural Computation 4(6), 863-879). Units alone would hide what is shared in
their size or in their product, so their squares and products are predicted too.

Shapes: M modalities, B local rows, G rows of all processes, V units of a complementary code, P moments of them.
"""

from collections.abc import Mapping
from itertools import chain, combinations_with_replacement

import torch
from torch import Tensor

from tvl_align.losses.contrastive import indices
from tvl_align.system.distributed import gather_with_grad

SPARE = 0.01  # added to the share of a variance that is not predicted: bounds the penalty
LEAST_VARIANCE = 1e-6  # of a prediction times that of what is predicted


def moment_count(units: int) -> int:
    """P, the number of `moments` of V units."""
    return units + units * (units + 1) // 2


def moments(code: Tensor) -> Tensor:
    """Units (..., V) -> the units, and the products of all pairs of them, their squares among them: (..., P)."""
    pairs = zip(*combinations_with_replacement(range(code.shape[-1]), 2), strict=True)
    first, second = code.index_select(-1, indices(tuple(chain(*pairs)), code.device)).chunk(2, dim=-1)
    return torch.cat([code, first * second], dim=-1)


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
    each = [torch.stack([x[m] for m in codes]) for x in (codes, predicted, valid)]  # (M, B, V), (M, B, P), (M, B)
    rows = each[2][..., None]
    known = torch.where(rows, torch.cat([*each[:2], rows], dim=2), 0.0)
    joined = gather_with_grad(known.transpose(0, 1)).transpose(0, 1)
    code, guess, counted = joined.split([each[0].shape[2], each[1].shape[2], 1], dim=2)  # (M, G, V), (M, G, P), (M, G, 1)
    count = counted.detach().sum(1, keepdim=True)
    weight, found = counted.detach() / count.clamp(min=1), (count > 0).sum().clamp(min=1)
    truth, known_guess = moments(code), guess.detach()
    loss = ((guess - truth.detach()).square() * weight).sum() / (found * guess.shape[2])
    parts = torch.cat([truth, truth.square(), truth * known_guess, known_guess, known_guess.square()], dim=2)
    mean, square, product, of_guess, square_of_guess = (weight.transpose(1, 2) @ parts).chunk(5, dim=2)  # (M, 1, P) each
    variances = (square - mean.square()) * (square_of_guess - of_guess.square())
    explained = ((product - mean * of_guess).square() / variances.clamp(min=LEAST_VARIANCE)).clamp(max=1)
    return loss, torch.log1p(explained / -(1 + SPARE)).sum() / (-2 * found)
