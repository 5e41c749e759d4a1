"""The run folder: configuration, checkpoints and metrics, written atomically; and resuming from it.

checkpoint.pth also stores the metrics of all epochs. After a crash between two writes, the other files are written again
from it when the run resumes. The best checkpoints hold weights only; a run resumes from checkpoint.pth. Logs that are
appended to (times.jsonl, nonfinite.jsonl, TensorBoard events) are cut to the steps before the one the run begins at, so that
no step is in them twice.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tvl_align.config import from_plain, to_plain
from tvl_align.contract import MODALITIES, FeatureSpec, Implementation, Method
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features.identity import Identity
from tvl_align.features.inputs import DataConfig
from tvl_align.features.store import FeatureStore
from tvl_align.methods.registry import METHODS, load_method
from tvl_align.system.checkpoint import load_checkpoint, save_checkpoint
from tvl_align.system.console import UserError
from tvl_align.system.distributed import world_size
from tvl_align.system.files import write_atomically
from tvl_align.system.provenance import provenance
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings, notes_on_ignored_flags

MAX_SIZE = 2**20  # of features: their width and number of tokens
MAY_DIFFER_ON_RESUME = {  # options that do not change the results of a run
    "stage1": {  # places; the store knows their content, and the precision
        *("enable_flash_attention2", "encode_precision", "stage1_checkpoint", "clip_pretrain_data"),
        *("vision_encoder", "tactile_encoder", "text_encoder", "more_encoders"),
    },
    "data": {
        *("num_workers", "pin_mem", "multi_epochs_dataloader", "strict", "max_skipped"),
        *("feature_dir", "datasets_dir", "store", "pairs", "label_columns"),
    },
    "run": {
        *("output_dir", "log_name"),
        *("method", "slurm", "device", "resume", "start_epoch", "log_dir", "dist_eval", "find_unused_parameters", "compile"),
        *("cuda_graphs", "world_size", "local_rank", "dist_url"),
    },
}


@dataclass
class Progress:
    """Training state to resume from, in addition to weights and optimizer.

    epoch: index of the current epoch. step: optimizer steps done in it. sums, counted: sums of the loss scalars over these
    steps, and their number. skipped: steps skipped because of NaN or inf. best: best validation scores so far. better: names
    of the scores that improved in the last epoch. history: metrics of every finished epoch.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counted: int = 0
    skipped: int = 0
    best: dict[str, float] = field(default_factory=lambda: {"acc1": -1.0, "acc5": -1.0})
    better: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def finish_epoch(self, metrics: dict[str, Any], scores: Mapping[str, float]) -> None:
        """Store the metrics of an epoch, update the best scores, and start the next epoch."""
        self.better = [name for name in self.best if scores[name] > self.best[name]]
        self.best |= {name: scores[name] for name in self.better}
        self.history = [*self.history, metrics]
        self.epoch, self.step, self.sums, self.counted = self.epoch + 1, 0, {}, 0


