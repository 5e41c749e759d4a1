"""Encode a stream of samples into a feature store: data in any form, read once, which may be larger than the disk.

A sample is a mapping; what it lacks may be left out or None:

    name      unique in the stream; required
    vision    a photo: a path, a PIL image, the bytes of an image file, or an array as `picture_tensor` takes it
    tactile   a touch image, likewise, or a `tvl_align.data.pictures.Touch`
    <other>   of a further modality, such as depth: a picture, or whatever its encoder's `transform` takes
    text      adjectives, separated by commas, or a `Sentence`, which is used as it is
    group     samples of a group (object, episode) are never split apart; default: every sample is its own
    split     train, val or test, for every sample or for none; default: groups are drawn, 80%, 10%, 10%
    labels    {factor: class or number} for the probes of evaluation; floats are numbers, everything else is a class

`tvl_align.data.sources` makes streams of common formats.
"""

import logging
import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tvl_align.contract import FeatureSpec, Tokens
from tvl_align.data.further import further_inputs
from tvl_align.data.image_options import Crop, ImageOptions, Turn
from tvl_align.data.pairs import SPLITS
from tvl_align.data.pictures import BadImage
from tvl_align.data.samples import TextOptions, view_seed
from tvl_align.data.text import PROMPT, Sentence, caption_key, evaluation_text
from tvl_align.data.transforms import MEASURED, ColourSums, raw_colours, source_views
from tvl_align.data.tvl import PICTURES, Tolerance, caption_of
from tvl_align.encoders.tvl import Stage1
from tvl_align.features.identity import encoder_ingredients, image_ingredients, text_ingredients
from tvl_align.features.store import FeatureStore
from tvl_align.features.tables import hash_ids
from tvl_align.system.console import UserError, progress
from tvl_align.system.provenance import FEATURE_PACKAGES, package_versions
from tvl_align.system.workers import run_in_threads

Sample = Mapping[str, Any]
BATCH = 64  # samples
FEWER = "fewer than two modalities"
DRAWS = threading.Lock()  # augmented views are drawn with the generator of the process
log = logging.getLogger(__name__)


def plain_images(
    stage1: Stage1,
    photo_crop: Crop = "none",
    touch_crop: Crop = "none",
    touch_turn: Turn = 0,
    subtract_background: bool = False,
    earlier_touch: bool = False,
) -> ImageOptions:
    """What is done to the pictures of a stream: by default the whole picture is resized to the input of its encoder.

    Colours are normalised as the encoders expect it: an encoder of one's own has its own numbers; for TVL's they are CLIP's
    for photos, and those of TVL's touch images. The last two arguments are those of `ImageOptions`.
    """
    images = ImageOptions(
        stage1.photo_size,
        stage1.touch_size,
        subtract_background=subtract_background,
        photo_crop=photo_crop,
        touch_crop=touch_crop,
        touch_turn=touch_turn,
        touch_frames=stage1.touch_frames,
        earlier_touch=earlier_touch and stage1.touch_frames > 1,
    )
    for modality in PICTURES:
        if (colours := stage1.picture_norm(modality, subtract_background)) is not None:
            images = images.normalised_by(modality, colours)
    return images


def measured_colours(samples: Iterable[Sample], images: ImageOptions, modalities: Sequence[str]) -> ImageOptions:
    """These options, whose numbers for the pictures of `modalities` are measured on training samples of a stream.

    They are those of at most 2,000 pictures of each modality; the stream is read until there are so many. Pictures that
    cannot be used do not count. Raises UserError for samples without a split, whose training samples are not known before
    the whole stream is read, and for a modality without pictures.
    """
    raw, sums = images, {m: ColourSums() for m in modalities}
    for modality in modalities:
        raw = raw_colours(raw, modality)
    for sample in samples:
        if sample.get("split") is None:
            raise UserError(
                f"measured colours are those of training samples, and {sample.get('name')} has no split; name the key of "
                "the splits, or the colours."
            )
        given = {m: sample[m] for m in modalities if sums[m].count < MEASURED and sample.get(m) is not None}
        if _split(sample) == "train":
            (pictures,), _ = source_views(given, raw, [None])
            for m, picture in pictures.items():
                sums[m].add(picture)
        if all(of.count == MEASURED for of in sums.values()):
            break
    for m in modalities:
        found = sums[m].colours(m, "the stream")
        if found is None:
            raise UserError(f"no training sample has a picture of {m}; name its colours.")
        images = images.normalised_by(m, found)
    return images


