"""The training loop of all methods: fit, calibrate, train_one_epoch, evaluate."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tvl_align.contract import Features, FeatureSpec, Method, Output, Stage2Model
from tvl_align.features.store import FeatureSource
from tvl_align.losses.alignment import pair_name
from tvl_align.losses.contrastive import keys_of
from tvl_align.metrics.retrieval import retrieval
from tvl_align.registers.pooling import pooled_overlapping
from tvl_align.system.console import UserError
from tvl_align.system.console import progress as progress_bar
from tvl_align.system.distributed import (
    gather,
    is_main,
    join_process_group,
    mean_over_processes,
    rank,
    single_process,
    world_size,
)
from tvl_align.system.files import lock_folder
from tvl_align.system.runtime import generator, keep_freed_memory, pick_device, seed_everything
from tvl_align.system.signals import StopSignals
from tvl_align.system.workers import read_ahead
from tvl_align.training.accumulation import large_batch_gradient
from tvl_align.training.graphs import Gradients, RecordedGradients
from tvl_align.training.optimisation import Schedule, backward_and_step, gradient_norm, make_adamw, optimizer_step
from tvl_align.training.run import Progress, Run, find_checkpoint, recorded_identity, restore
from tvl_align.training.sampling import balanced_weights, epoch_batches, epoch_views, shard_batches
from tvl_align.training.settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator

EVAL_BATCH = 256  # rows per batch in validation and calibration
BUCKET = 200  # MB of gradients that processes exchange at a time: all of a model of ordinary size in one call
CALIBRATION_ROWS = 20_000  # most training rows that calibration reads
log = logging.getLogger(__name__)


def make_accelerator(settings: Settings[Any]) -> "Accelerator":
    """Set up device and process group. Precision is left to `training_precision`."""
    from accelerate import Accelerator
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs

    device = pick_device(settings.run.device)
    if device.index is not None and device.type == "cuda" and world_size() == 1:
        torch.cuda.set_device(device)  # accelerate takes the current device
    timeout = timedelta(hours=6)  # long enough for a process that encodes much more than the others
    join_process_group(device, timeout)
    if device.type == "cpu":
        keep_freed_memory()
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # with another one accelerate replaces the forward of the model, also in validation
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=settings.run.find_unused_parameters,
                bucket_cap_mb=BUCKET,
                gradient_as_bucket_view=True,
                comm_hook=DDPCommunicationHookType.BF16 if settings.run.bf16_gradients else DDPCommunicationHookType.NO,
                broadcast_buffers=False,  # closed forms are fitted alike on all processes, and no step changes them
            ),
            InitProcessGroupKwargs(timeout=timeout),
        ],
    )


def training_precision(device: torch.device) -> torch.autocast:
    """The precision of the forward pass of a training step: bf16 autocast on a GPU, float32 on a CPU.

    Everything else is float32: closed forms, losses, validation and measuring.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def fit(settings: Settings[Any], method: Method) -> Path:
    """Train a method and return its run folder. A run with the same settings that was interrupted is resumed.

    The folder contains config.json, metrics.jsonl, times.jsonl, TensorBoard events, checkpoint.pth and the best
    checkpoint-acc1.pth and checkpoint-acc5.pth.

    Raises UserError for invalid settings, for a folder that has a run with other settings or is in use by another process,
    and for a loss or gradient with NaN or inf. After SIGTERM, SIGUSR1 or SIGUSR2 the current step is finished, a checkpoint
    is written, and the process exits with code 143.
    """
    accelerator = make_accelerator(settings)
    with lock_folder(settings.folder, wait=False, why="trains in") if is_main() else nullcontext():
        _fit(settings, method, accelerator)
    accelerator.wait_for_everyone()
    return settings.folder


