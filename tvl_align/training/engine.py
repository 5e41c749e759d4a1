"""The one training loop, for every method: train_one_epoch, evaluate, fit."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tvl_align.contract import Features, FeatureSpec, Method, Output, Stage2Model
from tvl_align.features.store import FeatureSource
from tvl_align.losses.alignment import pair_name
from tvl_align.metrics.retrieval import retrieval
from tvl_align.registers.pooling import pooled_overlapping
from tvl_align.system.console import UserError
from tvl_align.system.console import progress as progress_bar
from tvl_align.system.distributed import (
    gather,
    is_main,
    mean_over_processes,
    rank,
    rejoin_process_group,
    single_process,
    world_size,
)
from tvl_align.system.files import lock_folder
from tvl_align.system.runtime import generator, keep_freed_memory, pick_device, seed_everything
from tvl_align.system.signals import StopSignals
from tvl_align.training.accumulation import large_batch_gradient
from tvl_align.training.optimisation import Schedule, backward_and_step, gradient_norm, make_adamw, optimizer_step
from tvl_align.training.run import Progress, Run, find_checkpoint, restore
from tvl_align.training.sampling import balanced_weights, epoch_batches, epoch_views, shard_batches
from tvl_align.training.settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator

EVAL_BATCH = 256
CALIBRATION_ROWS = 20_000
log = logging.getLogger(__name__)


def make_accelerator(settings: Settings[Any]) -> "Accelerator":
    """Device, processes and precision: bf16 autocast on a GPU, float32 on a CPU."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    device, patience = pick_device(settings.run.device), timedelta(hours=6)  # one process may have far more to encode
    rejoin_process_group(device, patience)
    if device.type == "cpu":
        keep_freed_memory()
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if device.type == "cuda" else "no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=settings.run.find_unused_parameters, gradient_as_bucket_view=True
            ),
            InitProcessGroupKwargs(timeout=patience),
        ],
    )


def fit(settings: Settings[Any], method: Method) -> Path:
    """Train a method, from where an earlier call with the same settings stopped if there was one; returns the run folder.

    The folder holds config.json, metrics.jsonl, times.jsonl, TensorBoard events, checkpoint.pth and the best
    checkpoint-acc1.pth and checkpoint-acc5.pth. Raises UserError for bad settings, for a folder that holds a run with other
    settings or is being written to, and for numbers that are not finite. A signal that asks the process to end is obeyed
    after the next step: checkpoint, a line, exit code 143.
    """
    accelerator = make_accelerator(settings)
    with lock_folder(settings.folder, wait=False, why="trains in") if is_main() else nullcontext():
        _fit(settings, method, accelerator)
    accelerator.wait_for_everyone()
    return settings.folder


