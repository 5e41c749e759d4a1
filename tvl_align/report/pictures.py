"""Pictures of test rows as they are shown: framed as the encoders see them, small, many on one JPEG sheet."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tvl_align.data.image_options import ImageOptions
from tvl_align.data.pictures import BadImage, framed_photo, framed_touch, open_picture
from tvl_align.data.tvl import Row, file_of
from tvl_align.evaluation.explore_file import Exploration

COLUMNS = 10  # of a sheet
QUALITY = 82  # of JPEG
BLANK = (232, 232, 228)  # of a row without a picture


class Pictures:
    """The pictures of the rows of an exploration. modalities: those that have any that can be shown, in a data folder that
    exists. options: crops, rotation and bits; None: the defaults."""

    def __init__(self, found: Exploration, root: Path, options: ImageOptions | None) -> None:
        self.found, self.root, self.options = found, root, options or ImageOptions()
        self.modalities = [str(m) for m in found.modalities if m in found.files and self._shows(str(m))]

    def _shows(self, modality: str) -> bool:
        first = next((i for i, path in enumerate(self.found.files[modality]) if path), None)
        return first is not None and self.picture(modality, first) is not None

    def picture(self, modality: str, row: int) -> np.ndarray | None:
        """(H, W, 3) uint8, the part that the encoder sees; None for a row without a picture that can be used."""
        paths = {m: str(files[row]) or None for m, files in self.found.files.items()}
        if not (path := paths.get(modality)):
            return None
        named = Row(str(self.found.datasets[row]), paths.get("vision"), paths.get("tactile"), None, None, "")
        bits = {"vision": self.options.photo_bits, "tactile": self.options.touch_bits}
        try:
            pixels = open_picture(file_of(self.root, path), bits.get(modality, self.options.more_bits.get(modality, 16)))
            if modality == "vision":
                return framed_photo(pixels, self.options, named)
            return framed_touch(pixels, self.options) if modality == "tactile" else pixels
        except BadImage:
            return None


def sheet(pictures: Sequence[np.ndarray | None], side: int, columns: int = COLUMNS) -> bytes:
    """Pictures (H, W, 3) uint8 as one JPEG, row by row, each padded to a square of `side` pixels; None: blank."""
    lines = -(-len(pictures) // columns)
    whole = Image.new("RGB", (side * min(columns, len(pictures)), side * lines), BLANK)
    for i, pixels in enumerate(pictures):
        if pixels is not None:
            small = ImageOps.pad(Image.fromarray(pixels), (side, side), Image.Resampling.LANCZOS)
            whole.paste(small, (side * (i % columns), side * (i // columns)))
    buffer = io.BytesIO()
    whole.save(buffer, format="jpeg", quality=QUALITY)
    return buffer.getvalue()
