"""What a training step launches, and that it never waits for the device."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed import BenchConfig, Operators, training_step
from tvl_align.methods.registry import METHODS

MOST = {"base": 520, "disentangled": 520, "cursor": 300, "flextok": 600, "matryoshka": 600, "mlp": 250, "closed": 250}
WAITING = ("_local_scalar_dense", "nonzero", "masked_select")  # of the value of a tensor, or of a size that depends on it


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_launches_few_operators_and_waits_for_none(name: str) -> None:
    step = training_step(name, BenchConfig(batch=8), condensed=True)
    step()  # constants and the state of the optimizer are made once
    with Operators() as operators, Names() as seen:
        step()
    assert 100 < operators.count <= 1.05 * MOST[name]  # kernels of other machines take a few more
    assert not [operator for operator in seen.names if operator in WAITING]


def test_views_are_not_counted() -> None:
    x = torch.ones(2, 3)
    with Operators() as operators:
        y = x.view(3, 2).mT[0].expand(4, 3)
        assert operators.count == 0
        (y + 1).contiguous()
    assert operators.count == 1
