"""What flows through the project: Batch -> (frozen encoders) -> Features -> (a method) -> Output -> (its loss) -> numbers.

Shape legend, used as suffixes and in docstrings everywhere:

    B  samples in a batch          T  key tokens of a modality      W  width of a modality's tokens
    E  width of pooled features    N  registers, No overlapping + Nc complementary = N
    D  register width              V  augmented views of a training row
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

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


@dataclass(frozen=True)
class Reconstruction:
    """How well a decoder rebuilt the frozen tokens from the registers.

    error (B, T): mean squared difference to the token, standardised over its width, so that 1 means "nothing was kept".
    mask (B, T) bool, True = a real token. The rebuilt tokens themselves, as large as what the model read, are not held.
    """

    error: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Output:
    """What a method's model returns. An entry is an attribute, or is read by name: `output["register_tokens"]`.

    overlapping_tokens: {modality: (B, No, D)}, dropped registers zero. complementary_tokens: {modality: (B, Nc, D)}.
    stage1_features: {modality: (B, E)}, the frozen pooled features. logit_scale: (), already exponentiated and clamped.
    present: {modality: (B,) bool}. caption_keys: (B, K) int64. register_tokens: (B, N, D), registers that attend to all
    present modalities at once; None where they were not asked for. nested_dropout_mask: (B, N) bool, True = kept; None in
    evaluation. reconstruction: {modality: Reconstruction}, empty where the method rebuilds nothing. features: what the model
    read; no loss may use it. extras: what a method adds for its own loss or for inspection.
    """

    overlapping_tokens: dict[str, Tensor]
    complementary_tokens: dict[str, Tensor]
    stage1_features: dict[str, Tensor]
    logit_scale: Tensor
    present: dict[str, Tensor]
    caption_keys: Tensor
    register_tokens: Tensor | None = None
    nested_dropout_mask: Tensor | None = None
    reconstruction: dict[str, Reconstruction] = field(default_factory=dict)
    features: Features | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return self.extras[name] if name in self.extras else getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (this is get)

    def keys(self) -> list[str]:
        """Names of the entries there are, extras included."""
        own = [f.name for f in fields(self) if f.name != "extras" and getattr(self, f.name) is not None]
        return [*own, *self.extras]

    def float(self) -> "Output":
        """Every entry that a loss reads in float32, whatever the precision it was computed in."""
        parts = {f.name: _float(getattr(self, f.name)) for f in fields(self) if f.name != "features"}
        return replace(self, **parts)


def _float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, Reconstruction):
        return replace(value, error=value.error.float())
    if isinstance(value, Mapping):
        return {name: _float(x) for name, x in value.items()}
    return value


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


@runtime_checkable
class Stage2Model(Protocol):
    """What the engine asks of a model beside being an nn.Module. Inherit it for the defaults:
    `class Mine(nn.Module, Stage2Model)`.

    registers: (N, D), the learnable queries. forward: raw inputs or features -> Output; kept (B, N) bool is the
    nested-dropout mask (None: drawn in training, all kept in evaluation); joint: compute `register_tokens` too.
    """

    registers: torch.nn.Parameter

    def forward(self, batch: Batch | Features, kept: Tensor | None = None, joint: bool = True) -> Output: ...

    def draw_kept(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """(B, N) bool: a nested-dropout mask for training. By default every register is kept."""
        return torch.ones(batch, len(self.registers), dtype=torch.bool)

    def calibrate(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Fit closed forms on the batches of training rows that each call of `batches` yields; called after every epoch,
        without gradients. By default there are none."""


@dataclass(frozen=True)
class Method:
    """An approach to Stage 2.

    knobs: frozen dataclass of its options, a tvl_align.registers.model.RegisterConfig. model(knobs, specs): an nn.Module
    that is a Stage2Model. loss(knobs, modalities): a module, Output -> named scalars, among them `total_loss` and
    `overlapping_loss`.
    """

    implementation: Implementation
    knobs: type
    model: Callable[[Any, Mapping[str, FeatureSpec]], torch.nn.Module]
    loss: Callable[[Any, Sequence[str]], torch.nn.Module]
