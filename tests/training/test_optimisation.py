"""Learning-rate schedule, parameter groups, optimizer step, gradient norm."""

import math

import pytest
import torch
from torch import Tensor, nn

from tvl_align.training.optimisation import (
    Schedule,
    backward_and_step,
    backward_together,
    decays,
    gradient_norm,
    make_adamw,
    optimizer_step,
)


def test_schedule_is_a_line_then_half_a_cosine() -> None:
    schedule = Schedule(2.0, total=110, warmup=10, lowest=0.5)
    assert [schedule(s) for s in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert schedule(10) == pytest.approx(2.0)
    assert schedule(60) == pytest.approx(0.5 + 1.5 * (0.5 + 0.5 * math.cos(math.pi / 2)))
    assert schedule(110) == schedule(500) == pytest.approx(0.5)


def test_warmup_longer_than_the_training() -> None:
    assert Schedule(1.0, total=5, warmup=10)(4) == pytest.approx(0.5)


def test_only_matrices_decay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.registers = nn.Parameter(torch.randn(4, 8))
            self.logit_scale = nn.Parameter(torch.tensor(1.0))
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    model = Model()
    assert [n for n, p in model.named_parameters() if decays(n, p)] == ["linear.weight"]
    model.norm.requires_grad_(False)
    decayed, plain = make_adamw(model.named_parameters(), 0.1).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert (len(decayed["params"]), len(plain["params"])) == (1, 3)
    assert decayed["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("threads", [1, 2])
def test_parts_that_are_backpropagated_together_get_the_gradients_of_the_sum(threads: int) -> None:
    torch.manual_seed(0)
    data, weight, before = torch.randn(5, 3), nn.Parameter(torch.randn(2)), torch.get_num_threads()
    layers = [nn.Linear(3, 2) for _ in range(3)]
    parameters = [weight, *(p for layer in layers for p in layer.parameters())]

    def joint(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (weight * a * b.exp() * c.cos()).sum()

    outputs = [layer(data) for layer in layers]
    errors = [z.square().mean() * (i + 1) for i, z in enumerate(outputs)]
    expected = torch.autograd.grad(joint(*outputs) + torch.stack(errors).sum(), parameters)
    outputs = [layer(data) for layer in layers]
    errors = [z.square().mean() * (i + 1) for i, z in enumerate(outputs)]
    leaves = [z.detach().requires_grad_() for z in outputs]
    torch.set_num_threads(threads)
    try:
        backward_together(joint(*leaves), list(zip(outputs, leaves, errors, strict=True)))
    finally:
        torch.set_num_threads(before)
    for p, gradient in zip(parameters, expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient)


def test_accumulated_gradients_are_those_of_their_mean() -> None:
    data, ends = torch.randn(4, 3), []
    for accumulate in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(3, 1)
        optimizer = make_adamw(layer.named_parameters(), 0.0)
        if accumulate:
            for i, half in enumerate(data.chunk(2)):
                backward_and_step(layer(half).square().mean() / 2, optimizer, 0.1, update=i == 1)
        else:
            backward_and_step(layer(data).square().mean(), optimizer, 0.1)
        ends.append(torch.cat([p.flatten() for p in layer.parameters()]))
    assert torch.allclose(*ends)


def test_a_step_that_is_skipped_leaves_no_trace() -> None:
    """Neither in weights, although its gradient is NaN, nor in the averages and the step count of AdamW."""
    torch.manual_seed(0)
    data, ends = torch.randn(3, 4, 3), []
    for skipped in (False, True):
        torch.manual_seed(1)
        layer = nn.Linear(3, 1)
        optimizer = make_adamw(layer.named_parameters(), 0.1)
        for i, batch in enumerate(data):
            layer(batch).square().mean().backward()
            optimizer_step(optimizer, 0.1, skip=torch.tensor(False))
            if skipped and i < 2:
                (layer(batch).square().mean() * torch.nan).backward()
                optimizer_step(optimizer, 0.1, skip=torch.tensor(True))
                assert all(p.grad is None for p in layer.parameters())
        ends.append(torch.cat([p.detach().flatten() for p in layer.parameters()]))
        assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    assert torch.equal(*ends)


def test_gradient_norm_is_that_of_all_numbers_together() -> None:
    """For all shapes and memory layouts; one NaN anywhere makes it NaN."""
    shapes = [(), (7,), (5, 3), (2, 4, 3)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape)
    parameters[2].grad = torch.randn(3, 5).T
    optimizer = make_adamw([(str(i), p) for i, p in enumerate(parameters)], 0.05)
    together = torch.cat([p.grad.reshape(-1) for p in parameters])
    assert torch.allclose(gradient_norm(optimizer), together.norm())
    parameters[3].grad[0, 1, 2] = torch.nan
    assert not gradient_norm(optimizer).isfinite()
