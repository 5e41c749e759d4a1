"""Independence of complementary codes from what modalities share, by critics, as pure functions.

Uncorrelated is not independent: an MLP reads what linear regression has removed. So critics, small MLPs, learn to name the
row whose shared code belongs to a complementary code, among all rows of the batch (InfoNCE, as in van den Oord et al. 2018,
arXiv:1807.03748, eq. 4: a lower bound of the mutual information). The encoder is trained so that their answer is uniform: it
pays the divergence of the answer from the uniform distribution. An answer that is always wrong would tell as much as one
that is right.

Shapes: B local rows, G rows of all processes, C critics, U width of a shared code.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tvl_align.losses import alignment
from tvl_align.losses.contrastive import info_nce, keys_of, positive_mask
from tvl_align.system.distributed import gather, rank, world_size

_recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def independence(
    codes: Mapping[str, Tensor],
    guesses: Mapping[str, Tensor],
    answers: Mapping[str, Tensor],
    valid: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    caption_keys: Tensor,
    content_keys: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Critics' loss and encoders' penalty, averaged over pairs of modalities with rows -> (), ().

    codes {modality: (B, U)}: shared codes, without gradient. guesses {modality: (B, C, U)}: the critics' guess of the OTHER
    modalities' codes, with gradients for the critics only; answers: the same, with gradients for the encoders only. valid
    {modality: (B,) bool}: rows whose complementary code was computed. present (B,) bool. caption_keys (B, K) and
    content_keys {modality: (B,)}: rows with the same content in the modality that is guessed are positives of each other.
    Averaged over processes, the results are those of the joined batch.
    """
    gallery = {m: gather(F.normalize(code, dim=-1)) for m, code in codes.items()}
    gallery_present = {m: gather(flags.float()) > 0 for m, flags in present.items()}
    keys = {o: keys_of((o,), caption_keys, content_keys or {}) for o in codes}
    all_keys = {o: None if own is None else gather(own) for o, own in keys.items()}
    critic_losses, penalties, weights = [], [], []
    for m, guess in guesses.items():
        for o in codes:
            if o == m:
                continue
            rows = valid[m] & present[m] & present[o]
            count = gather(rows.float()).sum()
            share = world_size() / count.clamp(min=1) / guess.shape[1]
            terms = []
            for at in torch.arange(len(rows), device=rows.device).split(alignment.PIECE):
                positives = _positives(at, len(gallery[o]), keys[o], all_keys[o])
                args = guess[at], answers[m][at], gallery[o], positives, rows[at], gallery_present[o]
                terms.append(torch.stack(_recomputed(_both, *args) if len(rows) > alignment.PIECE else _both(*args)))
            critic_loss, penalty = (torch.stack(terms).sum(0) * share).unbind()
            critic_losses.append(critic_loss)
            penalties.append(penalty)
            weights.append((count > 0).float())
    weight = torch.stack(weights) / torch.stack(weights).sum().clamp(min=1)
    return (torch.stack(critic_losses) * weight).sum(), (torch.stack(penalties) * weight).sum()


def _positives(at: Tensor, count: int, keys: Tensor | None, all_keys: Tensor | None) -> Tensor:
    """(b, G) bool: the own row of local rows `at` (b,) among `count` rows G, and rows with the same key in any column."""
    same_row = torch.arange(count, device=at.device) == (at + rank() * count // world_size())[:, None]
    return same_row if keys is None or all_keys is None else same_row | positive_mask(keys[at], all_keys)


def _both(
    guess: Tensor, answers: Tensor, gallery: Tensor, positives: Tensor, rows: Tensor, gallery_valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Critics' loss and encoders' penalty, summed over rows and critics."""
    one = gallery.new_ones(())
    losses = [info_nce(g, gallery, one, positives, rows, gallery_valid) for g in guess.unbind(1)]
    return torch.stack(losses).sum(), _divergence(answers, gallery, rows, gallery_valid)


def _divergence(answers: Tensor, gallery: Tensor, rows: Tensor, gallery_valid: Tensor) -> Tensor:
    """KL divergence in nats of answers (B, C, U) over the gallery (G, U) from uniform, summed over rows and critics."""
    logits = torch.einsum("bcu,gu->bcg", answers, gallery).masked_fill(~gallery_valid, -torch.inf)
    log_probability = logits.log_softmax(-1)
    negative_entropy = (log_probability.exp() * log_probability.masked_fill(~gallery_valid, 0.0)).sum(-1)
    divergence = negative_entropy + gallery_valid.sum().clamp(min=1).log()
    return torch.where(rows[:, None], divergence, 0.0).sum()