def _fit(settings: Settings[Any], method: Method, accelerator: "Accelerator") -> None:
    device, implementation, optim = accelerator.device, method.implementation, settings.optim
    checkpoint = find_checkpoint(settings, implementation)
    inputs = settings.open_inputs(device, recorded_identity(settings) if checkpoint is not None else None)
    for name in ("train", "val"):
        if name not in inputs.splits or not len(inputs.splits[name]):
            folder = settings.data.store or settings.data.datasets_dir
            raise UserError(f"{folder} has no {name} rows; give data with at least two trajectories (or groups).")
    seed_everything(settings.run.own_seed)
    model = build_model(method, settings.knobs, inputs.specs).to(device)
    loss = method.loss(settings.knobs, list(inputs.specs))
    lr = optim.lr if optim.lr is not None else optim.blr * optim.batch_size * optim.accum_iter * world_size() / 256
    steps = len(epoch_batches(len(inputs.splits["train"]), optim.batch_size, 0, 0, drop_last=optim.drop_last))
    updates = math.ceil(steps / optim.accum_iter)
    schedule = Schedule(lr, optim.epochs * updates, round(optim.warmup * updates), optim.min_lr)
    optimizer = make_adamw(model.named_parameters(), optim.weight_decay)
    progress = Progress(epoch=settings.run.start_epoch)
    if checkpoint is not None:
        progress = restore(checkpoint, model, optimizer, inputs.identity.key, explicit=bool(settings.run.resume))
    rows = {name: len(split) for name, split in inputs.splits.items()}
    run = Run(settings, implementation, inputs.identity, rows, inputs.specs, progress) if is_main() else None
    if run is not None and optim.warmup < optim.warmup_epochs:
        run.log(f"--warmup_epochs {optim.warmup_epochs:g} is more than half of the run; shortened to {optim.warmup:g}")
    if run is not None and checkpoint is not None:
        if settings.run.resume in ("", "auto"):
            run.write_derived(model, progress)
        else:
            run.save(model, optimizer, progress)
        done = f"epoch {progress.epoch}" + (f", step {progress.step}" if progress.step else "")
        run.log(f"resuming after {done}" if progress.epoch < optim.epochs else f"all {optim.epochs} epochs are done already")
    with StopSignals() as signals:  # from here on a signal ends the run after a step, with a checkpoint
        if checkpoint is None:
            calibrate(model, inputs.splits["train"], device)
        condense = cast(Stage2Model, model).condense
        train, val = (inputs.splits[name].condensed(condense, device) for name in ("train", "val"))
        wrapped = accelerator.prepare_model(_compiled(model, device) if settings.run.compile else model)
        may = settings.run.cuda_graphs and method.recordable and device.type == "cuda"
        recorded = may and world_size() == optim.accum_iter == 1
        learner = Learner(model, wrapped, loss, optimizer, accelerator, recorded)
        for epoch in range(progress.epoch, optim.epochs):
            times = [time.perf_counter()]
            trained = train_one_epoch(learner, train, settings, schedule, progress, signals)
            if trained is None:
                if run is not None:
                    run.save(model, optimizer, progress)
                    done = f"epoch {epoch}, step {progress.step}"
                    run.log(f"stopped by a signal after {done}; run the same command again to resume")
                accelerator.wait_for_everyone()
                signals.end()
            times.append(time.perf_counter())
            validated = evaluate(model, loss, val, device)
            times.append(time.perf_counter())
            metrics = {"epoch": epoch, "lr": schedule((epoch + 1) * updates - 1)}
            metrics |= {f"train_{k}": v for k, v in trained.items()} | {f"val_{k}": v for k, v in validated.items()}
            progress.finish_epoch(metrics, selection_scores(validated))
            if run is not None:
                run.save(model, optimizer, progress)
                seconds = [end - begin for begin, end in pairwise(times)]
                run.record(metrics, dict(zip(("train", "validate"), seconds, strict=True)))
    if run is not None:
        run.close()


