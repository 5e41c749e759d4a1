"""The gradient of one large batch in the memory of small ones (GradCache, Gao et al. 2021, arXiv:2101.06983).

A contrastive loss is no mean over small batches: each of them has fewer negatives. So every part is first run without
gradients and the outputs are joined; the loss of the joined output says what each number of it should become; then every
part is run again, with its activations, and takes the gradient of its own numbers. Activations of one part at a time are
held, and of all of them the features and the outputs, which are small: tokens of the registers and one error for each
frozen token.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.contract import Output, Reconstruction

FROZEN = ("/stage1_features", "/present")  # entries of an output that no gradient passes


def large_batch_gradient(
    runs: Sequence[Callable[[], Output]],
    loss: Callable[[Output], dict[str, Tensor]],
    descend: Callable[[Tensor, int], None],
    around: Callable[[int], AbstractContextManager[None]] = lambda part: nullcontext(),
) -> dict[str, Tensor]:
    """Take the gradient of `loss` of all parts joined. Returns its numbers.

    runs: one call per part, the model's output for it; each is called twice and must give the same both times (torch's
    generators are put back before the second). descend(scalar, part): takes the scalar's gradient. around(part): entered for
    the second call and the gradient of a part, where processes must not wait for each other yet.
    """
    states, outputs = [], []
    with torch.no_grad():
        for run in runs:
            states.append(_generators())
            outputs.append(replace(run(), features=None))  # no loss reads them
    after = _generators()
    sizes = [len(output.caption_keys) for output in outputs]
    joined = _join(outputs)
    del outputs
    leaves = {path: t.requires_grad_() for path, t in _numbers(joined).items() if t.is_floating_point()}
    numbers = loss(joined)
    gradients = torch.autograd.grad(numbers["total_loss"], list(leaves.values()), allow_unused=True)
    wanted = {path: g for path, g in zip(leaves, gradients, strict=True) if g is not None}
    numbers = {name: value.detach() for name, value in numbers.items()}
    del joined, leaves, gradients
    start = 0
    for part, (run, state, size) in enumerate(zip(runs, states, sizes, strict=True)):
        _restore(state)
        rows = slice(start, start + size)
        with around(part):
            # A scalar is the same in every part. The last one takes its gradient: there processes meet, and wait for all.
            terms = [
                (x * _part_of(wanted[path], x, rows)).sum()
                for path, x in _numbers(run()).items()
                if path in wanted and x.requires_grad and (x.ndim or part == len(runs) - 1)
            ]
            descend(torch.stack(terms).sum(), part)
        start += size
    _restore(after)
    return numbers


def _part_of(gradient: Tensor, x: Tensor, rows: slice) -> Tensor:
    """The gradient that belongs to x, without the padding it was joined with."""
    if not x.ndim:
        return gradient
    return gradient[rows, : x.shape[1]] if x.ndim > 1 else gradient[rows]


def _join(values: Sequence[Any]) -> Any:
    """Outputs of the parts -> the output of all of them: rows one after another, shorter sequences padded with zeros."""
    first = values[0]
    if isinstance(first, Tensor):
        if first.ndim == 0:
            return first.clone()
        longest = max(v.shape[1] for v in values) if first.ndim > 1 else 0
        padded = [F.pad(v, (0, 0) * (v.ndim - 2) + (0, longest - v.shape[1])) if v.ndim > 1 else v for v in values]
        return torch.cat(padded)
    if isinstance(first, Mapping):
        return {key: _join([v[key] for v in values]) for key in first}
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(**{f.name: _join([getattr(v, f.name) for v in values]) for f in fields(first)})
    return first


def _numbers(value: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor of an output that a gradient may pass, by its path."""
    if path in FROZEN:
        return {}
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, Reconstruction):
        return {f"{path}/error": value.error}
    if isinstance(value, Output):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return {p: t for key, x in value.items() for p, t in _numbers(x, f"{path}/{key}").items()}
    return {}


def _generators() -> list[Tensor]:
    devices = [torch.cuda.get_rng_state()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *devices]


def _restore(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
