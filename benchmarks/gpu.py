"""`benchmarks/gpu.sh`: what a GPU makes of this project -> a table and gpu.json. Random weights and features throughout.

Times are medians of several runs after a warm-up, with the device synchronised. "busy" is the time that the device spends in
kernels, from the profiler: what is left of a step is waiting for Python.
"""

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import open_clip
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import jobs
from benchmarks.jobs import random_features
from benchmarks.speed import MatrixProducts, random_registers, random_stage1
from tvl_align.config import parse
from tvl_align.contract import Features, FeatureSpec
from tvl_align.data.image_options import ImageOptions
from tvl_align.data.samples import Samples, TextOptions
from tvl_align.data.tvl import PICTURES
from tvl_align.data.tvl import Row as Sample
from tvl_align.features.encode import GPU_BATCH, open_or_encode
from tvl_align.features.store import FeatureStore
from tvl_align.methods.registry import METHODS
from tvl_align.system.console import UserError, reports_errors
from tvl_align.system.files import write_atomically
from tvl_align.system.provenance import provenance
from tvl_align.system.signals import StopSignals
from tvl_align.training.engine import Learner, train_one_epoch
from tvl_align.training.optimisation import Schedule, make_adamw, optimizer_step
from tvl_align.training.run import Progress

TVL = {"vision": FeatureSpec(1024, 17, 768), "tactile": FeatureSpec(192, 17, 768), "text": FeatureSpec(768, 20, 768)}
STEPS = 20
EMBEDDED = 1024  # rows


@dataclass(frozen=True)
class GPUConfig:
    """Measure encoding and training on a GPU."""

    out: Path = Path("gpu.json")
    """Output file."""
    batch: int = 256
    """Rows of a training step."""
    rows: int = 16_000
    """Training rows of the store of an epoch."""
    pictures: int = 8192
    """Rows of the store that is filled: a photo and a touch image each."""
    parts: tuple[str, ...] = ("tower", "store", "step", "epoch", "compile")
    """Parts to measure."""


Row = dict[str, float | str]


