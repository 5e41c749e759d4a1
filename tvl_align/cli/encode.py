"""`tvl-align encode`: write the feature store that `train` reads."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from tvl_align.cli.train import read_settings
from tvl_align.config import parse
from tvl_align.data.image_options import Crop, ImageOptions, Turn
from tvl_align.data.sources import BLOCK_ROWS, Block, Keys, open_blocks, open_source
from tvl_align.data.text import PROMPT
from tvl_align.data.tvl import Tolerance
from tvl_align.encoders.names import check_modalities, one_each
from tvl_align.encoders.own import load_encoders
from tvl_align.encoders.tvl import Stage1, Stage1Config
from tvl_align.features.cluster import ray_cluster
from tvl_align.features.encode import open_or_encode
from tvl_align.features.inputs import MEASURED, NORMS, check_touch, load_samples
from tvl_align.features.parts import encode_blocks
from tvl_align.features.store import FeatureStore
from tvl_align.features.stream import encode_stream, measured_colours, plain_images
from tvl_align.system.bounds import at_least, between
from tvl_align.system.console import UserError
from tvl_align.system.distributed import is_main, join_process_group
from tvl_align.system.runtime import pick_device
from tvl_align.training.engine import make_accelerator

ABOUT = (
    "Encode a data set once into a feature store. With the same flags, train uses this store. --source takes data in other "
    "formats: `tvl-align encode --source datasets:FOLDER --help` lists its flags."
)
EXAMPLES = (
    "tvl-align encode --stage1_checkpoint stage1/checkpoint.pth --datasets_dir world",
    "torchrun --nproc_per_node=8 --no_python tvl-align encode --stage1_checkpoint P --datasets_dir D --views 4",
)
SOURCE_EXAMPLES = (
    "tvl-align encode --source datasets:FOLDER --vision_key image --tactile_key touch --text_key words --out S ...",
    "tvl-align encode --source 'webdataset:shards-{0..9}.tar' --vision_key photo.jpg --tactile_key touch.jpg --out S ...",
    "tvl-align encode --source lerobot:FOLDER --vision_key observation.images.top --every 10 --out S ...",
    "tvl-align encode --source video:FOLDER --vision_key camera --tactile_key touch --every 30 --out S ...",
    "torchrun --nproc_per_node=8 --no_python tvl-align encode --source datasets:FOLDER --vision_key image --out S ...",
    "tvl-align encode --source 'webdataset:s3://bucket/{000..999}.tar' --ray HOST:PORT --vision_key photo.jpg --out S ...",
)


@dataclass(frozen=True)
class SourceConfig:
    """Encode a stream of samples, read once, into a feature store for `train --store`."""

    source: str
    """datasets:FOLDER (save_to_disk, .parquet or .arrow), webdataset:SHARDS, pairs:TABLE (a CSV file), tvl:FOLDER,
    lerobot:FOLDER or video:FOLDER; of parquet, shards and tables also addresses, such as s3://bucket/folder."""
    out: Path
    """Folder for the store; new or empty."""
    vision_key: str | None = None
    """Key of photos: a column, an extension of a shard's files, a feature, or a sub-folder of videos; of TVL: vision."""
    tactile_key: str | None = None
    """Key of touch images."""
    text_key: str | None = None
    """Key of adjectives, separated by commas; they get TVL's prompt."""
    sentence_key: str | None = None
    """Key of sentences that are used as they are; default with lerobot: task."""
    more_keys: tuple[str, ...] = ()
    """Keys of further modalities: depth=observation.images.depth audio=wav. Each needs an encoder, see --more_encoders."""
    earlier_touch_key: str | None = None
    """Key of touch images of the same contact, some frames before, for encoders that take two (Sparsh: 5 frames before);
    default: the touch image stands for both."""
    touch_background_key: str | None = None
    """Key of touch images without contact, for --subtract_background; of TVL: background."""
    group_key: str | None = None
    """Key of groups (object, trajectory) that are never split apart; default: every sample, episode or video is one."""
    split_key: str | None = None
    """Key of train, val or test; default: splits that the source names, else 80%, 10%, 10% of the groups are drawn."""
    label_keys: tuple[str, ...] = ()
    """Keys of labels that evaluate probes; default: none."""
    every: int = 1
    """Take one of so many frames of lerobot and video."""
    photo_crop: Crop = "none"
    """Part of a photo: tvl (under the sensor), centre (largest square) or none (all)."""
    touch_crop: Crop = "none"
    """Part of a touch image: tvl (padded to a square), centre or none (all)."""
    touch_turn: Turn = 0
    """Degrees by which touch images are turned counterclockwise."""
    subtract_background: Literal["background", "none"] | None = None
    """background: subtract the touch image without contact from every touch image; none: do not; default: none. Sparsh needs
    to be told."""
    photo_norm: Literal["clip", "imagenet", "half", "measured"] | None = None
    """Colours for the normalisation of photos: clip, imagenet, half (0.5), or measured on training samples, for which the
    stream is read twice; default: those of the encoder (TVL's: clip)."""
    touch_norm: Literal["tvl", "clip", "imagenet", "half", "measured"] | None = None
    """Colours for the normalisation of touch images; default: those of the encoder (TVL's: tvl)."""
    views: int = 0
    """Augmented views of the photo and the touch image of each training sample; without splits, of every sample."""
    randomize_crop: bool = False
    """Shift the photo's crop by up to 5% of its side in augmented views."""
    shared_geometry: bool = True
    """Same flips and rotation for photo and touch image; --no_shared_geometry samples them independently, as TVL does."""
    no_text_prompt: tyro.conf.FlagCreatePairsOff[bool] = False
    """Omit the prompt "This image gives tactile feelings of" before the adjectives."""
    strict: bool = False
    """Stop at the first sample or picture that cannot be used, instead of skipping it."""
    max_skipped: float = 0.05
    """Stop if more than this fraction of the samples cannot be used (0.05 = 5%)."""
    seed: int = 0
    """Seed of the augmented views, and of the random split if there are no splits."""
    device: str | None = None
    """cuda or cpu; default: cuda if available, else cpu."""
    ray: str | None = None
    """Encode in the processes of a Ray cluster: local (one that is started on this machine), auto (that of RAY_ADDRESS, else
    local), or its address, HOST:PORT. Each process has a GPU, or some cores. All machines share --out and the files of
    --source. The same command goes on where an encode stopped. Default: this process, or those of torchrun."""
    block_rows: int = BLOCK_ROWS
    """With --ray or torchrun: samples of a block, the part that one process encodes at a time; a shard of webdataset is a
    block."""
    worker_cpus: int | None = None
    """With --ray: cores of a process; default: 4, or as many as there are."""
    stage1: tyro.conf.OmitArgPrefixes[Stage1Config] = field(default_factory=Stage1Config)

    def __post_init__(self) -> None:
        at_least(1, self, "every")
        at_least(0, self, "views")
        at_least(1, self, "block_rows", "worker_cpus")
        between(0, 1, self, "max_skipped")
        if self.ray is None and self.worker_cpus is not None:
            raise UserError("--worker_cpus is of an encode on Ray; give it with --ray, or leave it out.")
        if self.ray is None and processes() == 1 and self.block_rows != BLOCK_ROWS:
            raise UserError(
                "--block_rows is of an encode in many processes; give it with --ray or torchrun, or leave it out."
            )
        if self.subtract_background == "background" and self.touch_background_key is None:
            raise UserError(
                "--subtract_background background needs touch images without contact; give --touch_background_key."
            )
        check_modalities(self.modalities)
        if len(self.modalities) < 2:
            given = ", ".join(self.modalities) or "nothing"
            raise UserError(
                f"registers align two or more modalities, and there are keys of {given}; give --vision_key, --tactile_key, "
                "--text_key, --sentence_key or --more_keys."
            )

    @property
    def keys(self) -> Keys:
        """Where the parts of a sample are."""
        single = (self.vision_key, self.tactile_key, self.text_key, self.sentence_key, self.group_key, self.split_key)
        beside = self.earlier_touch_key, self.touch_background_key
        return Keys(*single, self.label_keys, one_each("more_keys", self.more_keys), *beside)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those to encode. A LeRobot dataset has the sentences of its tasks too. Beside two other modalities they are left
        out if text has no encoder.
        """
        found, encoders = self.keys.modalities, (self.stage1.stage1_checkpoint, self.stage1.text_encoder)
        if self.source.startswith("lerobot:") and (len(found) < 2 or encoders != (None, None)):
            return replace(self.keys, sentence="task").modalities
        return found


def run(argv: Sequence[str]) -> None:
    if any(flag.partition("=")[0] == "--source" for flag in argv):
        _encode_source(parse(SourceConfig, argv, "tvl-align encode", examples=SOURCE_EXAMPLES))
        return
    settings, _, _ = read_settings(argv, "tvl-align encode", ABOUT, EXAMPLES)
    if settings.data.store is not None:
        raise UserError(f"{settings.data.store} is already a feature store; pass it to train with --store.")
    if settings.data.views == 0:
        raise UserError("--views 0 means no feature store; give --views 1 or more.")
    data, device = settings.data, make_accelerator(settings).device
    stage1, samples = load_samples(settings.stage1, data, settings.run.seed, device)
    tolerance = Tolerance(data.strict, data.max_skipped)
    store = open_or_encode(settings.feature_dir, stage1, samples, data.views, data.num_workers, tolerance=tolerance)
    if is_main():
        print(store.folder)


def processes() -> int:
    """The number of processes that torchrun has started; 1 without it. Raises UserError for tasks of Slurm alone."""
    count, tasks = int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if count < tasks:
        raise UserError(
            f"{tasks} tasks of Slurm would each encode all of the source; start torchrun in one task per machine."
        )
    return count


def _encode_source(config: SourceConfig) -> None:
    options = {
        "prompt": "" if config.no_text_prompt else PROMPT,
        "views": config.views,
        "tolerance": Tolerance(config.strict, config.max_skipped),
        "seed": config.seed,
    }
    if config.ray is not None:
        if processes() > 1:
            raise UserError("--ray starts processes of its own; give it without torchrun.")
        store = _encode_on_ray(config, config.ray, options)
    elif processes() > 1:
        store = _encode_in_process_group(config, options)
    else:
        store = _encode_in_this_process(config, options)
    if not is_main():
        return
    rows = ", ".join(f"{len(split)} {name}" for name, split in store.splits.items())
    print(f"{', '.join(store.specs)}: {rows} rows")
    print(store.folder)


def _encode_in_this_process(config: SourceConfig, options: dict[str, Any]) -> FeatureStore:
    source = open_source(config.source, config.keys, config.every)
    stage1 = _load(config, config.stage1)
    return encode_stream(source.samples, stage1, config.out, _images(config, stage1), total=source.total, **options)


def _encode_in_process_group(config: SourceConfig, options: dict[str, Any]) -> FeatureStore:
    blocks = _blocks(config)
    device = pick_device(config.device)
    join_process_group(device, timedelta(hours=6))  # until the last has encoded its blocks
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    stage1 = _load(config, config.stage1)
    return encode_blocks(blocks, stage1, lambda: stage1, config.out, _images(config, stage1), **options)


def _blocks(config: SourceConfig) -> list[Block]:
    blocks = open_blocks(config.source, config.keys, config.block_rows)
    if config.every != 1:
        raise UserError("--every counts frames, and many processes read none; leave it out.")
    return blocks


def _encode_on_ray(config: SourceConfig, address: str, options: dict[str, Any]) -> FeatureStore:
    blocks = _blocks(config)
    with ray_cluster(address, config.worker_cpus) as cluster:
        encoders = config.stage1
        if encoders.stage1_checkpoint is not None:
            encoders = replace(encoders, stage1_checkpoint=encoders.stage1_checkpoint.absolute())
        if encoders.encode_precision == "auto" and cluster.gpus and config.device != "cpu":
            encoders = replace(encoders, encode_precision="bf16")  # as on a GPU of this process
        stage1 = _load(replace(config, device="cpu"), encoders)  # computes nothing here
        load = partial(_load, config, encoders)
        return encode_blocks(blocks, stage1, load, config.out, _images(config, stage1), engine=cluster.encode, **options)


def _load(config: SourceConfig, encoders: Stage1Config) -> Stage1:
    return load_encoders(encoders, config.modalities).to(pick_device(config.device))


def _images(config: SourceConfig, stage1: Stage1) -> ImageOptions:
    """What is done to pictures; colours that are to be measured are measured, for which the stream is read once."""
    given = [name for name in ("earlier_touch_key", "touch_background_key") if getattr(config, name) is not None]
    check_touch(stage1, config.subtract_background, given)
    subtracted, earlier = config.subtract_background == "background", config.earlier_touch_key is not None
    images = plain_images(stage1, config.photo_crop, config.touch_crop, config.touch_turn, subtracted, earlier)
    images = replace(images, randomize_crop=config.randomize_crop, shared_geometry=config.shared_geometry)
    norms = {"vision": config.photo_norm, "tactile": config.touch_norm}
    for modality, norm in norms.items():
        images = images.normalised_by(modality, NORMS[norm]) if norm in NORMS else images
    if measured := [m for m, norm in norms.items() if norm == MEASURED and m in config.modalities]:
        images = measured_colours(open_source(config.source, config.keys, config.every).samples, images, measured)
    return images
