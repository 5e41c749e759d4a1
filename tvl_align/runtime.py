"""Processes, devices and seeds. The rank is asked of torch.distributed, never passed around."""

import ctypes
import mmap
import multiprocessing
import multiprocessing.connection
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tvl_align.console import UserError, says_it_plainly

PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "numpy", "pillow", "tensordict", "accelerate")


MOST_LANES = 4  # pieces of work at once: what they hold in memory, they hold as often
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # the end, and what schedulers send before they pre-empt
SUBMITIT = "SUBMITIT_EXECUTOR"  # in the environment of a task that submitit started
STOPPED = 143  # exit code of a process that SIGTERM ended
_alone = False
T = TypeVar("T")


@contextmanager
def alone() -> Iterator[None]:
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


def join_again(device: torch.device, timeout: timedelta) -> None:
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


def pick_device(name: str | None) -> torch.device:
    """The named device; by default cuda where there is one, else cpu."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: --device takes cuda or cpu.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but PyTorch finds no GPU here; use --device cpu.")
    return device


def seed_everything(seed: int) -> None:
    """Seed the global generators that libraries use (parameter init, dropout). Our own draws take a generator."""
    random.seed(seed)
    torch.manual_seed(seed)


def generator(*parts: int) -> torch.Generator:
    """A CPU generator that depends on all the given integers: seed, epoch, step, ..."""
    mixed = random.Random(repr(parts)).getrandbits(63)
    return torch.Generator().manual_seed(mixed)


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


def release_pages(mapped: Tensor) -> None:
    """Unmap the pages of a memory-mapped tensor from this process. Its content stays: it is that of its file."""
    if sys.platform == "linux" and mapped.numel():
        page = mmap.PAGESIZE
        start = mapped.data_ptr() // page * page
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(mapped.nbytes), mmap.MADV_DONTNEED)


def keep_freed_memory(up_to: int = 32 * 2**20) -> None:
    """Let C's allocator keep what tensors of `up_to` bytes free, for the tensors to come; larger ones go back to the system.

    A training step frees and takes the same memory again and again; taking it from the system, page by page, made a step on
    a CPU 5% slower. glibc only: elsewhere nothing happens.
    """
    trim_threshold, mmap_threshold = -1, -3  # parameters of mallopt(3), which takes 32 MB at most
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(trim_threshold, -1)
        ctypes.CDLL(None).mallopt(mmap_threshold, up_to)


def side_by_side(work: Iterable[Callable[[], T]], lanes: int | None = None) -> Iterator[T]:
    """The results of pieces of work, in order, several of them in threads at once on a share of this process's threads each.

    Small operations gain little from a second core; two of them side by side lose nothing. No more pieces are taken from
    `work` than threads need to go on. lanes: how many at once; default: 2 to 4.
    """
    threads = torch.get_num_threads()
    lanes = lanes or max(2, min(MOST_LANES, threads))  # two even on one core: one computes while the other writes
    pool = ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(max(1, threads // lanes),))
    begun: deque[Future[T]] = deque()
    try:
        for piece in work:
            begun.append(pool.submit(piece))
            if len(begun) > lanes:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error, pieces that have begun end by themselves
        torch.set_num_threads(threads)


def run_in_processes(jobs: Mapping[str, tuple[Any, ...]], at_once: int, threads: int) -> None:
    """Run {name: (function, *arguments)}, each in a new process with `threads` torch threads, `at_once` of them at a time.

    Raises UserError as soon as one of them fails or is killed, after the others were ended.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running = deque(jobs.items()), dict[str, SpawnProcess]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, job = waiting.popleft()
                running[name] = context.Process(target=_job, args=(threads, *job))
                running[name].start()
            multiprocessing.connection.wait([process.sentinel for process in running.values()])
            for name in [name for name, process in running.items() if process.exitcode is not None]:
                code = running.pop(name).exitcode
                if code:
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
                    raise UserError(f"the process of {name} {how}; the others were ended, the same command goes on.")
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _job(threads: int, function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(threads)
    says_it_plainly(function)(*arguments)


class StopSignals:
    """Inside, signals that ask this process to end are only noted in `received`, so that it ends where nothing is lost."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # submitit ignores SIGTERM on purpose: Slurm sends it along with the signal on which submitit queues a job again.
            taken = STOP_SIGNALS[1:] if SUBMITIT in os.environ else STOP_SIGNALS
            self._previous = {number: signal.signal(number, self._note) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.received = number

    def end(self) -> NoReturn:
        """After the state is saved: let whoever handled the signal before have it (a launcher queues the job again), then
        exit with 143."""
        self.__exit__()
        if self.received is not None and callable(self._previous.get(self.received)):
            signal.raise_signal(self.received)
        raise SystemExit(STOPPED)


def git_commit() -> str:
    """The commit of the code that runs, with "-dirty" where files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def _command() -> str:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"torchrun --nproc_per_node={world_size()} {command}" if dist.is_torchelastic_launched() else command


def provenance() -> dict[str, object]:
    """What a result needs to be made again: the command, where, from which code and packages, on how many processes."""
    return {
        "command": _command(),
        "folder": os.getcwd(),
        "commit": git_commit(),
        "packages": package_versions(),
        "processes": world_size(),
    }