def measured(function: Callable[[], Any], turns: int = STEPS) -> float:
    """Median milliseconds of a call."""
    times = []
    for turn in range(turns + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(1000 * (time.perf_counter() - start))
    return median(times)


def busy(function: Callable[[], Any], turns: int = 5) -> tuple[float, float]:
    """Milliseconds that the device is busy in a call, and kernels that it launches."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(turns):
            function()
        torch.cuda.synchronize()
    events = (e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    kernels = [e for e in events if not e.is_user_annotation]  # such as the span of an optimizer's step
    return sum(e.device_time for e in kernels) / 1000 / turns, len(kernels) / turns


def learner_of(name: str, batch: int, recorded: bool, compiled: bool = False) -> tuple[Learner, Features]:
    """A method at the width of TVL, and one batch of features on the device."""
    device, method = torch.device("cuda"), METHODS[name]
    torch.manual_seed(0)
    model = method.model(method.knobs(), TVL).to(device).train()
    features = jobs.condensed(model, random_features(TVL, batch).to(device))
    forward: Any = torch.compile(model) if compiled else model
    loss, optimizer = method.loss(method.knobs(), list(TVL)), make_adamw(model.named_parameters(), 0.05)
    return Learner(model, forward, loss, optimizer, Accelerator(mixed_precision="no"), recorded), features


def step_of(name: str, batch: int, recorded: bool = True, compiled: bool = False) -> Callable[[], None]:
    """A training step as in the engine, on one batch in memory."""
    learner, features = learner_of(name, batch, recorded, compiled)
    model: Any = learner.model

    def step() -> None:
        learner.gradients([(features, model.draw_kept(batch))])
        optimizer_step(learner.optimizer, 1e-5)

    return step


def _tower(config: GPUConfig) -> Iterator[Row]:
    """The vision tower of ViT-L-14, random weights: pictures a second by precision and batch."""
    tower = open_clip.create_model("ViT-L-14", pretrained=None).visual.cuda().eval()

    def rate(batch: int, dtype: torch.dtype | None, tf32: bool = False) -> float:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        images = torch.randn(batch, 3, 224, 224, device="cuda")

        @torch.no_grad()
        def run() -> None:
            with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
                tower(images)

        found = 1000 * batch / measured(run, 8)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return found

    for what, batch, dtype, tf32 in (
        ("float32", 64, None, False),
        ("TF32", 64, None, True),
        ("bf16", 64, torch.bfloat16, False),
        ("bf16", 256, torch.bfloat16, False),
        ("fp16", 256, torch.float16, False),
    ):
        yield {"what": f"ViT-L-14 vision, {what}, batch {batch}", "pictures/s": rate(batch, dtype, tf32)}


def _store(config: GPUConfig) -> Iterator[Row]:
    """Filling a store from PNG files of 224 pixels, beside the bare forward passes of its batches; and `embed`.

    ViT-L-14 and ViT-Tiny with random weights, in bf16. A fourth of the rows is filled too: what all rows take beyond it is
    the rate, without hashes of weights and the start of workers, which take seconds whatever the number of rows.
    """
    stage1 = random_stage1("ViT-L-14", {}).cuda()
    stage1.encode_precision = "bf16"
    with jobs.temporary_folder() as folder:
        options = ImageOptions(photo_crop="none", touch_crop="none", touch_turn=0)
        rows = _pictures(folder, config.pictures)
        images = {m: torch.randn(GPU_BATCH, *stage1.input_shape(m), device="cuda") for m in PICTURES}
        assert stage1.specs  # encodes a blank row once per process; excluded from the measured time

        def bare() -> None:
            for m, batch in images.items():
                stage1.encode({m: batch})

        def fill(count: int) -> float:
            start, samples = time.perf_counter(), Samples(folder, rows[:count], options, TextOptions(), 0)
            shutil.rmtree(open_or_encode(folder / "features", stage1, {"train": samples}, 0, 16).folder)
            return _since(start)

        few, count = len(rows) // 4, len(rows)
        fill(few)  # reads the files once and starts what is started once
        few_s, all_s = fill(few), fill(count)
        row: Row = {"what": f"store of {count} rows, 2 PNGs of 224 pixels each, ViT-L-14 and ViT-Tiny, bf16", "s": all_s}
        rates = {"rows/s": (count - few) / (all_s - few_s), "bare rows/s": 1000 * GPU_BATCH / measured(bare, 8)}
        yield row | {"a fourth of them s": few_s} | rates | {"store / bare": rates["rows/s"] / rates["bare rows/s"]}
        registers = random_registers(stage1, options, folder)
        registers.device = torch.device("cuda")
        registers.model.cuda()
        files = {m: [folder / row.files[m] for row in rows[:EMBEDDED]] for m in PICTURES}
        registers.embed(**files, batch_size=64, precision="bf16")
        start = time.perf_counter()
        registers.embed(**files, batch_size=64, precision="bf16")
        yield {"what": "embed of such pictures, bf16", "rows/s": EMBEDDED / _since(start)}


def _pictures(folder: Path, count: int) -> list[Sample]:
    """Write a photo and a touch image of 224 pixels for each of `count` rows: smooth colours, 64 different ones."""
    draw, files = np.random.default_rng(0), []
    for _ in range(64):
        coarse = Image.fromarray(draw.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        coarse.resize((224, 224), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())
    for i in range(2 * count):
        (folder / f"{i}.png").write_bytes(files[i % len(files)])
    return [Sample("own", f"{i}.png", f"{count + i}.png", None, "soft, woven", str(i)) for i in range(count)]


def _step(config: GPUConfig) -> Iterator[Row]:
    for name, batch in (("base", config.batch), ("cursor", 64), ("cursor", config.batch), ("cursor", 4 * config.batch)):
        step = step_of(name, batch, recorded=False)
        with MatrixProducts() as products:
            step()
        pairs = [[torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in pair] for pair in products.shapes]

        def bare(pairs: list[list[Tensor]] = pairs) -> None:
            for a, b in pairs:
                torch.matmul(a, b)

        what, products_ms = f"step of {name}, batch {batch}, width 768, bf16", busy(bare)[0]
        yield _timed(what, step) | {"bare products, busy ms": products_ms}
        yield _timed(f"{what}, CUDA graph", step_of(name, batch)) | {"bare products, busy ms": products_ms}


def _timed(what: str, step: Callable[[], None]) -> Row:
    milliseconds, (device, kernels) = measured(step), busy(step)
    return {"what": what, "ms": milliseconds, "busy ms": device, "kernels": kernels, "step / busy": milliseconds / device}


def _compile(config: GPUConfig) -> Iterator[Row]:
    for name in ("base", "cursor"):
        for recorded in (True, False):
            start, step = time.perf_counter(), step_of(name, config.batch, recorded, compiled=True)
            step()
            row: Row = {"first s": _since(start)}
            what = f"step of {name}, batch {config.batch}, torch.compile{', CUDA graph' if recorded else ''}"
            yield _timed(what, step) | row


def _since(start: float) -> float:
    return time.perf_counter() - start


def _epoch(config: GPUConfig) -> Iterator[Row]:
    """An epoch of the engine from a store, beside its bare steps."""
    for name, recorded in (("base", False), ("base", True), ("cursor", True)):
        with jobs.temporary_folder() as folder:
            jobs.write_store(folder / "store", TVL, config.rows, validation=256)
            settings = jobs.run_settings(folder / "store", folder, config.batch, 768, method=name)
            learner, _ = learner_of(name, config.batch, recorded)
            model: Any = learner.model
            source = FeatureStore(folder / "store").splits["train"].condensed(model.condense, learner.accelerator.device)
            steps = config.rows // config.batch
            schedule = Schedule(1e-5, steps, 0)

            def epoch(given: tuple[Any, ...] = (learner, source, settings, schedule)) -> None:
                train_one_epoch(*given, Progress(), StopSignals())

            found: Row = {"ms": measured(epoch, 3) / steps, "bare step ms": measured(step_of(name, config.batch, recorded))}
            yield {"what": f"step of {name} in an epoch of the engine{', CUDA graph' if recorded else ''}"} | found


@reports_errors
def main() -> None:
    config = parse(GPUConfig, prog="python -m benchmarks.gpu")
    if not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU on this machine; `make bench` measures the CPU.")
    parts = {"tower": _tower, "store": _store, "step": _step, "epoch": _epoch, "compile": _compile}
    rows: list[Row] = [{"what": f"{torch.cuda.get_device_name()}, torch {torch.__version__}"}]
    for name in config.parts:
        for row in parts[name](config):
            rows.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
            write_atomically(config.out, json.dumps([*rows, {"made_by": provenance()}], indent=1, allow_nan=False))


if __name__ == "__main__":
    main()
