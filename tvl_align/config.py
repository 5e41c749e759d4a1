"""Every option of a training run: frozen dataclasses <-> flags <-> JSON.

The flags are made by tyro from the fields and the strings under them; an unknown flag is an error that names the nearest
one. A method adds its own knobs (see contract.Method); all groups share one flat list of flags.
"""

import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import tyro

from tvl_align.console import UserError
from tvl_align.contract import MODALITIES
from tvl_align.encoders.tvl import FeatureKind
from tvl_align.nested import NestedMode
from tvl_align.registers import BlockOptions

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Stage1Config:
    """The frozen encoders."""

    stage1_checkpoint: Path | None = None
    """TVL checkpoint (.pth) with the touch encoder; needed unless --store is given."""
    tactile_model: str = "vit_tiny_patch16_224"
    """Touch encoder of the checkpoint: vit_tiny_patch16_224, vit_small_patch16_224, vit_base_patch16_224 or resnet18."""
    common_latent_dim: int | None = None
    """Width of the common latent space where Stage 1 was trained with one; default: what the checkpoint says."""
    clip_vision_model: str | None = None
    """OpenCLIP model; default: what the checkpoint names, else ViT-L-14."""
    clip_pretrain_data: str | None = None
    """OpenCLIP weights, a tag or a local file; default: what the checkpoint names, else datacomp_xl_s13b_b90k."""
    features: FeatureKind = "tokens"
    """What registers attend to: token sequences, or the one pooled vector of each modality."""
    enable_flash_attention2: bool = False
    """Accepted; PyTorch's fused attention is always used."""


@dataclass(frozen=True)
class DataConfig:
    """The data and how they are augmented."""

    datasets_dir: Path = Path(".datasets")
    """Folder that holds ssvtp/ and hct/."""
    datasets: tuple[str, ...] = ("ssvtp", "hct")
    """Data sets to use."""
    active_modality_names: tuple[str, ...] = MODALITIES
    """Modalities to use: two or three of vision, tactile, text; of a --store: any of its own, by default all."""
    views: int = 4
    """Augmented views of every training row in the feature store; 0: no store, encode on the fly in every step."""
    store: Path | None = None
    """Train on this feature store as it is (`tvl-align features import`); encoders and data sets are not read."""
    feature_dir: Path | None = None
    """Folder of feature stores; default: <output_dir>/features."""
    importance_sampling: bool = False
    """Draw every data set equally often (with replacement), however few rows it has."""
    use_not_contact: bool = False
    """Add rows in which the sensor touches nothing (caption "background") to training."""
    percent_not_contact: float = 0.1
    """At most this fraction (0.1 = one in ten) of the training rows is added by --use_not_contact."""
    color_jitter: bool = False
    """Jitter the colour of background-subtracted touch images too (others are always jittered in augmented views)."""
    randomize_crop: bool = False
    """Move the photo's crop by up to 5% of its side in augmented views."""
    subtract_background: Literal["background"] | None = None
    """Subtract the idle touch image of each trajectory."""
    shared_geometry: bool = True
    """Draw flips and quarter turns once for photo and touch; --no_shared_geometry draws them apart, as TVL does."""
    augment_pictures: bool = True
    """Flip, turn and jitter the pictures of training views; --no_augment_pictures encodes them once, and only the
    sentences of views vary."""
    shuffle_text: bool = False
    """Shuffle the adjectives of training captions."""
    no_text_prompt: bool = False
    """Leave out "This image gives tactile feelings of" before the adjectives."""
    replace_synonyms: bool = False
    """Swap adjectives of training captions for synonyms (ssvtp/synonyms.json)."""
    keep_k_synonyms: int | None = None
    """Use only the first K synonyms of a word; default: all."""
    strict: bool = False
    """Stop at the first row or picture that cannot be used, instead of leaving it out and counting it."""
    max_skipped: float = 0.05
    """Stop where more than this share of the rows cannot be used."""
    num_workers: int = 10
    """Processes that decode pictures; never more than there are cores."""
    pin_mem: bool = True
    """Accepted; batches are pinned whenever the device is a GPU."""
    multi_epochs_dataloader: bool = False
    """Accepted; stored features need no workers that could be kept."""

    def __post_init__(self) -> None:
        for name in self.active_modality_names:
            if self.store is None and name not in MODALITIES:
                raise UserError(
                    f"modality {name!r} is not supported: --active_modality_names takes {', '.join(MODALITIES)}."
                )
        if len(set(self.active_modality_names)) < 2:
            raise UserError("registers align modalities: give --active_modality_names at least two of them.")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule."""

    batch_size: int = 64
    """Rows per step and process."""
    epochs: int = 100
    """Passes over the training rows."""
    drop_last: bool = True
    """Leave out the last, smaller batch of an epoch; --no_drop_last: train on it too."""
    accum_iter: int = 1
    """Batches of one step: its gradient is that of all their rows as one batch, in the memory of one of them."""
    weight_decay: float = 0.05
    """Decoupled weight decay of AdamW; not on norms, biases and registers."""
    lr: float | None = None
    """Peak learning rate; default: blr x total batch / 256."""
    blr: float = 1e-3
    """Learning rate per 256 rows of total batch."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    skip_nonfinite: int = 0
    """Leave out at most so many steps whose loss or gradients are not finite, and say each; then stop."""
    warmup_epochs: float = 10
    """Epochs of linear warm-up, counted in steps."""


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
    dist_eval: bool = False
    """Accepted; validation is always shared by all processes and scored over the whole gallery."""
    compile: bool = False
    """Fuse the model's operations with torch.compile: the same numbers, after a minute or more of compiling."""
    find_unused_parameters: bool = False
    """Let DistributedDataParallel look for parameters without gradients; needed only where a pair's loss is disabled."""
    world_size: int = 1
    """Accepted; torchrun sets the number of processes."""
    local_rank: int = -1
    """Accepted; torchrun sets the rank."""
    dist_url: str = "env://"
    """Accepted; torchrun sets the address."""

    @property
    def own_seed(self) -> int:
        """The seed of what the run draws itself."""
        return self.seed if self.draw_seed is None else self.draw_seed


