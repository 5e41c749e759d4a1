"""Swapped folders are detected from image statistics."""

import torch

from tvl_align.data.swapped import swapped_groups


def test_the_odd_groups_are_named() -> None:
    g = torch.Generator().manual_seed(0)
    groups = [f"g{i // 5}" for i in range(50)]
    photo, touch = torch.randn(50, 6, generator=g) + 1, torch.randn(50, 6, generator=g) * 0.3 - 1
    assert swapped_groups(groups, photo, touch) == []
    photo[10:15], touch[10:15] = touch[10:15].clone(), photo[10:15].clone()
    photo[20:25] = torch.nan  # a group without photos is never reported
    assert swapped_groups(groups, photo, touch) == ["g2"]
    assert swapped_groups(groups[:10], photo[:10], touch[:10]) == []
