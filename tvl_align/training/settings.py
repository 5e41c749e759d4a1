"""Settings: all options of one training run."""

from dataclasses import dataclass, field, fields
from pathlib import Path, PurePath
from typing import Annotated, Any, Generic, TypeVar

import torch
import tyro

from tvl_align.config import Ignored, ignored_flags
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features.identity import Identity
from tvl_align.features.inputs import DataConfig, Inputs, load_inputs
from tvl_align.system.bounds import at_least
from tvl_align.system.console import UserError
from tvl_align.training.optimisation import OptimConfig


@dataclass(frozen=True)
class RunConfig:
    """Output folder, device, seeds and launch of a run."""

    output_dir: Path = Path("./output_dir")
    """Parent folder of the run folders."""
    log_name: str = "stage2"
    """Name of the run; its folder is <output_dir>/<log_name>."""
    log_dir: Path | None = None
    """Folder for TensorBoard events; default: the run folder."""
    device: str | None = None
    """cuda or cpu; default: cuda if available, else cpu."""
    seed: int = 0
    """Seed of the train/val split and of the augmented views; also the default of --draw_seed."""
    draw_seed: int | None = None
    """Seed of batch order, view sampling, dropout and initial weights; default: --seed. It does not change the features."""
    resume: str = ""
    """Resume with changed options from a checkpoint: a path, or no value for that of the run folder."""
    start_epoch: int = 0
    """Index of the first epoch; a checkpoint overrides it."""
    dist_eval: tyro.conf.Suppress[Annotated[bool, Ignored("validation always runs on all processes")]] = False
    compile: bool = False
    """Compile the model with torch.compile, which takes a minute or more at the start."""
    cuda_graphs: bool = True
    """On one GPU, record the training step and replay it (CUDA graphs), if the method allows it."""
    bf16_gradients: bool = False
    """Several processes exchange their gradients in bf16: half the bytes, rounded to 3 digits."""
    find_unused_parameters: bool = False
    """Option of DistributedDataParallel; needed only if the loss of a pair is disabled."""
    world_size: tyro.conf.Suppress[Annotated[int, Ignored("torchrun sets the number of processes")]] = 1
    local_rank: tyro.conf.Suppress[Annotated[int, Ignored("torchrun sets the rank")]] = -1
    dist_url: tyro.conf.Suppress[Annotated[str, Ignored("torchrun sets the address")]] = "env://"
    method: str = "base"
    """Method: base, cursor, flextok, matryoshka, disentangled, closed, mlp, or your own as package.module:NAME."""
    slurm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Submit a Slurm job: key=value, repeated for each option of submitit (partition=gpu, nodes=2, ...)."""

    def __post_init__(self) -> None:
        at_least(0, self, "start_epoch")
        name = PurePath(self.log_name)
        if not name.parts or name.is_absolute() or ".." in name.parts or "\0" in self.log_name:
            raise UserError(f"--log_name {self.log_name!r} is no folder inside --output_dir; give a name without ..")

    @property
    def own_seed(self) -> int:
        """Seed of batch order, view sampling, dropout and initial weights."""
        return self.seed if self.draw_seed is None else self.draw_seed


K = TypeVar("K")


@dataclass(frozen=True)
class Settings(Generic[K]):
    """All options of one training run; `knobs` are the options of the method."""

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
        if self.run.start_epoch >= self.optim.epochs:
            raise UserError(
                f"--start_epoch {self.run.start_epoch} leaves nothing of --epochs {self.optim.epochs}; give a lower one."
            )
        own = all(self.stage1.encoder_of(m) for m in self.data.active_modality_names)
        if self.stage1.stage1_checkpoint is None and self.data.store is None and not own:
            raise UserError(
                "no features to train on; give --stage1_checkpoint FILE, an encoder of your own for each modality "
                "(--vision_encoder ..., --more_encoders), or --store FOLDER."
            )

    @property
    def folder(self) -> Path:
        """Run folder."""
        return self.run.output_dir / self.run.log_name

    @property
    def feature_dir(self) -> Path:
        """Folder of the feature stores."""
        return self.data.feature_dir or self.run.output_dir / "features"

    def open_inputs(self, device: torch.device, expected: Identity | None = None) -> Inputs:
        """Open the features for training and validation; see tvl_align.features.inputs.load_inputs."""
        return load_inputs(self.stage1, self.data, self.run.seed, self.feature_dir, device, expected, self.folder)


def notes_on_ignored_flags(settings: Settings[Any]) -> list[str]:
    """One line for every given flag that has no effect."""
    lines = []
    for group in (settings.stage1, settings.knobs, settings.data, settings.optim, settings.run):
        for name, reason in ignored_flags(type(group)).items():
            default = next(f.default for f in fields(group) if f.name == name)
            if getattr(group, name) != default:
                lines.append(f"--{name} has no effect: {reason}")
    return lines
