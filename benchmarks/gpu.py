"""`benchmarks/gpu.sh`: what a GPU makes of this project -> a table and gpu.json. Random weights and features throughout.

Times are medians of several runs after a warm-up, with the device synchronised. "busy" is the time that the device spends in
kernels, from the profiler: what is left of a step is waiting for Python.
"""

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import jobs
from benchmarks.jobs import random_features
from benchmarks.speed import MatrixProducts, random_registers, random_stage1
from tvl_align.config import parse
from tvl_align.contract import FeatureSpec
from tvl_align.data.image_options import ImageOptions
from tvl_align.data.samples import Samples, TextOptions
from tvl_align.data.tvl import PICTURES
from tvl_align.data.tvl import Row as Sample
from tvl_align.features.encode import GPU_BATCH, open_or_encode
from tvl_align.features.identity import identify
from tvl_align.features.store import FeatureStore
from tvl_align.methods.registry import METHODS
from tvl_align.system.console import UserError, reports_errors
from tvl_align.system.files import write_atomically
from tvl_align.system.provenance import provenance
from tvl_align.system.signals import StopSignals
from tvl_align.training.engine import make_accelerator, train_one_epoch, training_precision
from tvl_align.training.optimisation import Schedule, backward_and_step, make_adamw
from tvl_align.training.run import Progress

TVL = {"vision": FeatureSpec(1024, 17, 768), "tactile": FeatureSpec(192, 17, 768), "text": FeatureSpec(768, 20, 768)}
STEPS = 20


@dataclass(frozen=True)
class GPUConfig:
    """Measure encoding and training on a GPU."""

    out: Path = Path("gpu.json")
    """Output file."""
    batch: int = 256
    """Rows of a training step."""
    rows: int = 16_000
    """Training rows of the store of an epoch."""
    pictures: int = 4096
    """Rows of the store that is filled: a photo and a touch image each."""
    parts: tuple[str, ...] = ("encode", "step", "epoch", "compile")
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
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.device_time for e in kernels) / 1000 / turns, len(kernels) / turns


def step_of(name: str, batch: int, compiled: str | None = None) -> tuple[Callable[[], None], Any]:
    """A training step as in the engine, with bf16 autocast, on one batch in memory."""
    device, method = torch.device("cuda"), METHODS[name]
    torch.manual_seed(0)
    model = method.model(method.knobs(), TVL).to(device).train()
    loss = method.loss(method.knobs(), list(TVL))
    features = jobs.condensed(model, random_features(TVL, batch).to(device))
    optimizer = make_adamw(model.named_parameters(), 0.05)
    forward: Any = model if compiled is None else torch.compile(model, mode=compiled)

    def step() -> None:
        kept = model.draw_kept(batch)
        with training_precision(device):
            output = forward(features, kept=kept, joint=False).float()
        backward_and_step(loss(output)["total_loss"], optimizer, 1e-5)

    return step, model


def _encode(config: GPUConfig) -> Iterator[Row]:
    yield from _tower()
    yield from _store(config)


