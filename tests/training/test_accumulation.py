"""GradCache gives the gradient of the large batch for every method; averaging losses of small batches does not."""

import dataclasses
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch import Tensor, nn

from tvl_align.contract import MODALITIES, Features, Method, Output
from tvl_align.losses import alignment
from tvl_align.methods.registry import METHODS
from tvl_align.training.accumulation import large_batch_gradient
from tvl_align.training.checks import SPECS, eight_rows

ROUNDING = 1e-4  # of gradients of up to 5, where correlations of a few rows, near 1, make the penalty steep


def built(method: Method) -> tuple[nn.Module, nn.Module]:
    """A small model without noise and dropout, whose draws depend on the batch size, and its loss."""
    quiet = {f.name: 0.0 for f in dataclasses.fields(method.knobs) if f.name in ("noise", "input_dropout")}
    knobs = method.knobs(register_token_dim=32, num_heads=4, **quiet)
    torch.manual_seed(0)
    return method.model(knobs, SPECS).train(), method.loss(knobs, MODALITIES)


def output_of(**entries: Any) -> Output:
    """An output of 4 rows with only these entries."""
    empty: dict[str, Any] = {key: {} for key in ("overlapping_tokens", "complementary_tokens", "stage1_features", "present")}
    return Output(**(empty | {"logit_scale": torch.ones(()), "caption_keys": torch.zeros(4, 1)} | entries))


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def cut(features: Features, kept: Tensor, sizes: tuple[int, ...]) -> list[tuple[Features, Tensor]]:
    """Split a batch into parts of the given sizes."""
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        parts.append((features.map(lambda t, rows=rows: t[rows]), kept[rows]))
        start += size
    return parts


@pytest.mark.parametrize("name", METHODS)
def test_gradient_of_the_parts_is_that_of_the_whole(name: str) -> None:
    model, loss = built(METHODS[name])
    features, kept = eight_rows(model.registers.shape[0])
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
    forwards = [partial(model, f, kept=k, joint=False) for f, k in parts]
    numbers = large_batch_gradient(forwards, loss, lambda scalar, part: scalar.backward())
    assert numbers["total_loss"] == pytest.approx(whole["total_loss"].item(), rel=1e-5)
    assert (gradient(model) - expected).abs().max() < ROUNDING
    model.zero_grad()
    small = [loss(model(f, kept=k, joint=False))["total_loss"] / 2 for f, k in cut(features, kept, (4, 4))]
    torch.stack(small).sum().backward()
    assert (gradient(model) - expected).abs().max() > 1e-3


def test_scores_in_pieces_are_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = built(METHODS["base"])
    features, kept = eight_rows(model.registers.shape[0])
    found = []
    for piece in (2**20, 200):
        monkeypatch.setattr(alignment, "PIECE", piece)
        model.zero_grad()
        numbers = loss(model(features, kept=kept, joint=False))
        numbers["total_loss"].backward()
        found.append((numbers, gradient(model)))
    (whole, expected), (pieces, ours) = found
    assert {name: value.item() for name, value in pieces.items()} == pytest.approx(
        {name: value.item() for name, value in whole.items()}, rel=1e-5, abs=1e-6
    )
    assert (ours - expected).abs().max() < 2e-6 * expected.abs().max()  # rounding of float32


@pytest.mark.parametrize("name", METHODS)
def test_what_is_held_of_all_rows_is_small(name: str) -> None:
    """The outputs kept for all parts do not include tensors of the size of the frozen tokens."""
    model, loss = built(METHODS[name])
    features, kept = eight_rows(model.registers.shape[0])
    widths = {(m.tokens.shape[1], m.tokens.shape[2]) for m in features.modalities.values()}
    seen: list[tuple[int, ...]] = []

    def shapes(value: Any) -> list[tuple[int, ...]]:
        if isinstance(value, Tensor):
            return [tuple(value.shape)]
        inner = (
            value.values() if isinstance(value, dict) else vars(value).values() if dataclasses.is_dataclass(value) else []
        )
        return [shape for x in inner for shape in shapes(x)]

    def watched(output: Output) -> dict[str, Tensor]:
        seen.extend(shapes(output))
        return loss(output)

    forwards = [partial(model, f, kept=k, joint=False) for f, k in cut(features, kept, (4, 4))]
    large_batch_gradient(forwards, watched, lambda scalar, part: scalar.backward())
    assert seen
    assert not {shape[1:] for shape in seen} & widths


def test_scores_of_a_large_batch_are_not_kept_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = built(METHODS["base"])
    features, kept = eight_rows(model.registers.shape[0])
    output = model(features, kept=kept, joint=False)

    def saved(piece: int) -> list[Tensor]:
        monkeypatch.setattr(alignment, "PIECE", piece)
        held: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
            loss(output)
        return [t for t in held if t.is_floating_point() and t.ndim > 3 and t.shape[-1] == 8]

    assert saved(2**20)
    assert not saved(200)


def test_dropout_is_the_same_in_both_passes() -> None:
    layer, seen = nn.Dropout(0.5), []
    weight = nn.Parameter(torch.ones(4, 3))

    def run() -> Output:
        seen.append(layer(weight))
        return output_of(extras={"x": seen[-1]})

    torch.manual_seed(0)
    large_batch_gradient([run, run], lambda output: {"total_loss": output["x"].sum()}, lambda s, part: s.backward())
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def _one_of_two(index: int, meeting: str, out: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=index, world_size=2)
    model, loss = built(METHODS[name])
    wrapped = nn.parallel.DistributedDataParallel(model)
    features, kept = eight_rows(model.registers.shape[0])
    rows = slice(4 * index, 4 * index + 4)
    parts = cut(features.map(lambda t: t[rows]), kept[rows], (3, 1))
    forwards = [partial(wrapped, f, kept=k, joint=False) for f, k in parts]
    large_batch_gradient(
        forwards, loss, lambda scalar, part: scalar.backward(), lambda part: nullcontext() if part else wrapped.no_sync()
    )
    torch.save(gradient(model), f"{out}/{index}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "cursor"])
def test_parts_on_two_processes_have_the_gradient_of_one_batch(name: str, tmp_path: Path) -> None:
    model, loss = built(METHODS[name])
    features, kept = eight_rows(model.registers.shape[0])
    loss(model(features, kept=kept, joint=False))["total_loss"].backward()
    spawn(_one_of_two, (f"{tmp_path}/meeting", str(tmp_path), name), 2)
    for index in range(2):
        assert (torch.load(tmp_path / f"{index}.pt") - gradient(model)).abs().max() < ROUNDING


def test_a_modality_may_have_any_name() -> None:
    """A modality with the name of an entry of the output has a gradient like any other."""
    weight = nn.Parameter(torch.ones(4, 3))

    def run() -> Output:
        return output_of(overlapping_tokens={"mask": weight * 2.0})

    def loss(output: Output) -> dict[str, Tensor]:
        return {"total_loss": output["overlapping_tokens"]["mask"].sum()}

    large_batch_gradient([run, run], loss, lambda s, part: s.backward())
    assert torch.equal(weight.grad, torch.full((4, 3), 4.0))
