"""The folder of a run: configuration, checkpoints and metrics, whole at any moment; and how a run goes on.

The checkpoint is the one source: it holds the metrics of all epochs too, so that whatever was lost between two writes is
written again when the run goes on.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tvl_align.config import from_plain, to_plain
from tvl_align.contract import Implementation, Method
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features.inputs import DataConfig
from tvl_align.methods.registry import METHODS, load_method
from tvl_align.system.checkpoint import link_as, load_checkpoint, save_checkpoint
from tvl_align.system.console import UserError
from tvl_align.system.distributed import world_size
from tvl_align.system.files import write_atomically
from tvl_align.system.provenance import provenance
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings, notes_on_ignored_flags

FREE = {  # options that change no number of a run
    "stage1": {"enable_flash_attention2"},
    "data": {"num_workers", "pin_mem", "multi_epochs_dataloader", "feature_dir", "strict", "max_skipped"},
    "run": {
        *("method", "slurm", "device", "resume", "start_epoch", "log_dir", "dist_eval", "find_unused_parameters", "compile"),
        *("world_size", "local_rank", "dist_url"),
    },
}


@dataclass
class Progress:
    """How far a run is: what goes on with it beside weights and optimizer.

    epoch: the one being trained; step: optimizer steps of it that are done; sums, counted: of their numbers; skipped: steps
    left out for numbers that were not finite; history: the metrics of every finished epoch; better: what the last of them
    was the best at.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counted: int = 0
    skipped: int = 0
    best: dict[str, float] = field(default_factory=lambda: {"acc1": -1.0, "acc5": -1.0})
    better: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def finish_epoch(self, metrics: dict[str, Any], chosen: Mapping[str, float]) -> None:
        """Take note of the epoch's metrics and of what they are the best at."""
        self.better = [name for name in self.best if chosen[name] > self.best[name]]
        self.best |= {name: chosen[name] for name in self.better}
        self.history = [*self.history, metrics]
        self.epoch, self.step, self.sums, self.counted = self.epoch + 1, 0, {}, 0


