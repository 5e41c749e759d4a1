"""Options of the data -> the inputs of a training run: a feature source for every split."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from tvl_align.config import Ignored, from_plain
from tvl_align.contract import MODALITIES, FeatureSpec
from tvl_align.data.further import further_inputs
from tvl_align.data.image_options import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PHOTO_MEAN,
    PHOTO_STD,
    TOUCH_MEAN,
    TOUCH_STD,
    Colours,
    Crop,
    ImageOptions,
    Turn,
)
from tvl_align.data.pairs import Columns, read_pairs
from tvl_align.data.pictures import inspect_images
from tvl_align.data.samples import Samples, TextOptions, find_synonyms, make_samples
from tvl_align.data.text import PROMPT, read_synonyms
from tvl_align.data.transforms import measure_colours
from tvl_align.data.tvl import Tolerance, TVLData, read_tvl
from tvl_align.encoders.names import check_modalities, one_each
from tvl_align.encoders.own import load_encoders
from tvl_align.encoders.tvl import Stage1, Stage1Config
from tvl_align.features.encode import changed_features, open_or_encode
from tvl_align.features.identity import Identity, identify, precision_of
from tvl_align.features.live import LiveSplit
from tvl_align.features.store import FeatureSource, FeatureStore
from tvl_align.features.subset import ShuffledPairs, set_probe_rows_aside
from tvl_align.system.bounds import at_least, between
from tvl_align.system.console import UserError

log = logging.getLogger(__name__)
COLUMNS = (
    *("photo_column", "touch_column", "caption_column", "sentence_column", "group_column", "split_column"),
    *("label_columns", "more_columns", "earlier_touch_column", "touch_background_column"),
)  # of --pairs
COLUMN_FLAGS = {"vision": "--photo_column", "tactile": "--touch_column", "text": "--caption_column or --sentence_column"}
MEASURED = "measured"
NORMS: dict[str, Colours] = {
    "tvl": (TOUCH_MEAN, TOUCH_STD),
    "clip": (PHOTO_MEAN, PHOTO_STD),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class DataConfig:
    """Data sets and augmentation."""

    datasets_dir: Path = Path(".datasets")
    """Folder that contains ssvtp/ and hct/."""
    datasets: tuple[str, ...] = ("ssvtp", "hct")
    """Data sets to use."""
    pairs: Path | None = None
    """Your own data instead: a CSV file with one row per sample. --datasets_dir, default the folder of this file, has its
    files. At least two of photo, touch, text and further modalities; columns are found by their names, or named by the next
    flags."""
    photo_column: str | None = None
    """Column of photos, paths below --datasets_dir; default: photo, vision, image ..."""
    touch_column: str | None = None
    """Column of touch images; default: touch or tactile."""
    caption_column: str | None = None
    """Column of adjectives, separated by commas; default: caption or adjectives."""
    sentence_column: str | None = None
    """Column of sentences that are used as they are, without prompt or shuffling; default: sentence, text or description."""
    group_column: str | None = None
    """Column of groups (object, trajectory) that are never split apart; default: group, else every row is its own."""
    split_column: str | None = None
    """Column with train, val or test; default: split, else 10% of the rows are drawn for test, and then 10% for val."""
    label_columns: tuple[str, ...] | None = None
    """Columns of labels that evaluate probes; default: none."""
    more_columns: tuple[str, ...] | None = None
    """Columns of the files of further modalities, of any names: depth=depth_path audio=wav. Each needs an encoder, see
    --more_encoders."""
    earlier_touch_column: str | None = None
    """Column of touch images of the same contact, some frames before, for encoders that take two (Sparsh: 5 frames before);
    default: none, the touch image stands for both."""
    touch_background_column: str | None = None
    """Column of touch images without contact, for --subtract_background; default: none, and the file digit_background.png in
    a folder above a touch image is its background."""
    photo_crop: Crop | None = None
    """Part of a photo: tvl (under the sensor), centre (largest square) or none (all); default: tvl, with --pairs none."""
    touch_crop: Crop | None = None
    """Part of a touch image: tvl (padded to a square), centre or none; default: tvl, with --pairs none."""
    touch_turn: Turn | None = None
    """Degrees by which touch images are turned counterclockwise; default: 90, with --pairs 0."""
    photo_norm: Literal["clip", "imagenet", "half", "measured"] | None = None
    """Colours for the normalisation of photos: clip, imagenet, half (0.5), or measured on training rows; default: clip."""
    touch_norm: Literal["tvl", "clip", "imagenet", "half", "measured"] | None = None
    """Colours for the normalisation of touch images; default: tvl, with --pairs measured."""
    active_modality_names: tuple[str, ...] = MODALITIES
    """Modalities to use: two or more of vision, tactile, text and --more_columns; with --store: two or more of the store's;
    default: all."""
    views: int = 4
    """Views per training row in the feature store, beside the plain one; where pictures are augmented, half of a batch is
    plain. 0: no store, encode every batch on the fly."""
    store: Path | None = None
    """Train on an existing feature store (`tvl-align features import`), without encoders and data sets."""
    feature_dir: Path | None = None
    """Folder of feature stores; default: <output_dir>/features."""
    importance_sampling: bool = False
    """Sample all data sets equally often (with replacement), whatever their size."""
    use_not_contact: bool = False
    """Add training rows in which the sensor touches nothing (caption "background")."""
    percent_not_contact: float = 0.1
    """--use_not_contact adds at most this fraction of the training rows (0.1 = 10%)."""
    color_jitter: bool = False
    """Also jitter the colours of background-subtracted touch images; other touch images are always jittered."""
    randomize_crop: bool = False
    """Shift the photo's crop by up to 5% of its side in augmented views."""
    subtract_background: Literal["background", "none"] | None = None
    """background: subtract the touch image without contact, of the trajectory or of --touch_background_column, from every
    touch image; none: do not; default: none. Sparsh needs to be told."""
    shared_geometry: bool = True
    """Same flips and rotation for photo and touch image; --no_shared_geometry samples them independently, as TVL does."""
    augment_pictures: bool = True
    """Flip, rotate and jitter the images of augmented views; with --no_augment_pictures views differ in their sentences
    only, and images are encoded once."""
    shuffle_text: bool = False
    """Shuffle the adjectives of training captions."""
    no_text_prompt: tyro.conf.FlagCreatePairsOff[bool] = False
    """Omit the prompt "This image gives tactile feelings of" before the adjectives."""
    replace_synonyms: bool = False
    """Randomly replace adjectives of training captions by synonyms (ssvtp/synonyms.json)."""
    keep_k_synonyms: int | None = None
    """Use only the first K synonyms of a word; default: all."""
    probe_rows: int = 3000
    """Training rows set aside for probes in evaluation (whole groups, at most a quarter); 0: probes use validation rows."""
    shuffle_pairs: tyro.conf.FlagCreatePairsOff[bool] = False
    """Control: train on random pairs. Every modality but the first is taken from another row."""
    strict: bool = False
    """Stop at the first row or image that cannot be used, instead of skipping it."""
    max_skipped: float = 0.05
    """Stop if more than this fraction of the rows cannot be used (0.05 = 5%)."""
    num_workers: int = 10
    """Processes that decode images, at most one per CPU core."""
    pin_mem: tyro.conf.Suppress[Annotated[bool, Ignored("batches are pinned whenever the device is a GPU")]] = True
    multi_epochs_dataloader: tyro.conf.Suppress[Annotated[bool, Ignored("stored features need no workers")]] = False

    def __post_init__(self) -> None:
        self._check_pairs()
        self.image_options(ImageOptions.photo_size, ImageOptions.touch_size)  # refuses what does not go together
        at_least(0, self, "views", "keep_k_synonyms", "probe_rows", "num_workers")
        between(0, 1, self, "percent_not_contact", "max_skipped")
        more = one_each("more_columns", self.more_columns)
        if self.active_modality_names == MODALITIES:
            object.__setattr__(self, "active_modality_names", (*MODALITIES, *more))
        for name in self.active_modality_names:
            if self.store is None and name not in (*MODALITIES, *more):
                known = ", ".join((*MODALITIES, *more))
                raise UserError(
                    f"modality {name!r} is not supported: --active_modality_names takes {known}, and modalities whose files "
                    f"a table lists, --more_columns {name}=COLUMN."
                )
        if len(set(self.active_modality_names)) < 2:
            raise UserError("registers align modalities: give --active_modality_names at least two of them.")
        if self.store is None:
            check_modalities(self.active_modality_names)

    def _check_pairs(self) -> None:
        if self.pairs is None:
            given = next((n for n in COLUMNS if getattr(self, n) is not None), None)
            if given is not None:
                raise UserError(f"--{given} is of a table of your own; give it with --pairs FILE, or leave out --{given}.")
            return
        for name in ("store", "use_not_contact", "datasets"):
            if getattr(self, name) != getattr(DataConfig, name):
                raise UserError(f"--{name} has no meaning with --pairs; leave out one of them.")
        if self.datasets_dir == DataConfig.datasets_dir:
            object.__setattr__(self, "datasets_dir", self.pairs.parent)

    @property
    def columns(self) -> Columns:
        """Columns of the table of pairs."""
        given = {name.removesuffix("_column"): getattr(self, name) for name in COLUMNS if name.endswith("_column")}
        return Columns(**given, labels=self.label_columns or (), more=one_each("more_columns", self.more_columns))

    @property
    def norms(self) -> dict[str, str]:
        """{modality: what its pictures are normalised by, a key of NORMS or "measured"}."""
        touch = "tvl" if self.pairs is None else MEASURED
        return {"vision": self.photo_norm or "clip", "tactile": self.touch_norm or touch}

    def image_options(self, photo_size: int, touch_size: int, touch_frames: int = 1) -> ImageOptions:
        """The options of the image transforms. Colours that are to be measured have their default."""
        own = self.pairs is not None
        options = ImageOptions(
            photo_size,
            touch_size,
            self.randomize_crop,
            self.color_jitter,
            self.subtract_background == "background",
            self.shared_geometry,
            self.augment_pictures,
            photo_crop=self.photo_crop or ("none" if own else "tvl"),
            touch_crop=self.touch_crop or ("none" if own else "tvl"),
            touch_turn=self.touch_turn if self.touch_turn is not None else (0 if own else 90),
            touch_frames=touch_frames,
            earlier_touch=touch_frames > 1 and self.earlier_touch_column is not None,
        )
        for modality, norm in self.norms.items():
            options = options.normalised_by(modality, NORMS.get(norm, options.colours(modality)))
        return options


