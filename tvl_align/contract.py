"""What flows through the project: Batch -> (frozen encoders) -> Features -> (a method) -> Output -> (its loss) -> numbers.

Shape legend, used as suffixes and in docstrings everywhere:

    B  samples in a batch          T  key tokens of a modality      W  width of a modality's tokens
    E  width of pooled features    N  registers, No overlapping + Nc complementary = N
    D  register width              V  augmented views of a training row
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MODALITIES = ("vision", "tactile", "text")

Batch = Mapping[str, Any]
"""Raw inputs: {"vision": (B, 3, S, S), "tactile": (B, 3, S', S'), "text": (B, L) int64 token ids}; optionally
"present": {modality: (B,) bool} and "caption_keys": (B, K) int64. Without them every row is present and rows are equal
in text when their token ids are."""


@dataclass(frozen=True)
class Tokens:
    """Frozen features of one modality.

    tokens (B, T, W) float; mask (B, T) bool, True = a real token; pooled (B, E) float, L2-normalised;
    present (B,) bool, False = the row lacks this modality and its numbers mean nothing.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    present: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        return Tokens(*(change(t) for t in (self.tokens, self.mask, self.pooled, self.present)))

    def float(self) -> "Tokens":
        """Half-precision storage -> float32 for computing."""
        return replace(self, tokens=self.tokens.float(), pooled=self.pooled.float())


@dataclass(frozen=True)
class Features:
    """One batch of frozen features.

    caption_keys (B, K) int64: two rows that agree in any column say the same in words, and are positives of each other
    wherever text is one of the pair (column 0 the caption of the row, column 1 the sentence that was drawn from it).
    rows (B,) int64: where the rows stand in their split.
    """

    modalities: dict[str, Tokens]
    caption_keys: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Features":
        tokens = {name: m.map(change) for name, m in self.modalities.items()}
        return Features(tokens, change(self.caption_keys), change(self.rows))

    def to(self, device: torch.device | str) -> "Features":
        return self.map(lambda t: t.to(device, non_blocking=True))

    def float(self) -> "Features":
        return replace(self, modalities={name: m.float() for name, m in self.modalities.items()})

    def only(self, names: Iterable[str]) -> "Features":
        return replace(self, modalities={name: self.modalities[name] for name in names if name in self.modalities})


Output = dict[str, Any]
"""What a method's model returns:

    overlapping_tokens    {modality: (B, No, D)}   dropped registers are zero
    complementary_tokens  {modality: (B, Nc, D)}
    register_tokens       (B, N, D)                registers attending to all present modalities at once
    stage1_features       {modality: (B, E)}       the frozen pooled features
    nested_dropout_mask   (B, N) bool              True = kept; training only
    logit_scale           ()                       already exponentiated and clamped
    present               {modality: (B,) bool}
    caption_keys          (B, K) int64
    reconstruction        {modality: Reconstruction}   where the method preserves information
    features              Features                 what the model read; no loss may use it

A method may add entries of its own; it never changes the meaning of these.
"""


@dataclass(frozen=True)
class Reconstruction:
    """How well a decoder rebuilt the frozen tokens from the registers.

    error (B, T): mean squared difference to the token, standardised over its width, so that 1 means "nothing was kept".
    mask (B, T) bool, True = a real token. The rebuilt tokens themselves, as large as what the model read, are not held.
    """

    error: Tensor
    mask: Tensor


@dataclass(frozen=True)
class FeatureSpec:
    """The shape of a modality's features, all a method needs to know to be built."""

    width: int
    tokens: int
    pooled_width: int


@dataclass(frozen=True)
class Implementation:
    """Which approach made a run: written into every run folder, log line and table."""

    experiment_id: str
    version: str
    tag: str


@dataclass(frozen=True)
class Method:
    """An approach, as the list METHODS holds it.

    knobs: frozen dataclass of its options. model(knobs, specs) -> module: (Features, kept, joint) -> Output.
    loss(knobs, modalities) -> module: Output -> named scalars with `total_loss` and `overlapping_loss`.
    """

    implementation: Implementation
    knobs: type
    model: Callable[[Any, Mapping[str, FeatureSpec]], torch.nn.Module]
    loss: Callable[[Any, Sequence[str]], torch.nn.Module]
