"""Files of further modalities -> inputs of their encoders: pictures (depth, thermal), or whatever an encoder reads itself.

A further modality is any beside vision, tactile and text. Its encoder says what an input is: `size`, `mean` and `std` for
pictures, or `shape` and `transform` for anything else, such as sound or force curves. Inputs are never augmented.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvl_align.data.image_options import Colours
from tvl_align.data.pictures import BadImage
from tvl_align.data.transforms import as_source, whole_picture


@dataclass(frozen=True)
class FurtherInput:
    """Makes the inputs of one further modality. encoder: as in `tvl_align.encoders.own`. bits: of 16-bit grey pictures that
    do not say it themselves, see `tvl_align.data.pictures.inspect_images`.
    """

    encoder: Any
    bits: int = 16

    @property
    def colours(self) -> Colours | None:
        """Mean and standard deviation by which pictures are normalised; None if the inputs are no pictures."""
        return None if hasattr(self.encoder, "transform") else (tuple(self.encoder.mean), tuple(self.encoder.std))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an input, (3, S, S) for pictures."""
        return (3, self.encoder.size, self.encoder.size) if self.colours else tuple(self.encoder.shape)

    def __call__(self, source: Any) -> Tensor:
        """A path, array, tensor, PIL image or the bytes of a file -> an input, float32. Pictures are resized as a whole.

        Raises BadImage, with the reason, for a source that cannot be used.
        """
        if self.colours is not None:
            return whole_picture(as_source(source), self.encoder.size, self.colours, self.bits)
        try:
            made = self.encoder.transform(source)
        except Exception as error:  # of a library that anyone may have chosen
            raise BadImage(_reason(error, source)) from error
        if not isinstance(made, Tensor) or not made.is_floating_point() or made.shape != self.shape:
            what = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise BadImage(f"its transform gives {what}, not floats {self.shape}")
        if not made.isfinite().all():
            raise BadImage("its transform gives numbers that are not finite")
        return made.detach().to("cpu", torch.float32)


def further_inputs(encoders: Mapping[str, Any], bits: Mapping[str, int]) -> dict[str, FurtherInput]:
    """{modality: what makes its inputs}. encoders: of further modalities. bits: see FurtherInput; 16 where not named."""
    return {m: FurtherInput(encoder, bits.get(m, 16)) for m, encoder in encoders.items()}


def _reason(error: Exception, source: Any) -> str:
    """What an error says, without the name of the file, so that reasons can be counted."""
    text = str(error).replace(str(source), "the file") if isinstance(source, str | Path) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"[:160].rstrip(": .")
