"""Frozen encoders of one's own: any timm, OpenCLIP, transformers or sentence-transformers model, or a class, per modality.

`load_encoder` gives one from its name, `load_encoders` the whole Stage 1 from its options. An encoder is an nn.Module with
the attributes and methods of `ImageEncoder`, `TextEncoder` or `InputEncoder`. Weights are loaded strictly, so that none
stays random. Modalities beside vision, tactile and text (depth, sound ...) have an `ImageEncoder` or an `InputEncoder`.

Token sequences are those of TVL's encoders: for images the pooled token, then the grid average-pooled to at most 4 x 4; for
text one token per word piece. Pooled widths may differ between modalities.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tvl_align.contract import MODALITIES
from tvl_align.encoders.touch import anytouch_vit, sparsh_vit
from tvl_align.encoders.tvl import Stage1, Stage1Config, load_clip, load_stage1, load_strictly, pooled_sequence, unwrapped
from tvl_align.system.checkpoint import load_safely
from tvl_align.system.console import UserError
from tvl_align.system.modules import error_and_place, import_named

CONTEXT = 77  # word pieces of a sentence, at most, as in CLIP; a feature store has as many rows for each sentence
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
log = logging.getLogger(__name__)
Channels = tuple[float, float, float]
Encoded = tuple[Tensor, Tensor, Tensor]
"""tokens (B, T, W) float, mask (B, T) bool, False = padding, and pooled (B, E) float of unit norm."""


class ImageEncoder(Protocol):
    """An encoder of photos, touch images or pictures of a further modality; an nn.Module.

    size: side of its square input in pixels. mean, std: of each colour channel, values in [0, 1], for the normalisation.
    These three stand for a transform: tvl_align.data.transforms crops, turns, augments, resizes and normalises the images of
    all encoders, so that photo and touch image keep the same geometry and a feature store knows what was done to them. name:
    what it is beside its weights (optional); in the fingerprint. Pictures of a further modality are used as a whole.

    frames: of an encoder of touch, 2 if it takes two frames of a contact, the present one and an earlier one, as images of 6
    channels (optional). subtracted: (mean, std) for touch images from which the background is subtracted, values in [-1, 1]
    (optional); an encoder that has it wants to be told whether it is, see --subtract_background.
    """

    size: int
    mean: Channels
    std: Channels

    def encode(self, images: Tensor) -> Encoded:
        """Normalised images (B, 3 * frames, S, S) -> tokens, mask, pooled, see `Encoded`; T is the same for every batch."""


class InputEncoder(Protocol):
    """An encoder of a further modality whose inputs are no pictures, such as sound, force curves or point clouds; an
    nn.Module.

    shape: of one input; all inputs have it. name: what it is beside its weights, such as the version of `transform`
    (optional); in the fingerprint.
    """

    shape: tuple[int, ...]

    def transform(self, source: Any) -> Tensor:
        """A path, an array, a tensor, or, from a stream, the bytes of a file -> one input, finite floats of `shape`.

        It must give equal inputs for equal sources, and use no weights: it is called in other processes. A source for which
        it raises an error, of any kind, cannot be used; its row lacks the modality and the error is the reason.
        """

    def encode(self, inputs: Tensor) -> Encoded:
        """Inputs (B, *shape) -> tokens, mask, pooled, see `Encoded`; T is the same for every batch."""


class TextEncoder(Protocol):
    """An encoder of sentences; an nn.Module. name: what it is beside its weights (optional); in the fingerprint."""

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """Sentences -> token ids (B, L) int64; L is the same for every batch, longer sentences are cut."""

    def encode(self, ids: Tensor) -> Encoded:
        """Token ids (B, L) -> tokens, mask, pooled, see `Encoded`; T is at most L, and the first token is no padding."""


def load_encoders(config: Stage1Config, modalities: Sequence[str] = MODALITIES, never_from: Path | None = None) -> Stage1:
    """The frozen encoders of these options. TVL's are loaded unless each modality has an encoder of its own.

    never_from: a folder that no module is imported from, such as a run folder. Raises UserError if TVL's are needed and
    there is no Stage-1 checkpoint, and for encoders that cannot be loaded.
    """
    names = {m: config.encoder_of(m) for m in modalities}
    lacking = [m for m, name in names.items() if name is None]
    if further := [m for m in lacking if m not in MODALITIES]:
        raise UserError(
            f"{further[0]} has no encoder; give --more_encoders {further[0]}=timm:NAME or {further[0]}=package.module:NAME."
        )
    if lacking and config.stage1_checkpoint is None:
        raise UserError(
            f"encoding needs the Stage-1 encoders of {', '.join(lacking)}; give --stage1_checkpoint FILE, or "
            f"{', '.join(f'--{m}_encoder' for m in lacking)}."
        )
    own = {m: load_encoder(name, m, never_from) for m, name in names.items() if name is not None}
    if config.stage1_checkpoint is None or not lacking:
        return Stage1(None, None, None, None, config.features, modalities, own, config.encode_precision).freeze()
    return load_stage1(
        config.stage1_checkpoint,
        config.tactile_model,
        config.clip_vision_model,
        config.clip_pretrain_data,
        config.common_latent_dim,
        config.features,
        modalities,
        own,
        config.encode_precision,
    )


def load_encoder(name: str, modality: str, never_from: Path | None = None) -> Any:
    """An `ImageEncoder`, for text a `TextEncoder`, for a further modality also an `InputEncoder`; frozen, and checked with
    one input.

    name: timm:NAME, timm:NAME:FILE, open_clip:NAME:TAG_OR_FILE, hf:NAME_OR_FOLDER (transformers), st:NAME_OR_FOLDER
    (sentence-transformers, text), anytouch:FILE and sparsh:FILE (touch), or package.module:NAME, a class or function without
    arguments that gives one. modality: vision, tactile, text, or any other name. never_from: a folder that no module is
    imported from. Raises UserError for any other name, for a missing package, for weights that cannot be downloaded or do
    not fit, and for an encoder that gives something else than the protocol says.
    """
    further = modality not in MODALITIES
    option = f"--more_encoders {modality}={name}" if further else f"--{modality}_encoder {name}"
    prefix, colon, rest = name.partition(":")
    if not (colon and rest):
        raise UserError(f"{option} names no encoder; give {', '.join(f'{p}:...' for p in LOADERS)} or package.module:NAME.")
    if prefix in LOADERS:
        takes, load = LOADERS[prefix]
        kind = "vision" if further else modality  # what these libraries encode beside text are pictures
        if kind not in takes:
            raise UserError(f"{option}: {prefix} encodes {' and '.join(takes)} only; give an encoder of {modality}.")
        try:
            encoder = load(rest, kind, option)
        except ModuleNotFoundError as error:
            raise UserError(f"{option} needs {error.name}; run pip install 'tvl-align[encoders]'.") from error
    else:
        encoder = _imported(prefix, rest, option, never_from)
    if not isinstance(encoder, nn.Module):
        raise UserError(f"{option} gives a {type(encoder).__name__}; it must give a torch.nn.Module.")
    encoder.requires_grad_(False).eval()
    _check(encoder, modality, option)
    return encoder


@torch.no_grad()
def _check(encoder: Any, modality: str, option: str) -> None:
    """Encode one input. Raises UserError unless the encoder has the attributes and results of its protocol."""
    own_inputs = modality not in MODALITIES and hasattr(encoder, "transform")
    protocol: tuple[str, ...] = ("size", "mean", "std", "encode")
    if modality == "text":
        protocol = ("encode", "tokenize")
    elif own_inputs:
        protocol = ("shape", "transform", "encode")
    calls = ("encode", "tokenize", "transform")
    lacking = [a for a in protocol if not hasattr(encoder, a) or (a in calls and not callable(getattr(encoder, a)))]
    if lacking:
        raise UserError(f"{option} has no {' and no '.join(lacking)}; see tvl_align.encoders.own for what it needs.")
    try:
        if modality == "text":
            given = encoder.tokenize(["blank"])
            if not isinstance(given, Tensor) or given.dtype != torch.int64 or given.ndim != 2 or len(given) != 1:
                raise UserError(f"{option}: tokenize must give token ids (B, L) int64, and gives {_described(given)}.")
        elif own_inputs:
            shape = tuple(encoder.shape)
            if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
                raise UserError(f"{option}: shape must be whole numbers above 0, those of one input, not {shape}.")
            given = torch.linspace(-1, 1, math.prod(shape)).view(1, *shape)
        else:
            numbers = [*encoder.mean, *encoder.std]
            if len(encoder.mean) != 3 or len(numbers) != 6 or not all(map(math.isfinite, numbers)) or min(encoder.std) <= 0:
                raise UserError(f"{option}: mean and std must be three numbers each, std above 0, not {numbers}.")
            frames = getattr(encoder, "frames", 1)
            if frames != 1 and (frames != 2 or modality != "tactile"):
                raise UserError(f"{option} takes {frames} frames; only an encoder of tactile may take more than one, two.")
            shape = (1, 3 * frames, encoder.size, encoder.size)
            given = torch.linspace(-1, 1, math.prod(shape)).view(shape)  # zeros give zeros in a network without biases
        encoded = encoder.encode(given)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{option} cannot encode an input: {_reason(error)}.") from error
    if not isinstance(encoded, (tuple, list)) or len(encoded) != 3 or not all(isinstance(x, Tensor) for x in encoded):
        raise UserError(f"{option}: encode must give the three tensors tokens, mask and pooled.")
    tokens, mask, pooled = encoded
    wrong = [
        ("tokens", "floats (B, T, W)", tokens, tokens.ndim != 3 or len(tokens) != 1 or not tokens.is_floating_point()),
        ("mask", "bool (B, T)", mask, mask.dtype != torch.bool or mask.shape != tokens.shape[:2] or not mask.any()),
        ("pooled", "floats (B, E)", pooled, pooled.ndim != 2 or len(pooled) != 1 or not pooled.is_floating_point()),
    ]
    for part, needed, found, is_wrong in wrong:
        if is_wrong:
            raise UserError(f"{option}: {part} must be {needed}, and is {_described(found)} for B = 1.")
    if not (tokens[mask].isfinite().all() and pooled.isfinite().all()):
        raise UserError(f"{option} gives numbers that are not finite; use other weights.")
    if abs(float(pooled.float().norm()) - 1) > 1e-3:
        norm = float(pooled.float().norm())
        raise UserError(f"{option}: pooled must have the norm 1, not {norm:.3g}; apply torch.nn.functional.normalize.")


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _imported(module: str, attribute: str, option: str, never_from: Path | None) -> Any:
    """What the class or function `attribute` of a module gives."""
    remedy = f"; install it, or give one of {', '.join(f'{p}:' for p in LOADERS)}"
    make = getattr(import_named(module, option, remedy, never_from), attribute, None)
    if not callable(make):
        what = "not defined" if make is None else f"a {type(make).__name__}"
        raise UserError(f"{option} is {what}; it must name a class or function without arguments.")
    try:
        return make()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{option} cannot be made: {error_and_place(error)}.") from error


def _image_tokens(grid: Tensor, pooled_token: Tensor | None, pooled: Tensor) -> Encoded:
    """Grid (B, W, h, w) and pooled features (B, E) -> what `encode` gives.

    pooled_token (B, W): first of the tokens; if there is none, or it has another width, the mean of the grid is.
    """
    fits = pooled_token is not None and pooled_token.shape[1] == grid.shape[1]
    tokens = pooled_sequence(grid, pooled_token[:, None] if pooled_token is not None and fits else None)
    return tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool), F.normalize(pooled, dim=-1)


def _text_tokens(tokens: Tensor, mask: Tensor, pooled: Tensor) -> Encoded:
    """Without the columns behind the longest sentence of the batch."""
    length = int(mask.sum(1).max()) if len(mask) else 1
    return tokens[:, :length], mask[:, :length], F.normalize(pooled, dim=-1)


class TimmImages(nn.Module):
    """A timm model: a ViT or a CNN. pooled: its features before the classifier, or `projected` by its head.

    norm: (mean, std); default: those of the model's configuration.
    """

    def __init__(self, model: nn.Module, name: str, projected: bool = False, norm: Any = None) -> None:
        super().__init__()
        self.model: Any = model
        self.projected = projected
        config = timm.data.resolve_model_data_config(model)
        sides = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
        if sides[0] != sides[1]:
            raise UserError(f"{name} takes images of {sides[0]} x {sides[1]} pixels; give a model for squares.")
        mean, std = norm or (config["mean"], config["std"])
        self.name, self.size, self.mean, self.std = name, int(sides[0]), tuple(mean), tuple(std)

    def encode(self, images: Tensor) -> Encoded:
        """See `ImageEncoder`."""
        final, grids = self.model.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW")
        first = self.model.forward_head(final, pre_logits=True)
        norm = getattr(self.model, "fc_norm", None)  # which timm applies after pooling; here also to every token of the grid
        grid = (
            grids[-1] if norm is None else rearrange(norm(rearrange(grids[-1], "b w y x -> b y x w")), "b y x w -> b w y x")
        )
        return _image_tokens(grid, first, self.model.forward_head(final) if self.projected else first)


def _timm(rest: str, modality: str, option: str) -> TimmImages:
    name, _, file = rest.partition(":")
    state = _weights(Path(file), option) if file else {}
    try:
        model: Any = timm.create_model(name, pretrained=not file)
        model.reset_classifier(0)  # afterwards: with another number of classes timm does not load strictly
        if arguments := _saved_with(model, state):
            model = timm.create_model(name, num_classes=0, **arguments)
    except Exception as error:
        raise UserError(
            f"{option} cannot be loaded ({_reason(error)}); give a name of timm.list_models(), or a FILE."
        ) from error
    if not (hasattr(model, "forward_intermediates") and hasattr(model, "forward_head")):
        raise UserError(f"{option}: this model of timm has no forward_intermediates; give another one.")
    if file:
        classifier = model.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
        state = {k: v for k, v in state.items() if not k.startswith(heads)}
        load_strictly(model, state, Path(file), f"give {option.split()[0]} the timm model of this file")
    return TimmImages(model, f"timm:{name}")


def _saved_with(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of timm.create_model that the weights of a ViT show: the image size, and the mean as pooling."""
    found: dict[str, Any] = {}
    if "fc_norm.weight" in state and "norm.weight" not in state and "norm.weight" in model.state_dict():
        found["global_pool"] = "avg"
    here, there = getattr(model, "pos_embed", None), state.get("pos_embed")
    if isinstance(here, Tensor) and there is not None and there.ndim == 3 and here.shape[1] != there.shape[1]:
        prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        found["img_size"] = math.isqrt(max(1, there.shape[1] - prefix)) * model.patch_embed.patch_size[0]
    return found


