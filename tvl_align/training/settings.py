"""Settings: all options of one training run, and its folder."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import torch
import tyro

from tvl_align.config import Ignored, ignored_flags
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features.inputs import DataConfig, Inputs, load_inputs
from tvl_align.system.console import UserError
from tvl_align.training.optimisation import OptimConfig


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it is launched."""

    output_dir: Path = Path("./output_dir")
    """Folder of all runs."""
    log_name: str = "stage2"
    """Name of this run: its folder is <output_dir>/<log_name>."""
    log_dir: Path | None = None
    """Folder for TensorBoard; default: the run folder."""
    device: str | None = None
    """cuda or cpu; default: cuda where there is one, else cpu."""
    seed: int = 0
    """Seed of the split and of the stored views, and of what the run draws itself unless --draw_seed says otherwise."""
    draw_seed: int | None = None
    """Seed of order, view choice, dropout and initial weights; default: --seed. Runs that differ in it share a store."""
    resume: str = ""
    """Go on with other settings from a checkpoint: a path, or no value for the run's own. The same command needs none."""
    start_epoch: int = 0
    """First epoch; --resume sets it."""
    dist_eval: tyro.conf.Suppress[Annotated[bool, Ignored("validation is always shared by all processes")]] = False
    compile: bool = False
    """Fuse the model's operations with torch.compile: the same numbers, after a minute or more of compiling."""
    find_unused_parameters: bool = False
    """Let DistributedDataParallel look for parameters without gradients; needed only where a pair's loss is disabled."""
    world_size: tyro.conf.Suppress[Annotated[int, Ignored("torchrun sets the number of processes")]] = 1
    local_rank: tyro.conf.Suppress[Annotated[int, Ignored("torchrun sets the rank")]] = -1
    dist_url: tyro.conf.Suppress[Annotated[str, Ignored("torchrun sets the address")]] = "env://"
    method: str = "base"
    """Approach: base, cursor, flextok, matryoshka, disentangled, or one of your own as package.module:NAME."""
    slurm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Train as a Slurm job: key=value, given once for each option of submitit (partition=gpu, nodes=2, ...)."""

    @property
    def own_seed(self) -> int:
        """The seed of what the run draws itself."""
        return self.seed if self.draw_seed is None else self.draw_seed


K = TypeVar("K")


@dataclass(frozen=True)
class Settings(Generic[K]):
    """All options of one training run; `knobs` are those of the method."""

    stage1: Annotated[tyro.conf.OmitArgPrefixes[Stage1Config], tyro.conf.arg(name="encoders")]
    knobs: Annotated[tyro.conf.OmitArgPrefixes[K], tyro.conf.arg(name="registers_and_losses")]
    data: Annotated[tyro.conf.OmitArgPrefixes[DataConfig], tyro.conf.arg(name="data_and_features")] = field(
        default_factory=DataConfig
    )
    optim: Annotated[tyro.conf.OmitArgPrefixes[OptimConfig], tyro.conf.arg(name="optimisation")] = field(
        default_factory=OptimConfig
    )
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.stage1.stage1_checkpoint is None and self.data.store is None:
            raise UserError("give --stage1_checkpoint FILE, or --store FOLDER with features of your own.")

    @property
    def folder(self) -> Path:
        return self.run.output_dir / self.run.log_name

    @property
    def feature_dir(self) -> Path:
        return self.data.feature_dir or self.run.output_dir / "features"

    def open_inputs(self, device: torch.device, expected: str | None = None) -> Inputs:
        """What this run trains on; see tvl_align.features.inputs.load_inputs."""
        return load_inputs(self.stage1, self.data, self.run.seed, self.feature_dir, device, expected)


def notes_on_ignored_flags(settings: Settings[Any]) -> list[str]:
    """One line for every flag that was given though it has no effect."""
    lines = []
    for group in (settings.stage1, settings.knobs, settings.data, settings.optim, settings.run):
        for name, reason in ignored_flags(type(group)).items():
            default = next(f.default for f in fields(group) if f.name == name)
            if getattr(group, name) != default:
                lines.append(f"--{name} is not needed: {reason}")
    return lines
