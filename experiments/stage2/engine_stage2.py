"""The one training loop, for every method: train_one_epoch, evaluate, fit."""

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from tvl_align.accumulation import large_batch_gradient
from tvl_align.alignment import pair_name
from tvl_align.checkpoint import keep_as, load_checkpoint, save_checkpoint
from tvl_align.config import Settings, notes, to_plain
from tvl_align.console import UserError, progress
from tvl_align.contract import MODALITIES, Features, FeatureSpec, Method, Output
from tvl_align.data.samples import Samples, TextOptions, find_synonyms, make_samples
from tvl_align.data.text import PROMPT
from tvl_align.data.transforms import ImageOptions
from tvl_align.data.tvl import read_tvl
from tvl_align.encoders.tvl import Stage1, load_stage1
from tvl_align.evaluation import retrieval
from tvl_align.features import FeatureSource, FeatureStore, LiveSplit, open_or_encode
from tvl_align.optimisation import Schedule, descend, make_adamw
from tvl_align.registers import pooled_overlapping
from tvl_align.runtime import (
    alone,
    gather,
    generator,
    is_main,
    mean_over_processes,
    pick_device,
    provenance,
    rank,
    seed_everything,
    world_size,
)
from tvl_align.sampling import balanced_weights, epoch_batches, epoch_views, shares

EVAL_BATCH = 256
CALIBRATION_ROWS = 20_000
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a run trains on: feature sources by split, their shapes, the key of the store (None: on the fly), the rows."""

    splits: dict[str, FeatureSource]
    specs: dict[str, FeatureSpec]
    key: str | None
    samples: dict[str, Samples]


def make_accelerator(settings: Settings[Any]) -> Accelerator:
    """Device, processes and precision: bf16 autocast on a GPU, float32 on a CPU."""
    device = pick_device(settings.run.device)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if device.type == "cuda" else "no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=settings.run.find_unused_parameters),
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # one process may have far more to encode
        ],
    )


def load_inputs(settings: Settings[Any], device: torch.device, expected: str | None = None) -> Inputs:
    """Read the data, load the encoders, open the feature store (filled first where it is missing).

    expected: the key the store must have. Raises UserError where data or Stage-1 checkpoint now give another one.
    """
    if settings.data.store is not None:
        return _imported(settings, expected)
    stage1, samples = load_samples(settings, device)
    data = settings.data
    if data.views == 0:
        splits = {n: LiveSplit(stage1, s, data.num_workers, train=n == "train") for n, s in samples.items() if len(s)}
        return Inputs(dict(splits), stage1.specs, None, samples)
    store = open_or_encode(settings.feature_dir, stage1, samples, data.views, data.num_workers, expected)
    return Inputs(dict(store.splits), store.specs, store.key, samples)


def _imported(settings: Settings[Any], expected: str | None) -> Inputs:
    """A store of the user's own features."""
    assert settings.data.store is not None
    store, names = FeatureStore(settings.data.store), settings.data.active_modality_names
    if expected is not None and store.key != expected:
        raise UserError(f"{store.folder} now holds the store {store.key}, not the {expected} of this run; put that back.")
    store = store if names == MODALITIES else store.only(names)
    return Inputs(dict(store.splits), store.specs, store.key, {})


def load_samples(settings: Settings[Any], device: torch.device) -> tuple[Stage1, dict[str, Samples]]:
    """The frozen encoders on the device, and the rows of every split with the transforms these encoders need."""
    data, frozen = settings.data, settings.stage1
    if frozen.stage1_checkpoint is None:
        raise UserError("encoding needs --stage1_checkpoint FILE.")
    rows = read_tvl(data.datasets_dir, data.datasets, settings.run.seed, data.use_not_contact, data.percent_not_contact)
    stage1 = load_stage1(
        frozen.stage1_checkpoint,
        frozen.tactile_model,
        frozen.clip_vision_model,
        frozen.clip_pretrain_data,
        frozen.common_latent_dim,
        frozen.features,
        data.active_modality_names,
    ).to(device)
    images = ImageOptions(
        stage1.photo_size,
        stage1.touch_size,
        data.randomize_crop,
        data.color_jitter,
        data.subtract_background is not None,
        data.shared_geometry,
        data.augment_pictures,
    )
    synonyms = find_synonyms(rows.root, data.keep_k_synonyms) if data.replace_synonyms else {}
    text = TextOptions("" if data.no_text_prompt else PROMPT, data.shuffle_text, synonyms)
    return stage1, make_samples(rows, images, text, settings.run.seed)


