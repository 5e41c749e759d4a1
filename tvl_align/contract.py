"""Data types: Batch -> (frozen encoders) -> Features -> (model of a method) -> Output -> (its loss) -> named scalars.

Shape legend, used in docstrings and as suffixes of variable names:

    B  samples in a batch          T  key tokens of a modality      W  width of a modality's tokens
    E  width of pooled features    N  registers, No overlapping + Nc complementary = N
    D  register width              V  views of a training row, beside the plain one
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

MODALITIES = ("vision", "tactile", "text")
Batch = Mapping[str, Any]
"""Raw inputs: {"vision": (B, 3, S, S), "tactile": (B, 3, S', S') normalised floats, "text": B sentences, or (B, L) int64
token ids}; optionally "present": {modality: (B,) bool} and "caption_keys": (B, K) int64. Without "present" every row has
every modality. Without "caption_keys" two rows have the same caption if their token ids are equal."""


@dataclass(frozen=True)
class Tokens:
    """Frozen features of one modality.

    tokens (B, T, W) float; mask (B, T) bool, False = padding; pooled (B, E) float, L2-normalised; present (B,) bool,
    False = the row lacks this modality and its features are undefined. condensed: tokens are what Stage2Model.condense has
    made of them, (B, 1, C), and pooled is empty.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    present: Tensor
    condensed: bool = False

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """Apply a function to every tensor."""
        tokens, mask, pooled, present = (function(t) for t in (self.tokens, self.mask, self.pooled, self.present))
        return Tokens(tokens, mask, pooled, present, self.condensed)

    def float(self) -> "Tokens":
        """Convert tokens and pooled to float32."""
        return replace(self, tokens=self.tokens.float(), pooled=self.pooled.float())


@dataclass(frozen=True)
class Features:
    """One batch of frozen features.

    caption_keys (B, K) int64: rows that are equal in any column have the same text, and are positives of each other in pairs
    with text. Column 0 identifies the caption of the row, column 1 the augmented sentence. rows (B,) int64: indices of the
    rows in their split; -1 marks a padding row. content_keys {modality: (B,) int64}: rows that are equal have the same
    content in that modality, such as the same picture, and are positives of each other in pairs with it; in a modality that
    is not in it all rows differ. augmented {modality: (B,) bool}: rows that show an augmented picture, in which some of what
    is unique was drawn at random; a modality that is not in it has none. Other sentences of a row are not augmented.
    """

    modalities: dict[str, Tokens]
    caption_keys: Tensor
    rows: Tensor
    content_keys: dict[str, Tensor] = field(default_factory=dict)
    augmented: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Features":
        """Apply a function to every tensor."""
        tokens = {name: m.map(function) for name, m in self.modalities.items()}
        content = {name: function(keys) for name, keys in self.content_keys.items()}
        augmented = {name: function(rows) for name, rows in self.augmented.items()}
        return Features(tokens, function(self.caption_keys), function(self.rows), content, augmented)

    def tensors(self) -> list[Tensor]:
        """All its tensors."""
        found = [self.caption_keys, self.rows, *self.content_keys.values(), *self.augmented.values()]
        return found + [t for m in self.modalities.values() for t in (m.tokens, m.mask, m.pooled, m.present)]

    def to(self, device: torch.device | str) -> "Features":
        """Copy to a device, asynchronously from pinned memory."""
        return self.map(lambda t: t.to(device, non_blocking=True))

    def float(self) -> "Features":
        """Convert tokens and pooled features to float32."""
        return replace(self, modalities={name: m.float() for name, m in self.modalities.items()})

    def only(self, names: Iterable[str]) -> "Features":
        """Keep only the named modalities."""
        return replace(self, modalities={name: self.modalities[name] for name in names if name in self.modalities})


