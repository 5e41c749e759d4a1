"""Detect groups whose photo and touch folders are swapped, from the colour statistics of their images."""

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_GROUPS = 3  # with fewer groups the medians do not tell which group is the outlier


def swapped_groups(groups: Sequence[str], vision: Tensor, tactile: Tensor) -> list[str]:
    """Names of the groups (trajectories) whose photos and touch images appear to be swapped, sorted.

    groups: the group of each of the N rows. vision, tactile: (N, F) float32 statistics of the photo and the touch image of
    each row; NaN where a row has no such image. The reference of a modality is the median of its group means. A group is
    reported if its distance to the references of the other modality is less than half the distance to its own. If most
    groups are swapped, the correct ones are reported instead.
    """
    names = sorted(set(groups))
    if len(names) < MIN_GROUPS:
        return []
    position = {name: i for i, name in enumerate(names)}
    group_ids = torch.tensor([position[g] for g in groups])
    means = []
    for statistics in (vision, tactile):
        valid = ~statistics.isnan().any(1)
        sums = torch.zeros(len(names), statistics.shape[1]).index_add_(0, group_ids[valid], statistics[valid])
        means.append(sums / torch.bincount(group_ids[valid], minlength=len(names))[:, None])
    complete = ~torch.cat(means, dim=1).isnan().any(1)  # groups with both modalities
    if int(complete.sum()) < MIN_GROUPS:
        return []
    photo, touch = (mean[complete] for mean in means)
    photo_median, touch_median = photo.median(0).values, touch.median(0).values
    scale = torch.cat([(photo - photo_median).abs(), (touch - touch_median).abs()]).median(0).values + 1e-3
    own = _distance(photo, photo_median, scale) + _distance(touch, touch_median, scale)
    other = _distance(photo, touch_median, scale) + _distance(touch, photo_median, scale)
    kept = [name for name, both in zip(names, complete.tolist(), strict=True) if both]
    return [name for name, swapped in zip(kept, (other < own / 2).tolist(), strict=True) if swapped]


def _distance(means: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    return ((means - centre) / scale).square().mean(1).sqrt()
