"""Compute features on the fly, without a feature store."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tvl_align.contract import Batch, Features
from tvl_align.data.loading import ImageBatch, RowViews, load_images
from tvl_align.data.samples import Samples
from tvl_align.data.tvl import PICTURES, Tolerance
from tvl_align.encoders.tvl import Stage1
from tvl_align.features.store import Condense, FeatureSource

log = logging.getLogger(__name__)


class LiveSplit:
    """A split whose features are computed in every step (`--views 0`). Slow: every batch goes through the encoders.

    Images that cannot be used are absent and logged; too many raise UserError (`tolerance`).
    """

    def __init__(
        self, stage1: Stage1, samples: Samples, num_workers: int, train: bool, tolerance: Tolerance | None = None
    ) -> None:
        self.stage1, self.samples, self.num_workers = stage1, samples, num_workers
        self.tolerance, self._bad = tolerance or Tolerance(), dict[tuple[int, str], str]()
        self.views = 10**9 if train else 0  # so many that a sampled view is practically always a new one
        augments = train and samples.images.options.augment
        self.augmented = tuple(m for m in PICTURES if m in stage1.modalities) if augments else ()
        self.names = [row.name for row in samples.rows]
        distinct = sorted({row.dataset for row in samples.rows})
        self.datasets = torch.tensor([distinct.index(row.dataset) for row in samples.rows], dtype=torch.int64)
        indices = {group: i for i, group in enumerate(dict.fromkeys(row.group for row in samples.rows))}
        self.groups = torch.tensor([indices[row.group] for row in samples.rows], dtype=torch.int64)
        self._captions = samples.caption_ids()
        self.content_keys = {m: keys for m, keys in samples.content_keys.items() if m in stage1.modalities}

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, rows: Sequence[Tensor], views: Sequence[Tensor], device: torch.device) -> Iterator[Features]:
        """Yield the Features of every (rows, views) pair on `device`. See FeatureSource."""
        batches = [list(zip(r.tolist(), v.tolist(), strict=True)) for r, v in zip(rows, views, strict=True)]
        samples = self.samples.only(self.stage1.modalities)
        images = load_images(samples, batches, self.num_workers, self.stage1.modalities)
        for batch, loaded in zip(batches, images, strict=True):
            yield self._encode(batch, loaded, device)

    def condensed(self, condense: Condense, device: torch.device) -> FeatureSource:
        """This source itself: its views are computed on the fly."""
        return self

    def _encode(self, row_views: RowViews, loaded: ImageBatch, device: torch.device) -> Features:
        """Features with every modality, even if no row of the batch has it: all processes need the same modalities."""
        self._record_faults(row_views, loaded.faults)
        raw: dict[str, Any] = {}
        present: dict[str, Tensor] = {}
        for modality in self.stage1.modalities:
            if modality != "text":
                empty = torch.empty(0, *self.stage1.input_shape(modality))
                positions, images = loaded.images.get(modality, ([], empty))
                has_image = torch.zeros(len(row_views), dtype=torch.bool)
                has_image[positions] = True
                padded = images.new_zeros(len(row_views), *images.shape[1:])
                padded[has_image] = images
                raw[modality], present[modality] = padded.to(device), has_image.to(device)
        sentences = [self.samples.sentence(row, view) if row >= 0 else None for row, view in row_views]
        if "text" in self.stage1.modalities:
            raw["text"] = self.stage1.tokenize([s or "" for s in sentences]).to(device)
            present["text"] = torch.tensor([s is not None for s in sentences], device=device)
        rows = torch.tensor([row for row, _ in row_views])
        sentence_ids = [
            self._sentence_id(s) if s is not None else -1 - row for s, row in zip(sentences, rows.tolist(), strict=True)
        ]
        keys = torch.stack([self._captions[rows], torch.tensor(sentence_ids)], dim=-1)
        batch: Batch = {**raw, "present": present, "caption_keys": keys.to(device)}
        encoded = self.stage1.encode(batch)
        content = {m: keys[rows].to(device) for m, keys in self.content_keys.items()}
        shown = torch.tensor([view > 0 for _, view in row_views]).to(device)
        return Features(
            encoded.modalities, encoded.caption_keys, rows.to(device), content, dict.fromkeys(self.augmented, shown)
        )

    def _record_faults(self, row_views: RowViews, faults: Sequence[tuple[int, str, str]]) -> None:
        for position, modality, reason in faults:
            row = row_views[position][0]
            message = f"{modality} of {self.samples.rows[row].name}: {reason}"
            if (row, modality) not in self._bad:
                log.warning("skipped %s", message)
            self._bad[row, modality] = reason
            self.tolerance.check(len({row for row, _ in self._bad}), len(self), message)

    def _sentence_id(self, sentence: str) -> int:
        """The first 56 bits of the sentence's SHA-256, equal in all processes."""
        return int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:7], "big")