@dataclass(frozen=True)
class RegisterConfig:
    """The registers and their loss: the knobs every method has."""

    num_register_tokens: int = 4
    """Registers in all."""
    num_overlapping_tokens: int = 3
    """The first so many registers are aligned across modalities; the rest is complementary."""
    register_token_dim: int = 768
    """Width of a register."""
    num_cross_attn_layers: int = 2
    """Blocks through which registers read the frozen tokens."""
    num_heads: int = 8
    """Attention heads; must divide the width."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs, in register widths."""
    drop_rate: float = 0.0
    """Dropout probability of projections and MLPs."""
    attn_drop_rate: float = 0.0
    """Dropout probability of attention weights."""
    drop_path_rate: float = 0.0
    """Stochastic-depth probability of every residual branch."""
    nested_dropout_rate: float = 0.5
    """Drop probability of the last register; it rises linearly from 0 for the first."""
    nested_dropout_mode: NestedMode = "nested"
    """nested: what is kept is always a prefix; independent: every register is drawn alone."""
    complementary_reg_weight: float = 0.01
    """Weight of the L2 norm and diversity penalty on complementary tokens."""
    preservation_weight: float = 0.0
    """Weight of rebuilding the frozen tokens from all registers; 0: the documented formula exactly."""
    disable_vision_text_loss: bool = False
    """Leave the pair vision-text out of the loss."""
    disable_tactile_text_loss: bool = False
    """Leave the pair tactile-text out of the loss."""

    @property
    def block(self) -> BlockOptions:
        """The shape of a register block."""
        rates = self.drop_rate, self.attn_drop_rate, self.drop_path_rate
        return BlockOptions(self.register_token_dim, self.num_heads, self.mlp_ratio, *rates)


@dataclass(frozen=True)
class Settings(Generic[K]):
    """All options of one training run; `knobs` are those of the method."""

    stage1: tyro.conf.OmitArgPrefixes[Stage1Config]
    knobs: tyro.conf.OmitArgPrefixes[K]
    data: tyro.conf.OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    optim: tyro.conf.OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
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


NOTES = {
    "enable_flash_attention2": "PyTorch's fused attention is used anyway",
    "multi_epochs_dataloader": "stored features are read without workers, so there are none to keep between epochs",
    "dist_eval": "validation is always shared by all processes",
    "world_size": "torchrun sets the number of processes",
    "local_rank": "torchrun sets the rank",
    "dist_url": "torchrun sets the address",
}


def parse(cls: type[T], argv: Sequence[str] | None = None, prog: str | None = None) -> T:
    """Flags -> dataclass. Unknown flags exit with code 2 and the nearest known one; `--resume` alone means `auto`."""
    given = list(sys.argv[1:] if argv is None else argv)
    for i, flag in enumerate(given):
        if flag == "--resume" and (i + 1 == len(given) or given[i + 1].startswith("--")):
            given[i] = "--resume=auto"
    return tyro.cli(cls, args=given, prog=prog, use_underscores=True)


def notes(settings: Settings[Any]) -> list[str]:
    """One line for every flag that was given though today's PyTorch makes it unnecessary."""
    lines = []
    for group in (settings.stage1, settings.data, settings.run):
        for option in fields(group):
            if option.name in NOTES and getattr(group, option.name) != option.default:
                lines.append(f"--{option.name} is not needed: {NOTES[option.name]}")
    return lines


def to_plain(value: Any) -> Any:
    """Dataclasses -> what JSON holds; paths become absolute, so that a run can be read from any folder."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: to_plain(v) for name, v in ((f.name, getattr(value, f.name)) for f in fields(value))}
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def from_plain(cls: type[T], plain: Mapping[str, Any]) -> T:
    """What `to_plain` wrote -> the dataclass; an unknown key is an error."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    unknown = sorted(plain.keys() - known)
    if unknown:
        raise UserError(f"unknown option {unknown[0]!r} for {cls.__name__}; was this run made by another version?")
    return cls(**{name: _restore(hints[name], value) for name, value in plain.items()})


def _restore(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    options = typing.get_args(hint)
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and (hint is Path or Path in options):
        return Path(value)
    return value
