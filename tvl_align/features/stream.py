"""Encode a stream of samples into a feature store: data in any form, read once, which may be larger than the disk.

A sample is a mapping; what it lacks may be left out or None:

    name      unique in the stream; required
    vision    a photo: a path, a PIL image, the bytes of an image file, or an array as `picture_tensor` takes it
    tactile   a touch image, likewise
    text      adjectives, separated by commas, or a `Sentence`, which is used as it is
    group     samples of a group (object, episode) are never split apart; default: every sample is its own
    split     train, val or test, for every sample or for none; default: groups are drawn, 80%, 10%, 10%
    labels    {factor: class or number} for the probes of evaluation; floats are numbers, everything else is a class

Only plain views are encoded: a stream has no augmented ones. `tvl_align.data.sources` makes streams of common formats.
"""

import io
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tvl_align.data.pairs import SPLITS
from tvl_align.data.samples import TextOptions
from tvl_align.data.text import PROMPT, Sentence, caption_key, evaluation_text
from tvl_align.data.transforms import DECODER_ERRORS, BadImage, Crop, ImageOptions, Source, Turn, picture_tensor
from tvl_align.data.tvl import Tolerance, caption_of
from tvl_align.encoders.tvl import Stage1
from tvl_align.features.identity import image_ingredients, text_ingredients
from tvl_align.features.store import FeatureStore
from tvl_align.system.console import UserError, progress
from tvl_align.system.provenance import FEATURE_PACKAGES, package_versions
from tvl_align.system.workers import run_in_threads

Sample = Mapping[str, Any]
BATCH = 64  # samples
FEWER = "fewer than two modalities"
log = logging.getLogger(__name__)


def plain_images(stage1: Stage1, photo_crop: Crop = "none", touch_crop: Crop = "none", touch_turn: Turn = 0) -> ImageOptions:
    """What is done to the pictures of a stream: by default the whole picture is resized to the input of its encoder.

    Colours are normalised as the encoders expect it: an encoder of one's own has its own numbers; for TVL's they are CLIP's
    for photos, and those of TVL's touch images.
    """
    sizes = stage1.photo_size, stage1.touch_size
    images = ImageOptions(*sizes, photo_crop=photo_crop, touch_crop=touch_crop, touch_turn=touch_turn)
    for modality in ("vision", "tactile"):
        if (colours := stage1.picture_norm(modality)) is not None:
            images = images.normalised_by(modality, colours)
    return images


def encode_stream(
    samples: Iterable[Sample],
    stage1: Stage1,
    out: Path,
    images: ImageOptions | None = None,
    *,
    prompt: str = PROMPT,
    tolerance: Tolerance | None = None,
    total: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> FeatureStore:
    """Encode samples with frozen encoders into a store in the folder `out`, which must be new or empty, and open it.

    A few batches of samples are in memory at a time; only names, groups, splits, captions and labels of all are kept.
    stage1: its `modalities` are encoded. images: of the input sizes of stage1; default: `plain_images`. prompt: before
    adjectives. total: number of samples, for the progress; default: not known. seed: of the split, if the samples have none.

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
    bad, columns = _Bad(tolerance, total), _Columns(first[0])
    found = dict.fromkeys(stage1.modalities, 0)
    jobs = (partial(_encoded, batch, stage1, images, prompt) for batch in _batches(chain(first, rows), stage1, bad))
    specs, ingredients = stage1.specs, stream_ingredients(stage1, images, prompt, isinstance(first[0].get("text"), Sentence))
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
        "encoders": stage1.fingerprint(),
        "features": stage1.features,
        "images": image_ingredients(images),
        "text": text_ingredients(TextOptions(prompt), sentences),
        "views": 0,
        "packages": package_versions(FEATURE_PACKAGES),
    }


@dataclass
class _Bad:
    """The bad samples so far, by reason. total: number of samples, None: not known."""

    tolerance: Tolerance
    total: int | None
    seen: int = 0
    names: set[str] = field(default_factory=set)
    reasons: Counter[str] = field(default_factory=Counter)
    example: str = ""

    def add(self, name: str, modality: str, reason: str) -> None:
        self.names.add(name)
        self.example = self.example or f"{modality} of {name}: {reason}"
        self.reasons[f"{modality}: {reason}"] += 1
        if self.total is not None or self.tolerance.strict:
            self.tolerance.check(len(self.names), max(self.seen, self.total or 0), self.example)

    def check(self) -> None:
        if self.names:
            log.warning("%d of %d samples are bad, by reason: %s", len(self.names), self.seen, dict(self.reasons))
            self.tolerance.check(len(self.names), self.seen, self.example)


def _batches(samples: Iterable[Sample], stage1: Stage1, bad: _Bad) -> Iterator[list[Sample]]:
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


class _Columns:
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
class _Encoded:
    """A batch of samples. features: arguments of `FeatureWriter.add`. faults: (row, modality, reason) of bad pictures."""

    samples: Sequence[Sample]
    features: dict[str, dict[str, np.ndarray]]
    faults: list[tuple[int, str, str]]


def _encoded(samples: Sequence[Sample], stage1: Stage1, images: ImageOptions, prompt: str) -> _Encoded:
    """Encode a batch. Every distinct sentence of it is encoded once."""
    parts: dict[str, dict[str, np.ndarray]] = {what: {} for what in ("arrays", "pooled", "mask", "present")}
    faults: list[tuple[int, str, str]] = []
    for m, spec in stage1.specs.items():
        inputs: list[Any] = []
        rows: dict[int, int] = {}  # of the batch: the input that it has
        for i, sample in enumerate(samples):
            if not _has(sample, m):
                continue
            if m == "text":
                sentence = evaluation_text(sample[m], prompt)
                inputs += [sentence] if sentence not in inputs else []
                rows[i] = inputs.index(sentence)
                continue
            try:
                picture = _picture(sample[m], m, images)
            except BadImage as error:
                faults.append((i, m, str(error)))
                continue
            rows[i] = len(inputs)
            inputs.append(picture)
        count, here, there = len(samples), list(rows), list(rows.values())
        tokens, pooled = (
            np.zeros((count, spec.tokens, spec.width), np.float32),
            np.zeros((count, spec.pooled_width), np.float32),
        )
        mask, present = np.zeros((count, spec.tokens), bool), np.zeros(count, bool)
        if inputs:
            device = stage1.logit_scale.device
            batch = (stage1.tokenize(inputs) if m == "text" else torch.stack(inputs)).to(device)
            out = stage1.encode({m: batch}).float().map(Tensor.cpu).modalities[m]
            length = out.mask.shape[1]
            tokens[here, :length], mask[here, :length] = out.tokens.numpy()[there], out.mask.numpy()[there]
            pooled[here], present[here] = out.pooled.numpy()[there], True
        for what, x in (("arrays", tokens), ("pooled", pooled), ("mask", mask), ("present", present)):
            parts[what][m] = x
    return _Encoded(samples, parts, faults)


def _picture(source: Any, modality: str, images: ImageOptions) -> Tensor:
    if isinstance(source, bytes):
        try:
            source = Image.open(io.BytesIO(source))
        except UnidentifiedImageError as error:
            raise BadImage("not an image") from error
        except DECODER_ERRORS as error:
            raise BadImage("corrupt or truncated") from error
    if not isinstance(source, Source):
        raise BadImage(f"a {type(source).__name__}, not a picture")
    return picture_tensor(source, modality, images)