@dataclass(frozen=True)
class Inputs:
    """The inputs of a training run.

    splits: {split: feature source}, with the split "probe" of training rows that were set aside. specs: {modality: shapes}.
    identity: of the feature store, or of the features that are computed on the fly. samples: {split: images and sentences},
    empty for a store that is given by --store or used alone.
    """

    splits: dict[str, FeatureSource]
    specs: dict[str, FeatureSpec]
    identity: Identity
    samples: dict[str, Samples]


def load_inputs(
    frozen: Stage1Config,
    data: DataConfig,
    seed: int,
    feature_dir: Path,
    device: torch.device,
    expected: Identity | None = None,
    never_from: Path | None = None,
) -> Inputs:
    """Open the feature store of these options under `feature_dir`, and encode it first if it does not exist.

    With `data.store` that store is opened. With `data.views` 0 there is no store and features are computed on the fly. seed:
    seed of the split and of the augmented views. expected: the identity that the features must have. If its store exists and
    the data folder or the Stage-1 checkpoint does not, the store is used alone. Raises UserError if the data or the Stage-1
    checkpoint give another identity, before anything is encoded. never_from: see `load_samples`.
    """
    inputs = _open(frozen, data, seed, feature_dir, device, expected, never_from)
    splits = dict(inputs.splits)
    if "train" in splits and data.probe_rows and "probe" not in splits:
        splits["train"], splits["probe"] = set_probe_rows_aside(splits["train"], data.probe_rows, seed)
    if "train" in splits and data.shuffle_pairs:
        splits["train"] = ShuffledPairs(splits["train"], list(inputs.specs), seed)
    return replace(inputs, splits={name: split for name, split in splits.items() if len(split)})