def _weights(path: Path, option: str) -> dict[str, Any]:
    """The weights in a file: the whole of it, or its entry `model` or `state_dict`."""
    if not path.is_file():
        raise UserError(f"{option}: there is no file {path}; give the path of a file of weights (.pth, .safetensors).")
    content = load_safely(path)
    entries = content if isinstance(content, dict) else {}
    state = next((entries[k] for k in ("model", "state_dict") if isinstance(entries.get(k), dict)), entries)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} has no weights, alone or as an entry 'model' or 'state_dict'; give {option} such a file.")
    return unwrapped(state, path)


def _anytouch(rest: str, modality: str, option: str) -> TimmImages:
    model = anytouch_vit(_weights(Path(rest), option), Path(rest))
    return TimmImages(model, "anytouch", projected=True, norm=(IMAGENET_MEAN, IMAGENET_STD))


class SparshImages(TimmImages):
    """A Sparsh encoder. Differences to the background are shifted to [0, 1], frames without one are used as they are."""

    frames = 2
    subtracted = ((-0.5,) * 3, (1.0,) * 3)

    def encode(self, images: Tensor) -> Encoded:
        """See `ImageEncoder`. Larger differences than half of the range are cut."""
        return super().encode(images.clamp(0, 1))


def _sparsh(rest: str, modality: str, option: str) -> SparshImages:
    model = sparsh_vit(_weights(Path(rest), option), Path(rest))
    return SparshImages(model, "sparsh", norm=((0.0,) * 3, (1.0,) * 3))