def build_model(method: Method, knobs: Any, specs: Mapping[str, FeatureSpec]) -> nn.Module:
    """Create the model of a method. Raises UserError if it does not implement Stage2Model."""
    model = method.model(knobs, specs)
    if not isinstance(model, nn.Module) or not isinstance(model, Stage2Model):
        raise UserError(
            f"the model of {method.implementation.experiment_id} is a {type(model).__name__}; it must be an nn.Module that "
            "inherits tvl_align.contract.Stage2Model and has registers."
        )
    return model


def _compiled(model: nn.Module, device: torch.device) -> Any:
    """The model compiled by torch.compile. Raises UserError on a CPU without a C++ compiler."""
    if device.type == "cpu" and not any(shutil.which(c) for c in (os.environ.get("CXX", ""), "g++", "clang++")):
        raise UserError("--compile on a CPU needs a C++ compiler; install g++ or clang++, or leave out --compile.")
    return torch.compile(model)


@dataclass(frozen=True)
class Learner:
    """What a training step needs: a model, its loss, and how to compute and apply gradients.

    wrapped: the model in DistributedDataParallel or torch.compile; `model`: the same parameters without it. recorded: replay
    the step from CUDA graphs.
    """

    model: nn.Module
    wrapped: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: "Accelerator"
    recorded: bool = False

    def gradients(self, parts: Sequence[tuple[Features, Tensor]]) -> dict[str, Tensor]:
        """Compute the gradient of one batch, given as (features, kept) parts.

        Returns the named scalars of the loss and `gradient`, the norm of the gradient.
        """
        if len(parts) == 1:
            return self._of_one_part(*parts[0])
        last = len(parts) - 1

        def sync_context(part: int) -> AbstractContextManager[None]:
            return nullcontext() if part == last else self.accelerator.no_sync(self.wrapped)

        forwards = [partial(self._forward, *part) for part in parts]
        scalars = large_batch_gradient(forwards, self.loss, self._backward, sync_context)
        return scalars | {"gradient": gradient_norm(self.optimizer)}

    @cached_property
    def _of_one_part(self) -> Gradients:
        return RecordedGradients(self._directly, self.model.parameters()) if self.recorded else self._directly

    def _directly(self, features: Features, kept: Tensor) -> dict[str, Tensor]:
        scalars = self.loss(self._forward(features, kept))
        self._backward(scalars["total_loss"])
        return {name: value.detach() for name, value in scalars.items()} | {"gradient": gradient_norm(self.optimizer)}

    def _forward(self, features: Features, kept: Tensor) -> Output:
        with training_precision(self.accelerator.device):
            return self.wrapped(features, kept=kept, joint=False).float()

    def _backward(self, scalar: Tensor, part: int = 0) -> None:
        backward_and_step(scalar, self.optimizer, 0.0, self.accelerator.backward, update=False)


