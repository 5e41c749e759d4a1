"""What a GPU records of a training step, and the replay of it. The graphs themselves are tested where there is a GPU."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tvl_align.contract import Features, Tokens
from tvl_align.methods.registry import METHODS
from tvl_align.system.console import UserError
from tvl_align.training.checks import build, eight_rows, random_features
from tvl_align.training.graphs import MOST_GRAPHS, WARM_UP, RecordedGradients, _Graph, _shape
from tvl_align.training.optimisation import make_adamw, optimizer_step


def gradients_of(name: str) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
    """(tensors of the batch) -> loss and gradients of a step of a method, and the tensors of a batch."""
    model, loss = build(METHODS[name])
    features, kept = eight_rows(len(model.registers))
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()

    def step(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        mine = features.map(lambda _: next(given))
        total = loss(model(mine, kept=next(given), joint=False).float())["total_loss"]
        return [total, *(g for g in torch.autograd.grad(total, parameters, allow_unused=True) if g is not None)]

    tensors: list[Tensor] = []
    features.map(lambda t: tensors.append(t) or t)
    return step, [*tensors, kept]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.recordable])
def test_the_operators_of_one_batch_are_those_of_the_next(name: str) -> None:
    """A step records as operators on tensors, and they compute the loss and gradients of another batch."""
    step, first = gradients_of(name)
    torch.manual_seed(1)
    recorded = make_fx(step)(*first)
    g = torch.Generator().manual_seed(5)
    second = [t + torch.randn(t.shape, generator=g) if t.is_floating_point() else t.flip(0) for t in first]
    torch.manual_seed(2)
    expected = step(*second)
    torch.manual_seed(2)
    found = recorded(*second)
    assert not torch.equal(step(*first)[0], expected[0])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_methods_that_train_are_recordable() -> None:
    assert [name for name, method in METHODS.items() if not method.recordable] == ["closed"]


def test_what_must_be_equal_for_a_replay() -> None:
    features, kept = random_features(8), torch.ones(8, 4, dtype=torch.bool)
    shape = _shape(features, kept)
    assert _shape(random_features(8, seed=1), kept) == shape
    touch = features.modalities["tactile"]
    condensed = Tokens(touch.tokens, touch.mask, touch.pooled, touch.present, condensed=True)
    others = (
        (random_features(7), kept[:7]),
        (features.only(("vision", "tactile")), kept),
        (features, kept[:, :3]),
        (features.map(lambda t: t.double() if t.is_floating_point() else t), kept),
        (Features(features.modalities | {"tactile": condensed}, features.caption_keys, features.rows), kept),
        (Features(features.modalities, features.caption_keys, features.rows, {"vision": features.rows}), kept),
        (replace(features, augmented={"vision": features.rows > 0}), kept),
    )
    assert all(_shape(*other) != shape for other in others)


def test_a_value_of_a_tensor_is_no_operator() -> None:
    """What the first test is for: a step that reads a value cannot be recorded."""
    layer = nn.Linear(2, 2)

    def step(x: Tensor) -> Tensor:
        return layer(x).sum() if float(x.sum()) > 0 else layer(-x).sum()

    with pytest.raises(RuntimeError, match="data-dependent|specialization|concrete|_local_scalar_dense"):
        make_fx(step)(torch.ones(1, 2))


class OnCPU(RecordedGradients):
    """Records nothing: a replay computes anew from the inputs that a graph would read, into what it would write."""

    def _warm_up(self, features: Features, kept: Tensor) -> dict[str, Tensor]:
        return self.compute(features, kept)

    def _record(self, features: Features, kept: Tensor) -> _Graph:
        mine, own_kept = features.map(torch.clone), kept.clone()
        for p in self.parameters:
            p.grad = None
        with torch.random.fork_rng():  # recording draws nothing
            found = self.compute(mine, own_kept)
        gradients, scalars = [p.grad for p in self.parameters], torch.stack(list(found.values())).fill_(torch.nan)

        def replay() -> None:
            for p in self.parameters:
                p.grad = None
            scalars.copy_(torch.stack(list(self.compute(mine, own_kept).values())))
            for gradient, p in zip(gradients, self.parameters, strict=True):
                assert (gradient is None) == (p.grad is None)
                if gradient is not None and p.grad is not None:
                    gradient.copy_(p.grad)

        graph = cast(torch.cuda.CUDAGraph, SimpleNamespace(replay=replay))
        return _Graph(graph, [*mine.tensors(), own_kept], list(found), scalars, gradients)


def losses_of_steps(recorded: type[RecordedGradients] | None, sizes: list[int]) -> tuple[list[float], int]:
    """The losses of steps with batches of some sizes, and how many shapes were recorded."""
    model, loss = build(METHODS["mlp"])
    model.train()
    optimizer = make_adamw(model.named_parameters(), 0.05)

    def compute(features: Features, kept: Tensor) -> dict[str, Tensor]:
        total = loss(model(features, kept=kept, joint=False).float())["total_loss"]
        total.backward()
        return {"total_loss": total.detach()}

    step = compute if recorded is None else recorded(compute, model.parameters())
    losses = []
    for i, size in enumerate(sizes):
        torch.manual_seed(i)
        scalars = step(random_features(size, seed=i), model.draw_kept(size, torch.Generator().manual_seed(i)))
        optimizer_step(optimizer, 1e-2)
        losses.append(float(scalars["total_loss"]))
    return losses, len(step.graphs) if isinstance(step, RecordedGradients) else 0


def test_replays_take_the_inputs_of_their_step_and_give_its_gradients() -> None:
    """Of two shapes in turns, the second with three steps as usual, one recorded and some replayed."""
    sizes = [8, 6] * 6
    losses, graphs = losses_of_steps(OnCPU, sizes)
    assert graphs == 2
    assert losses == pytest.approx(losses_of_steps(None, sizes)[0], rel=1e-6)


def test_few_shapes_are_recorded() -> None:
    """Each keeps its memory. Steps of others run as usual."""
    sizes = [size for size in range(4, 10) for _ in range(WARM_UP + 2)]
    losses, graphs = losses_of_steps(OnCPU, sizes)
    assert graphs == MOST_GRAPHS
    assert losses == pytest.approx(losses_of_steps(None, sizes)[0], rel=1e-6)


def test_a_step_that_cannot_be_recorded_ends_in_one_sentence() -> None:
    class Refused(OnCPU):
        def _record(self, features: Features, kept: Tensor) -> _Graph:
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nCUDA_LAUNCH_BLOCKING=1")
            finally:
                raise RuntimeError("the recording was invalidated")

    with pytest.raises(
        UserError, match=r"graph \(operation not permitted when stream is capturing\); give --no_cuda_graphs"
    ):
        losses_of_steps(Refused, [8] * (WARM_UP + 1))
