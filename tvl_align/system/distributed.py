"""Process groups: rank, world size, and all_gather with exact gradients. Without a process group there is one process."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tvl_align.system.console import UserError

_single_process = False


@contextmanager
def single_process() -> Iterator[None]:
    """Inside, `rank` is 0, `world_size` is 1 and nothing is communicated.

    For work that every process does on its own, where the number of batches may differ between processes.
    """
    global _single_process
    before, _single_process = _single_process, True
    try:
        yield
    finally:
        _single_process = before


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() and not _single_process else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() and not _single_process else 1


def is_main() -> bool:
    """Whether this is the process of rank 0, which writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def join_process_group(device: torch.device, timeout: timedelta) -> None:
    """Initialise the process group that torchrun or Slurm has described in the environment; without one, nothing.

    On GPUs it is NCCL, told which GPU is whose, and each process needs a GPU of its own. torchrun keeps its store between
    restarts (`--max_restarts`), so the default initialisation would read the addresses of dead processes; here the keys in
    the store get a prefix per restart. Raises UserError if there are more processes than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or dist.is_initialized():
        return
    options: dict[str, Any] = {"timeout": timeout}
    if device.type == "cuda":
        own, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= gpus:
            needed = int(os.environ.get("LOCAL_WORLD_SIZE", own + 1))
            raise UserError(
                f"{needed} processes on this machine have {gpus} GPU{'s' if gpus > 1 else ''}, and each needs its own; "
                f"start {gpus} (--nproc_per_node {gpus}), or train on CPUs with --device cpu."
            )
        options["device_id"] = torch.device("cuda", own)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        whole = dist.TCPStore(address, port, size, is_master=False, timeout=timeout)
        options |= {"store": dist.PrefixStore(f"attempt{attempt}", whole), "rank": int(os.environ["RANK"])}
        options["world_size"] = size
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums, over all processes, the gradients of each process's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        ctx.rows = slice(rank() * len(x), (rank() + 1) * len(x))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.rows]


def gather_with_grad(x: Tensor) -> Tensor:
    """Concatenate equally shaped (B, ...) tensors of all processes in rank order -> (processes x B, ...), with gradients.

    Averaged over processes, the gradients equal those of one process on the global batch, if the loss of each process is
    its rows' part of the global mean times the number of processes.
    """
    return _Gather.apply(x.contiguous()) if world_size() > 1 else x


def gather(x: Tensor) -> Tensor:
    """Concatenate (B, ...) tensors of all processes in rank order, without gradients; B may differ between processes."""
    if world_size() == 1:
        return x
    sizes = [torch.zeros((), dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(len(x), device=x.device))
    longest = int(max(sizes))
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]) if len(x) < longest else x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def joint_noise(like: Tensor, rows: int = 0, draw: Callable[..., Tensor] = torch.randn) -> Tensor:
    """Noise with the shape, dtype and device of `like`, whose dimension `rows` counts the rows of a batch.

    draw: torch.randn, standard normal, or torch.rand, uniform in [0, 1).

    It is drawn for the global batch and each process takes its rows, so 2 processes draw the same noise as 1. Requires that
    torch's global generator has the same state on all processes, as the engine ensures.
    """
    shape = list(like.shape)
    shape[rows] *= world_size()
    drawn = draw(shape, dtype=like.dtype, device=like.device)
    return drawn.narrow(rows, rank() * like.shape[rows], like.shape[rows])


def mean_over_processes(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean of named scalars over all processes, float32, in one all_reduce."""
    stacked = torch.stack([v.detach().float() for v in values.values()])
    if world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(values, stacked.unbind(), strict=True))


def joint_mean(values: Tensor) -> Tensor:
    """Mean over all processes, without gradients. A local sum divided by that of counts averages to the global mean."""
    if world_size() == 1:
        return values.detach()
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / world_size()


def joint_mean_with_grad(values: Tensor) -> Tensor:
    """Mean over all processes, with the gradient of the local values; averaged over processes, that is its gradient."""
    return values if world_size() == 1 else values + (joint_mean(values) - values.detach())