def train_one_epoch(
    learner: Learner,
    source: FeatureSource,
    settings: Settings[Any],
    schedule: Schedule,
    progress: Progress,
    signals: StopSignals,
) -> dict[str, float] | None:
    """Run the remaining steps of an epoch. Returns the means of the loss scalars over its steps and all processes.

    Returns None if any process received a stop signal; `progress` then has the steps done. Random draws depend only on seed,
    epoch and step, so a resumed epoch gives the same results as an uninterrupted one.
    """
    model, device = cast(Stage2Model, learner.model), learner.accelerator.device
    seed, batch, accum, epoch = settings.run.own_seed, settings.optim.batch_size, settings.optim.accum_iter, progress.epoch
    weights = balanced_weights(source.datasets) if settings.data.importance_sampling else None
    rows = epoch_batches(len(source), batch, seed, epoch, weights, settings.optim.drop_last)
    views = epoch_views(len(rows), batch, source.views, seed, epoch, bool(source.augmented))
    updates = math.ceil(len(rows) / accum)
    learner.wrapped.train()
    done = progress.step * accum
    batches = _fetched(source.batches(list(rows[done:]), list(views[done:]), device), device)
    with progress_bar(len(rows), f"epoch {epoch + 1}", "step", quiet=not is_main(), initial=done) as bar:
        for group in range(progress.step, updates):
            parts = []
            for step, features in zip(range(group * accum, (group + 1) * accum), batches, strict=False):
                kept = model.draw_kept(batch * world_size(), generator(seed, epoch, step, 2))
                parts.append((features, kept[rank() * batch : (rank() + 1) * batch]))
            seed_everything(generator(seed, epoch, group, 3).initial_seed())  # for dropout and noise inside the model
            scalars = learner.gradients(parts)
            stop = torch.tensor(float(signals.received is not None), device=device)
            averaged = mean_over_processes(scalars | {"stop": stop})
            bad = ~(averaged["gradient"] + averaged["total_loss"]).isfinite()
            optimizer_step(learner.optimizer, schedule(epoch * updates + group), skip=bad)
            means = values_of(averaged | {"bad": bad})  # a GPU is waited for here
            stopping, _ = means.pop("stop") > 0, means.pop("gradient")
            if not means.pop("bad"):
                progress.counted += 1
                for name, value in means.items():
                    progress.sums[name] = progress.sums.get(name, 0.0) + value
            else:
                progress.skipped += 1
                _record_nonfinite(means["total_loss"], parts, source, settings, progress)
            progress.step = group + 1
            bar.set_postfix(loss=f"{means['total_loss']:.3f}", refresh=False)
            bar.update(len(parts))
            if stopping:
                return None
    return {name: total / max(1, progress.counted) for name, total in progress.sums.items()}


