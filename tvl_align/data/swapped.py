"""Photos and touch images in each other's folders, told from how images of either kind look."""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_GROUPS = 3  # of fewer one cannot say which are the odd ones


def swapped_groups(groups: Sequence[str], vision: Tensor, tactile: Tensor) -> list[str]:
    """Names of the groups (trajectories) whose photos look like touch images and the other way round.

    vision, tactile (N, F): what rows look like; NaN where a row has no such image. The median look of either kind over
    all groups is what it should be; a group is suspected where it is less than half as far from the other kind's as from its
    own. Where most groups are swapped, the others are named.
    """
    names = sorted(set(groups))
    if len(names) < LEAST_GROUPS:
        return []
    where = {name: i for i, name in enumerate(names)}
    place = torch.tensor([where[g] for g in groups])
    looks = []
    for kind in (vision, tactile):
        real = ~kind.isnan().any(1)
        sums = torch.zeros(len(names), kind.shape[1]).index_add_(0, place[real], kind[real])
        looks.append(sums / torch.bincount(place[real], minlength=len(names))[:, None])
    whole = ~torch.cat(looks, dim=1).isnan().any(1)
    if int(whole.sum()) < LEAST_GROUPS:
        return []
    photo, touch = (look[whole] for look in looks)
    of_photos, of_touch = photo.median(0).values, touch.median(0).values
    spread = torch.cat([(photo - of_photos).abs(), (touch - of_touch).abs()]).median(0).values + 1e-3
    straight = _distance(photo, of_photos, spread) + _distance(touch, of_touch, spread)
    crossed = _distance(photo, of_touch, spread) + _distance(touch, of_photos, spread)
    kept = [name for name, there in zip(names, whole.tolist(), strict=True) if there]
    return [name for name, odd in zip(kept, (crossed < straight / 2).tolist(), strict=True) if odd]


def _distance(looks: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    return ((looks - centre) / spread).square().mean(1).sqrt()
