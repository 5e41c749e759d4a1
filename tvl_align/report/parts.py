"""The data of an explorable page: a head, which is JSON, and parts, which are bytes with a name.

A page asks for parts by name. Those of a page in a file are embedded in it; a served page fetches them, each made when it is
asked for. Names: "rank" is an array over all rows, "finds/3" the fourth part of an array that is cut into parts of rows,
"picture.vision/3" a JPEG sheet of the same rows.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tvl_align.evaluation.explore_file import Exploration
from tvl_align.report.pictures import COLUMNS, Pictures, sheet
from tvl_align.report.tables import with_owners

LABELS = {"vision": ("photo", "photos"), "tactile": ("touch image", "touch images"), "text": ("sentence", "sentences")}
SCORE_STEPS = 100  # of a score of 1: a page shows two decimals
NAME = re.compile(r"(?P<array>[^/]+)(/(?P<part>\d{1,9}))?")


class Parts:
    """The parts of a page. rows: in one part. side: of a picture, in pixels."""

    def __init__(self, found: Exploration, pictures: Pictures, rows: int, side: int) -> None:
        self.found, self.pictures, self.rows, self.side = found, pictures, rows, side
        names = [str(m) for m in found.modalities]
        self.whole: dict[str, np.ndarray] = {
            "rank": found.rank.astype(np.int32),
            "first": found.finds[..., 0].astype(np.int32),
            "answers": found.answers.astype(np.int32),
            "present": np.array([found.present[m] for m in names]).astype(np.uint8),
            "labels": np.array([found.labels[f] for f in found.levels]).astype(np.int16),
        }
        self.whole |= {f"map.{key}": at.astype(np.float32) for key, at in found.maps.items()}
        finds = np.where(found.finds < 0, -1, 2 * found.finds.astype(np.int32) + found.right)  # odd: a right one
        self.by_row: dict[str, np.ndarray] = {
            "finds": np.moveaxis(finds, 2, 0).astype(np.int16 if 2 * len(found) < 2**15 else np.int32),
            "scores": np.moveaxis(np.round(found.scores.astype(np.float32) * SCORE_STEPS), 2, 0).astype(np.int8),
        }
        self.by_row |= {f"attention.{m}": _of_largest(x) for m, x in found.attention.items()}

    def __iter__(self) -> Iterator[str]:
        """The names of all parts."""
        yield from self.whole
        for name in (*self.by_row, *(f"picture.{m}" for m in self.pictures.modalities)):
            yield from (f"{name}/{i}" for i in range(-(-len(self.found) // self.rows)))

    def read(self, name: str) -> tuple[bytes, str]:
        """The bytes of a part and their media type. Raises KeyError if there is no such part."""
        parsed = NAME.fullmatch(name)
        if parsed is None:
            raise KeyError(name)
        array, part = parsed["array"], parsed["part"]
        if part is None:
            return self.whole[array].tobytes(), "application/octet-stream"
        rows = range(len(self.found))[int(part) * self.rows : (int(part) + 1) * self.rows]
        if not rows:
            raise KeyError(name)
        modality = array.removeprefix("picture.")
        if modality != array and modality in self.pictures.modalities:
            return sheet([self.pictures.picture(modality, row) for row in rows], self.side), "image/jpeg"
        return self.by_row[array][rows.start : rows.stop].tobytes(), "application/octet-stream"

    def head(self) -> dict[str, Any]:
        """What the page knows from the start: names, shapes and texts."""
        found = self.found
        return {
            "rows": len(found),
            "rowsPerPart": self.rows,
            "sheetColumns": COLUMNS,
            "scoreSteps": SCORE_STEPS,
            "modalities": [self._modality(str(m)) for m in found.modalities],
            "directions": found.directions.tolist(),
            "lengths": found.lengths.tolist(),
            "overlapping": int(found.overlapping),
            "finds": found.finds.shape[-1],
            "lookStep": int(found.look_step),
            "names": found.names.tolist(),
            "captions": found.captions.tolist(),
            "factors": [
                {"name": f, "title": with_owners(f, {"ownership": found.owners[f]}), "levels": levels.tolist()}
                for f, levels in found.levels.items()
            ],
            "maps": [_map(key, share) for key, share in found.variance.items()],
            "arrays": {
                name: {"type": str(array.dtype), "shape": array.shape}
                for arrays in (self.whole, self.by_row)
                for name, array in arrays.items()
            },
        }

    def _modality(self, name: str) -> dict[str, Any]:
        one, several = LABELS.get(name, (name, f"items of {name}"))
        return {"name": name, "one": one, "several": several, "pictures": name in self.pictures.modalities}


def _of_largest(attention: np.ndarray) -> np.ndarray:
    """(Q, N, T) shares -> uint8, 255 for the largest of a register; they are shares again when divided by their sum."""
    x = attention.astype(np.float32)
    return np.round(255 * x / np.maximum(x.max(-1, keepdims=True), 1e-12)).astype(np.uint8)


def _map(key: str, share: Sequence[float] | np.ndarray) -> Mapping[str, Any]:
    group, _, modality = key.partition(".")
    return {"group": group, "modality": modality, "shares": [round(float(x), 4) for x in share]}