def fit(settings: Settings[Any], method: Method) -> Path:
    """Train a method from start to end; returns the run folder.

    The folder holds config.json, metrics.jsonl, TensorBoard events, checkpoint.pth and the best checkpoint-acc1.pth and
    checkpoint-acc5.pth. Raises UserError for bad settings and for a loss that is not finite.
    """
    accelerator = make_accelerator(settings)
    device, who = accelerator.device, method.implementation
    folder = settings.folder
    checkpoint = _resume_point(settings)
    inputs = load_inputs(settings, device)
    for name in ("train", "val"):
        if name not in inputs.splits or not len(inputs.splits[name]):
            where = settings.data.store or settings.data.datasets_dir
            raise UserError(f"{where} leaves no {name} rows; it needs at least two trajectories (or groups).")
    seed_everything(settings.run.own_seed)
    model = method.model(settings.knobs, inputs.specs).to(device)
    loss = method.loss(settings.knobs, list(inputs.specs))
    optim = settings.optim
    lr = optim.lr if optim.lr is not None else optim.blr * optim.batch_size * optim.accum_iter * world_size() / 256
    steps = len(epoch_batches(len(inputs.splits["train"]), optim.batch_size, 0, 0, drop_last=optim.drop_last))
    updates = math.ceil(steps / optim.accum_iter)
    schedule = Schedule(lr, optim.epochs * updates, round(optim.warmup_epochs * updates), optim.min_lr)
    optimizer = make_adamw(model.named_parameters(), optim.weight_decay)
    start, best = settings.run.start_epoch, {"acc1": -1.0, "acc5": -1.0}
    if checkpoint is not None:
        start, best = _restore(checkpoint, model, optimizer, method)
    run = Run(folder, settings, method, inputs, start) if is_main() else None
    wrapped = accelerator.prepare_model(model)
    for epoch in range(start, optim.epochs):
        began = time.perf_counter()
        trained = train_one_epoch(
            wrapped, model, loss, optimizer, inputs.splits["train"], settings, schedule, accelerator, epoch
        )
        calibrate(model, inputs.splits["train"], device)
        validated = evaluate(model, loss, inputs.splits["val"], device)
        chosen = selection(validated)
        better = [k for k in best if chosen[k] > best[k]]
        best |= {k: chosen[k] for k in better}
        if run is not None:
            metrics = {
                "epoch": epoch,
                "lr": schedule((epoch + 1) * updates - 1),
                "seconds": time.perf_counter() - began,
            }
            metrics |= {f"train_{k}": v for k, v in trained.items()} | {f"val_{k}": v for k, v in validated.items()}
            content = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch,
                "best": best,
                "implementation": asdict(who),
                "settings": to_plain(settings),
                "store": inputs.key,
            }
            save_checkpoint(folder / "checkpoint.pth", content)
            for k in better:
                keep_as(folder / "checkpoint.pth", f"checkpoint-{k}.pth")
            run.record(metrics)
    if run is not None:
        run.close()
    accelerator.wait_for_everyone()
    return folder