def _fit(settings: Settings[Any], method: Method, accelerator: "Accelerator") -> None:
    device, who, optim = accelerator.device, method.implementation, settings.optim
    checkpoint = find_checkpoint(settings, who)
    inputs = settings.open_inputs(device)
    for name in ("train", "val"):
        if name not in inputs.splits or not len(inputs.splits[name]):
            where = settings.data.store or settings.data.datasets_dir
            raise UserError(f"{where} leaves no {name} rows; it needs at least two trajectories (or groups).")
    seed_everything(settings.run.own_seed)
    model = build_model(method, settings.knobs, inputs.specs).to(device)
    loss = method.loss(settings.knobs, list(inputs.specs))
    lr = optim.lr if optim.lr is not None else optim.blr * optim.batch_size * optim.accum_iter * world_size() / 256
    steps = len(epoch_batches(len(inputs.splits["train"]), optim.batch_size, 0, 0, drop_last=optim.drop_last))
    updates = math.ceil(steps / optim.accum_iter)
    schedule = Schedule(lr, optim.epochs * updates, round(optim.warmup_epochs * updates), optim.min_lr)
    optimizer = make_adamw(model.named_parameters(), optim.weight_decay)
    progress = Progress(epoch=settings.run.start_epoch)
    if checkpoint is not None:
        progress = restore(checkpoint, model, optimizer, inputs.key, asked=bool(settings.run.resume))
    run = Run(settings, who, inputs.key, {n: len(s) for n, s in inputs.splits.items()}) if is_main() else None
    if run is not None and checkpoint is not None:
        if settings.run.resume in ("", "auto"):
            run.follow(progress)
        else:
            run.save(model, optimizer, progress)
        done = f"epoch {progress.epoch}" + (f", step {progress.step}" if progress.step else "")
        run.say(f"going on after {done}" if progress.epoch < optim.epochs else f"all {optim.epochs} epochs are done already")
    wrapped = accelerator.prepare_model(_compiled(model, device) if settings.run.compile else model)
    with StopSignals() as signals:
        for epoch in range(progress.epoch, optim.epochs):
            clock = [time.perf_counter()]
            trained = train_one_epoch(
                wrapped, model, loss, optimizer, inputs.splits["train"], settings, schedule, accelerator, progress, signals
            )
            if trained is None:
                if run is not None:
                    run.save(model, optimizer, progress)
                    run.say(f"stopped by a signal after epoch {epoch}, step {progress.step}; the same command goes on")
                accelerator.wait_for_everyone()
                signals.end()
            clock.append(time.perf_counter())
            calibrate(model, inputs.splits["train"], device)
            clock.append(time.perf_counter())
            validated = evaluate(model, loss, inputs.splits["val"], device)
            clock.append(time.perf_counter())
            metrics = {"epoch": epoch, "lr": schedule((epoch + 1) * updates - 1)}
            metrics |= {f"train_{k}": v for k, v in trained.items()} | {f"val_{k}": v for k, v in validated.items()}
            progress.finish_epoch(metrics, selection(validated))
            if run is not None:
                run.save(model, optimizer, progress)
                seconds = [end - begin for begin, end in pairwise(clock)]
                run.record(metrics, dict(zip(("train", "calibrate", "validate"), seconds, strict=True)))
    if run is not None:
        run.close()


def build_model(method: Method, knobs: Any, specs: Mapping[str, FeatureSpec]) -> nn.Module:
    """The model of a method. Raises UserError where it does not define what the engine asks of it."""
    model = method.model(knobs, specs)
    if not isinstance(model, nn.Module) or not isinstance(model, Stage2Model):
        raise UserError(
            f"the model of {method.implementation.experiment_id} is a {type(model).__name__}; it must be an nn.Module that "
            "inherits tvl_align.contract.Stage2Model and has registers."
        )
    return model


def _compiled(model: nn.Module, device: torch.device) -> Any:
    if device.type == "cpu" and not any(shutil.which(c) for c in (os.environ.get("CXX", ""), "g++", "clang++")):
        raise UserError("--compile needs a C++ compiler, and there is no g++ or clang++; install one or leave it out.")
    return torch.compile(model)