def find_checkpoint(settings: Settings[Any], implementation: Implementation) -> dict[str, Any] | None:
    """The checkpoint to resume from: that of `--resume`, else checkpoint.pth of the run folder, else None.

    Raises UserError for a checkpoint of another method, and without `--resume` for one of other settings or another version.
    """
    requested, own = settings.run.resume, settings.folder / "checkpoint.pth"
    if not requested and not own.is_file():
        return None
    path = Path(requested) if requested not in ("", "auto") else own
    checkpoint = load_checkpoint(path)
    parts = ("implementation", "progress", "settings")
    if not all(isinstance(checkpoint.get(part), dict) for part in parts) or "store" not in checkpoint:
        raise UserError(f"{path} was not written by this version of tvl-align; start a new run with another --log_name.")
    if not {"optimizer", "processes"} <= checkpoint.keys():
        raise UserError(
            f"{path} has no optimizer state, as the best checkpoints of a run hold weights only; resume from the "
            "checkpoint.pth of that run."
        )
    made_by = checkpoint["implementation"].get("experiment_id")
    if made_by != implementation.experiment_id:
        raise UserError(
            f"{path} is of the method {made_by}, not {implementation.experiment_id}; give the --method it was trained with."
        )
    version = str(checkpoint["implementation"].get("version"))
    _check_version(path.parent, implementation, version)
    if version != implementation.version and not requested:
        raise UserError(
            f"{path.parent} was trained by version {version} of {made_by}, and {implementation.version} trains otherwise; "
            "give another --log_name, --resume, or use the package of that run."
        )
    changed = changed_options(checkpoint["settings"], to_plain(settings))
    if checkpoint["processes"] != world_size():
        changed.append(f"{world_size()} processes (it has {checkpoint['processes']})")
    if changed and (not requested or checkpoint["progress"].get("step")):
        remedy = "give these values, --resume, or another --log_name"
        if requested:
            remedy = "it stopped within an epoch, so give these values to finish the epoch first"
        raise UserError(f"{path.parent} contains a run with other settings: {', '.join(changed)}; {remedy}.")
    return checkpoint


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Options that differ between two plain settings and change results, as `--lr 0.1 (it has 0.2)`."""
    found = []
    for group in new:
        old_group = old[group] if isinstance(old.get(group), dict) else {}
        for name in sorted(new[group].keys() | old_group.keys()):
            was, now = old_group.get(name), new[group].get(name)
            since = name not in old_group and not now  # an option that the earlier version lacked, at its default
            if was != now and not since and name not in MAY_DIFFER_ON_RESUME.get(group, ()):
                found.append(f"--{name} {now} (it has {was})")
    return found


def recorded_identity(settings: Settings[Any]) -> Identity | None:
    """The identity of the features that the run in this folder was trained on.

    None with `--resume`, which may change them, and for a folder without a config.json.
    """
    path = settings.folder / "config.json"
    if settings.run.resume or not path.is_file():
        return None
    return _identity(json.loads(path.read_text(encoding="utf-8")))


def _identity(config: Mapping[str, Any]) -> Identity:
    return Identity(config["store"], config.get("features", {}))


def restore(
    checkpoint: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, key: str | None, explicit: bool
) -> Progress:
    """Load the weights and the optimizer state of a checkpoint, and return its progress.

    key: of the feature store; None without one. explicit: `--resume` was given, so the features may differ. Raises UserError
    if the checkpoint does not fit the model or was trained on other features.
    """
    if checkpoint["store"] != key and not explicit:
        raise UserError(
            f"the run was trained on the feature store {checkpoint['store']}, not {key}: the data, the Stage-1 checkpoint "
            "or a package has changed; restore it, or give another --log_name."
        )
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return Progress(**checkpoint["progress"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the checkpoint does not fit this model ({reason}); resume with the flags of its run.") from error


class Run:
    """Writer of a run folder, for the main process. Creating it writes config.json.

    features: their identity, of which config.json keeps the key and the ingredients. rows: number of rows of every split.
    specs: {modality: shapes of the features}, from which the model is built. progress: where the run begins; log entries of
    later steps, which are run again, are removed.
    """

    def __init__(
        self,
        settings: Settings[Any],
        implementation: Implementation,
        features: Identity,
        rows: Mapping[str, int],
        specs: Mapping[str, FeatureSpec],
        progress: Progress,
    ) -> None:
        self.folder, self.settings, self.implementation, self.key = settings.folder, settings, implementation, features.key
        self.metrics, self.epochs = self.folder / "metrics.jsonl", settings.optim.epochs
        config = {"implementation": asdict(implementation), "settings": to_plain(settings), "store": self.key}
        config |= {"features": dict(features.ingredients), "rows": dict(rows)}
        config |= {"specs": {name: asdict(spec) for name, spec in specs.items()}}
        write_atomically(self.folder / "config.json", json.dumps(config | provenance(), indent=1, allow_nan=False) + "\n")
        for name in ("times.jsonl", "nonfinite.jsonl"):
            remove_later_entries(self.folder / name, progress)
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(settings.run.log_dir or self.folder), purge_step=progress.epoch)
        self.log(f"{implementation.experiment_id} v{implementation.version} -> {self.folder}")
        for line in notes_on_ignored_flags(settings):
            self.log(line)

    def log(self, line: str) -> None:
        """Print a line to stdout, prefixed with the tag of the method."""
        print(f"[{self.implementation.tag}] {line}", flush=True)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write checkpoint.pth and the files derived from it."""
        state = {"progress": asdict(progress), "optimizer": optimizer.state_dict(), "processes": world_size()}
        save_checkpoint(self.folder / "checkpoint.pth", self._weights(model) | state)
        self.write_derived(model, progress)

    def _weights(self, model: nn.Module) -> dict[str, Any]:
        """The weights, and what says which run they are of."""
        made_by = {"implementation": asdict(self.implementation), "settings": to_plain(self.settings), "store": self.key}
        return {"model": model.state_dict(), **made_by}

    def write_derived(self, model: nn.Module, progress: Progress) -> None:
        """Write metrics.jsonl, and the best checkpoints if the last epoch improved a score. Safe to repeat.

        model, progress: as in checkpoint.pth. The best checkpoints have weights and epoch, and no optimizer state.
        """
        if progress.step == 0:
            for name in progress.better:
                best = self._weights(model) | {"progress": {"epoch": progress.epoch, "step": 0}}
                save_checkpoint(self.folder / f"checkpoint-{name}.pth", best)
        lines = (json.dumps(strict(metrics), allow_nan=False) + "\n" for metrics in progress.history)
        write_atomically(self.metrics, "".join(lines))

    def record(self, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        """Report a finished epoch: append to times.jsonl, write TensorBoard scalars, print two lines.

        seconds: wall-clock seconds of train and validate.
        """
        with (self.folder / "times.jsonl").open("a", encoding="utf-8") as file:
            times = {"epoch": metrics["epoch"]} | {k: round(v, 3) for k, v in seconds.items()}
            file.write(json.dumps(times, allow_nan=False) + "\n")
        for name, value in metrics.items():
            if name != "epoch":
                self.board.add_scalar(name.replace("_", "/", 1), value, metrics["epoch"])
        self.board.flush()
        for line in epoch_lines(metrics, self.epochs, sum(seconds.values())):
            self.log(line)

    def close(self) -> None:
        """Close the TensorBoard file."""
        self.board.close()


def remove_later_entries(path: Path, progress: Progress) -> None:
    """Remove the entries of steps and epochs that are not done yet from a JSON Lines file, and lines cut off by a crash."""

    def is_done(line: str) -> bool:
        try:
            entry = json.loads(line)
            return (entry["epoch"], entry.get("step", math.inf)) < (progress.epoch, progress.step)
        except (ValueError, TypeError, KeyError, AttributeError):  # a line that a crash has cut off or a hand has changed
            return False

    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if is_done(line)]
        if kept != lines:
            write_atomically(path, "".join(f"{line}\n" for line in kept))


