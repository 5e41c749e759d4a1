"""Rows of a split -> what encoders take: images, sentences, masks. Used to fill a store and to encode on the fly.

A view is a number: 0 is plain (and the only one of validation and test), 1, 2, ... are augmented, each drawn from the
seed, the row's name and the view alone. Neither the order of files, nor workers, nor processes change a draw.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tvl_align.data.text import PROMPT, caption_key, evaluation_text, read_synonyms, training_text
from tvl_align.data.transforms import ImageLoader, ImageOptions
from tvl_align.data.tvl import Row, TVLData, locate


@dataclass(frozen=True)
class TextOptions:
    """Everything that shapes sentences."""

    prompt: str = PROMPT
    shuffle: bool = False
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)


def find_synonyms(root: Path, keep: int | None) -> dict[str, list[str]]:
    return read_synonyms(locate(root, "ssvtp") / "synonyms.json", keep)


@dataclass(frozen=True)
class Views:
    """The images of one view of a row, and {modality: reason} for those that cannot be used."""

    images: dict[str, Tensor]
    faults: dict[str, str]


class Samples(Dataset[Views]):
    """The images and sentences of some rows. Indexing with (row, view) loads the images of a view; row -1 has none.

    dropped: rows that the reader of the data folder left out, by reason.
    """

    def __init__(
        self,
        root: Path,
        rows: Sequence[Row],
        images: ImageOptions,
        text: TextOptions,
        seed: int,
        dropped: Mapping[str, int] | None = None,
    ) -> None:
        self.root, self.rows, self.text, self.seed = root, list(rows), text, seed
        self.images, self.dropped = ImageLoader(root, images), dict(dropped or {})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, job: tuple[int, int]) -> Views:
        row, view = job
        if row < 0:
            return Views({}, {})
        return Views(*self.images(self.rows[row], self._draw(row, view, "picture") if view else None))

    def sentence(self, row: int, view: int) -> str | None:
        """The sentence of a view; None where the row has no caption."""
        caption = self.rows[row].caption
        if caption is None:
            return None
        if not view:
            return evaluation_text(caption, self.text.prompt)
        rng = random.Random(self._draw(row, view, "text"))
        return training_text(caption, self.text.prompt, rng, self.text.shuffle, self.text.synonyms)

    def caption_ids(self) -> Tensor:
        """(N,) int64: equal for rows whose captions say the same; rows without a caption are equal to none."""
        known: dict[str, int] = {}
        keys = [caption_key(r.caption) if r.caption else f"\0{i}" for i, r in enumerate(self.rows)]
        return torch.tensor([known.setdefault(key, len(known)) for key in keys], dtype=torch.int64)

    def _draw(self, row: int, view: int, what: str) -> int:
        return random.Random(f"{self.seed}|{what}|{self.rows[row].name}|{view}").getrandbits(62)


def make_samples(data: TVLData, images: ImageOptions, text: TextOptions, seed: int) -> dict[str, Samples]:
    splits = ("train", "val", "test")
    return {name: Samples(data.root, data.split(name), images, text, seed, data.dropped) for name in splits}
