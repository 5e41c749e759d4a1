"""A PyTorch data set over the rows of a split: the images and sentences that the encoders take as input.

Views are numbered. View 0 is the plain one; validation and test have no other. Views 1, 2, ... are augmented. The
augmentation of a view depends only on the seed, the name of the row and the number of the view. The order of files, the
number of workers and the number of processes do not change it.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tvl_align.data.split import copies_across, repeats, row_keys
from tvl_align.data.text import PROMPT, caption_key, evaluation_text, read_synonyms, training_text
from tvl_align.data.transforms import ImageLoader, ImageOptions
from tvl_align.data.tvl import Row, TVLData, locate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextOptions:
    """Options of the sentences: the prompt before the adjectives, random order, {word: synonyms} for random replacement."""

    prompt: str = PROMPT
    shuffle: bool = False
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)


def find_synonyms(root: Path, keep: int | None) -> dict[str, list[str]]:
    """Read `ssvtp/synonyms.json` of the data folder `root`: {word: its first `keep` synonyms}, {} without the file."""
    return read_synonyms(locate(root, "ssvtp") / "synonyms.json", keep)


@dataclass(frozen=True)
class Views:
    """One view of a row. images: {modality: (3, S, S)}. faults: {modality: reason} of every image that cannot be used."""

    images: dict[str, Tensor]
    faults: dict[str, str]


class Samples(Dataset[Views]):
    """Images and sentences of the rows of a split.

    `samples[row, view]` loads the images of one view. Row -1 has no images. `dropped` counts the rows that the reader of the
    data folder removed, by reason. `content_keys` {modality: (N,) int64}: rows with the same key have the same picture; a
    modality whose pictures all differ is not in it. pictures: {path: key of its content}; default: all pictures differ.
    """

    def __init__(
        self,
        root: Path,
        rows: Sequence[Row],
        images: ImageOptions,
        text: TextOptions,
        seed: int,
        dropped: Mapping[str, int] | None = None,
        pictures: Mapping[str, int] | None = None,
    ) -> None:
        self.root, self.rows, self.text, self.seed = root, list(rows), text, seed
        self.images, self.dropped = ImageLoader(root, images), dict(dropped or {})
        keys = picture_keys(self.rows, pictures) if pictures else {}
        self.content_keys = {m: torch.from_numpy(column) for m, column in keys.items() if repeats(column)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: tuple[int, int]) -> Views:
        row, view = index
        if row < 0:
            return Views({}, {})
        return Views(*self.images(self.rows[row], self._view_seed(row, view, "picture") if view else None))

    def sentence(self, row: int, view: int) -> str | None:
        """The sentence of a view, None if the row has no caption."""
        caption = self.rows[row].caption
        if caption is None:
            return None
        if not view:
            return evaluation_text(caption, self.text.prompt)
        rng = random.Random(self._view_seed(row, view, "text"))
        return training_text(caption, self.text.prompt, rng, self.text.shuffle, self.text.synonyms)

    def caption_ids(self) -> Tensor:
        """(N,) int64. Rows with the same set of adjectives share an id; a row without a caption has an id of its own."""
        ids: dict[str, int] = {}
        keys = [caption_key(r.caption) if r.caption else f"\0{i}" for i, r in enumerate(self.rows)]
        return torch.tensor([ids.setdefault(key, len(ids)) for key in keys], dtype=torch.int64)

    def _view_seed(self, row: int, view: int, purpose: str) -> int:
        return random.Random(f"{self.seed}|{purpose}|{self.rows[row].name}|{view}").getrandbits(62)


def picture_keys(rows: Sequence[Row], pictures: Mapping[str, int]) -> dict[str, np.ndarray]:
    """{"vision": (N,) int64, "tactile": (N,)}: rows with the same key have the same picture. pictures: {path: key}."""
    paths = {"vision": [row.vision for row in rows], "tactile": [row.tactile for row in rows]}
    return {m: row_keys(None if path is None else pictures[path] for path in column) for m, column in paths.items()}


def make_samples(data: TVLData, images: ImageOptions, text: TextOptions, seed: int) -> dict[str, Samples]:
    """The samples of the splits train, val and test. `seed` determines the augmented views.

    Rows with the same picture as another row are counted in the log, those of the test split and of training as well.
    """
    rows = {name: data.split(name) for name in ("train", "val", "test")}
    every = [row for split in rows.values() for row in split]
    made = {name: Samples(data.root, split, images, text, seed, data.dropped, data.pictures) for name, split in rows.items()}
    for name, samples in made.items():
        for modality, keys in samples.content_keys.items():
            log.warning("%s: %d rows repeat the %s of another row", name, repeats(keys.numpy()), modality)
    sides = ["test" if name == "test" else "train and val" for name, split in rows.items() for _ in split]
    across = copies_across(picture_keys(every, data.pictures), sides)
    if across:
        log.warning("%d rows have a picture that is on both sides of the test split", across)
    return made