def train_one_epoch(
    wrapped: nn.Module,
    model: nn.Module,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: FeatureSource,
    settings: Settings[Any],
    schedule: Schedule,
    accelerator: Accelerator,
    epoch: int,
) -> dict[str, float]:
    """One pass over the training rows; returns the epoch's mean of every number, over all processes.

    `wrapped` is the model as it synchronises gradients, `model` the same parameters without the wrapping.
    """
    seed, batch, accum = settings.run.own_seed, settings.optim.batch_size, settings.optim.accum_iter
    weights = balanced_weights(source.datasets) if settings.data.importance_sampling else None
    rows = epoch_batches(len(source), batch, seed, epoch, weights, settings.optim.drop_last)
    views = epoch_views(len(rows), batch, source.views, seed, epoch)
    updates = math.ceil(len(rows) / accum)
    seed_everything(generator(seed, epoch, 3).initial_seed())  # dropout and noise inside models, where there are any
    wrapped.train()
    sums: dict[str, Tensor] = {}
    batches = source.batches(list(rows), list(views), accelerator.device)
    with progress(len(rows), f"epoch {epoch}", "step", quiet=not is_main()) as bar:
        for group in range(updates):
            parts = []
            for step, features in zip(range(group * accum, (group + 1) * accum), batches, strict=False):
                joined = model.draw_kept(batch * world_size(), generator(seed, epoch, step, 2))
                parts.append((features, joined[rank() * batch : (rank() + 1) * batch]))
            lr = schedule(epoch * updates + group)
            numbers = _update(wrapped, loss, optimizer, parts, lr, accelerator)
            means = mean_over_processes(numbers)
            _check_finite(float(means["total_loss"]), epoch, group * accum, settings.folder)
            for name, value in means.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
            bar.set_postfix(loss=f"{float(means['total_loss']):.3f}", refresh=False)
            bar.update(len(parts))
    return {name: float(total) / updates for name, total in sums.items()}


def _update(
    wrapped: nn.Module,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[tuple[Features, Tensor]],
    lr: float,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """One optimizer step on (features, kept) parts, which together are one batch; returns the loss's numbers."""

    def run(features: Features, kept: Tensor) -> Output:
        with accelerator.autocast():
            return wrapped(features, kept=kept, joint=False)

    def part_step(scalar: Tensor, part: int) -> None:
        descend(scalar, optimizer, lr, accelerator.backward, update=part == len(parts) - 1)

    if len(parts) == 1:
        numbers = loss(run(*parts[0]))
        part_step(numbers["total_loss"], 0)
        return numbers

    def around(part: int) -> AbstractContextManager[None]:
        return nullcontext() if part == len(parts) - 1 else accelerator.no_sync(wrapped)

    return large_batch_gradient([partial(run, *part) for part in parts], loss, part_step, around)


@torch.no_grad()
def calibrate(model: nn.Module, source: FeatureSource, device: torch.device) -> None:
    """Let a model that has closed forms (`calibrate(batches)`) fit them on training rows, plain view, after each epoch.

    At most CALIBRATION_ROWS rows, evenly spaced; every process reads all of these, so that all end with the same numbers.
    """
    if not hasattr(model, "calibrate"):
        return
    model.eval()
    rows = list(torch.arange(0, len(source), math.ceil(len(source) / CALIBRATION_ROWS)).split(EVAL_BATCH))

    def batches() -> Iterator[Features]:
        with progress(len(rows), "calibrate", "batch", quiet=not is_main()) as bar, alone():
            for features in source.batches(rows, [torch.zeros_like(r) for r in rows], device):
                yield features
                bar.update()

    model.calibrate(batches)


def _check_finite(value: float, epoch: int, step: int, folder: Path) -> None:
    if not math.isfinite(value):  # a mean over all processes: they all stop here
        good = folder / "checkpoint.pth"
        last = f"the last good checkpoint is {good}" if good.is_file() else "there is no checkpoint yet"
        raise UserError(f"the loss became {value} in epoch {epoch}, step {step}; {last}; lower --blr and use --resume.")


@torch.no_grad()
def evaluate(model: nn.Module, loss: nn.Module, source: FeatureSource, device: torch.device) -> dict[str, float]:
    """Score a split with one gallery of all its rows; every process does its share, all return the same, and what one
    process alone would return.

    Names as in training: `<pair>_loss`, `<pair>_acc1`, `<pair>_acc5`, `<pair>_chance1`, the averages, the other terms of
    the loss and `total_loss`.
    """
    model.eval()
    rows = list(shares(torch.arange(len(source)), EVAL_BATCH))
    collected: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}
    with progress(len(rows), "validate", "batch", quiet=not is_main()) as bar:
        for step, features in enumerate(source.batches(rows, [torch.zeros_like(r) for r in rows], device)):
            output = model(features, joint=False)
            of_batch = min(EVAL_BATCH, len(source) - step * EVAL_BATCH)
            for name, value in loss(output).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * of_batch / len(source)
            real = features.rows >= 0
            parts = {f"pooled/{m}": v for m, v in pooled_overlapping(output).items()}
            parts |= {f"present/{m}": v for m, v in output["present"].items()}
            for name, part in (parts | {"keys": output["caption_keys"], "rows": features.rows}).items():
                collected.setdefault(name, []).append(part[real])
            scale = float(output["logit_scale"])
            bar.update()
    everything = {name: gather(torch.cat(parts)) for name, parts in collected.items()}
    order = everything["rows"].argsort()
    everything = {name: part[order] for name, part in everything.items()}
    numbers = {name: float(total) for name, total in mean_over_processes(sums).items()}
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


