"""Independence of complementary and overlapping codes, by predictability minimisation, as pure functions.

Uncorrelated is not independent: an MLP reads what linear regression has removed. So predictors, small MLPs, learn the
complementary code of a modality from its overlapping one and the other way round, and the complementary code is trained so
that no prediction correlates with what is there (Schmidhuber 1992, Neural Computation 4(6), 863-879). Units alone would hide
what is shared in their size or in their product, so their squares and products are predicted too.

Shapes: M modalities, B local rows, G rows of all processes, V units of a complementary code, P targets of predictions.
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
    """The number of `moments` of V units."""
    return units + units * (units + 1) // 2


def moments(code: Tensor) -> Tensor:
    """Units (..., V) -> the units, and the products of all pairs of them, their squares among them."""
    pairs = zip(*combinations_with_replacement(range(code.shape[-1]), 2), strict=True)
    first, second = code.index_select(-1, indices(tuple(chain(*pairs)), code.device)).chunk(2, dim=-1)
    return torch.cat([code, first * second], dim=-1)


def independence(predictions: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The predictors' loss and the encoders' penalty, means over the modalities that have rows -> (), ().

    predictions {modality: (B, 3, P)}: targets, with gradients for codes, predictions of them with gradients for predictors
    only, and the same predictions with gradients for codes only. valid {modality: (B,) bool}: rows that count.
    The loss is the mean squared error. The penalty is -1/2 log(1 - r^2) summed over targets, for r the correlation of a
    target and its prediction in the joined batch: the mutual information, in nats, of normal variables with this
    correlation. Averaged over processes, the results and the gradients are those of the joined batch.
    """
    each, rows = torch.stack([x.flatten(1) for x in predictions.values()]), torch.stack([valid[m] for m in predictions])
    known = torch.where(rows[..., None], torch.cat([each, rows[..., None]], dim=2), 0.0)  # (M, B, 3 * P + 1)
    joined = gather_with_grad(known.transpose(0, 1)).transpose(0, 1)
    size = each.shape[2] // 3
    target, learnt, judged, counted = joined.split([size, size, size, 1], dim=2)  # (M, G, P) thrice, (M, G, 1)
    count = counted.detach().sum(1, keepdim=True)
    weight, found = counted.detach() / count.clamp(min=1), (count > 0).sum().clamp(min=1)
    loss = ((learnt - target.detach()).square() * weight).sum() / (found * size)
    parts = torch.cat([target, target.square(), target * judged, judged, judged.square()], dim=2)
    mean, square, product, of_guess, square_of_guess = (weight.transpose(1, 2) @ parts).chunk(5, dim=2)  # (M, 1, P) each
    variances = (square - mean.square()) * (square_of_guess - of_guess.square())
    explained = ((product - mean * of_guess).square() / variances.clamp(min=LEAST_VARIANCE)).clamp(max=1)
    return loss, torch.log1p(explained / -(1 + SPARE)).sum() / (-2 * found)
