"""Independence of complementary codes from what modalities share, by critics, as pure functions.

Uncorrelated is not independent: an MLP reads what linear regression has removed. So critics, small MLPs, learn to name the
row whose shared code belongs to a complementary code, among all rows of the batch (InfoNCE, as in van den Oord et al. 2018,
arXiv:1807.03748, eq. 4: a lower bound of the mutual information). The encoder is trained so that their answer is uniform: it
pays the divergence of the answer from the uniform distribution. An answer that is always wrong would tell as much as one
that is right.

Shapes: M modalities, B local rows, G rows of all processes, C critics, U width of a shared code.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.losses.alignment import chunks, recomputed
from tvl_align.losses.contrastive import cross_entropy, indices, join, similarities
from tvl_align.system.distributed import rank, world_size


def independence(
    codes: Mapping[str, Tensor],
    guesses: Mapping[str, Tensor],
    valid: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    caption_keys: Tensor,
    content_keys: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Critics' loss and encoders' penalty, averaged over ordered pairs of modalities with rows -> (), ().

    codes {modality: (B, U)}: shared codes, without gradient. guesses {modality: (B, 2, C, U)}: the critics' guesses of
    the OTHER modalities' codes, with gradients for the critics only, and again with gradients for the encoders only. valid
    {modality: (B,) bool}: rows whose complementary code was computed. present (B,) bool. caption_keys (B, K) and
    content_keys {modality: (B,)}: rows with the same content in the modality that is guessed are positives of each other.
    Averaged over processes, the results are those of the joined batch.
    """
    names = list(codes)
    shared = F.normalize(torch.stack([codes[m].detach() for m in names]), dim=-1)  # (M, B, U)
    both = torch.stack([guesses[m].movedim(0, 2) for m in names], dim=1)  # (2, M, C, B, U)
    flags = torch.stack([rows[m] for rows in (present, valid) for m in names])
    joined = join(shared, flags, names, caption_keys, content_keys or {})
    all_present, all_computed = joined.flags.chunk(2)
    ordered = [(m, o) for m in range(len(names)) for o in range(len(names)) if m != o]
    of, others = (indices(tuple(pair[i] for pair in ordered), shared.device) for i in (0, 1))
    gallery, gallery_valid = joined.vectors.index_select(0, others), all_present.index_select(0, others)  # (Q, G, U), (Q, G)
    rows_of = (all_computed & all_present).index_select(0, of) & gallery_valid  # (Q, G)
    batch = shared.shape[1]
    local = rows_of[:, rank() * batch : (rank() + 1) * batch]
    both, critics = both.index_select(1, of), both.shape[2]  # (2, Q, C, B, U)
    parts = list(chunks(batch, 2 * len(ordered) * critics * gallery_valid.shape[1]))
    sums = []
    for rows in parts:
        positives = joined.same(rows).index_select(0, others) & gallery_valid[:, None]
        given = both[..., rows, :], gallery, positives, local[:, rows], gallery_valid
        sums.append(recomputed(_terms, *given) if len(parts) > 1 else _terms(*given))
    terms = torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]  # (2, Q)
    counts = rows_of.sum(1)
    found = counts > 0
    share = found / counts.clamp(min=1) / found.sum().clamp(min=1) * (world_size() / critics)
    critic, penalty = (terms @ share).unbind()
    return critic, penalty


def _terms(both: Tensor, gallery: Tensor, positives: Tensor, valid: Tensor, gallery_valid: Tensor) -> Tensor:
    """Critics' loss and encoders' penalty, summed over rows and critics, for Q ordered pairs: (2, Q).

    both (2, Q, C, b, U): the guesses, with gradients for critics, then for encoders. gallery (Q, G, U), positives (Q, b, G),
    valid (Q, b), gallery_valid (Q, G).
    The penalty is the KL divergence, in nats, of the answer over the gallery from the uniform distribution.
    """
    of_critics, of_codes = similarities(both, gallery[:, None], gallery_valid[:, None]).unbind()
    critic = cross_entropy(of_critics, positives[:, None], valid[:, None]).sum(1)
    log_probability = of_codes.log_softmax(-1)
    negative_entropy = (log_probability.exp() * log_probability).sum(-1)  # (Q, C, b)
    divergence = negative_entropy + gallery_valid.sum(1).clamp(min=1).log()[:, None, None]
    return torch.stack([critic, (divergence * valid[:, None]).sum((1, 2))])