def _resume_point(settings: Settings[Any]) -> dict[str, Any] | None:
    folder, resume = settings.folder, settings.run.resume
    if resume:
        return load_checkpoint(folder / "checkpoint.pth" if resume == "auto" else Path(resume))
    if (folder / "checkpoint.pth").exists():
        raise UserError(f"{folder} already holds a run; give --resume to go on with it, or another --log_name.")
    return None


def _restore(
    checkpoint: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, method: Method
) -> tuple[int, dict[str, float]]:
    made_by = checkpoint.get("implementation", {}).get("experiment_id")
    if made_by != method.implementation.experiment_id:
        raise UserError(
            f"the checkpoint is of {made_by}, not of {method.implementation.experiment_id}; resume its own method."
        )
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the checkpoint does not fit this model ({reason}); resume with the flags it was made with."
        ) from error
    return checkpoint["epoch"] + 1, dict(checkpoint["best"])


class Run:
    """The run folder as the main process writes it."""

    def __init__(self, folder: Path, settings: Settings[Any], method: Method, inputs: Inputs, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics, self.tag, self.epochs = folder / "metrics.jsonl", method.implementation.tag, settings.optim.epochs
        described = {
            "implementation": asdict(method.implementation),
            "settings": to_plain(settings),
            "store": inputs.key,
            "rows": {name: len(source) for name, source in inputs.splits.items()},
            **provenance(),
        }
        (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        kept = _epochs_before(self.metrics, start)
        self.metrics.write_text("".join(kept), encoding="utf-8")
        self.board = SummaryWriter(str(settings.run.log_dir or folder))
        print(f"[{self.tag}] {method.implementation.experiment_id} v{method.implementation.version} -> {folder}")
        for line in notes(settings):
            print(f"[{self.tag}] {line}")

    def record(self, metrics: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if name != "epoch":
                self.board.add_scalar(name.replace("_", "/", 1), value, metrics["epoch"])
        print(f"[{self.tag}] {epoch_line(metrics, self.epochs)}", flush=True)

    def close(self) -> None:
        self.board.close()


def _epochs_before(metrics: Path, start: int) -> Iterable[str]:
    if not metrics.is_file():
        return []
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if json.loads(line)["epoch"] < start]


def epoch_line(metrics: dict[str, Any], epochs: int) -> str:
    """One line a person reads after each epoch."""
    parts = [f"epoch {metrics['epoch'] + 1}/{epochs}", f"loss {metrics['train_total_loss']:.3f}"]
    parts.append(f"val {metrics['val_total_loss']:.3f}")
    for name in metrics:
        if name.startswith("val_") and name.endswith("_chance1"):
            pair = name.removeprefix("val_").removesuffix("_chance1")
            one, five = metrics[f"val_{pair}_acc1"], metrics[f"val_{pair}_acc5"]
            parts.append(f"{pair.replace('_', '-')} {one:.1f}/{five:.1f} (chance {metrics[name]:.1f})")
    parts.append(f"reg {metrics['val_complementary_reg']:.2f}" if "val_complementary_reg" in metrics else "")
    return " | ".join([*filter(None, parts), f"{metrics['seconds']:.1f} s"])