def encode_stream(
    samples: Iterable[Sample],
    stage1: Stage1,
    out: Path,
    images: ImageOptions | None = None,
    *,
    prompt: str = PROMPT,
    views: int = 0,
    tolerance: Tolerance | None = None,
    total: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> FeatureStore:
    """Encode samples with frozen encoders into a store in the folder `out`, which must be new or empty, and open it.

    A few batches of samples are in memory at a time; only names, groups, splits, captions and labels of all are kept.
    stage1: its `modalities` are encoded. images: of the input sizes of stage1; default: `plain_images`. prompt: before
    adjectives. views: number of augmented views of the photo and the touch image of each training sample, as of the rows of
    a table; they are made of all samples where the samples have no split. total: number of samples, for the progress;
    default: not known. seed: of the views, and of the split if the samples have none.

    A picture that cannot be used is absent from its row, and a sample of fewer than two modalities is left out. Both count
    as bad and are logged by reason. The store records what made it: a run that is trained on it can embed new pictures.

    Raises UserError for samples that are not as described, for more bad samples than `tolerance` accepts, and for a modality
    that no sample has; then there is no store.
    """
    images, tolerance = images or plain_images(stage1), tolerance or Tolerance()
    if (out / "manifest.json").exists():
        raise UserError(f"{out} is a feature store already; give a new folder.")
    if len(stage1.modalities) < 2:
        raise UserError(f"the encoders are of {', '.join(stage1.modalities)}; give those of two or more modalities.")
    rows = iter(samples)
    first = list(islice(rows, 1))  # what is wrong with the source is seen before anything is written
    if not first:
        raise UserError("there are no samples; check the source.")
    bad, columns = BadSamples(tolerance, total), SampleColumns(first[0])
    found = dict.fromkeys(stage1.modalities, 0)
    batches = usable_batches(chain(first, rows), stage1, bad)
    jobs = (partial(encode_batch, batch, stage1, images, prompt, views, seed) for batch in batches)
    specs, ingredients = stage1.specs, stream_ingredients(stage1, images, prompt, isinstance(first[0].get("text"), Sentence))
    ingredients |= {"views": views, "seed": seed} if views else {}
    with (
        FeatureStore.writer(out, specs, seed=seed, ingredients=ingredients) as writer,
        progress(total, "encode", "sample", quiet) as bar,
    ):
        for encoded in run_in_threads(jobs):
            for row, modality, reason in encoded.faults:
                bad.add(str(encoded.samples[row]["name"]), modality, reason)
            writer.add(**encoded.features, **columns.of(encoded.samples, "text" in stage1.modalities))
            found = {m: n + int(encoded.features["present"][m].sum()) for m, n in found.items()}
            bar.update(len(encoded.samples))
        bad.check()
        if absent := [m for m, n in found.items() if not n]:
            raise UserError(f"no sample has {' or '.join(absent)}; name its key, or leave out its encoder.")
    return FeatureStore(out)


def stream_ingredients(stage1: Stage1, images: ImageOptions, prompt: str, sentences: bool) -> dict[str, Any]:
    """What the features of a stream depend on beside the samples, under the names of `tvl_align.features.identity`."""
    return {
        **encoder_ingredients(stage1),
        "images": image_ingredients(images),
        "text": text_ingredients(TextOptions(prompt), sentences),
        "views": 0,
        "packages": package_versions(FEATURE_PACKAGES),
    }


@dataclass
class BadSamples:
    """The bad samples so far, by reason. total: number of samples, None: not known. seen: number of samples so far."""

    tolerance: Tolerance
    total: int | None
    seen: int = 0
    names: set[str] = field(default_factory=set)
    earlier: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    example: str = ""

    @property
    def count(self) -> int:
        """Number of bad samples."""
        return len(self.names) + self.earlier

    def add(self, name: str, modality: str, reason: str) -> None:
        """A sample is bad, for one reason of perhaps several. Raises UserError once there are too many."""
        self.names.add(name)
        self.example = self.example or f"{modality} of {name}: {reason}"
        self.reasons[f"{modality}: {reason}"] += 1
        self._check_early()

    def add_all(self, seen: int, count: int, reasons: Mapping[str, int], example: str) -> None:
        """Add those of other samples, `count` of `seen`. Raises UserError once there are too many."""
        self.seen, self.earlier = self.seen + seen, self.earlier + count
        self.reasons.update(reasons)
        self.example = self.example or example
        self._check_early()

    def _check_early(self) -> None:
        if self.total is not None or self.tolerance.strict:
            self.tolerance.check(self.count, max(self.seen, self.total or 0), self.example)

    def check(self) -> None:
        """Log the bad samples. Raises UserError if they are too many."""
        if self.count:
            log.warning("%d of %d samples are bad, by reason: %s", self.count, self.seen, dict(self.reasons))
            self.tolerance.check(self.count, self.seen, self.example)


def usable_batches(samples: Iterable[Sample], stage1: Stage1, bad: BadSamples) -> Iterator[list[Sample]]:
    """The samples that have two or more modalities, BATCH at a time; the others are counted as bad."""

    def usable() -> Iterator[Sample]:
        for sample in samples:
            if not isinstance(sample, Mapping) or not sample.get("name"):
                raise UserError(f"sample {bad.seen} has no name; give every sample a unique one.")
            bad.seen += 1
            if sum(_has(sample, m) for m in stage1.modalities) >= 2:
                yield sample
            else:
                bad.add(str(sample["name"]), "sample", FEWER)

    rows = usable()
    while batch := list(islice(rows, BATCH)):
        yield batch


def _has(sample: Sample, modality: str) -> bool:
    value = sample.get(modality)
    if modality == "text" and not isinstance(value, str | None):
        raise UserError(f"the text of {sample['name']} is {value!r:.60}; give adjectives, a Sentence, or None.")
    return caption_of(value) is not None if modality == "text" else value is not None


class SampleColumns:
    """What the samples say beside their pictures, as columns of the store. The first sample says which there are."""

    def __init__(self, first: Sample) -> None:
        self.split, self.factors = first.get("split") is not None, list(first.get("labels") or {})
        self.numeric: dict[str, bool] = {}  # by the first value of a factor

    def of(self, samples: Sequence[Sample], text: bool) -> dict[str, Any]:
        """The columns of a batch, as arguments of `FeatureWriter.add`."""
        columns: dict[str, Any] = {"names": [str(s["name"]) for s in samples]}
        columns["groups"] = [str(s["name"] if s.get("group") is None else s["group"]) for s in samples]
        columns["labels"] = {factor: self._label(factor, samples) for factor in self.factors}
        if text:
            columns["captions"] = {"text": [caption_key(s["text"]) if _has(s, "text") else "" for s in samples]}
        if any((s.get("split") is not None) != self.split for s in samples):
            raise UserError("some samples have a split and some have none; give it for all or none.")
        if self.split:
            columns["split"] = [_split(s) for s in samples]
        return columns

    def _label(self, factor: str, samples: Sequence[Sample]) -> np.ndarray:
        values = []
        for sample in samples:
            labels = sample.get("labels") or {}
            if unknown := [name for name in labels if name not in self.factors]:
                raise UserError(
                    f"{sample['name']} has the label {unknown[0]}, which the first sample lacks; give None there."
                )
            value = labels.get(factor)
            values.append(value.item() if isinstance(value, np.generic) else value)
        given = [value for value in values if value is not None]
        if given and factor not in self.numeric:
            self.numeric[factor] = isinstance(given[0], float)
        if not self.numeric.get(factor, True):
            return np.array(["" if value is None else str(value) for value in values])
        try:
            return np.array([math.nan if value is None else float(value) for value in values])
        except (TypeError, ValueError) as error:
            raise UserError(f"the label {factor} is a number and then not ({error}); give one kind.") from error


def _split(sample: Sample) -> str:
    split = SPLITS.get(str(sample["split"]).lower())
    if split is None:
        raise UserError(f"{sample['name']} has the split {sample['split']!r}; give train, val or test.")
    return split


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of samples. features: arguments of `FeatureWriter.add`. faults: (row, modality, reason) of bad pictures.

    contents: {modality: (B,) int64}, equal for rows with equal inputs of the encoder (the plain view of a picture, a
    sentence), and another number for every row without the modality; empty unless they are asked for.
    """

    samples: Sequence[Sample]
    features: dict[str, dict[str, np.ndarray]]
    faults: list[tuple[int, str, str]]
    contents: dict[str, np.ndarray]


def encode_batch(
    samples: Sequence[Sample],
    stage1: Stage1,
    images: ImageOptions,
    prompt: str,
    views: int = 0,
    seed: int = 0,
    contents: bool = False,
) -> EncodedBatch:
    """Encode a batch. Every distinct sentence of it is encoded once. Views of other than training samples are zero.

    contents: give those of the rows too.
    """
    keys: dict[str, np.ndarray] = {}
    parts: dict[str, dict[str, np.ndarray]] = {what: {} for what in ("arrays", "pooled", "mask", "present")}
    pictures, faults = _pictures(samples, stage1, images, views, seed)
    further = further_inputs(stage1.further, images.more_bits)
    for m, spec in stage1.specs.items():
        inputs: list[Any] = []
        rows: dict[int, int] = {}  # of the batch: the input that it has
        for i, sample in enumerate(samples):
            if m == "text" and _has(sample, m):
                sentence = evaluation_text(sample[m], prompt)
                inputs += [sentence] if sentence not in inputs else []
                rows[i] = inputs.index(sentence)
            elif m in further and _has(sample, m):
                try:
                    inputs.append(further[m](sample[m]))
                    rows[i] = len(inputs) - 1
                except BadImage as error:
                    faults.append((i, m, str(error)))
            elif (i, 0) in pictures.get(m, {}):
                inputs.append(pictures[m][i, 0])
                rows[i] = len(inputs) - 1
        count, here, there = len(samples), list(rows), list(rows.values())
        if contents:
            keys[m] = hash_ids(_bytes(inputs[rows[i]]) if i in rows else f"\0{s['name']}" for i, s in enumerate(samples))
        tokens, pooled = _zeros(spec, count)
        mask, present = np.zeros((count, spec.tokens), bool), np.zeros(count, bool)
        if inputs:
            out = _numbers(stage1, m, inputs)
            length = out.mask.shape[1]
            tokens[here, :length], mask[here, :length] = out.tokens.numpy()[there], out.mask.numpy()[there]
            pooled[here], present[here] = out.pooled.numpy()[there], True
        for what, x in (("arrays", tokens), ("pooled", pooled), ("mask", mask), ("present", present)):
            parts[what][m] = x
        if m in pictures and views:
            shown, shown_pooled = _zeros(spec, count, views)
            for view in range(1, views + 1):
                at = [i for i in here if (i, view) in pictures[m]]
                if at:
                    out = _numbers(stage1, m, [pictures[m][i, view] for i in at])
                    shown[at, view - 1], shown_pooled[at, view - 1] = out.tokens.numpy(), out.pooled.numpy()
            parts.setdefault("views", {})[m], parts.setdefault("views_pooled", {})[m] = shown, shown_pooled
    return EncodedBatch(samples, parts, faults, keys)


def _bytes(x: Any) -> bytes | str:
    """A sentence, or the numbers of a tensor."""
    return x if isinstance(x, str) else x.contiguous().numpy().tobytes()


def _pictures(
    samples: Sequence[Sample], stage1: Stage1, images: ImageOptions, views: int, seed: int
) -> tuple[dict[str, dict[tuple[int, int], Tensor]], list[tuple[int, str, str]]]:
    """{modality: {(row, view): (3, S, S)}} of photos and touch images, and (row, modality, reason) of bad ones."""
    pictures: dict[str, dict[tuple[int, int], Tensor]] = {m: {} for m in PICTURES if m in stage1.modalities}
    faults: list[tuple[int, str, str]] = []
    for i, sample in enumerate(samples):
        augmented = views if sample.get("split") is None or _split(sample) == "train" else 0
        seeds = [None, *(view_seed(seed, "picture", str(sample["name"]), view) for view in range(1, augmented + 1))]
        given = {m: sample[m] for m in pictures if _has(sample, m)}
        with DRAWS if augmented else nullcontext():
            found, bad = source_views(given, images, seeds)
        faults += [(i, m, reason) for m, reason in bad.items()]
        for view, of_view in enumerate(found):
            for m, picture in of_view.items():
                if m not in bad:
                    pictures[m][i, view] = picture
    return pictures, faults


def _numbers(stage1: Stage1, modality: str, inputs: Sequence[Any]) -> Tokens:
    """The features of inputs or sentences, float32 on the CPU."""
    batch = stage1.tokenize(inputs) if modality == "text" else torch.stack(list(inputs))
    encoded = stage1.encode({modality: batch.to(stage1.logit_scale.device)})
    return encoded.float().map(Tensor.cpu).modalities[modality]


def _zeros(spec: FeatureSpec, *rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (*rows, T, W) and pooled features (*rows, E) of zeros."""
    return np.zeros((*rows, spec.tokens, spec.width), np.float32), np.zeros((*rows, spec.pooled_width), np.float32)
