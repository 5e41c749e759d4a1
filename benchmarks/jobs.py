"""Jobs that `make bench` runs in separate processes, to measure their peak memory and scaling. Linux only (/proc)."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
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
from tvl_align.inference.search import Index
from tvl_align.methods.registry import METHODS
from tvl_align.metrics.retrieval import retrieval
from tvl_align.system.console import UserError
from tvl_align.system.runtime import keep_freed_memory
from tvl_align.training.accumulation import large_batch_gradient
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig, backward_and_step, make_adamw
from tvl_align.training.settings import RunConfig, Settings

SMALL = {"vision": FeatureSpec(192, 17, 128), "tactile": FeatureSpec(192, 17, 128), "text": FeatureSpec(128, 9, 128)}
MAX_VALIDATION = 2000  # validation rows of a random store


def random_features(specs: dict[str, FeatureSpec], rows: int) -> Features:
    """Standard-normal tokens and unit-norm pooled features of `rows` rows, with every modality present."""
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


def condensed(model: Any, features: Features) -> Features:
    """The features as the engine gives them to a model that condenses them."""
    found = {}
    for m, t in features.modalities.items():
        small = model.condense(m, t.float())
        blank = {"mask": t.present[:, None], "pooled": t.pooled[:, :0], "condensed": True}
        found[m] = t if small is None else replace(t, tokens=small[:, None], **blank)
    return replace(features, modalities=found)


def write_store(out: Path, specs: dict[str, FeatureSpec], rows: int, validation: int = MAX_VALIDATION) -> None:
    """Write a store of random features: `rows` training rows, and at most `validation` rows each for validation and test."""
    held_out = min(rows, validation)
    features = random_features(specs, rows + 2 * held_out)
    split = np.array(["train"] * rows + ["val"] * held_out + ["test"] * held_out)
    tokens, pooled = ({m: getattr(t, kind).numpy() for m, t in features.modalities.items()} for kind in ("tokens", "pooled"))
    FeatureStore.from_arrays(tokens, out, split=split, pooled=pooled)


def run_settings(store: Path, out: Path, batch: int, width: int, epochs: int = 1, method: str = "base") -> Settings[Any]:
    """The settings of a training run on a feature store."""
    return Settings(
        Stage1Config(),
        METHODS[method].knobs(register_token_dim=width),
        DataConfig(store=store, views=0, num_workers=0),
        OptimConfig(batch_size=batch, epochs=epochs, lr=1e-5, warmup_epochs=0),
        RunConfig(out, "run", device="cpu"),
    )


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds of a job and the MB (2**20 bytes) by which it raises the peak resident memory of its process."""

    seconds: float
    megabytes: float


def cost(job: Callable[..., Callable[[], Any]], *args: Any, turns: int = 1, live: bool = False) -> Cost:
    """Measure the function that `job(*args)` returns, in a new process.

    The function runs `turns` times: memory is that of the first run, time that of the fastest. live: return freed memory to
    the system at once, so that the memory is that of live tensors and excludes what the allocator caches; slow.
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
    with open(os.devnull, "w") as null, redirect_stdout(null):
        function = job(*args)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before, seconds, peaks = _memory("VmRSS"), [], []
        for _ in range(turns):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
            peaks.append(_memory("VmHWM") - before)
        return Cost(min(seconds), peaks[0])


def _memory(name: str) -> float:
    """An entry of /proc/self/status in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def training(store: Path, batch: int, width: int) -> Callable[[], Any]:
    """A complete run of one epoch: opening the store, training, closed-form fits, validation, checkpoints."""
    out = Path(tempfile.mkdtemp(dir=store.parent))
    return lambda: fit(run_settings(store, out, batch, width), METHODS["base"])


def gallery_retrieval(rows: int, width: int = 768) -> Callable[[], Any]:
    """Retrieval of random unit vectors with one positive per query."""
    x, y = unit_rows(rows, width)
    return lambda: retrieval(x, y, torch.ones(rows, dtype=torch.bool))


