"""AdamW, its learning-rate schedule and its step. All training in this repository calls `backward_and_step`, with
`backward_together` where parts of a model run in threads."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tvl_align.system.bounds import at_least
from tvl_align.system.workers import run_together


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    batch_size: int = 64
    """Rows per batch and process."""
    epochs: int = 100
    """Epochs: passes over the training rows."""
    drop_last: bool = True
    """Drop the last incomplete batch of an epoch; --no_drop_last: train on it too."""
    accum_iter: int = 1
    """Batches per optimizer step (GradCache): exact gradient of one batch of all their rows, in the memory of one."""
    weight_decay: float = 0.05
    """Weight decay of AdamW; norms, biases and registers are excluded."""
    lr: float | None = None
    """Peak learning rate; default: blr x rows per optimizer step / 256, over all processes."""
    blr: float = 1e-3
    """Base learning rate, per 256 rows of an optimizer step."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine schedule."""
    skip_nonfinite: int = 0
    """Skip up to this many steps with NaN or inf in loss or gradients, each with a warning; then stop with an error."""
    warmup_epochs: float = 10
    """Epochs of linear warm-up; may be fractional. More than half of --epochs is shortened to half."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size", "epochs", "accum_iter")
        at_least(0, self, "weight_decay", "blr", "lr", "min_lr", "skip_nonfinite", "warmup_epochs")

    @property
    def warmup(self) -> float:
        """Epochs of warm-up: --warmup_epochs, at most half of the run, so that the peak is reached."""
        return min(self.warmup_epochs, self.epochs / 2)


@dataclass(frozen=True)
class Schedule:
    """Learning rate per optimizer step: linear warm-up to `peak`, then half a cosine down to `lowest`.

    total, warmup: numbers of optimizer steps.
    """

    peak: float
    total: int
    warmup: int
    lowest: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.lowest + (self.peak - self.lowest) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter has weight decay: matrices do; norms, biases, scales, registers, queries and positions do not.

    By name, since several copies of a bias are a matrix too (tvl_align.registers.copies).
    """
    *path, last = name.split(".")
    is_norm = bool(path) and "norm" in path[-1]
    return parameter.ndim > 1 and not is_norm and last not in ("bias", "registers", "positions", "queries")


def make_adamw(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, in two groups: with and without weight decay."""
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
    """Backpropagate `loss` (), then take one optimizer step with learning rate `lr`.

    backward: called with the loss instead of Tensor.backward. update: False: only accumulate the gradient.
    """
    (backward or Tensor.backward)(loss)
    if update:
        optimizer_step(optimizer, lr)


def backward_together(loss: Tensor, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Backpropagate `loss` () and the losses of parts of a model that share no weight, all parts at once.

    parts: (output, leaf, own loss ()) of each. The leaf is a detached copy of the output, and `loss` was computed from it.
    """
    loss.backward()
    work = [partial(torch.autograd.backward, [output, own], [leaf.grad, None]) for output, leaf, own in parts]
    run_together(work, loss.device)


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float, skip: Tensor | None = None) -> None:
    """One step of an optimizer with learning rate `lr`, then zero the gradients.

    skip: (), for fused optimizers; where it is not 0 the step changes nothing. Its value is not read, so a GPU is not waited
    for.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
    optimizer.step()
    optimizer.zero_grad()


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """L2 norm of all gradients together (); NaN or inf if any gradient has NaN or inf."""
    return nn.utils.get_total_norm(
        [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    )