def strict(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with None, null in JSON, for numbers that are not finite: JSON has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}


def epoch_lines(metrics: Mapping[str, Any], epochs: int, seconds: float) -> list[str]:
    """Two lines about an epoch: losses and seconds; validation Acc@1/5 of every pair, with the chance level of Acc@1.

    They fit 120 columns with three modalities and the tag of a method. If the chance level differs between pairs, the lowest
    and the highest are given.
    """
    losses = [f"loss {metrics['train_total_loss']:.3f}", f"val loss {metrics['val_total_loss']:.3f}"]
    if "val_complementary_reg" in metrics:
        losses.append(f"val complementary reg {metrics['val_complementary_reg']:.2f}")
    names = [name for name in metrics if name.startswith("val_") and name.endswith("_chance1")]
    pairs = [name.removeprefix("val_").removesuffix("_chance1") for name in names]
    accuracies = [
        f"{pair.replace('_', '-')} {metrics[f'val_{pair}_acc1']:.1f}/{metrics[f'val_{pair}_acc5']:.1f}" for pair in pairs
    ]
    levels = sorted(metrics[name] for name in names)
    chance = "-".join(dict.fromkeys(f"{level:.1f}" for level in (levels[0], levels[-1])))
    return [
        f"epoch {metrics['epoch'] + 1}/{epochs} | {', '.join(losses)} | {seconds:.1f} s",
        f"val Acc@1/5 %: {', '.join(accuracies)} (chance {chance})",
    ]


@dataclass(frozen=True)
class Places:
    """Where the inputs of a run are now."""

    datasets_dir: Path | None = None
    """New place of the data folder; default: where it was, relative to the run folder, or else as it was."""
    stage1_checkpoint: Path | None = None
    """New place of the Stage-1 checkpoint; default as for --datasets_dir."""
    store: Path | None = None
    """New place of a feature store that was given to train with --store; default as for --datasets_dir."""
    feature_dir: Path | None = None
    """New place of the folder of feature stores; default as for --datasets_dir."""
    pairs: Path | None = None
    """New place of the table that was given to train with --pairs; default as for --datasets_dir."""


