"""Device selection, seeding and memory of this process."""

import ctypes
import mmap
import random
import sys

import torch
from torch import Tensor

from tvl_align.system.console import UserError


def pick_device(name: str | None) -> torch.device:
    """The named device; None: cuda if available, else cpu. Raises UserError for an unknown or unavailable device.

    float32 is float32 on a GPU too: convolutions, which cuDNN computes in TF32 otherwise, change features by 2e-3 then.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise UserError(f"unknown device {name!r}: --device takes cuda, cuda:N or cpu.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (device.index or 0):
            found, remedy = (f"{count} GPUs, numbered from 0,", "cuda") if count else ("no GPU", "cpu")
            raise UserError(f"--device {name}: PyTorch finds {found} on this machine; use --device {remedy}.")
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bf16 matrices: a GPU, or a CPU with AVX-512 BF16 or AMX."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cuda" or any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python and PyTorch (parameter initialisation, dropout). Other draws use `generator`."""
    random.seed(seed)
    torch.manual_seed(seed)


def generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded from all the given integers, such as seed, epoch and step."""
    mixed = random.Random(repr(parts)).getrandbits(63)
    return torch.Generator().manual_seed(mixed)


def release_pages(mapped: Tensor) -> None:
    """Release the resident pages of a memory-mapped tensor. The content is read from the file again on the next access."""
    if sys.platform == "linux" and mapped.numel():
        page = mmap.PAGESIZE
        start = mapped.data_ptr() // page * page
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(mapped.nbytes), mmap.MADV_DONTNEED)


def keep_freed_memory(up_to: int = 32 * 2**20) -> None:
    """Let glibc's malloc keep freed blocks of at most `up_to` bytes for reuse; larger blocks return to the system.

    A training step frees and allocates the same memory repeatedly. Without this, page faults make a CPU step 5% slower.
    Does nothing on other C libraries.
    """
    trim_threshold, mmap_threshold = -1, -3  # parameters of mallopt(3); M_MMAP_THRESHOLD is at most 32 MiB
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(trim_threshold, -1)
        ctypes.CDLL(None).mallopt(mmap_threshold, up_to)