def train_one_epoch(
    wrapped: nn.Module,
    model: nn.Module,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: FeatureSource,
    settings: Settings[Any],
    schedule: Schedule,
    accelerator: "Accelerator",
    progress: Progress,
    signals: StopSignals,
) -> dict[str, float] | None:
    """The steps of an epoch that are still to do; returns the epoch's mean of every number, over all processes.

    `wrapped` is the model as it synchronises gradients, `model` the same parameters without the wrapping. None: a signal
    came to one of the processes, and `progress` says how far all of them are. Every draw follows from seed, epoch and step,
    so an epoch that was stopped goes on as if it had not been.
    """
    seed, batch, accum, epoch = settings.run.own_seed, settings.optim.batch_size, settings.optim.accum_iter, progress.epoch
    weights = balanced_weights(source.datasets) if settings.data.importance_sampling else None
    rows = epoch_batches(len(source), batch, seed, epoch, weights, settings.optim.drop_last)
    views = epoch_views(len(rows), batch, source.views, seed, epoch)
    updates = math.ceil(len(rows) / accum)
    wrapped.train()
    done = progress.step * accum
    batches = source.batches(list(rows[done:]), list(views[done:]), accelerator.device)
    with progress_bar(len(rows), f"epoch {epoch}", "step", quiet=not is_main()) as bar:
        bar.update(done)
        for group in range(progress.step, updates):
            parts = []
            for step, features in zip(range(group * accum, (group + 1) * accum), batches, strict=False):
                joined = cast(Stage2Model, model).draw_kept(batch * world_size(), generator(seed, epoch, step, 2))
                parts.append((features, joined[rank() * batch : (rank() + 1) * batch]))
            seed_everything(generator(seed, epoch, group, 3).initial_seed())  # dropout and noise inside models
            numbers = _gradients(wrapped, loss, optimizer, parts, accelerator)
            norm = gradient_norm(optimizer)
            stop = torch.tensor(float(signals.received is not None), device=norm.device)
            means = mean_over_processes(numbers | {"gradient": norm, "stop": stop})
            stopping = means.pop("stop") > 0
            if math.isfinite(means.pop("gradient")) and math.isfinite(means["total_loss"]):
                optimizer_step(optimizer, schedule(epoch * updates + group))
                progress.counted += 1
                for name, value in means.items():
                    progress.sums[name] = progress.sums.get(name, 0.0) + value
            else:
                optimizer.zero_grad()
                progress.skipped += 1
                _not_finite(means["total_loss"], parts, source, settings, progress)
            progress.step = group + 1
            bar.set_postfix(loss=f"{means['total_loss']:.3f}", refresh=False)
            bar.update(len(parts))
            if stopping:
                return None
    return {name: total / max(1, progress.counted) for name, total in progress.sums.items()}


def _gradients(
    wrapped: nn.Module,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[tuple[Features, Tensor]],
    accelerator: "Accelerator",
) -> dict[str, Tensor]:
    """The gradients of (features, kept) parts, which together are one batch; returns the loss's numbers."""

    def run(features: Features, kept: Tensor) -> Output:
        with accelerator.autocast():
            return wrapped(features, kept=kept, joint=False).float()

    def take(scalar: Tensor, part: int = 0) -> None:
        backward_and_step(scalar, optimizer, 0.0, accelerator.backward, update=False)

    if len(parts) == 1:
        numbers = loss(run(*parts[0]))
        take(numbers["total_loss"])
        return numbers

    def around(part: int) -> AbstractContextManager[None]:
        return nullcontext() if part == len(parts) - 1 else accelerator.no_sync(wrapped)

    return large_batch_gradient([partial(run, *part) for part in parts], loss, take, around)


def _not_finite(
    loss: float, parts: Sequence[tuple[Features, Tensor]], source: FeatureSource, settings: Settings[Any], progress: Progress
) -> None:
    """Note the rows of a step whose loss or gradients are not finite. Raises UserError where no more may be left out; all
    processes see the same mean, so they all do."""
    rows = torch.cat([gather(features.rows) for features, _ in parts]).tolist()
    where, allowed = settings.folder / "nonfinite.jsonl", settings.optim.skip_nonfinite
    at = f"epoch {progress.epoch}, step {progress.step}"
    if is_main():
        noted = {"epoch": progress.epoch, "step": progress.step, "loss": repr(loss)}
        noted |= {"rows": rows, "names": [source.names[row] for row in rows if row >= 0]}
        with where.open("a", encoding="utf-8") as file:
            file.write(json.dumps(noted) + "\n")
        log.warning("%s: loss %s or a gradient is not finite; the step is left out, its rows are in %s", at, loss, where)
    if progress.skipped > allowed:
        good = settings.folder / "checkpoint.pth"
        last = f"the last good checkpoint is {good}" if good.is_file() else "there is no checkpoint yet"
        more = f" for the {progress.skipped}th time (--skip_nonfinite {allowed})" if allowed else ""
        raise UserError(
            f"the loss became {loss}, or a gradient not finite, in {at}{more}; {last}, the rows are in {where}; "
            "lower --lr or --blr, or allow some with --skip_nonfinite."
        )


