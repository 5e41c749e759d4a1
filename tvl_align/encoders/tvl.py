"""The frozen Stage-1 encoders: OpenCLIP for vision and text, a timm model for touch, loaded from a TVL checkpoint.

An encoder of one's own (tvl_align.encoders.own) takes the place of any of the three, and encodes further modalities.

Checkpoints are loaded strictly: a missing or unexpected key is an error that names the key, so no weight stays random.

Each encoder gives L2-normalised pooled features (B, E) and a token sequence (B, T, W), both from `forward_intermediates` of
its library. For images the sequence is the pooled token, then the patch grid average-pooled to at most 4 x 4 in row-major
order. For text it is the tokens up to and including the end token. Encoders compute in float32, bf16 or fp16, and give
float32.
"""

import argparse
import copy
import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import timm
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import Tensor, nn

from tvl_align.config import Ignored
from tvl_align.contract import MODALITIES, Batch, Features, FeatureSpec, Tokens
from tvl_align.encoders.names import one_each
from tvl_align.encoders.small import register_small_clip, touch_overrides
from tvl_align.system.checkpoint import check_weights, load_safely
from tvl_align.system.console import UserError

CLIP_VISION_MODEL = "ViT-L-14"
CLIP_PRETRAIN_DATA = "datacomp_xl_s13b_b90k"
TOUCH_MODELS = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "resnet18": "resnet18",
}
ARGUMENTS = {  # what is read of the `args` of a checkpoint
    **dict.fromkeys(("tactile_model", "clip_vision_model", "clip_pretrain_data"), str),
    "common_latent_dim": int,
    "tactile_overrides": dict,
}
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before the names of weights
# An unknown weight of these parts is an error; others, such as further heads, are ignored.
OWN_PARTS = ("clip.", "tactile_encoder.", *(f"modality_heads.{m}." for m in MODALITIES))
log = logging.getLogger(__name__)
PANGRAM = "The quick brown fox jumps over the lazy dog, 0123456789."  # its token ids identify a tokenizer
GRID = 4  # side of the average-pooled patch grid
FILE_ENCODERS = ("timm", "open_clip", "hf", "st", "anytouch", "sparsh")  # encoders whose name may end with a path
FeatureKind = Literal["tokens", "pooled"]
Precision = Literal["float32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PrecisionOption = Literal["auto", "float32", "bf16", "fp16"]


@dataclass(frozen=True)
class Stage1Config:
    """The frozen encoders."""

    stage1_checkpoint: Path | None = None
    """TVL checkpoint (.pth) with the touch encoder; required unless --store or an encoder for every modality is given."""
    tactile_model: str = "vit_tiny_patch16_224"
    """Touch encoder of the checkpoint: vit_tiny_patch16_224, vit_small_patch16_224, vit_base_patch16_224 or resnet18."""
    common_latent_dim: int | None = None
    """Width of Stage 1's common latent space, if it has one; default: the value in the checkpoint."""
    clip_vision_model: str | None = None
    """OpenCLIP model; default: the model named in the checkpoint, else ViT-L-14."""
    clip_pretrain_data: str | None = None
    """OpenCLIP weights, a tag or a local file; default: those named in the checkpoint, else datacomp_xl_s13b_b90k."""
    features: FeatureKind = "tokens"
    """Input of the registers: the token sequence or the one pooled vector of each modality."""
    vision_encoder: str | None = None
    """Encoder of one's own for photos: timm:NAME, timm:NAME:FILE, open_clip:NAME:TAG_OR_FILE, hf:NAME_OR_FOLDER, or
    package.module:NAME; default: TVL's."""
    tactile_encoder: str | None = None
    """Encoder of one's own for touch images: as for photos, anytouch:FILE or sparsh:FILE; default: TVL's."""
    text_encoder: str | None = None
    """Encoder of one's own for sentences: open_clip:NAME:TAG_OR_FILE, hf:NAME_OR_FOLDER, st:NAME_OR_FOLDER
    (sentence-transformers), or package.module:NAME; default: TVL's."""
    more_encoders: tuple[str, ...] | None = None
    """Encoders of further modalities: depth=timm:NAME audio=package.module:NAME ..., as for photos."""
    encode_precision: PrecisionOption = "auto"
    """Precision of the encoders: float32, bf16 (autocast), or fp16 (weights in half precision); auto: bf16 on a GPU, float32
    on a CPU. A run keeps the one that its features were computed in."""
    enable_flash_attention2: tyro.conf.Suppress[Annotated[bool, Ignored("PyTorch's fused attention is always used")]] = False

    def __post_init__(self) -> None:
        for option in ("vision_encoder", "tactile_encoder", "text_encoder"):
            if (name := getattr(self, option)) is not None:
                object.__setattr__(self, option, _with_absolute_path(name))
        if self.more_encoders is not None:
            named = one_each("more_encoders", self.more_encoders)
            object.__setattr__(self, "more_encoders", tuple(f"{m}={_with_absolute_path(x)}" for m, x in named.items()))

    def encoder_of(self, modality: str) -> str | None:
        """The encoder of one's own of a modality; None if there is none."""
        own = {"vision": self.vision_encoder, "tactile": self.tactile_encoder, "text": self.text_encoder}
        return (own | one_each("more_encoders", self.more_encoders)).get(modality)


def _with_absolute_path(encoder: str) -> str:
    """The name of an encoder; a path at its end becomes absolute, so that a run can be loaded from any folder."""
    before, colon, file = encoder.rpartition(":")
    if before.partition(":")[0] in FILE_ENCODERS and Path(file).exists():
        return f"{before}{colon}{Path(file).resolve()}"
    return encoder


def touch_model_name(name: str) -> str:
    """The timm name of a touch model, given in its short or long form. Raises UserError for any other name."""
    full = TOUCH_MODELS.get(name, name)
    if full not in TOUCH_MODELS.values():
        raise UserError(f"unknown touch model {name!r}: --tactile_model takes {', '.join(TOUCH_MODELS.values())}.")
    return full


class Stage1(nn.Module):
    """The vision, touch and text encoders of Stage 1.

    clip: an OpenCLIP model. tokenizer: its tokenizer. tactile_encoder: a timm model. common_latent_dim: width of a linear
    head per modality on top of the pooled features, None for no heads. features: "tokens", or "pooled" for sequences that
    consist of the pooled vector only. modalities: those that `encode` computes. own: {modality: encoder} of encoders that
    take the place of TVL's, and of those of further modalities, see tvl_align.encoders.own; where each modality has one, the
    first three are None. encode_precision: see `precision`. Raises UserError for a modality without an encoder.
    """

    clip: Any  # torch types the attributes of a submodule as Tensor | Module
    tactile_encoder: Any

    def __init__(
        self,
        clip: nn.Module | None,
        tokenizer: Any,
        tactile_encoder: nn.Module | None,
        common_latent_dim: int | None = None,
        features: FeatureKind = "tokens",
        modalities: Sequence[str] = MODALITIES,
        own: Mapping[str, nn.Module] | None = None,
        encode_precision: PrecisionOption = "float32",
    ) -> None:
        super().__init__()
        self.clip, self.tokenizer, self.tactile_encoder = clip, tokenizer, tactile_encoder
        self.features, self.modalities, self.encode_precision = features, tuple(modalities), encode_precision
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1 / 0.07), the initial value of CLIP
        heads: dict[str, nn.Module] = {}
        if common_latent_dim:
            clip_width = self.clip.text_projection.shape[-1]
            widths = {"vision": clip_width, "text": clip_width, "tactile": self.tactile_encoder.num_features}
            heads = {m: nn.Linear(w, common_latent_dim, bias=False) for m, w in widths.items()}
        self.modality_heads = nn.ModuleDict(heads)
        self.frozen = False
        self.to(memory_format=torch.channels_last)  # 10% faster convolutions in the small encoders
        self.own: Any = nn.ModuleDict(dict(own or {}))
        parts = {"vision": clip, "tactile": tactile_encoder, "text": clip}
        if lacking := [m for m in self.modalities if m not in self.own and parts.get(m) is None]:
            raise UserError(f"there is no encoder of {' and '.join(lacking)}; give one in `own`, or TVL's models.")

    def freeze(self) -> "Stage1":
        """Set evaluation mode and disable gradients. A later `train()` has no effect."""
        self.frozen = True
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Stage1":
        """Set training mode, unless the encoders are frozen."""
        return super().train(mode and not self.frozen)

    @property
    def precision(self) -> Precision:
        """What `encode` computes in by default: `encode_precision`, where "auto" is bf16 on a GPU and float32 on a CPU."""
        if self.encode_precision == "auto":
            return "bf16" if self.logit_scale.device.type == "cuda" else "float32"
        return self.encode_precision

    @cached_property
    def _half(self) -> "Stage1":
        """A copy with weights in half precision; these stay as they are, since the fingerprint is that of the checkpoint."""
        return copy.deepcopy(self).half()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stage1":
        """Called by `to`, `half` and the like, which change the weights."""
        self.__dict__.pop("_half", None)
        return super()._apply(fn, recurse)

    @property
    def photo_size(self) -> int:
        """Side of the vision encoder's input in pixels; 224 if there is none."""
        if "vision" in self.own:
            return int(self.own["vision"].size)
        size = self.clip.visual.image_size if self.clip is not None else 224
        return int(size if isinstance(size, int) else size[0])

    @property
    def touch_size(self) -> int:
        """Side of the touch encoder's input in pixels; 224 if there is none."""
        if "tactile" in self.own:
            return int(self.own["tactile"].size)
        embed = getattr(self.tactile_encoder, "patch_embed", None)
        return int(embed.img_size[0]) if embed is not None else 224

    @property
    def touch_frames(self) -> int:
        """How many frames of a contact the touch encoder takes: 1 or 2."""
        return int(getattr(self.own["tactile"], "frames", 1)) if "tactile" in self.own else 1

    @property
    def further(self) -> dict[str, nn.Module]:
        """{modality: encoder} of the modalities beside vision, tactile and text."""
        return {m: self.own[m] for m in self.modalities if m not in MODALITIES}

    def takes_pictures(self, modality: str) -> bool:
        """Whether the inputs of a modality are pictures: not for text, nor for encoders with a `transform` of their own."""
        return modality in ("vision", "tactile") or (modality != "text" and not hasattr(self.own[modality], "transform"))

    def input_shape(self, modality: str) -> tuple[int, ...]:
        """Shape of an input of any modality but text, without the axis of the batch: (3, S, S) for pictures, and (6, S, S)
        for two touch frames.
        """
        if not self.takes_pictures(modality):
            return tuple(self.own[modality].shape)
        sizes = {"vision": self.photo_size, "tactile": self.touch_size}
        size = sizes[modality] if modality in sizes else int(self.own[modality].size)
        return (3 * self.touch_frames if modality == "tactile" else 3, size, size)

    def picture_norm(
        self, modality: str, subtracted: bool = False
    ) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
        """(mean, std) of each colour channel, values in [0, 1], that an image encoder of one's own takes for normalisation.

        subtracted: those for touch images from which the background is subtracted, if the encoder has others for them. None
        without an encoder of one's own, whose numbers are those of the image options, and where no pictures are taken.
        """
        if modality not in self.own or not self.takes_pictures(modality):
            return None
        if subtracted and modality == "tactile" and self.knows_subtraction:
            mean, std = self.own["tactile"].subtracted
            return tuple(mean), tuple(std)
        return tuple(self.own[modality].mean), tuple(self.own[modality].std)

    @property
    def knows_subtraction(self) -> bool:
        """Whether the touch encoder has numbers of its own for touch images from which the background is subtracted."""
        return "tactile" in self.own and hasattr(self.own["tactile"], "subtracted")

    @cached_property
    def specs(self) -> dict[str, FeatureSpec]:
        """{modality: shapes of its features}, found by encoding one blank row. For text `tokens` is the context length."""
        device = self.logit_scale.device
        blank = {m: torch.zeros(1, *self.input_shape(m), device=device) for m in self.modalities if m != "text"}
        if "text" in self.modalities:
            blank["text"] = self.tokenize(["blank"]).to(device)
        specs = {}
        for name, encoded in self.encode(blank).modalities.items():
            length = (blank["text"] if name == "text" and self.features == "tokens" else encoded.tokens).shape[1]
            specs[name] = FeatureSpec(encoded.tokens.shape[2], length, encoded.pooled.shape[1])
        return specs

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """Sentences -> (B, L) int64 token ids, truncated to the context length L of the text encoder."""
        return self.own["text"].tokenize(list(sentences)) if "text" in self.own else self.tokenizer(list(sentences))

    def encode(self, batch: Batch, precision: Precision | None = None) -> Features:
        """Encode a batch of raw inputs. Modalities that the batch lacks are absent from the result.

        precision: float32, bf16 (autocast) or fp16 (weights in half precision); default: `precision` of the encoders.
        Features are float32 in any of them, pooled features of unit norm. A surrounding autocast has an effect in float32
        only. Raises UserError if the batch has none of the modalities, if modalities differ in the number of rows, for
        images of another size or type than the encoders take, and for another precision.
        """
        precision = precision or self.precision
        if precision not in PRECISIONS:
            raise UserError(f"the encoders have no precision {precision!r}; give one of {', '.join(PRECISIONS)}.")
        model = self._half if precision == "fp16" else self
        names = [name for name in self.modalities if name in batch]
        if not names:
            raise UserError(f"the batch has none of {', '.join(self.modalities)}; it has {', '.join(batch)}.")
        encoders: dict[str, Any] = {"vision": model.encode_vision, "tactile": model.encode_touch, "text": model.encode_text}
        encoders |= {name: encoder.encode for name, encoder in model.own.items()}
        inputs = {name: self._text(batch[name]) if name == "text" else model._inputs(name, batch[name]) for name in names}
        lengths = {name: len(x) for name, x in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"the modalities of the batch differ in their rows, {lengths}; give each the same number.")
        device = self.logit_scale.device
        computing: AbstractContextManager[Any] = nullcontext()
        if precision != "float32":
            computing = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        with torch.no_grad() if self.frozen else nullcontext():
            with computing:
                found = {name: encoders[name](x) for name, x in inputs.items()}
            tokens = {name: self._tokens(x, precision != "float32") for name, x in found.items()}
        rows = torch.arange(lengths[names[0]], device=device)
        if "present" in batch:
            tokens = {m: Tokens(t.tokens, t.mask, t.pooled, batch["present"][m]) for m, t in tokens.items()}
        keys = batch.get("caption_keys")
        if keys is None:
            keys = (_hash(inputs["text"]) if "text" in inputs else rows)[:, None]
        return Features(tokens, keys, rows)

    def _inputs(self, name: str, inputs: Any) -> Tensor:
        """Check images (B, 3, S, S), normalised floats, or other inputs, and convert them to the type of the encoders."""
        shape, pictures = self.input_shape(name), self.takes_pictures(name)
        what = f"the {name} {'images' if pictures else 'inputs'}"
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            how = "scaled to [0, 1] and normalised as in tvl_align.data.transforms" if pictures else "as its transform does"
            raise UserError(f"{what} are {kind}; give a float tensor, {how}.")
        if inputs.shape[1:] != shape or not inputs.ndim:
            taken, remedy = ", ".join(map(str, shape)), "resize them first" if pictures else "use its transform"
            raise UserError(f"{what} have the shape {tuple(inputs.shape)}, but the encoder takes (B, {taken}); {remedy}.")
        return inputs.to(self.logit_scale.dtype)

    def _text(self, text: Any) -> Tensor:
        """Token ids (B, L) of sentences; token ids are returned as they are."""
        if isinstance(text, Tensor):
            return text
        if isinstance(text, str) or not all(isinstance(sentence, str) for sentence in text):
            raise UserError(f"the text is {text!r:.60}; give a list of sentences, or token ids (B, L) from `tokenize`.")
        return self.tokenize(text).to(self.logit_scale.device)

    def _tokens(self, encoded: tuple[Tensor, Tensor, Tensor], rounded: bool) -> Tokens:
        """rounded: to fewer bits, in which the norm of a pooled feature is wrong by up to 0.4%."""
        tokens, mask, pooled = encoded
        if rounded:
            tokens, pooled = tokens.float(), F.normalize(pooled.float(), dim=-1)
        if self.features == "pooled":
            tokens, mask = pooled[:, None], mask.new_ones(len(mask), 1)
        return Tokens(tokens, mask, pooled, mask.new_ones(len(mask)))

    def encode_vision(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, S, S) -> tokens (B, 1 + <=16, W), mask (B, 1 + <=16) bool, pooled features (B, E)."""
        outputs = self.clip.visual.forward_intermediates(
            images, indices=1, normalize_intermediates=True, output_fmt="NCHW", output_extra_tokens=True
        )
        prefix = outputs.get("image_intermediates_prefix")
        tokens = pooled_sequence(outputs["image_intermediates"][-1], prefix[-1][:, :1] if prefix else None)
        pooled = self._head("vision", F.normalize(outputs["image_features"], dim=-1))
        return tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool), pooled

    def encode_touch(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, S, S) -> tokens (B, 1 + <=16, W), mask (B, 1 + <=16) bool, pooled features (B, E)."""
        encoder = self.tactile_encoder
        final, grids = encoder.forward_intermediates(images, indices=1, norm=False, output_fmt="NCHW")
        pooled_token = encoder.forward_head(final, pre_logits=True)
        # With global_pool="avg" timm normalises after pooling (fc_norm); apply the same norm to every token of the grid.
        norm = getattr(encoder, "fc_norm", nn.Identity())
        grid = norm(pooled_sequence(grids[-1], None)[:, 1:])
        tokens = torch.cat([pooled_token[:, None], grid], dim=1)
        pooled = self._head("tactile", F.normalize(encoder.forward_head(final), dim=-1))
        return tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool), pooled

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (B, L) -> tokens (B, L', W), mask (B, L') bool, pooled features (B, E).

        L' is the length of the longest sentence of the batch, including its end token.
        """
        outputs = self.clip.forward_intermediates(text=ids, text_indices=1, normalize_intermediates=True)
        end = ids.argmax(-1)  # CLIP's end token has the largest id
        length = int(end.max()) + 1
        mask = torch.arange(length, device=ids.device) <= end[:, None]
        return outputs["text_intermediates"][-1][:, :length], mask, self._head("text", outputs["text_features"])

    def _head(self, modality: str, pooled: Tensor) -> Tensor:
        if modality not in self.modality_heads:
            return pooled
        return F.normalize(self.modality_heads[modality](pooled), dim=-1)

    def fingerprint(self) -> str:
        """SHA-256 of all weights, `features`, `modalities`, and of what encoders of one's own are beside their weights.

        Encoders with equal fingerprints give equal features.
        """
        digest = hashlib.sha256(f"{self.features} {self.modalities} {GRID}".encode())
        for name, encoder in sorted(self.own.items()):
            kind = f"{type(encoder).__module__}.{type(encoder).__qualname__} {getattr(encoder, 'name', '')}"
            if name == "text":
                inputs: Any = self.tokenize([PANGRAM]).tolist()
            else:
                norm = self.picture_norm(name)
                inputs = self.input_shape(name) if norm is None else (encoder.size, norm)
            digest.update(f"{name} {kind} {inputs}".encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _hash(ids: Tensor) -> Tensor:
    """Token ids (B, L) -> (B,) int64, equal for equal rows on every process, else different but for 1 pair in 2^60."""
    factors = torch.randint(2**62, ids.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 + 1
    return (ids * factors.to(ids.device)).sum(-1)


def pooled_sequence(grid: Tensor, pooled_token: Tensor | None) -> Tensor:
    """Patch grid (B, W, h, w) -> (B, 1 + <=16, W): the pooled token, then the average-pooled grid.

    Without `pooled_token` (B, 1, W) the mean of the grid takes its place.
    """
    height, width = grid.shape[-2:]
    pooled_grid = F.adaptive_avg_pool2d(grid, (min(GRID, height), min(GRID, width)))
    tokens = rearrange(pooled_grid, "b w y x -> b (y x) w")
    first = grid.mean((-2, -1))[:, None] if pooled_token is None else pooled_token
    return torch.cat([first, tokens], dim=1)


def load_stage1(
    checkpoint: Path | str,
    tactile_model: str = "vit_tiny_patch16_224",
    clip_vision_model: str | None = None,
    clip_pretrain_data: str | None = None,
    common_latent_dim: int | None = None,
    features: FeatureKind = "tokens",
    modalities: Sequence[str] = MODALITIES,
    own: Mapping[str, nn.Module] | None = None,
    encode_precision: PrecisionOption = "float32",
) -> Stage1:
    """Load the frozen Stage 1 from a TVL checkpoint and an OpenCLIP model.

    `clip_vision_model` and `clip_pretrain_data` default to the values in the checkpoint, then to TVL's ViT-L-14.
    `clip_pretrain_data` is a tag or a weight file; a relative path is resolved beside the checkpoint first. own,
    encode_precision: as for Stage1; `tvl_align.encoders.own.load_encoders` loads encoders of one's own too. Raises UserError
    if the checkpoint or the CLIP weights do not match the models.
    """
    path = Path(checkpoint)
    state, args = read_checkpoint(path)
    requested = touch_model_name(tactile_model)
    saved = getattr(args, "tactile_model", None)
    if saved is not None and TOUCH_MODELS.get(saved, saved) != requested:
        raise UserError(f"{path} has the touch model {saved}, not {requested}; give --tactile_model {saved}.")
    latent = common_latent_dim or getattr(args, "common_latent_dim", None)
    clip_name = clip_vision_model or getattr(args, "clip_vision_model", None) or CLIP_VISION_MODEL
    weights = clip_pretrain_data or getattr(args, "clip_pretrain_data", None) or CLIP_PRETRAIN_DATA
    if (path.parent / weights).is_file():
        weights = str(path.parent / weights)
    clip: Any = load_clip(clip_name, weights)
    num_classes = 0 if latent else clip.text_projection.shape[-1]
    tactile = create_touch_encoder(requested, num_classes, getattr(args, "tactile_overrides", None) or {})
    import open_clip

    tokenizer = open_clip.get_tokenizer(clip_name)
    stage1 = Stage1(clip, tokenizer, tactile, latent, features, modalities, own, encode_precision)
    state = {k: v for k, v in state.items() if k != "logit_bias"}  # no feature depends on it
    load_strictly(
        *(stage1, state, path, "check --tactile_model and --common_latent_dim"),
        own_parts=OWN_PARTS,
        loaded_before=("clip.", "own."),
    )
    return stage1.freeze()


def create_touch_encoder(name: str, num_classes: int, overrides: Mapping[str, Any]) -> nn.Module:
    """The timm touch encoder of TVL (`global_pool="avg"`) with random weights.

    num_classes: width of its linear head, 0 for none. overrides: see `touch_overrides`. Raises UserError if they do not fit.
    """
    try:
        return timm.create_model(name, num_classes=num_classes, global_pool="avg", **touch_overrides(dict(overrides)))
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"the checkpoint's tactile_overrides {dict(overrides)} do not fit {name} ({error}).") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], argparse.Namespace]:
    """The weights and the `args` of a TVL checkpoint.

    The weights are the entry `model` or `state_dict`, or the whole file (also .safetensors). `args` is a Namespace or a
    dict; without it the Namespace is empty. Prefixes that wrappers put before all names are removed. No code in the file is
    executed, see `load_safely`. Raises UserError for any other file.
    """
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}; give --stage1_checkpoint a TVL checkpoint (.pth).")
    content = load_safely(path)
    entries = content if isinstance(content, dict) else {}
    found = [entries[name] for name in ("model", "state_dict") if isinstance(entries.get(name), dict)]
    if entries and all(isinstance(value, Tensor) for value in entries.values()):
        found.append(entries)
    if not found:
        raise UserError(f"{path} is not a TVL checkpoint: it has no weights, alone or as an entry 'model' or 'state_dict'.")
    args = entries.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    for name, kind in ARGUMENTS.items():
        if not isinstance(args.get(name), kind | None):
            raise UserError(f"{path} has the argument {name} = {args[name]!r}; it must be of type {kind.__name__}.")
    return unwrapped(found[0], path), argparse.Namespace(**{str(name): value for name, value in args.items()})


def unwrapped(weights: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """Weights without the prefixes of WRAPPERS, if all weights of the model, or of the touch encoder, have them."""
    weights, removed = {str(name): value for name, value in weights.items()}, []

    def common(part: str, wrapper: str) -> bool:
        names = [name for name in weights if name.startswith(part)]
        return bool(names) and all(name.startswith(part + wrapper) for name in names)

    for part in ("", "tactile_encoder."):
        while wrapper := next((w for w in WRAPPERS if common(part, w)), None):
            prefix = part + wrapper
            weights = {part + n[len(prefix) :] if n.startswith(prefix) else n: value for n, value in weights.items()}
            removed.append(prefix)
    if removed:
        log.warning("%s: read without the prefixes of wrappers that its weights have: %s", path, ", ".join(removed))
    return weights


def load_clip(
    name: str, weights: str, model_option: str = "--clip_vision_model", weights_option: str = "--clip_pretrain_data"
) -> nn.Module:
    """An OpenCLIP model with pretrained weights, a tag or a local file.

    model_option, weights_option: the options that errors name. Raises UserError unless every weight matches.
    """
    import open_clip  # takes seconds to import, and training on stored features does not need it

    register_small_clip()
    if open_clip.get_model_config(name) is None:
        raise UserError(f"unknown OpenCLIP model {name!r}; give {model_option} a name of open_clip.list_models().")
    local = Path(weights).is_file()
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not local and weights not in tags:
        known = ", ".join(tags) or "none"
        raise UserError(f"no CLIP weights {weights!r} for {name} (tags: {known}); {weights_option} also takes a file.")
    try:
        with warnings.catch_warnings():
            if not local:
                warnings.simplefilter("error")  # open_clip only warns when it falls back to random weights
            return open_clip.create_model(name, pretrained=weights, require_pretrained=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        what = f"{weights} does not fit {name}" if local else f"the CLIP weights {weights!r} of {name} cannot be downloaded"
        raise UserError(f"{what} ({reason}); give {weights_option} the path of a local weight file.") from error


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Any],
    path: Path,
    remedy: str,
    own_parts: tuple[str, ...] = ("",),
    loaded_before: tuple[str, ...] = (),
) -> None:
    """Load the weights `state` of the file `path` into a model, so that no weight stays random.

    own_parts: an unexpected weight whose name begins with one of them is an error; others are ignored, and named in the log.
    loaded_before: beginnings of the names of weights that the file lacks. BatchNorm counters may be floats, as in a
    checkpoint in half precision: no feature depends on them. Raises UserError with the names of weights that are missing,
    unexpected, or of another shape or type; it ends with `remedy`.
    """
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(loaded_before or "\0")}
    floats = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point()}
    counters = [k for k in own.keys() & floats.keys() if k.endswith("num_batches_tracked")]
    state = dict(state) | {k: floats[k].float().nan_to_num(0.0, 0.0, 0.0).to(own[k].dtype) for k in counters}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    further = [k for k in unexpected if not k.startswith(own_parts)]
    if further and not missing:
        log.warning("%s: ignored weights that are no part of the encoders: %s", path, _first(further))
        state = {k: v for k, v in state.items() if k not in further}
        unexpected = [k for k in unexpected if k not in further]
    shapes = [
        f"{k} {tuple(getattr(state[k], 'shape', ()))}, needs {tuple(own[k].shape)}"
        for k in sorted(own.keys() & state.keys())
        if not isinstance(state[k], Tensor) or state[k].shape != own[k].shape
    ]
    dtypes = [
        f"{k} {state[k].dtype}, needs {own[k].dtype}"
        for k in sorted(own.keys() & state.keys())
        if isinstance(state[k], Tensor) and state[k].is_floating_point() != own[k].is_floating_point()
    ]
    mismatches = {"missing keys": missing, "unexpected keys": unexpected, "wrong shapes": shapes, "wrong dtypes": dtypes}
    errors = [f"{kind}: {_first(keys)}" for kind, keys in mismatches.items() if keys]
    if errors:
        raise UserError(f"{path} does not fit these encoders, {'; '.join(errors)}; {remedy}.")
    check_weights(state, path)
    model.load_state_dict(state, strict=False)  # the keys above are complete; only those loaded before are absent


def _first(names: Sequence[str], count: int = 8) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