def _open(
    frozen: Stage1Config,
    data: DataConfig,
    seed: int,
    feature_dir: Path,
    device: torch.device,
    expected: Identity | None,
    never_from: Path | None,
) -> Inputs:
    if data.store is not None:
        return _open_given_store(data, data.store, expected)
    places = frozen.stage1_checkpoint, data.datasets_dir, data.pairs
    missing = [str(p) for p in places if p is not None and not p.exists()]
    if expected is not None and missing and (feature_dir / str(expected.key) / "manifest.json").is_file():
        log.warning("there is no %s; using the stored features of this run alone", " and no ".join(missing))
        return _of_store(FeatureStore(feature_dir / str(expected.key)), {})
    stage1, samples = load_samples(frozen, data, seed, device, expected, never_from)
    tolerance = Tolerance(data.strict, data.max_skipped)
    if data.views == 0:
        splits = {n: LiveSplit(stage1, s, data.num_workers, n == "train", tolerance) for n, s in samples.items() if len(s)}
        identity = identify(stage1, samples, 0, feature_dir)
        if expected is not None and expected.key not in (None, identity.key):
            raise changed_features(expected, identity)
        return Inputs(dict(splits), stage1.specs, identity, samples)
    return _of_store(
        open_or_encode(feature_dir, stage1, samples, data.views, data.num_workers, expected, tolerance), samples
    )


def _open_given_store(data: DataConfig, folder: Path, expected: Identity | None) -> Inputs:
    store, names = FeatureStore(folder), data.active_modality_names
    if expected is not None and store.key != expected.key:
        raise UserError(
            f"{store.folder} contains the store {store.key}, not {expected.key} that this run was trained on; give that "
            "one with --store."
        )
    return _of_store(store if names == MODALITIES else store.only(names), {})


