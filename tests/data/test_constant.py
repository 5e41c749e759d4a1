"""Modalities whose images carry no information are named."""

import torch

from tvl_align.data.constant import constant_modalities


def statistics(count: int = 20) -> torch.Tensor:
    return torch.rand(count, 6, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.1


def test_images_of_one_colour_each_are_counted() -> None:
    plain = statistics()
    plain[:, 3:] = 0.001
    assert constant_modalities({"vision": plain, "tactile": statistics()}) == ["all 20 photos are of one colour each"]
    plain[:8] = statistics(8)
    plain[19] = torch.nan  # a row without a photo does not count
    assert constant_modalities({"vision": plain}) == ["11 of 19 photos are of one colour each"]
    plain[:12] = statistics(12)
    assert constant_modalities({"vision": plain}) == []


def test_equal_images_are_counted() -> None:
    equal = statistics(1).repeat(20, 1)
    equal[0] += 0.1
    expected = ["19 of 20 touch images look the same"]
    assert constant_modalities({"vision": statistics(), "tactile": equal}) == expected
    assert constant_modalities({"vision": torch.full((5, 6), torch.nan), "tactile": equal[:1]}) == []