def load_run(
    folder: Path, method_name: str | None = None, places: Places | None = None
) -> tuple[Settings[Any], Method, dict[str, Any]]:
    """Load a run folder -> its settings, its method, and the content of config.json.

    A run that was moved finds its data, Stage 1 and stores where they are now: at `places`, else at the same place relative
    to the run folder, else at the recorded place.

    method_name: a value of `--method`; default: that of the run. Raises UserError if the folder is not a run folder, if its
    settings or its method are of another version, or if the run was trained with another method.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder (no config.json); give <output_dir>/<log_name>.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not the config.json of a run ({type(error).__name__}: {error}); give <output_dir>/<log_name>."
        ) from error
    settings, method = read_config(config, path, method_name)
    return _relocated(settings, folder, places or Places()), method, config


def read_config(config: Any, path: Path, method_name: str | None = None) -> tuple[Settings[Any], Method]:
    """The settings and the method of the content of a config.json, with the places that are recorded in it.

    path: of the file, for messages; nothing in its folder is imported. method_name and errors as for `load_run`.
    """
    try:
        made_by, plain, _ = config["implementation"]["experiment_id"], config["settings"], config["store"]
        recorded = plain["run"].get("method")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not the config.json of a run ({type(error).__name__}: {error}); give <output_dir>/<log_name>."
        ) from error
    method = _method_of(path.parent, method_name or recorded, made_by)
    _check_version(path.parent, method.implementation, str(config["implementation"].get("version")))
    groups = {"stage1": Stage1Config, "knobs": method.knobs, "data": DataConfig, "optim": OptimConfig, "run": RunConfig}
    try:
        return Settings(**{name: from_plain(cls, plain[name]) for name, cls in groups.items()}), method
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} has invalid settings ({type(error).__name__}: {error}); use the version of tvl-align that wrote it."
        ) from error


def specs_of(settings: Settings[Any], config: Mapping[str, Any]) -> dict[str, FeatureSpec]:
    """{modality: shapes of the frozen features} of a run: those in its config.json, or, for one of an earlier version, those
    of its feature store. Raises UserError if they are malformed or the store is gone.
    """
    if "specs" in config:
        try:
            specs = {str(name): FeatureSpec(**spec) for name, spec in config["specs"].items()}
            sizes = [size for spec in specs.values() for size in asdict(spec).values()]
        except (TypeError, AttributeError):
            sizes = []
        if not sizes or not all(type(size) is int and 0 < size <= MAX_SIZE for size in sizes):
            raise UserError(
                f"the config.json of {settings.folder} has the shapes {str(config['specs'])[:100]!r}; give a folder whose "
                f"features have whole numbers from 1 to {MAX_SIZE}."
            )
        return specs
    folder, names = settings.data.store or settings.feature_dir / str(config["store"]), settings.data.active_modality_names
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"{settings.folder} was written by an earlier version and its feature store {folder} is gone; run its train "
            "command again, which records the shapes of the features."
        )
    store = FeatureStore(folder)
    return (store if settings.data.store is None or names == MODALITIES else store.only(names)).specs


def _relocated(settings: Settings[Any], folder: Path, places: Places) -> Settings[Any]:
    """The settings with the places of today; see `load_run`."""
    recorded, now = settings.folder, folder.resolve()

    def place(path: Path | None, given: Path | None, make: bool = False) -> Path | None:
        if given is not None or path is None:
            return given
        beside = Path(os.path.normpath(now / os.path.relpath(path, recorded)))
        return beside if beside.exists() or (make and not path.exists()) else path

    stage1, data = settings.stage1, settings.data
    return replace(
        settings,
        stage1=replace(stage1, stage1_checkpoint=place(stage1.stage1_checkpoint, places.stage1_checkpoint)),
        data=replace(
            data,
            datasets_dir=place(data.datasets_dir, places.datasets_dir) or data.datasets_dir,
            store=place(data.store, places.store),
            pairs=place(data.pairs, places.pairs),
            feature_dir=place(settings.feature_dir, places.feature_dir, make=True),
        ),
        run=replace(settings.run, output_dir=now.parent, log_name=now.name),
    )


def _method_of(folder: Path, name: Any, made_by: Any) -> Method:
    """The method of a run by name, or by its experiment id `made_by`. Python files in the run folder are not imported."""
    if name is None:  # written by an earlier version
        found = [m for m in METHODS.values() if m.implementation.experiment_id == made_by]
        if not found:
            known = ", ".join(m.implementation.experiment_id for m in METHODS.values())
            raise UserError(f"{folder} is a run of {made_by}, not of a built-in method ({known}); give its --method.")
        return found[0]
    method = load_method(str(name), never_from=folder)
    if method.implementation.experiment_id != made_by:
        raise UserError(
            f"{folder} is a run of {made_by}, but {name} is {method.implementation.experiment_id}; give its own --method."
        )
    return method


def _check_version(folder: Path, implementation: Implementation, recorded: str) -> None:
    """Refuse a run of another major version of its method: its weights may load and mean something else."""
    if recorded.partition(".")[0] != implementation.version.partition(".")[0]:
        raise UserError(
            f"{folder} is a run of version {recorded} of {implementation.experiment_id}, and this is "
            f"{implementation.version}; train again, or use the package of that run."
        )