def find_checkpoint(settings: Settings[Any], who: Implementation) -> dict[str, Any] | None:
    """The checkpoint to go on from: that of `--resume`, else the run folder's own, else None.

    Raises UserError for a checkpoint of another method, and for one of other settings unless --resume asks for it.
    """
    asked, own = settings.run.resume, settings.folder / "checkpoint.pth"
    if not asked and not own.is_file():
        return None
    path = Path(asked) if asked not in ("", "auto") else own
    checkpoint = load_checkpoint(path)
    parts = ("implementation", "progress", "settings")
    if (
        not all(isinstance(checkpoint.get(part), dict) for part in parts)
        or not {"optimizer", "processes", "store"} <= checkpoint.keys()
    ):
        raise UserError(f"{path} was not written by this version of the project; start a new run.")
    made_by = checkpoint["implementation"].get("experiment_id")
    if made_by != who.experiment_id:
        raise UserError(f"the checkpoint is of {made_by}, not of {who.experiment_id}; resume its own method.")
    changed = differences(checkpoint["settings"], to_plain(settings))
    if checkpoint["processes"] != world_size():
        changed.append(f"{world_size()} processes (it has {checkpoint['processes']})")
    if changed and (not asked or checkpoint["progress"].get("step")):
        remedy = "it stopped inside an epoch; give these" if asked else "give these values, --resume, or another --log_name"
        raise UserError(f"{path.parent} holds a run with other settings: {', '.join(changed)}; {remedy}.")
    return checkpoint


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two plain settings, of what matters: `--lr 0.1 (it has 0.2)`."""
    found = []
    for group in new:
        old_group = old[group] if isinstance(old.get(group), dict) else {}
        for name in sorted(new[group].keys() | old_group.keys()):
            was, now = old_group.get(name), new[group].get(name)
            if was != now and name not in FREE.get(group, ()):
                found.append(f"--{name} {now} (it has {was})")
    return found


def restore(
    checkpoint: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, key: str | None, asked: bool
) -> Progress:
    """Weights, optimizer and progress of a checkpoint. Raises UserError where it does not fit, or has other features."""
    if checkpoint["store"] != key and not asked:
        raise UserError(
            f"the run was trained on the features {checkpoint['store']}, and these are {key}: data, Stage-1 checkpoint or a "
            "package changed since; put back what was there, or give another --log_name."
        )
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return Progress(**checkpoint["progress"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the checkpoint does not fit this model ({reason}); resume with the flags it was made with."
        ) from error


class Run:
    """The run folder as the main process writes it."""

    def __init__(self, settings: Settings[Any], who: Implementation, key: str | None, rows: Mapping[str, int]) -> None:
        self.folder, self.settings, self.who, self.key = settings.folder, settings, who, key
        self.metrics, self.epochs = self.folder / "metrics.jsonl", settings.optim.epochs
        described = {"implementation": asdict(who), "settings": to_plain(settings), "store": key, "rows": dict(rows)}
        write_atomically(self.folder / "config.json", json.dumps(described | provenance(), indent=1) + "\n")
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(settings.run.log_dir or self.folder))
        self.say(f"{who.experiment_id} v{who.version} -> {self.folder}")
        for line in notes_on_ignored_flags(settings):
            self.say(line)

    def say(self, line: str) -> None:
        print(f"[{self.who.tag}] {line}", flush=True)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """The checkpoint, and everything that follows from it."""
        content = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "progress": asdict(progress),
            "implementation": asdict(self.who),
            "settings": to_plain(self.settings),
            "processes": world_size(),
            "store": self.key,
        }
        save_checkpoint(self.folder / "checkpoint.pth", content)
        self.follow(progress)

    def follow(self, progress: Progress) -> None:
        """Bring the best checkpoints and metrics.jsonl to where checkpoint.pth is; what is there already stays as it is."""
        if progress.step == 0:
            for name in progress.better:
                link_as(self.folder / "checkpoint.pth", f"checkpoint-{name}.pth")
        write_atomically(self.metrics, "".join(json.dumps(metrics) + "\n" for metrics in progress.history))

    def record(self, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        """One more epoch: times.jsonl, TensorBoard, a line for the person who watches."""
        with (self.folder / "times.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": metrics["epoch"], **{k: round(v, 3) for k, v in seconds.items()}}) + "\n")
        for name, value in metrics.items():
            if name != "epoch":
                self.board.add_scalar(name.replace("_", "/", 1), value, metrics["epoch"])
        self.say(f"{epoch_line(metrics, self.epochs)} | {sum(seconds.values()):.1f} s")

    def close(self) -> None:
        self.board.close()


def epoch_line(metrics: Mapping[str, Any], epochs: int) -> str:
    """One line a person reads after each epoch."""
    parts = [f"epoch {metrics['epoch'] + 1}/{epochs}", f"loss {metrics['train_total_loss']:.3f}"]
    parts.append(f"val {metrics['val_total_loss']:.3f}")
    for name in metrics:
        if name.startswith("val_") and name.endswith("_chance1"):
            pair = name.removeprefix("val_").removesuffix("_chance1")
            one, five = metrics[f"val_{pair}_acc1"], metrics[f"val_{pair}_acc5"]
            parts.append(f"{pair.replace('_', '-')} {one:.1f}/{five:.1f} (chance {metrics[name]:.1f})")
    parts.append(f"reg {metrics['val_complementary_reg']:.2f}" if "val_complementary_reg" in metrics else "")
    return " | ".join(filter(None, parts))


def load_run(folder: Path, method_name: str | None = None) -> tuple[Settings[Any], Method, dict[str, Any]]:
    """The settings, the method and the config.json of a run folder.

    method_name: what `--method` would take; default: what the run remembers. Raises UserError for what is no run folder, for
    settings of another version, and for a method that is not the one the run was trained with.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder (no config.json); give <output_dir>/<log_name>.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        made_by, plain, _ = config["implementation"]["experiment_id"], config["settings"], config["store"]
        remembered = plain["run"].get("method")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not the configuration of a run ({type(error).__name__}: {error}).") from error
    method = _method_of(folder, method_name or remembered, made_by)
    groups = {"stage1": Stage1Config, "knobs": method.knobs, "data": DataConfig, "optim": OptimConfig, "run": RunConfig}
    try:
        return Settings(**{name: from_plain(cls, plain[name]) for name, cls in groups.items()}), method, config
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds settings that cannot be read ({type(error).__name__}: {error}).") from error


def _method_of(folder: Path, name: Any, made_by: Any) -> Method:
    if name is None:  # a run of an earlier version
        found = [m for m in METHODS.values() if m.implementation.experiment_id == made_by]
        if not found:
            known = ", ".join(m.implementation.experiment_id for m in METHODS.values())
            raise UserError(f"{folder} was made by {made_by}, which is not among the methods that ship ({known}).")
        return found[0]
    method = load_method(str(name), never_from=folder)
    if method.implementation.experiment_id != made_by:
        raise UserError(
            f"{folder} was made by {made_by}, and {name} is {method.implementation.experiment_id}; give its own --method."
        )
    return method
