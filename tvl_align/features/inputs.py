"""Data options -> what a run trains on: the feature sources of every split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from tvl_align.config import Ignored
from tvl_align.contract import MODALITIES, FeatureSpec
from tvl_align.data.samples import Samples, TextOptions, find_synonyms, make_samples
from tvl_align.data.text import PROMPT
from tvl_align.data.transforms import ImageOptions
from tvl_align.data.tvl import Tolerance, read_tvl
from tvl_align.encoders.tvl import Stage1, Stage1Config, load_stage1
from tvl_align.features.encode import open_or_encode
from tvl_align.features.live import LiveSplit
from tvl_align.features.store import FeatureSource, FeatureStore
from tvl_align.system.console import UserError


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
    """Flip, turn and jitter the images of training views; --no_augment_pictures encodes them once, and only the
    sentences of views vary."""
    shuffle_text: bool = False
    """Shuffle the adjectives of training captions."""
    no_text_prompt: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave out "This image gives tactile feelings of" before the adjectives."""
    replace_synonyms: bool = False
    """Swap adjectives of training captions for synonyms (ssvtp/synonyms.json)."""
    keep_k_synonyms: int | None = None
    """Use only the first K synonyms of a word; default: all."""
    strict: bool = False
    """Stop at the first row or image that cannot be used, instead of leaving it out and counting it."""
    max_skipped: float = 0.05
    """Stop where more than this share of the rows cannot be used."""
    num_workers: int = 10
    """Processes that decode images; never more than there are cores."""
    pin_mem: tyro.conf.Suppress[Annotated[bool, Ignored("batches are pinned whenever the device is a GPU")]] = True
    multi_epochs_dataloader: tyro.conf.Suppress[Annotated[bool, Ignored("stored features need no workers")]] = False

    def __post_init__(self) -> None:
        for name in self.active_modality_names:
            if self.store is None and name not in MODALITIES:
                raise UserError(
                    f"modality {name!r} is not supported: --active_modality_names takes {', '.join(MODALITIES)}."
                )
        if len(set(self.active_modality_names)) < 2:
            raise UserError("registers align modalities: give --active_modality_names at least two of them.")


@dataclass(frozen=True)
class Inputs:
    """What a run trains on: feature sources by split, their shapes, the key of the store (None: on the fly), the rows."""

    splits: dict[str, FeatureSource]
    specs: dict[str, FeatureSpec]
    key: str | None
    samples: dict[str, Samples]


def load_inputs(
    frozen: Stage1Config,
    data: DataConfig,
    seed: int,
    feature_dir: Path,
    device: torch.device,
    expected: str | None = None,
) -> Inputs:
    """Read the data, load the encoders, open the feature store under `feature_dir` (encoded first where it is missing).

    seed: of the split and of augmented views. expected: the key the store must have. Raises UserError where data or
    Stage-1 checkpoint now give another one.
    """
    if data.store is not None:
        return _imported(data, data.store, expected)
    stage1, samples = load_samples(frozen, data, seed, device)
    tolerance = Tolerance(data.strict, data.max_skipped)
    if data.views == 0:
        splits = {n: LiveSplit(stage1, s, data.num_workers, n == "train", tolerance) for n, s in samples.items() if len(s)}
        return Inputs(dict(splits), stage1.specs, None, samples)
    store = open_or_encode(feature_dir, stage1, samples, data.views, data.num_workers, expected, tolerance)
    return Inputs(dict(store.splits), store.specs, store.key, samples)


def _imported(data: DataConfig, folder: Path, expected: str | None) -> Inputs:
    """A store of the user's own features."""
    store, names = FeatureStore(folder), data.active_modality_names
    if expected is not None and store.key != expected:
        raise UserError(f"{store.folder} now holds the store {store.key}, not the {expected} of this run; put that back.")
    store = store if names == MODALITIES else store.only(names)
    return Inputs(dict(store.splits), store.specs, store.key, {})


def load_samples(
    frozen: Stage1Config, data: DataConfig, seed: int, device: torch.device
) -> tuple[Stage1, dict[str, Samples]]:
    """The frozen encoders on the device, and the rows of every split with the transforms these encoders need."""
    if frozen.stage1_checkpoint is None:
        raise UserError("encoding needs --stage1_checkpoint FILE.")
    tolerance = Tolerance(data.strict, data.max_skipped)
    idle = data.use_not_contact, data.percent_not_contact
    rows = read_tvl(data.datasets_dir, data.datasets, seed, *idle, tolerance)
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
    return stage1, make_samples(rows, images, text, seed)
