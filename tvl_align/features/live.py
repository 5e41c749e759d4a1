"""Features computed as they are asked for, without a store."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tvl_align.contract import Batch, Features
from tvl_align.data.loading import ImageBatch, Jobs, load_images
from tvl_align.data.samples import Samples
from tvl_align.data.tvl import Tolerance
from tvl_align.encoders.tvl import Stage1

log = logging.getLogger(__name__)


class LiveSplit:
    """Features computed as they are asked for (`--views 0`): the documented architecture taken literally, and slow."""

    def __init__(
        self, stage1: Stage1, samples: Samples, num_workers: int, train: bool, tolerance: Tolerance | None = None
    ) -> None:
        self.stage1, self.samples, self.num_workers = stage1, samples, num_workers
        self.tolerance, self._bad = tolerance or Tolerance(), dict[tuple[int, str], str]()
        self.views = 10**9 if train else 0  # every draw is a new view
        self.names = [row.name for row in samples.rows]
        known = sorted({row.dataset for row in samples.rows})
        self.datasets = torch.tensor([known.index(row.dataset) for row in samples.rows], dtype=torch.int64)
        self._captions = samples.caption_ids()

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, rows: Sequence[Tensor], views: Sequence[Tensor], device: torch.device) -> Iterator[Features]:
        jobs = [list(zip(r.tolist(), v.tolist(), strict=True)) for r, v in zip(rows, views, strict=True)]
        images = load_images(self.samples, jobs, self.num_workers, self.stage1.modalities)
        for part, found in zip(jobs, images, strict=True):
            yield self._encode(part, found, device)

    def _encode(self, part: Jobs, loaded: ImageBatch, device: torch.device) -> Features:
        """All modalities are there, absent or not, so that every process has the same ones."""
        self._note(part, loaded.faults)
        raw: dict[str, Any] = {}
        present: dict[str, Tensor] = {}
        for modality, size in (("vision", self.stage1.photo_size), ("tactile", self.stage1.touch_size)):
            if modality in self.stage1.modalities:
                positions, images = loaded.images.get(modality, ([], torch.empty(0, 3, size, size)))
                there = torch.zeros(len(part), dtype=torch.bool)
                there[positions] = True
                full = images.new_zeros(len(part), *images.shape[1:])
                full[there] = images
                raw[modality], present[modality] = full.to(device), there.to(device)
        sentences = [self.samples.sentence(*job) if job[0] >= 0 else None for job in part]
        if "text" in self.stage1.modalities:
            raw["text"] = self.stage1.tokenize([s or "" for s in sentences]).to(device)
            present["text"] = torch.tensor([s is not None for s in sentences], device=device)
        rows = torch.tensor([row for row, _ in part])
        drawn = [
            self._sentence_id(s) if s is not None else -1 - row for s, row in zip(sentences, rows.tolist(), strict=True)
        ]
        keys = torch.stack([self._captions[rows], torch.tensor(drawn)], dim=-1)
        batch: Batch = {**raw, "present": present, "caption_keys": keys.to(device)}
        encoded = self.stage1.encode(batch)
        return Features(encoded.modalities, encoded.caption_keys, rows.to(device))

    def _note(self, part: Jobs, faults: Sequence[tuple[int, str, str]]) -> None:
        for position, modality, reason in faults:
            row = part[position][0]
            why = f"{modality} of {self.samples.rows[row].name}: {reason}"
            if (row, modality) not in self._bad:
                log.warning("left out, %s", why)
            self._bad[row, modality] = reason
            self.tolerance.check(len({row for row, _ in self._bad}), len(self), why)

    def _sentence_id(self, sentence: str) -> int:
        """A number that is the same on all processes: part of a hash of the sentence."""
        return int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:7], "big")