def _tower() -> Iterator[Row]:
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

    ViT-L-14 and ViT-Tiny with random weights, in bf16. Hashes of weights and files, which take seconds whatever the number
    of rows, are timed alone and subtracted.
    """
    stage1 = random_stage1("ViT-L-14", {}).cuda()
    stage1.encode_precision = "bf16"
    with jobs.temporary_folder() as folder:
        options = ImageOptions(photo_crop="none", touch_crop="none", touch_turn=0)
        samples = {"train": Samples(folder, _pictures(folder, config.pictures), options, TextOptions(), 0)}
        images = {m: torch.randn(GPU_BATCH, *stage1.input_shape(m), device="cuda") for m in PICTURES}
        assert stage1.specs  # encodes a blank row once per process; excluded from the measured time

        def bare() -> None:
            for m, batch in images.items():
                stage1.encode({m: batch})

        def fill() -> None:
            store = open_or_encode(folder / "features", stage1, samples, 0, 16)
            shutil.rmtree(store.folder)

        hashes = _seconds(lambda: identify(stage1, samples, 0, folder / "features"), 2)
        filled = _seconds(fill, 2) - hashes
        row: Row = {"what": f"store of {config.pictures} rows, 2 PNGs of 224 pixels each, ViT-L-14 and ViT-Tiny, bf16"}
        rates = {"rows/s": config.pictures / filled, "bare forward rows/s": 1000 * GPU_BATCH / measured(bare, 8)}
        yield row | rates | {"hashes s": hashes, "store / bare": rates["rows/s"] / rates["bare forward rows/s"]}
        registers = random_registers(stage1, options, folder)
        registers.device = torch.device("cuda")
        registers.model.cuda()
        files = {m: [folder / row.files[m] for row in samples["train"].rows] for m in PICTURES}
        seconds = _seconds(lambda: registers.embed(**files, batch_size=64, precision="bf16"), 2)
        yield {"what": "embed of the same pictures, bf16", "rows/s": config.pictures / seconds}


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


def _seconds(function: Callable[[], Any], turns: int = 1) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _step(config: GPUConfig) -> Iterator[Row]:
    for name, batch in (("base", config.batch), ("cursor", 64), ("cursor", config.batch), ("cursor", 4 * config.batch)):
        step, _ = step_of(name, batch)
        milliseconds, (device, kernels) = measured(step), busy(step)
        with MatrixProducts() as products:
            step()
        pairs = [[torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in pair] for pair in products.shapes]

        def bare(pairs: list[list[Tensor]] = pairs) -> None:
            for a, b in pairs:
                torch.matmul(a, b)

        row = {"what": f"step of {name}, batch {batch}, width 768, bf16", "ms": milliseconds, "busy ms": device}
        yield row | {"kernels": kernels, "bare products, busy ms": busy(bare)[0], "step / busy": milliseconds / device}


def _compile(config: GPUConfig) -> Iterator[Row]:
    for name in ("base", "cursor"):
        for mode in ("default", "reduce-overhead"):
            start = time.perf_counter()
            try:
                step, _ = step_of(name, config.batch, mode)
                milliseconds = measured(step)
            except Exception as error:  # what a compiler refuses is a result
                yield {"what": f"step of {name}, torch.compile {mode}", "error": " ".join(str(error).split())[:200]}
                continue
            device, kernels = busy(step)
            row: Row = {"what": f"step of {name}, torch.compile {mode}, batch {config.batch}", "ms": milliseconds}
            yield row | {
                "busy ms": device,
                "kernels": kernels,
                "step / busy": milliseconds / device,
                "first s": _since(start),
            }


def _since(start: float) -> float:
    return time.perf_counter() - start


def _epoch(config: GPUConfig) -> Iterator[Row]:
    """An epoch of the engine from a store, beside its bare steps."""
    for name in ("base", "cursor"):
        with jobs.temporary_folder() as folder:
            jobs.write_store(folder / "store", TVL, config.rows, validation=256)
            settings = jobs.run_settings(folder / "store", folder, config.batch, 768, method=name)
            settings = replace(settings, run=replace(settings.run, device="cuda"))
            method, accelerator = METHODS[name], make_accelerator(settings)
            torch.manual_seed(0)
            model = method.model(settings.knobs, TVL).cuda().train()
            loss, optimizer = method.loss(settings.knobs, list(TVL)), make_adamw(model.named_parameters(), 0.05)
            source = FeatureStore(folder / "store").splits["train"].condensed(model.condense, accelerator.device)

            schedule = Schedule(1e-5, config.rows // config.batch, 0)
            given = model, model, loss, optimizer, source, settings, schedule, accelerator
            milliseconds = measured(partial(_one_epoch, *given), 3) / (config.rows // config.batch)
            bare = measured(step_of(name, config.batch)[0])
            yield {"what": f"step of {name} in an epoch of the engine", "ms": milliseconds, "bare step ms": bare}


def _one_epoch(*given: Any) -> None:
    train_one_epoch(*given, Progress(), StopSignals())


@reports_errors
def main() -> None:
    config = parse(GPUConfig, prog="python -m benchmarks.gpu")
    if not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU on this machine; `make bench` measures the CPU.")
    parts = {"encode": _encode, "step": _step, "epoch": _epoch, "compile": _compile}
    rows: list[Row] = [{"what": f"{torch.cuda.get_device_name()}, torch {torch.__version__}"}]
    for name in config.parts:
        for row in parts[name](config):
            rows.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
            write_atomically(config.out, json.dumps([*rows, {"made_by": provenance()}], indent=1, allow_nan=False))


if __name__ == "__main__":
    main()