class OpenClipImages(nn.Module):
    """The vision tower of an OpenCLIP model. pooled: its projected features."""

    def __init__(self, visual: nn.Module, name: str, mean: Channels, std: Channels) -> None:
        super().__init__()
        self.visual: Any = visual
        size: Any = self.visual.image_size
        self.size = int(size if isinstance(size, int) else size[0])
        self.name, self.mean, self.std = name, mean, std

    def encode(self, images: Tensor) -> Encoded:
        """See `ImageEncoder`."""
        outputs = self.visual.forward_intermediates(
            images, indices=1, normalize_intermediates=True, output_fmt="NCHW", output_extra_tokens=True
        )
        prefix = outputs.get("image_intermediates_prefix")
        first = prefix[-1][:, 0] if prefix else None
        return _image_tokens(outputs["image_intermediates"][-1], first, outputs["image_features"])


class OpenClipText(nn.Module):
    """The text tower of an OpenCLIP model. pooled: its projected features."""

    def __init__(self, clip: nn.Module, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.clip: Any = clip
        self.tokenizer, self.name = tokenizer, name
        text: Any = getattr(clip, "text", clip)  # SigLIP and others hold the tower as a part
        self.pooling = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", "argmax")
        self.end: Any = getattr(text, "text_eos_id", None) or getattr(text, "eos_id", None)
        self.pad = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", None) or 0

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """See `TextEncoder`."""
        return self.tokenizer(list(sentences))

    def encode(self, ids: Tensor) -> Encoded:
        """See `TextEncoder`. Tokens end with the end token; without one (SigLIP) with the last that is no padding."""
        outputs = self.clip.forward_intermediates(text=ids, text_indices=1, normalize_intermediates=True)
        if self.pooling == "argmax":  # CLIP's end token has the largest id
            end = ids.argmax(-1)
        elif self.pooling == "eos":
            end = ids.eq(self.end).int().argmax(-1)
        else:
            places = torch.arange(ids.shape[1], device=ids.device)
            end = torch.where(ids != self.pad, places, 0).amax(-1)
        mask = torch.arange(ids.shape[1], device=ids.device) <= end[:, None]
        return _text_tokens(outputs["text_intermediates"][-1], mask, outputs["text_features"])


def _open_clip(rest: str, modality: str, option: str) -> nn.Module:
    import open_clip

    name, _, weights = rest.partition(":")
    if not weights:
        raise UserError(f"{option} names no weights; give open_clip:NAME:TAG or open_clip:NAME:FILE.")
    flag = option.removesuffix(rest)
    clip: Any = load_clip(name, weights, flag, f"{flag}{name}:")
    if modality != "text":
        if not hasattr(clip.visual, "forward_intermediates"):
            raise UserError(f"{option}: the vision tower of {name} has no forward_intermediates; give another model.")
        norm = clip.visual.image_mean, clip.visual.image_std
        tags = open_clip.list_pretrained_tags_by_model(name)
        configs = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
        norms = {(tuple(c["mean"]), tuple(c["std"])) for c in configs if c.get("mean") and c.get("std")}
        if weights not in tags and len(norms) == 1:  # a file does not say them, but all published weights agree
            norm = norms.pop()
        elif weights not in tags and norms:
            log.warning("%s: published weights of %s differ in mean and std; %s is used", option, name, norm)
        return OpenClipImages(clip.visual, f"open_clip:{name}", tuple(norm[0]), tuple(norm[1]))
    text = getattr(clip, "text", clip)
    if not (hasattr(clip, "forward_intermediates") and (text is clip or hasattr(text, "forward_intermediates"))):
        raise UserError(f"{option}: the text tower of {name} has no forward_intermediates; give hf: or st: instead.")
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise UserError(f"{option}: its tokenizer cannot be loaded ({_reason(error)}); run once with a network.") from error
    del clip.visual  # no feature of text depends on it
    return OpenClipText(clip, tokenizer, f"open_clip:{name}")


def _transformer(source: str, option: str) -> Any:
    """A model of transformers, loaded strictly. No code in the folder or repository is executed.

    Weights of a pooler may be missing: no feature depends on it.
    """
    import transformers

    try:
        model, info = transformers.AutoModel.from_pretrained(source, output_loading_info=True, dtype=torch.float32)
    except Exception as error:
        raise UserError(f"{option} cannot be loaded ({_reason(error)}); give a name of a model or its folder.") from error
    wrong = [k for k in (*info["missing_keys"], *map(str, info["mismatched_keys"])) if "pooler." not in k]
    if wrong:
        names = ", ".join(sorted(wrong)[:8])
        raise UserError(f"{option} lacks weights of this model, or has them in another shape: {names}; give another one.")
    return model


def _configuration(model: Any) -> str:
    """What a model of transformers is beside its weights, wherever it was loaded from."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    return json.dumps(config, sort_keys=True, default=str)


class TransformerImages(nn.Module):
    """A vision model of transformers with a `last_hidden_state`: (B, N, W) of a ViT, such as DINOv2 or v3, or (B, W, h, w).

    pooled: the class token; without one the mean of the grid.
    """

    def __init__(self, model: nn.Module, size: int, mean: Channels, std: Channels) -> None:
        super().__init__()
        self.model: Any = model
        self.size, self.mean, self.std, self.name = size, mean, std, _configuration(model)

    def encode(self, images: Tensor) -> Encoded:
        """See `ImageEncoder`."""
        hidden = self.model(pixel_values=images).last_hidden_state
        if hidden.ndim == 4:
            return _image_tokens(hidden, None, hidden.mean((-2, -1)))
        side = images.shape[-1] // self.model.config.patch_size
        prefix = hidden.shape[1] - side**2  # class token and registers
        grid = rearrange(hidden[:, prefix:], "b (y x) w -> b w y x", y=side)
        first = hidden[:, 0] if prefix else hidden.mean(1)
        return _image_tokens(grid, first, first)


class TransformerText(nn.Module):
    """A text model of transformers. pooled: the mean of the tokens that are no padding."""

    def __init__(self, model: nn.Module, tokenizer: Any, length: int) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer, self.length, self.name = tokenizer, length, _configuration(model)

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """See `TextEncoder`."""
        return _ids(self.tokenizer, sentences, self.length)

    def encode(self, ids: Tensor) -> Encoded:
        """See `TextEncoder`."""
        mask = _no_padding(ids, self.tokenizer.pad_token_id)
        tokens = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return _text_tokens(tokens, mask, pooled)


class SentenceTransformerText(nn.Module):
    """A model of sentence-transformers. pooled: its sentence embedding."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        self.model: Any = model
        self.length = length
        self.name = f"{[type(part).__name__ for part in model]} {_configuration(model[0].auto_model)}"

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """See `TextEncoder`."""
        return _ids(self.model.tokenizer, sentences, self.length)

    def encode(self, ids: Tensor) -> Encoded:
        """See `TextEncoder`."""
        mask = _no_padding(ids, self.model.tokenizer.pad_token_id)
        outputs = self.model({"input_ids": ids, "attention_mask": mask.long()})
        return _text_tokens(outputs["token_embeddings"], mask, outputs["sentence_embedding"])


def _ids(tokenizer: Any, sentences: Sequence[str], length: int) -> Tensor:
    options = {"padding": "max_length", "truncation": True, "max_length": length, "padding_side": "right"}
    return tokenizer(list(sentences), return_tensors="pt", **options)["input_ids"]


def _no_padding(ids: Tensor, pad: int) -> Tensor:
    """Token ids (B, L) -> (B, L) bool, up to the last token that is no padding, and at least the first token."""
    places = torch.arange(ids.shape[1], device=ids.device)
    return places <= torch.where(ids != pad, places, 0).amax(-1, keepdim=True)


def _checked_tokenizer(tokenizer: Any, option: str) -> Any:
    if tokenizer is None or tokenizer.pad_token_id is None:
        raise UserError(f"{option}: its tokenizer has no padding token; give a model whose tokenizer has one.")
    return tokenizer


def _hf(source: str, modality: str, option: str) -> nn.Module:
    import transformers

    model = _transformer(source, option)
    kind = transformers.AutoTokenizer if modality == "text" else transformers.AutoImageProcessor
    try:
        inputs: Any = kind.from_pretrained(source)
    except Exception as error:
        what = "tokenizer" if modality == "text" else "image processor"
        raise UserError(f"{option}: its {what} cannot be loaded ({_reason(error)}); give a model of {modality}.") from error
    if modality == "text":
        length = min(CONTEXT, inputs.model_max_length, getattr(model.config, "max_position_embeddings", CONTEXT))
        return TransformerText(model, _checked_tokenizer(inputs, option), length)
    sizes = [getattr(inputs, name, None) for name in ("crop_size", "size")]
    sides = [s[k] for s in sizes if s for k in ("height", "shortest_edge") if k in s] or [
        getattr(model.config, "image_size", 224)
    ]
    mean, std = inputs.image_mean or IMAGENET_MEAN, inputs.image_std or IMAGENET_STD
    return TransformerImages(model, int(sides[0]), tuple(mean), tuple(std))


def _st(source: str, modality: str, option: str) -> nn.Module:
    import sentence_transformers

    try:
        model = sentence_transformers.SentenceTransformer(source, device="cpu")
        tokenizer = _checked_tokenizer(model.tokenizer, option)
        again: Any = model[0].auto_model  # strictly: sentence-transformers only warns of weights that stay random
        _transformer(again.config._name_or_path, option)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{option} cannot be loaded ({_reason(error)}); give a name of a model or its folder.") from error
    length = min(CONTEXT, model.max_seq_length or CONTEXT, tokenizer.model_max_length)
    return SentenceTransformerText(model, length)


LOADERS: dict[str, tuple[tuple[str, ...], Callable[[str, str, str], nn.Module]]] = {  # prefix: (modalities, function)
    "timm": (("vision", "tactile"), _timm),
    "anytouch": (("tactile",), _anytouch),
    "sparsh": (("tactile",), _sparsh),
    "open_clip": (MODALITIES, _open_clip),
    "hf": (MODALITIES, _hf),
    "st": (("text",), _st),
}
