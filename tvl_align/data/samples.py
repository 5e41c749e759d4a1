"""A PyTorch data set over the rows of a split: the images and sentences that the encoders take as input.

Views are numbered. View 0 is the plain one; validation and test have no other. Views 1, 2, ... are augmented. The
augmentation of a view depends only on the seed, the name of the row and the number of the view. The order of files, the
number of workers and the number of processes do not change it.
"""

import copy
import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tvl_align.data.further import FurtherInput
from tvl_align.data.image_options import Colours, ImageOptions
from tvl_align.data.pictures import BadImage
from tvl_align.data.split import copies_across, repeats
from tvl_align.data.text import PROMPT, caption_key, evaluation_text, read_synonyms, training_text
from tvl_align.data.transforms import ImageLoader
from tvl_align.data.tvl import PICTURES, Row, TVLData, content_keys, file_of, locate

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
    """One view of a row. images: {modality: (3, S, S)}, of a further modality (its shape). faults: {modality: reason} of
    every file that cannot be used.
    """

    images: dict[str, Tensor]
    faults: dict[str, str]


class Samples(Dataset[Views]):
    """Images and sentences of the rows of a split.

    `samples[row, view]` loads the images of one view. Row -1 has no images. `dropped` counts the rows that the reader of the
    data folder removed, by reason. `content_keys` {modality: (N,) int64}: rows with the same key have the same file; a
    modality whose files all differ is not in it. pictures: {path: key of its content}; default: all files differ. further:
    {further modality: what makes its inputs}; they are not augmented, so all views of a row are the same.
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
        further: Mapping[str, FurtherInput] | None = None,
    ) -> None:
        self.root, self.rows, self.text, self.seed = root, list(rows), text, seed
        self.images, self.dropped = ImageLoader(root, images), dict(dropped or {})
        self.further = dict(further or {})
        self.loaded: tuple[str, ...] = (*PICTURES, *self.further)
        keys = content_keys(self.rows, pictures) if pictures else {}
        self.content_keys = {m: torch.from_numpy(column) for m, column in keys.items() if repeats(column)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: tuple[int, int]) -> Views:
        row, view = index
        if row < 0:
            return Views({}, {})
        images: dict[str, Tensor] = {}
        faults: dict[str, str] = {}
        if not set(PICTURES).isdisjoint(self.loaded):  # both: the touch image's random draws come after the photo's
            images, faults = self.images(self.rows[row], self._view_seed(row, view, "picture") if view else None)
        for modality, path in self.rows[row].more.items():
            if modality in self.loaded:
                try:
                    images[modality] = self.further[modality](file_of(self.root, path))
                except BadImage as error:
                    faults[modality] = str(error)
        return Views(images, faults)

    def only(self, modalities: Iterable[str]) -> "Samples":
        """These samples, whose views have no images of other modalities; photo and touch image are loaded together."""
        result = copy.copy(self)
        result.loaded = tuple(m for m in self.loaded if m in set(modalities))
        return result

    def colours(self, modality: str) -> Colours:
        """The numbers by which the pictures of a modality are normalised."""
        further = self.further[modality].colours if modality in self.further else None
        return further or self.images.options.colours(modality)

    @property
    def view_bytes(self) -> int:
        """Bytes of the images of a row that has all modalities."""
        options = self.images.options
        pixels = options.photo_size**2 + options.touch_frames * options.touch_size**2
        pictures = 0 if set(PICTURES).isdisjoint(self.loaded) else 3 * pixels
        further = sum(math.prod(self.further[m].shape) for m in self.loaded if m in self.further)
        return torch.float32.itemsize * (pictures + further)

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
        return view_seed(self.seed, purpose, self.rows[row].name, view)


def view_seed(seed: int, purpose: str, name: str, view: int) -> int:
    """The seed of an augmented view of a row, by its name. purpose: "picture" or "text"."""
    return random.Random(f"{seed}|{purpose}|{name}|{view}").getrandbits(62)


def make_samples(
    data: TVLData, images: ImageOptions, text: TextOptions, seed: int, further: Mapping[str, FurtherInput] | None = None
) -> dict[str, Samples]:
    """The samples of the splits train, val and test. `seed` determines the augmented views. further: see Samples.

    Rows with the same picture as another row are counted in the log, those of the test split and of training as well.
    """
    rows = {name: data.split(name) for name in ("train", "val", "test")}
    every = [row for split in rows.values() for row in split]
    shared = images, text, seed, data.dropped, data.pictures, further
    made = {name: Samples(data.root, split, *shared) for name, split in rows.items()}
    for name, samples in made.items():
        for modality, keys in samples.content_keys.items():
            log.warning("%s: %d rows repeat the %s of another row", name, repeats(keys.numpy()), modality)
    touched = [row for row in every if row.tactile is not None] if images.touch_frames > 1 else []
    if alone := sum(row.earlier is None or not images.earlier_touch for row in touched):
        what = "%d of %d touch images have no earlier frame: the present one stands for it"
        log.warning(what, alone, len(touched))
    sides = ["test" if name == "test" else "train and val" for name, split in rows.items() for _ in split]
    across = copies_across(content_keys(every, data.pictures), sides)
    if across:
        log.warning("%d rows have a picture that is on both sides of the test split", across)
    return made
