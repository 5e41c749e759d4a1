"""Devices, seeds and memory of this process."""

import ctypes
import mmap
import random
import sys

import torch
from torch import Tensor

from tvl_align.system.console import UserError


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