@dataclass(frozen=True)
class Reconstruction:
    """Error of the frozen tokens reconstructed from the registers.

    error (B, T): mean squared error to the frozen token, standardised over its width; predicting 0 gives 1.
    mask (B, T) bool, False = padding. The reconstructed tokens are not stored: they are as large as the input.
    """

    error: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Output:
    """Output of a model. Entries are attributes and can also be read by name: `output["register_tokens"]`.

    overlapping_tokens: {modality: (B, No, D)}; dropped registers are zero. complementary_tokens: {modality: (B, Nc, D)}.
    stage1_features: {modality: (B, E)}, the frozen pooled features. logit_scale: (), already exponentiated and clamped;
    default: its start in CLIP. present: {modality: (B,) bool}; a modality that is not in it is present in all rows.
    caption_keys: (B, K) int64; empty: all captions differ. register_tokens: (B, N, D), registers that attend to all present
    modalities jointly; None if `joint` is False. nested_dropout_mask: (B, N) bool, True = kept; None in evaluation.
    reconstruction: {modality: Reconstruction}, empty if the method does not reconstruct. features: the input of the model,
    which a loss must not use. extras: entries a method adds for its own loss or for inspection. content_keys: {modality:
    (B,) int64} and augmented: {modality: (B,) bool}, by default those of `features`.
    """

    overlapping_tokens: dict[str, Tensor]
    complementary_tokens: dict[str, Tensor]
    stage1_features: dict[str, Tensor]
    logit_scale: Tensor = field(default_factory=lambda: torch.tensor(1 / 0.07))
    present: dict[str, Tensor] = field(default_factory=dict)
    caption_keys: Tensor = field(default_factory=lambda: torch.empty(0, 1, dtype=torch.int64))
    register_tokens: Tensor | None = None
    nested_dropout_mask: Tensor | None = None
    reconstruction: dict[str, Reconstruction] = field(default_factory=dict)
    features: Features | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    content_keys: dict[str, Tensor] = field(default_factory=dict)
    augmented: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.features is not None and not self.content_keys:
            object.__setattr__(self, "content_keys", self.features.content_keys)
        if self.features is not None and not self.augmented:
            object.__setattr__(self, "augmented", self.features.augmented)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return self.extras[name] if name in self.extras else getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (this defines get)

    def keys(self) -> list[str]:
        """Names of the entries that are not None, including extras."""
        own = [f.name for f in fields(self) if f.name != "extras" and getattr(self, f.name) is not None]
        return [*own, *self.extras]

    def float(self) -> "Output":
        """Convert all entries to float32, except `features`, which a loss does not use."""
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
    """Shape of the features of one modality: W (width), T (tokens) and E (pooled_width). A model is built from these."""

    width: int
    tokens: int
    pooled_width: int


@dataclass(frozen=True)
class Implementation:
    """Name and version of a method, written to run folders, tables and (`tag`) log lines."""

    experiment_id: str
    version: str
    tag: str


@runtime_checkable
class Stage2Model(Protocol):
    """Interface of a model for the training loop, in addition to nn.Module. Inherit from it to get the defaults:
    `class MyModel(nn.Module, Stage2Model)`.

    registers: (N, D), the learnable queries. forward: raw inputs or features -> Output. kept: (B, N) bool, nested-dropout
    mask; None: drawn in training, all kept in evaluation. joint: also compute `register_tokens`.
    """

    registers: torch.nn.Parameter

    def forward(self, batch: Batch | Features, kept: Tensor | None = None, joint: bool = True) -> Output: ...

    def draw_kept(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw a nested-dropout mask for training: (batch, N) bool, True = kept. Default: every register is kept."""
        return torch.ones(batch, len(self.registers), dtype=torch.bool)

    def calibrate(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Fit the parts of the model that have a closed-form solution, such as PCA or CCA. Default: nothing.

        The engine calls this once, before the first epoch, without gradients. Each call of `batches` iterates over the
        training rows.
        """
        return None

    def condense(self, name: str, tokens: Tokens) -> Tensor | None:
        """All that the model reads of a modality's tokens, (B, C) float32, if that is less; default: None, the tokens.

        It must depend on nothing that is trained. The engine calls it after `calibrate`, once for every stored row, keeps
        the result in memory and gives it to `forward` as Tokens with `condensed` set.
        """
        return None


@dataclass(frozen=True)
class Method:
    """A Stage-2 method: options, model and loss.

    knobs: frozen dataclass of options, a subclass of tvl_align.registers.model.RegisterConfig. model(knobs, specs): returns
    an nn.Module that is a Stage2Model. loss(knobs, modalities): returns a module that maps Output to named scalars,
    including `total_loss` and `overlapping_loss`. recordable: a training step depends on nothing but its batch, the weights
    and random numbers of the GPU, and reads no value of a tensor, so that a GPU may record its kernels once and replay them
    without Python.
    """

    implementation: Implementation
    knobs: type
    model: Callable[[Any, Mapping[str, FeatureSpec]], torch.nn.Module]
    loss: Callable[[Any, Sequence[str]], torch.nn.Module]
    recordable: bool = False
