"""Exact gradient of a large batch, computed in micro-batches (GradCache, Gao et al. 2021, arXiv:2101.06983).

A contrastive loss is not the mean of the losses of micro-batches, because each micro-batch has fewer negatives. GradCache
runs every micro-batch without gradients, concatenates the outputs, and computes the loss and its gradient with respect to
the outputs. It then runs every micro-batch again with gradients and backpropagates the cached gradient. Activations of one
micro-batch at a time are in memory, plus the inputs and the outputs of all. The outputs are small: register tokens and one
reconstruction error per frozen token.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.contract import Output, Reconstruction

NO_GRADIENT = ("/stage1_features", "/present")  # entries of an output without gradient


def large_batch_gradient(
    forwards: Sequence[Callable[[], Output]],
    loss: Callable[[Output], dict[str, Tensor]],
    backward: Callable[[Tensor, int], None],
    sync_context: Callable[[int], AbstractContextManager[None]] = lambda part: nullcontext(),
) -> dict[str, Tensor]:
    """Backpropagate the loss of the concatenated micro-batches. Returns the named scalars of the loss, detached.

    forwards: one function per micro-batch (part) that returns the output of the model. Each is called twice and must return
    the same values; the state of torch's generators is restored before the second call. backward(scalar, part):
    backpropagates a scalar. sync_context(part): context manager around the second forward and backward pass of a part, such
    as DistributedDataParallel.no_sync for all parts but the last.
    """
    states, outputs = [], []
    with torch.no_grad():
        for forward in forwards:
            states.append(_generators())
            outputs.append(replace(forward(), features=None))  # a loss does not use them
    after = _generators()
    sizes = [len(output.caption_keys) for output in outputs]
    joined = _concatenate(outputs)
    del outputs
    leaves = {path: t.requires_grad_() for path, t in _differentiable(joined).items() if t.is_floating_point()}
    scalars = loss(joined)
    gradients = torch.autograd.grad(scalars["total_loss"], list(leaves.values()), allow_unused=True)
    cached = {path: g for path, g in zip(leaves, gradients, strict=True) if g is not None}
    scalars = {name: value.detach() for name, value in scalars.items()}
    del joined, leaves, gradients
    start = 0
    for part, (forward, state, size) in enumerate(zip(forwards, states, sizes, strict=True)):
        _restore(state)
        rows = slice(start, start + size)
        with sync_context(part):
            # A scalar, such as logit_scale, is the same in every part. Only the last part backpropagates it.
            terms = [
                (x * _slice_of(cached[path], x, rows)).sum()
                for path, x in _differentiable(forward()).items()
                if path in cached and x.requires_grad and (x.ndim or part == len(forwards) - 1)
            ]
            if terms:  # a method without training has none but the temperature
                backward(torch.stack(terms).sum(), part)
        start += size
    _restore(after)
    return scalars


def _slice_of(gradient: Tensor, x: Tensor, rows: slice) -> Tensor:
    """The part of a cached gradient that belongs to x: its rows, without padding."""
    if not x.ndim:
        return gradient
    return gradient[rows, : x.shape[1]] if x.ndim > 1 else gradient[rows]


def _concatenate(values: Sequence[Any]) -> Any:
    """Concatenate the outputs of all parts along the rows; shorter sequences are padded with zeros."""
    first = values[0]
    if isinstance(first, Tensor):
        if first.ndim == 0:
            return first.clone()
        longest = max(v.shape[1] for v in values) if first.ndim > 1 else 0
        padded = [F.pad(v, (0, 0) * (v.ndim - 2) + (0, longest - v.shape[1])) if v.ndim > 1 else v for v in values]
        return torch.cat(padded)
    if isinstance(first, Mapping):
        return {key: _concatenate([v[key] for v in values]) for key in first}
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(**{f.name: _concatenate([getattr(v, f.name) for v in values]) for f in fields(first)})
    return first


def _differentiable(value: Any, path: str = "") -> dict[str, Tensor]:
    """{path: tensor} of the tensors of an output that may have a gradient."""
    if path in NO_GRADIENT:
        return {}
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, Reconstruction):
        return {f"{path}/error": value.error}
    if isinstance(value, Output):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return {p: t for key, x in value.items() for p, t in _differentiable(x, f"{path}/{key}").items()}
    return {}


def _generators() -> list[Tensor]:
    """States of torch's generators: CPU, then the current GPU."""
    devices = [torch.cuda.get_rng_state()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *devices]


def _restore(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
