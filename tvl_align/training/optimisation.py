"""AdamW, its schedule and its step: the one place in the repository where gradients are taken."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule."""

    batch_size: int = 64
    """Rows per step and process."""
    epochs: int = 100
    """Passes over the training rows."""
    drop_last: bool = True
    """Leave out the last, smaller batch of an epoch; --no_drop_last: train on it too."""
    accum_iter: int = 1
    """Batches of one step: its gradient is that of all their rows as one batch, in the memory of one of them."""
    weight_decay: float = 0.05
    """Decoupled weight decay of AdamW; not on norms, biases and registers."""
    lr: float | None = None
    """Peak learning rate; default: blr x total batch / 256."""
    blr: float = 1e-3
    """Learning rate per 256 rows of total batch."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    skip_nonfinite: int = 0
    """Leave out at most so many steps whose loss or gradients are not finite, and say each; then stop."""
    warmup_epochs: float = 10
    """Epochs of linear warm-up, counted in steps."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then half a cosine down to `lowest`; all steps are optimizer steps."""

    peak: float
    total: int
    warmup: int
    lowest: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.lowest + (self.peak - self.lowest) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, done)))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for norms, biases, scales, registers, queries or positions."""
    learned_inputs = ("registers", "positions", "queries")
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in learned_inputs


def make_adamw(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, in two groups: decayed and not."""
    trainable = [(name, p) for name, p in named if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if not decays(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def backward_and_step(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    lr: float,
    backward: Callable[[Tensor], None] | None = None,
    update: bool = True,
) -> None:
    """Take the gradient of `loss` and, unless more is to be accumulated or looked at first, one step of length `lr`."""
    (backward or Tensor.backward)(loss)
    if update:
        optimizer_step(optimizer, lr)


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One step of length `lr` along the gradients there are; then there are none."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """() L2 norm of all gradients together; not finite where one of them is not."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads or grads[0].is_cuda:
        return nn.utils.get_total_norm(grads)
    rows = [(g if g.ndim < 2 or g.is_contiguous() else g.mT).flatten() for g in grads]  # transposed ones without a copy
    return torch.stack([torch.dot(row, row) for row in rows]).sum().sqrt()  # half the time of norms on a CPU
