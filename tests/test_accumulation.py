"""A large batch in parts has the gradient of the large batch, for every method; averaging small batches does not."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from experiments.stage2.methods import METHODS
from experiments.stage2.test_modules import SPECS, _eight_rows
from tvl_align.accumulation import large_batch_gradient
from tvl_align.contract import MODALITIES, Features, Method


def built(method: Method) -> tuple[nn.Module, nn.Module]:
    """A small model without noise of its own, which differs between batch sizes, and its loss."""
    quiet = {"noise": 0.0} if "noise" in {f.name for f in dataclasses.fields(method.knobs)} else {}
    knobs = method.knobs(register_token_dim=32, num_heads=4, **quiet)
    torch.manual_seed(0)
    return method.model(knobs, SPECS).train(), method.loss(knobs, MODALITIES)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def cut(features: Features, kept: Tensor, sizes: tuple[int, ...]) -> list[tuple[Features, Tensor]]:
    """Parts of unequal sizes; the sentences of the second are shorter, as the store reads them."""
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        parts.append((features.map(lambda t, rows=rows: t[rows]), kept[rows]))
        start += size
    return parts


@pytest.mark.parametrize("name", METHODS)
def test_gradient_of_the_parts_is_that_of_the_whole(name: str) -> None:
    model, loss = built(METHODS[name])
    features, kept = _eight_rows(model.registers.shape[0])
    text = features.modalities["text"]
    text.mask[3:, 5:] = False
    whole = loss(model(features, kept=kept, joint=False))
    whole["total_loss"].backward()
    expected = gradient(model)
    model.zero_grad()
    parts = cut(features, kept, (3, 4, 1))
    for i in (1, 2):
        short = parts[i][0].modalities["text"]
        trimmed = dataclasses.replace(short, tokens=short.tokens[:, :5], mask=short.mask[:, :5])
        parts[i] = (dataclasses.replace(parts[i][0], modalities=parts[i][0].modalities | {"text": trimmed}), parts[i][1])
    runs = [partial(model, f, kept=k, joint=False) for f, k in parts]
    numbers = large_batch_gradient(runs, loss, lambda scalar, part: scalar.backward())
    assert numbers["total_loss"] == pytest.approx(whole["total_loss"].item(), abs=1e-5)
    assert (gradient(model) - expected).abs().max() < 1e-5
    model.zero_grad()
    small = [loss(model(f, kept=k, joint=False))["total_loss"] / 2 for f, k in cut(features, kept, (4, 4))]
    torch.stack(small).sum().backward()
    assert (gradient(model) - expected).abs().max() > 1e-3


def test_dropout_is_the_same_in_both_passes() -> None:
    layer, seen = nn.Dropout(0.5), []
    weight = nn.Parameter(torch.ones(4, 3))

    def run() -> dict[str, Tensor]:
        seen.append(layer(weight))
        return {"x": seen[-1], "caption_keys": torch.zeros(4, 1)}

    torch.manual_seed(0)
    large_batch_gradient([run, run], lambda output: {"total_loss": output["x"].sum()}, lambda s, part: s.backward())
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])