def unit_rows(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Two (rows, width) matrices of random unit vectors."""
    g = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(rows, width, generator=g), dim=-1), F.normalize(
        torch.randn(rows, width, generator=g), dim=-1
    )


def clustered_rows(rows: int, queries: int, width: int = 256) -> tuple[Tensor, Tensor]:
    """(rows, width) and (queries, width): random vectors around rows / 100 random centres, at a cosine near 0.7 to them."""
    g = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(max(1, rows // 100), width, generator=g), dim=-1)

    def draw(count: int) -> Tensor:
        noise = torch.randn(count, width, generator=g).mul_(width**-0.5)
        return noise.add_(centres[torch.randint(len(centres), (count,), generator=g)])

    return draw(rows), draw(queries)


def saved_search(folder: Path, queries: Tensor, k: int) -> Callable[[], Any]:
    """An exact search in a saved index."""
    index = Index.load(folder)
    return lambda: index.search(queries, k)


def batch_gradient(rows: int, parts: int, width: int = 256) -> Callable[[], Any]:
    """The gradient of a batch of `rows` rows, computed in `parts` micro-batches, or at once for `parts` 1."""
    features, method = random_features(SMALL, rows), METHODS["base"]
    knobs = method.knobs(register_token_dim=width)
    model, loss = method.model(knobs, SMALL).train(), method.loss(knobs, MODALITIES)
    optimizer = make_adamw(model.named_parameters(), 0.0)
    size = rows // parts
    micro_batches = [features.map(lambda t, i=i: t[i * size : (i + 1) * size]) for i in range(parts)]

    def gradient() -> None:
        if parts == 1:
            backward_and_step(loss(model(features, joint=False))["total_loss"], optimizer, 0.0, update=False)
        else:
            forwards = [lambda batch=batch: model(batch, joint=False) for batch in micro_batches]
            large_batch_gradient(
                forwards, loss, lambda scalar, part: backward_and_step(scalar, optimizer, 0.0, update=False)
            )
        model.zero_grad()

    return gradient


def steps(registers: int, tokens: int, batch: int = 64, width: int = 256, count: int = 8) -> Callable[[], Any]:
    """`count` training steps of the base method: `registers` registers, two modalities of `tokens` tokens each."""
    specs = {m: FeatureSpec(width, tokens, width) for m in ("vision", "tactile")}
    features, method = random_features(specs, batch), METHODS["base"]
    overlapping = 3 * registers // 4
    knobs = method.knobs(register_token_dim=width, num_register_tokens=registers, num_overlapping_tokens=overlapping)
    model, loss = method.model(knobs, specs).train(), method.loss(knobs, list(specs))
    optimizer = make_adamw(model.named_parameters(), 0.0)

    def train() -> None:
        for _ in range(count):
            backward_and_step(loss(model(features, joint=False))["total_loss"], optimizer, 0.0)

    return train


def epoch_on_processes(store: Path, method: str, processes: int, batch: int, width: int) -> Cost:
    """Training time of the faster of two epochs after a warm-up epoch, on `processes` processes of one thread each.

    `batch` is the global batch size. Memory is the peak resident memory of the largest process, libraries included.
    """
    knobs = f"--batch_size {batch // processes} --register_token_dim {width} --method {method} --epochs 3 --lr 1e-5"
    with tempfile.TemporaryDirectory(dir=store.parent) as out:
        tool = [str(Path(sys.executable).parent / "torchrun"), f"--nproc_per_node={processes}", "--no_python"]
        command = [*tool, str(Path(sys.executable).parent / "tvl-align"), "train", "--store", str(store), *knobs.split()]
        command += ["--device", "cpu", "--warmup_epochs", "0", "--output_dir", out, "--log_name", "run"]
        log = Path(out) / "output.log"
        with log.open("wb") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)  # usage includes child processes
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
            reason = errors[0] if errors else f"exit code {process.returncode}"
            raise UserError(
                f"training on {processes} processes failed ({reason}); leave processes and growth out of --parts."
            )
        lines = (Path(out) / "run" / "times.jsonl").read_text(encoding="utf-8").splitlines()
    return Cost(min(float(json.loads(line)["train"]) for line in lines[1:]), usage.ru_maxrss / 1024)


def products_at_once(processes: int, rows: int, width: int, turns: int = 200) -> float:
    """Seconds of one matrix product (rows, width) x (width, 4 width), its rows divided among processes of one thread each.

    The processes exchange nothing, so this is an upper bound of the speed-up by several processes on this machine.
    """
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(processes)  # all processes start to multiply at the same time
    with context.Pool(processes, initializer=start.wait) as pool:
        return max(pool.starmap(_layer, [(rows // processes, width, turns)] * processes, chunksize=1))


def _layer(rows: int, width: int, turns: int) -> float:
    torch.set_num_threads(1)
    x, weights = torch.randn(rows, width), torch.randn(width, 4 * width)
    start = time.perf_counter()
    for _ in range(turns):
        x @ weights
    return (time.perf_counter() - start) / turns


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit PyTorch and NumPy to one thread inside the context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tvl-align-bench-") as folder:
        yield Path(folder)