def _fetched(batches: Iterator[Features], device: torch.device) -> Iterator[Features]:
    """On a GPU, batches are read, pinned and copied by a thread, on a stream of their own, while a step runs."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def copied() -> Iterator[Features]:
        while True:
            with torch.cuda.stream(stream):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    for batch in read_ahead(copied()):
        torch.cuda.current_stream(device).wait_stream(stream)
        for tensor in batch.tensors():
            tensor.record_stream(torch.cuda.current_stream(device))
        yield batch


def _record_nonfinite(
    loss: float, parts: Sequence[tuple[Features, Tensor]], source: FeatureSource, settings: Settings[Any], progress: Progress
) -> None:
    """Write the rows of a step with NaN or inf to nonfinite.jsonl. Raises UserError above `--skip_nonfinite` such steps.

    All processes see the same mean loss, so all of them raise.
    """
    rows = torch.cat([gather(features.rows) for features, _ in parts]).tolist()
    path, allowed = settings.folder / "nonfinite.jsonl", settings.optim.skip_nonfinite
    position = f"epoch {progress.epoch}, step {progress.step}"
    if is_main():
        entry = {"epoch": progress.epoch, "step": progress.step, "loss": repr(loss)}
        entry |= {"rows": rows, "names": [source.names[row] for row in rows if row >= 0]}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
        log.warning("%s: loss %s or a gradient is not finite; step skipped, its rows are in %s", position, loss, path)
    if progress.skipped > allowed:
        checkpoint = settings.folder / "checkpoint.pth"
        last = f"the last good checkpoint is {checkpoint}" if checkpoint.is_file() else "there is no checkpoint yet"
        count = f", step {progress.skipped} of this kind with --skip_nonfinite {allowed}" if allowed else ""
        raise UserError(
            f"the loss became {loss}, or a gradient not finite, in {position}{count}; {last}, the rows are in {path}; "
            "lower --lr or --blr, or raise --skip_nonfinite."
        )


@torch.no_grad()
def calibrate(model: nn.Module, source: FeatureSource, device: torch.device) -> None:
    """Call Stage2Model.calibrate with batches of training rows, without augmentation.

    At most CALIBRATION_ROWS evenly spaced rows are read. Every process reads all of them and gets the same result.
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
    """Loss and retrieval metrics of a split; the retrieval gallery is the full split.

    The batches are divided among the processes. All processes return the same values, equal to those of a single process.
    Keys: `<pair>_loss`, `<pair>_acc1`, `<pair>_acc5`, `<pair>_chance1` (accuracies and chance in %), `average_acc1`,
    `average_acc5`, the other terms of the loss, `overlapping_loss` and `total_loss`. A pair that no row has is left out.
    Raises UserError if there is none.
    """
    model.eval()
    rows = list(shard_batches(torch.arange(len(source)), EVAL_BATCH))
    collected: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}
    with progress_bar(len(rows), "validate", "batch", quiet=not is_main()) as bar:
        for step, features in enumerate(source.batches(rows, [torch.zeros_like(r) for r in rows], device)):
            output = model(features, joint=False).float()
            batch_rows = min(EVAL_BATCH, len(source) - step * EVAL_BATCH)
            for name, value in loss(output).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * batch_rows / len(source)
            valid = features.rows >= 0
            parts = {f"pooled/{m}": v for m, v in pooled_overlapping(output).items()}
            parts |= {f"present/{m}": v for m, v in output.present.items()}
            for name, part in (parts | {"keys": output.caption_keys, "rows": features.rows}).items():
                collected.setdefault(name, []).append(part[valid])
            scale = float(output.logit_scale)
            bar.update()
    gathered = {name: gather(torch.cat(parts)) for name, parts in collected.items()}
    order = gathered["rows"].argsort()
    gathered = {name: part[order] for name, part in gathered.items()}
    content = {m: keys.to(device) for m, keys in source.content_keys.items()}
    metrics = values_of(mean_over_processes(sums))
    modalities = [name.removeprefix("pooled/") for name in collected if name.startswith("pooled/")]
    pairs: list[str] = []  # those in the loss for which there are rows
    for first, second in combinations(modalities, 2):
        pair, both = pair_name(first, second), gathered[f"present/{first}"] & gathered[f"present/{second}"]
        if f"{pair}_loss" not in metrics:
            continue
        if not both.any():
            metrics = {name: value for name, value in metrics.items() if not name.startswith(f"{pair}_")}
            continue
        pairs.append(pair)
        result = retrieval(
            gathered[f"pooled/{first}"],
            gathered[f"pooled/{second}"],
            both,
            keys_of((first, second), gathered["keys"], content),
            scale,
        )
        metrics |= {f"{pair}_{k}": getattr(result, k) for k in ("loss", "acc1", "acc5", "chance1")}
    if not pairs:
        raise UserError("no validation row has two modalities of a pair in the loss; give other data or another --seed.")
    # The other loss terms are means over batches. The alignment term is replaced by its value on the full gallery.
    alignment_loss = sum(metrics[f"{pair}_loss"] for pair in pairs) / len(pairs)
    metrics["total_loss"] += alignment_loss - metrics["overlapping_loss"]
    metrics["overlapping_loss"] = alignment_loss
    for k in ("acc1", "acc5"):
        metrics[f"average_{k}"] = sum(metrics[f"{pair}_{k}"] for pair in pairs) / len(pairs)
    return metrics


def values_of(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of named scalars, read from the device at once."""
    return dict(zip(scalars, torch.stack([value.float() for value in scalars.values()]).tolist(), strict=True))


def selection_scores(validated: dict[str, float]) -> dict[str, float]:
    """Scores that select the best checkpoints: mean Acc@1 and Acc@5 over the pairs with touch, else over all pairs.

    Vision and text encoders are already aligned with each other, so their pair does not measure progress.
    """
    touch = [pair for pair in (pair_name("tactile", "vision"), pair_name("tactile", "text")) if f"{pair}_acc1" in validated]
    return {
        k: sum(validated[f"{p}_{k}"] for p in touch) / len(touch) if touch else validated[f"average_{k}"]
        for k in ("acc1", "acc5")
    }