@torch.no_grad()
def calibrate(model: nn.Module, source: FeatureSource, device: torch.device) -> None:
    """Let a model fit its closed forms (Stage2Model.calibrate) on training rows, plain view, after each epoch.

    At most CALIBRATION_ROWS rows, evenly spaced; every process reads all of these, so that all end with the same numbers.
    """
    model.eval()
    rows = list(torch.arange(0, len(source), math.ceil(len(source) / CALIBRATION_ROWS)).split(EVAL_BATCH))

    def batches() -> Iterator[Features]:
        with progress_bar(len(rows), "calibrate", "batch", quiet=not is_main()) as bar, single_process():
            for features in source.batches(rows, [torch.zeros_like(r) for r in rows], device):
                yield features
                bar.update()

    cast(Stage2Model, model).calibrate(batches)


@torch.no_grad()
def evaluate(model: nn.Module, loss: nn.Module, source: FeatureSource, device: torch.device) -> dict[str, float]:
    """Score a split with one gallery of all its rows; every process does its share, all return the same, and what one
    process alone would return.

    Names as in training: `<pair>_loss`, `<pair>_acc1`, `<pair>_acc5`, `<pair>_chance1`, the averages, the other terms of
    the loss and `total_loss`.
    """
    model.eval()
    rows = list(shard_batches(torch.arange(len(source)), EVAL_BATCH))
    collected: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}
    with progress_bar(len(rows), "validate", "batch", quiet=not is_main()) as bar:
        for step, features in enumerate(source.batches(rows, [torch.zeros_like(r) for r in rows], device)):
            output = model(features, joint=False)
            of_batch = min(EVAL_BATCH, len(source) - step * EVAL_BATCH)
            for name, value in loss(output).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * of_batch / len(source)
            real = features.rows >= 0
            parts = {f"pooled/{m}": v for m, v in pooled_overlapping(output).items()}
            parts |= {f"present/{m}": v for m, v in output.present.items()}
            for name, part in (parts | {"keys": output.caption_keys, "rows": features.rows}).items():
                collected.setdefault(name, []).append(part[real])
            scale = float(output.logit_scale)
            bar.update()
    everything = {name: gather(torch.cat(parts)) for name, parts in collected.items()}
    order = everything["rows"].argsort()
    everything = {name: part[order] for name, part in everything.items()}
    numbers = mean_over_processes(sums)
    modalities = [name.removeprefix("pooled/") for name in collected if name.startswith("pooled/")]
    scored = [pair for pair in combinations(modalities, 2) if f"{pair_name(*pair)}_loss" in numbers]
    pairs = [pair_name(*pair) for pair in scored]
    for (first, second), pair in zip(scored, pairs, strict=True):
        found = retrieval(
            everything[f"pooled/{first}"],
            everything[f"pooled/{second}"],
            everything[f"present/{first}"] & everything[f"present/{second}"],
            everything["keys"] if "text" in (first, second) else None,
            scale,
        )
        numbers |= {f"{pair}_{k}": getattr(found, k) for k in ("loss", "acc1", "acc5", "chance1")}
    # The terms other than alignment are means over batches; alignment is replaced by that of the whole gallery.
    aligned = sum(numbers[f"{pair}_loss"] for pair in pairs) / len(pairs)
    numbers["total_loss"] += aligned - numbers["overlapping_loss"]
    numbers["overlapping_loss"] = aligned
    for k in ("acc1", "acc5"):
        numbers[f"average_{k}"] = sum(numbers[f"{pair}_{k}"] for pair in pairs) / len(pairs)
    return numbers


def selection(validated: dict[str, float]) -> dict[str, float]:
    """What the best checkpoint is chosen by: the mean over the pairs with touch, where there are any.

    Vision and text come from encoders that were aligned before; their pair would reward standing still.
    """
    touch = [pair for pair in (pair_name("tactile", "vision"), pair_name("tactile", "text")) if f"{pair}_acc1" in validated]
    return {
        k: sum(validated[f"{p}_{k}"] for p in touch) / len(touch) if touch else validated[f"average_{k}"]
        for k in ("acc1", "acc5")
    }
