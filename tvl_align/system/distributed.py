"""Process groups: ranks, and gathering with exact gradients. The rank is asked of torch.distributed, never passed around."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


@contextmanager
def single_process() -> Iterator[None]:
    """Inside, this process is the only one: nothing is gathered. For work whose amount differs between processes."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def rejoin_process_group(device: torch.device, timeout: timedelta) -> None:
    """Form the process group of a further attempt under torchrun (`--max_restarts`).

    torchrun's store outlives an attempt, and a group formed the usual way would read the addresses of processes that are
    gone from it; here each attempt has names of its own. The first attempt is left to whoever forms the group.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    size, me = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore(f"attempt{attempt}", dist.TCPStore(address, port, size, is_master=False, timeout=timeout))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=me, world_size=size, timeout=timeout)


class _Gather(torch.autograd.Function):
    """all_gather whose backward hands every process the sum of what all processes' losses say about its rows."""

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
    """Concatenate equally shaped (B, ...) tensors of all processes in rank order; gradients flow back to their owners.

    When the gradients are then averaged over processes, they are those of one process on the joined batch, provided each
    process's loss is (processes x its own rows' share of the joint mean).
    """
    return _Gather.apply(x.contiguous()) if world_size() > 1 else x


def gather(x: Tensor) -> Tensor:
    """As `gather_with_grad`, for tensors without gradients; the processes' first dimensions may differ."""
    if world_size() == 1:
        return x
    sizes = [torch.zeros((), dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(len(x), device=x.device))
    longest = int(max(sizes))
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]) if len(x) < longest else x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def joint_noise(like: Tensor) -> Tensor:
    """Standard normal noise for (B, ...) rows: drawn for the joined batch, of which each process takes its rows.

    From torch's global generator, which the engine seeds alike on all processes, so 2 processes add what 1 would add.
    """
    drawn = torch.randn(world_size() * len(like), *like.shape[1:], dtype=like.dtype, device=like.device)
    return drawn[rank() * len(like) : (rank() + 1) * len(like)]


def mean_over_processes(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean of named scalars over all processes, in one call."""
    stacked = torch.stack([v.detach().float() for v in values.values()])
    if world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(values, stacked.tolist(), strict=True))


def mean_count(count: Tensor) -> Tensor:
    """The mean of a local count over all processes, without gradients; dividing a local sum by it gives the joint mean."""
    count = count.detach().clone()
    if world_size() > 1:
        dist.all_reduce(count)
    return count / world_size()