def _of_store(store: FeatureStore, samples: dict[str, Samples]) -> Inputs:
    return Inputs(dict(store.splits), store.specs, Identity(store.key, store.manifest["ingredients"]), samples)


def load_samples(
    frozen: Stage1Config,
    data: DataConfig,
    seed: int,
    device: torch.device,
    expected: Identity | None = None,
    never_from: Path | None = None,
) -> tuple[Stage1, dict[str, Samples]]:
    """The frozen encoders on `device`, and the samples of every split at the input sizes of these encoders.

    expected: the identity of the features of a run; colours that it measured are not measured again, and "auto" is the
    precision of its encoders. never_from: a folder that no encoder is imported from, such as a run folder.
    """
    if expected is not None and frozen.encode_precision == "auto":
        frozen = replace(frozen, encode_precision=precision_of(expected.ingredients))
    tolerance = Tolerance(data.strict, data.max_skipped)
    if data.pairs is not None:
        rows = read_pairs(data.pairs, data.datasets_dir, data.columns, seed, tolerance)
        _check_modalities(rows, data)
    else:
        not_contact = data.use_not_contact, data.percent_not_contact
        rows = read_tvl(data.datasets_dir, data.datasets, seed, *not_contact, tolerance)
    stage1 = load_encoders(frozen, data.active_modality_names, never_from).to(device)
    given = [name for name in ("earlier_touch_column", "touch_background_column") if getattr(data, name) is not None]
    check_touch(stage1, data.subtract_background, given)
    of_pictures = [m for m in stage1.further if stage1.takes_pictures(m)]
    options = data.image_options(stage1.photo_size, stage1.touch_size, stage1.touch_frames)
    images = inspect_images(options, rows, of_pictures)
    recorded = expected.ingredients.get("images", {}) if expected is not None else {}
    images = _with_colours(images, rows, data, stage1, recorded)
    synonyms = {}
    if data.replace_synonyms and data.pairs is not None:
        synonyms = read_synonyms(rows.root / "synonyms.json", data.keep_k_synonyms)
    elif data.replace_synonyms:
        synonyms = find_synonyms(rows.root, data.keep_k_synonyms)
    text = TextOptions("" if data.no_text_prompt else PROMPT, data.shuffle_text, synonyms)
    return stage1, make_samples(rows, images, text, seed, further_inputs(stage1.further, images.more_bits))


def _check_modalities(rows: TVLData, data: DataConfig) -> None:
    found = {m for row in rows.train for m in row.modalities}
    there = [m for m in data.active_modality_names if m in found]
    absent = [m for m in data.active_modality_names if m not in there]
    if absent:
        columns = ", ".join(COLUMN_FLAGS.get(m, "--more_columns") for m in absent)
        remedy = f"name their columns with {columns}"
        if len(there) > 1:
            remedy = f"give --active_modality_names {' '.join(there)}, or {remedy}"
        raise UserError(f"no training row of {data.pairs} has {' or '.join(absent)}; {remedy}.")


def check_touch(stage1: Stage1, subtract_background: str | None, beside: Sequence[str]) -> None:
    """Raise UserError unless a touch encoder is told what it needs to know, and nothing that it cannot use.

    subtract_background: the value of that flag. beside: the flags that are given of those that name earlier frames
    (earlier_touch_...) and touch images without contact (touch_background_...).
    """
    if stage1.knows_subtraction and subtract_background is None:
        raise UserError(
            "this touch encoder was trained on differences to a touch image without contact (Sparsh, of DIGIT and GelSight "
            "Mini), or on touch images as they are (GelSight with markers); give --subtract_background background or none."
        )
    for flag in beside:
        if flag.startswith("earlier_touch") and stage1.touch_frames == 1:
            raise UserError(f"--{flag} is for touch encoders of two frames, and this one takes one; leave it out.")
        if flag.startswith("touch_background") and subtract_background is None:
            raise UserError(f"--{flag} is for --subtract_background background; give it too, or leave out --{flag}.")


def _with_colours(
    options: ImageOptions, rows: TVLData, data: DataConfig, stage1: Stage1, recorded: Mapping[str, Any]
) -> ImageOptions:
    """The options with the colours of normalisation that follow from encoders and data.

    An encoder of one's own has its own, unless a flag names others. Colours that are to be measured are those that a run
    recorded, else those of the training rows.
    """
    flags = {"vision": data.photo_norm, "tactile": data.touch_norm}
    for modality, norm in data.norms.items():
        colours = stage1.picture_norm(modality, options.subtract_background) if flags[modality] is None else None
        if colours is None and norm == MEASURED:
            colours = from_plain(ImageOptions, recorded).colours(modality)
            if colours in NORMS.values():  # not measured by that run
                colours = measure_colours(rows, modality, options)
        if colours is not None:
            options = options.normalised_by(modality, colours)
    return options
