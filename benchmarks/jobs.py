"""What `make bench` measures in processes of its own: peak memory, several processes, growth. Linux only (/proc)."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor

from tvl_align.contract import MODALITIES, Features, FeatureSpec, Tokens
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features.inputs import DataConfig
from tvl_align.features.store import FeatureStore
from tvl_align.methods.registry import METHODS
from tvl_align.metrics.retrieval import retrieval
from tvl_align.system.console import UserError
from tvl_align.system.runtime import keep_freed_memory
from tvl_align.training.accumulation import large_batch_gradient
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig, backward_and_step, make_adamw
from tvl_align.training.settings import RunConfig, Settings

SMALL = {"vision": FeatureSpec(192, 17, 128), "tactile": FeatureSpec(192, 17, 128), "text": FeatureSpec(128, 9, 128)}
VALIDATION = 2000  # rows of a made-up store that validate, at most


def random_features(specs: dict[str, FeatureSpec], rows: int) -> Features:
    """Random features of every modality."""
    g = torch.Generator().manual_seed(0)
    modalities = {
        m: Tokens(
            torch.randn(rows, s.tokens, s.width, generator=g),
            torch.ones(rows, s.tokens, dtype=torch.bool),
            F.normalize(torch.randn(rows, s.pooled_width, generator=g), dim=-1),
            torch.ones(rows, dtype=torch.bool),
        )
        for m, s in specs.items()
    }
    return Features(modalities, torch.arange(rows)[:, None], torch.arange(rows))


def write_store(out: Path, specs: dict[str, FeatureSpec], rows: int, validation: int = VALIDATION) -> None:
    """A store of random features with `rows` training rows and a few others."""
    few = min(rows, validation)
    features = random_features(specs, rows + 2 * few)
    split = np.array(["train"] * rows + ["val"] * few + ["test"] * few)
    FeatureStore.from_arrays({m: t.tokens.numpy() for m, t in features.modalities.items()}, out, split=split)


def run_settings(store: Path, out: Path, batch: int, width: int, epochs: int = 1, method: str = "base") -> Settings[Any]:
    """A training on a store of random features."""
    return Settings(
        Stage1Config(),
        METHODS[method].knobs(register_token_dim=width),
        DataConfig(store=store, views=0, num_workers=0),
        OptimConfig(batch_size=batch, epochs=epochs, lr=1e-5, warmup_epochs=0),
        RunConfig(out, "run", device="cpu"),
    )


@dataclass(frozen=True)
class Cost:
    """Of a job in a process of its own: seconds and MB it took at most above what was there before it."""

    seconds: float
    megabytes: float


def cost(job: Callable[..., Callable[[], Any]], *args: Any, turns: int = 1, live: bool = False) -> Cost:
    """job(*args) prepares and returns the work to measure. Memory is that of the first turn, time that of the fastest.

    live: give freed memory back at once, so that memory is that of tensors in use and not what the allocator keeps; slow.
    """
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply(_measured, (job, args, torch.get_num_threads(), turns, live))
    finally:
        pool.close()
        pool.join()


def _measured(job: Callable[..., Callable[[], Any]], args: Sequence[Any], threads: int, turns: int, live: bool) -> Cost:
    torch.set_num_threads(threads)
    if live:
        keep_freed_memory(up_to=2**16)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        work = job(*args)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, seconds, peaks = _memory("VmRSS"), [], []
        for _ in range(turns):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
            peaks.append(_memory("VmHWM") - before)
        return Cost(min(seconds), peaks[0])


def _memory(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def training(store: Path, batch: int, width: int) -> Callable[[], Any]:
    """One epoch with everything around it: opening, training, closed forms, validation, checkpoints."""
    out = Path(tempfile.mkdtemp(dir=store.parent))
    return lambda: fit(run_settings(store, out, batch, width), METHODS["base"])


def gallery_retrieval(rows: int, width: int = 768) -> Callable[[], Any]:
    x, y = unit_rows(rows, width)
    return lambda: retrieval(x, y, torch.ones(rows, dtype=torch.bool))


def unit_rows(rows: int, width: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(rows, width, generator=g), dim=-1), F.normalize(
        torch.randn(rows, width, generator=g), dim=-1
    )


def batch_gradient(rows: int, parts: int, width: int = 256) -> Callable[[], Any]:
    """The gradient of one batch of `rows`, in parts or at once."""
    features, method = random_features(SMALL, rows), METHODS["base"]
    knobs = method.knobs(register_token_dim=width)
    model, loss = method.model(knobs, SMALL).train(), method.loss(knobs, MODALITIES)
    optimizer = make_adamw(model.named_parameters(), 0.0)
    size = rows // parts
    pieces = [features.map(lambda t, i=i: t[i * size : (i + 1) * size]) for i in range(parts)]

    def work() -> None:
        if parts == 1:
            backward_and_step(loss(model(features, joint=False))["total_loss"], optimizer, 0.0, update=False)
        else:
            runs = [lambda p=p: model(p, joint=False) for p in pieces]
            large_batch_gradient(runs, loss, lambda scalar, part: backward_and_step(scalar, optimizer, 0.0, update=False))
        model.zero_grad()

    return work


def steps(registers: int, tokens: int, batch: int = 64, width: int = 256, count: int = 8) -> Callable[[], Any]:
    """Training steps of the base with `registers` registers that read `tokens` tokens of each of two modalities."""
    specs = {m: FeatureSpec(width, tokens, width) for m in ("vision", "tactile")}
    features, method = random_features(specs, batch), METHODS["base"]
    knobs = method.knobs(
        register_token_dim=width, num_register_tokens=registers, num_overlapping_tokens=3 * registers // 4, canonical=0
    )
    model, loss = method.model(knobs, specs).train(), method.loss(knobs, list(specs))
    optimizer = make_adamw(model.named_parameters(), 0.0)

    def work() -> None:
        for _ in range(count):
            backward_and_step(loss(model(features, joint=False))["total_loss"], optimizer, 0.0)

    return work


def epoch_on_processes(store: Path, method: str, processes: int, batch: int, width: int) -> Cost:
    """The training part of the faster of two epochs, after a first, on processes of one thread; joined batch `batch`. Memory
    is the peak of the largest process, libraries included."""
    knobs = f"--batch_size {batch // processes} --register_token_dim {width} --method {method} --epochs 3 --lr 1e-5"
    with tempfile.TemporaryDirectory(dir=store.parent) as out:
        tool = [str(Path(sys.executable).parent / "torchrun"), f"--nproc_per_node={processes}", "--no_python"]
        command = [*tool, str(Path(sys.executable).parent / "tvl-align"), "train", "--store", str(store), *knobs.split()]
        command += ["--device", "cpu", "--warmup_epochs", "0", "--output_dir", out, "--log_name", "run"]
        said = Path(out) / "said"
        with said.open("wb") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            started = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(started.pid, 0)  # of a process and those it waited for
        started.returncode = os.waitstatus_to_exitcode(status)
        if started.returncode:
            why = [line for line in said.read_text(errors="replace").splitlines() if line.startswith("error: ")]
            raise UserError(f"a training on {processes} processes failed ({why[0] if why else started.returncode}).")
        lines = (Path(out) / "run" / "times.jsonl").read_text(encoding="utf-8").splitlines()
    return Cost(min(float(json.loads(line)["train"]) for line in lines[1:]), usage.ru_maxrss / 1024)


def products_at_once(processes: int, rows: int, width: int, turns: int = 200) -> float:
    """Seconds that `rows` rows of width `width` take through a bare layer, shared by processes of one thread that do nothing
    else: what several processes can gain here at best."""
    context = multiprocessing.get_context("spawn")
    everyone = context.Barrier(processes)  # or the first would be done before the last has started
    with context.Pool(processes, initializer=everyone.wait) as pool:
        return max(pool.starmap(_layer, [(rows // processes, width, turns)] * processes, chunksize=1))


def _layer(rows: int, width: int, turns: int) -> float:
    torch.set_num_threads(1)
    x, weights = torch.randn(rows, width), torch.randn(width, 4 * width)
    began = time.perf_counter()
    for _ in range(turns):
        x @ weights
    return (time.perf_counter() - began) / turns


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, neither torch nor NumPy takes a second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tvl-align-bench-") as folder:
        yield Path(folder)
