"""Train a small Stage 1 on a folder in the TVL format, in minutes, and save it as a TVL checkpoint and OpenCLIP weights.

Registers can only read what the frozen tokens encode. A contrastive loss alone discards what the modalities do not share.
Therefore a small decoder, one transformer block over all tokens, predicts two more targets for every position of the 4 x 4
grid of an image, with a mean squared error:

    pixels     the patch at this position; preserves hue, light, contact position and hardness
    spectrum   the log power spectrum of a window of twice the patch size, in 6 frequency bands x 8 orientations (per colour
               channel for touch); preserves texture, coarseness, profile and the grain's direction. Like HOG in MaskFeat
               (Wei et al. 2022, arXiv:2112.09133) it is invariant to small shifts of the texture, so it is learned quickly.

The end token of a sentence predicts which words it has, by a linear layer and a binary cross-entropy. Without this target a
short contrastive training often never learns the names of hues: sentences that differ in them alone are then equal.

The decoder is nonlinear and mixes the tokens. Linear heads on single tokens (`heads="linear"`, for comparison) would make
the targets linear functions of the token at their position, which favours methods that read tokens linearly.

Images are not augmented: with flips the shared features could not encode orientation.
"""

import argparse
import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tvl_align.data.image_options import ImageOptions
from tvl_align.data.loading import load_images
from tvl_align.data.samples import Samples, TextOptions
from tvl_align.data.text import PROMPT, evaluation_text, training_text
from tvl_align.data.tvl import DATASETS, Tolerance, read_tvl
from tvl_align.encoders.small import SMALL_CLIP, SMALL_TOUCH, register_small_clip
from tvl_align.encoders.tvl import GRID, Stage1, create_touch_encoder
from tvl_align.losses.contrastive import info_nce, positive_mask
from tvl_align.registers.model import MAX_LOGIT_SCALE
from tvl_align.system.bounds import at_least
from tvl_align.system.console import UserError, progress
from tvl_align.system.provenance import provenance
from tvl_align.system.runtime import generator, multiplies_bf16, pick_device, seed_everything
from tvl_align.system.workers import run_together
from tvl_align.training.optimisation import (
    Schedule,
    backward_and_step,
    backward_together,
    make_adamw,
    optimizer_step,
)

log = logging.getLogger(__name__)
BANDS, ORIENTATIONS = 6, 8
DECODER_WIDTH, DECODER_HEADS = 96, 3
TOUCH_MODEL = "vit_tiny_patch16_224"
Heads = Literal["nonlinear", "linear"]
PretrainPrecision = Literal["auto", "float32", "bf16"]


@dataclass(frozen=True)
class PretrainConfig:
    """Train a small Stage 1 on a folder in the TVL format."""

    datasets_dir: Path
    """Folder that contains ssvtp/ and hct/."""
    output_dir: Path
    """Folder for checkpoint.pth (touch) and clip.pt (vision and text)."""
    datasets: tuple[str, ...] = DATASETS
    """Data sets to use."""
    epochs: int = 12
    """Number of epochs."""
    batch_size: int = 64
    """Rows per step. In a short training more steps help more than more negatives."""
    lr: float = 1.5e-3
    """Peak learning rate of AdamW: linear warm-up over the first 5% of steps, then cosine decay to 0."""
    weight_decay: float = 0.05
    """Decoupled weight decay of AdamW; the embedding of words has none (SparseAdam)."""
    pixel_weight: float = 1.0
    """Weight of the pixel target."""
    spectrum_weight: float = 2.0
    """Weight of the spectrum target."""
    words_weight: float = 1.0
    """Weight of the words of a sentence as a target."""
    heads: Heads = "nonlinear"
    """What predicts the targets: one transformer block over all tokens, or a linear function of each token."""
    num_workers: int = 2
    """Processes that decode images."""
    precision: PretrainPrecision = "float32"
    """Precision of the encoders and heads; losses are float32. auto: bf16 (autocast) where the processor multiplies in it,
    which takes half the time, else float32."""
    seed: int = 0
    """Seed of the split, the initial weights, the order of rows and the sentences."""
    device: str | None = None
    """PyTorch device; default: cuda if available, else cpu."""

    def __post_init__(self) -> None:
        at_least(1, self, "epochs", "batch_size")
        at_least(0, self, "lr", "weight_decay", "pixel_weight", "spectrum_weight", "words_weight", "num_workers")


class Spectrum(nn.Module):
    """Images (B, C, S, S) -> log power (B, 16, C * 48) of 4 x 4 overlapping Hann windows of S/2 pixels.

    size: S. The 48 values per channel are 6 frequency bands x 8 orientations.
    """

    hann: Tensor
    bank: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.window = size // 2
        hann = torch.hann_window(self.window, periodic=False)
        fy = torch.fft.fftfreq(self.window, 1 / self.window)[:, None]
        fx = torch.fft.rfftfreq(self.window, 1 / self.window)[None]
        radius, angle = torch.hypot(fx, fy), torch.remainder(torch.atan2(fy, fx), math.pi)
        edges = torch.logspace(math.log2(1.4), math.log2(13), BANDS + 1, base=2)  # cycles per window
        band = torch.bucketize(radius, edges) - 1
        direction = (angle / math.pi * ORIENTATIONS).round().long() % ORIENTATIONS
        bank = torch.zeros(BANDS * ORIENTATIONS, *radius.shape)
        inside = (band >= 0) & (band < BANDS)
        y, x = torch.nonzero(inside, as_tuple=True)
        bank[(band * ORIENTATIONS + direction)[inside], y, x] = 1
        bank = bank.flatten(1) / bank.flatten(1).sum(1, keepdim=True).clamp(min=1)
        self.register_buffer("hann", hann[:, None] * hann[None], persistent=False)
        self.register_buffer("bank", bank, persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """In float32, also under autocast."""
        step = self.window // 2
        padded = F.pad(images, [step // 2] * 4, mode="reflect")
        windows = padded.unfold(2, self.window, step).unfold(3, self.window, step)
        windows = (windows - windows.mean((-1, -2), keepdim=True)) * self.hann
        power = torch.view_as_real(torch.fft.rfft2(windows)).square().sum(-1).flatten(-2)
        with torch.autocast(images.device.type, enabled=False):
            bands = power @ self.bank.T
        return rearrange((bands + 0.05).log(), "b c y x f -> b (y x) (c f)")


class _Decoder(nn.Module):
    """One narrow pre-norm transformer block over all tokens: (B, 1 + 16, W) -> (B, 1 + 16, DECODER_WIDTH)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, DECODER_WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(1 + GRID**2, DECODER_WIDTH))
        self.block = Block(DECODER_WIDTH, DECODER_HEADS, mlp_ratio=2, qkv_bias=True)
        self.norm = nn.LayerNorm(DECODER_WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.block(self.project(tokens) + self.positions))


class TokenTargets(nn.Module):
    """The heads that predict the pixel and spectrum targets from the tokens of one modality; not saved.

    width: W of the tokens. size: S of the images. channels: of their spectrum.
    """

    def __init__(self, width: int, size: int, channels: int, heads: Heads) -> None:
        super().__init__()
        self.patch = size // GRID
        self.decoder = _Decoder(width) if heads == "nonlinear" else nn.Identity()
        width = DECODER_WIDTH if heads == "nonlinear" else width
        self.pixels = nn.Linear(width, 3 * self.patch**2)
        self.bands = nn.Linear(width, BANDS * ORIENTATIONS * channels)

    def forward(self, tokens: Tensor, images: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + 16, W), images (B, 3, S, S), log power (B, 16, channels * 48), which is standardised over the batch
        -> mean squared errors (), () of the pixels and of the spectrum."""
        grid = self.decoder(tokens)[:, 1:]
        patches = rearrange(images, "b c (y p) (x q) -> b (y x) (c p q)", p=self.patch, q=self.patch)
        power = (power - power.mean((0, 1))) / (power.std((0, 1)) + 1e-3)
        return F.mse_loss(self.pixels(grid), patches), F.mse_loss(self.bands(grid), power)


class WordTargets(nn.Module):
    """The head that predicts the words of a sentence from its end token; not saved.

    Args:
        width: W of the tokens.
        ids: (n, L) token ids of sentences with all words.
    """

    def __init__(self, width: int, ids: Tensor) -> None:
        super().__init__()
        self.register_buffer("vocabulary", ids.unique(), persistent=False)
        self.head = nn.Linear(width, len(self.vocabulary))

    vocabulary: Tensor

    def forward(self, tokens: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
        """Tokens (B, L', W), their mask (B, L'), ids (B, L) -> the mean over sentences of the cross-entropy (), in nats."""
        end = tokens[torch.arange(len(tokens)), mask.sum(1) - 1]
        has = (ids[:, :, None] == self.vocabulary).any(1).to(tokens.dtype)
        return F.binary_cross_entropy_with_logits(self.head(end), has, reduction="sum") / len(ids)


def pretrain(config: PretrainConfig, quiet: bool = False) -> Path:
    """Train the small Stage 1 and return the path of its checkpoint. The same config gives the same weights.

    Raises UserError if there are fewer training rows than `batch_size`.
    """
    seed_everything(config.seed)
    device = pick_device(config.device)
    data = read_tvl(config.datasets_dir, config.datasets, config.seed)
    if len(data.train) < config.batch_size:
        raise UserError(f"{len(data.train)} training rows are fewer than one batch; give a smaller --batch_size.")
    import open_clip

    register_small_clip()
    clip: Any = open_clip.create_model(SMALL_CLIP, load_weights=False)
    touch = create_touch_encoder(TOUCH_MODEL, clip.text_projection.shape[-1], SMALL_TOUCH)
    stage1 = Stage1(clip, open_clip.get_tokenizer(SMALL_CLIP), touch).to(device)
    options = ImageOptions(stage1.photo_size, stage1.touch_size)
    samples = Samples(data.root, data.train, options, TextOptions(), config.seed)
    spectra = {"vision": Spectrum(stage1.photo_size), "tactile": Spectrum(stage1.touch_size)}
    images = _load(samples, spectra, config.num_workers, quiet)
    widths = {modality: spec.width for modality, spec in stage1.specs.items()}
    targets = nn.ModuleDict(
        {
            "vision": TokenTargets(widths["vision"], stage1.photo_size, channels=1, heads=config.heads),
            "tactile": TokenTargets(widths["tactile"], stage1.touch_size, channels=3, heads=config.heads),
            "text": WordTargets(widths["text"], stage1.tokenize([PROMPT, *(row.caption or "" for row in data.train)])),
        }
    ).to(device)
    _fit(stage1, targets, samples, images, config, device, quiet)
    return _save(stage1, config)


@dataclass(frozen=True)
class Images:
    """The plain images of all rows that have both, in fp16: (n, 3, S, S), and their log power (n, 16, C * 48), by modality.

    rows (n,) int64. The spectrum of a photo is that of its brightness, of a touch image that of each colour.
    """

    pixels: dict[str, Tensor]
    power: dict[str, Tensor]
    rows: Tensor

    def batch(self, modality: str, at: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and log power of some rows, in float32."""
        pixels, power = (found[modality][at].float().to(device) for found in (self.pixels, self.power))
        return pixels, power


def _load(samples: Samples, spectra: Mapping[str, Spectrum], workers: int, quiet: bool) -> Images:
    pairs = [(i, 0) for i, row in enumerate(samples.rows) if row.vision and row.tactile]
    pixels: dict[str, list[Tensor]] = {m: [] for m in spectra}
    power: dict[str, list[Tensor]] = {m: [] for m in spectra}
    rows: list[int] = []
    with progress(len(pairs), "decode", "image", quiet) as bar:
        batches = [pairs[i : i + 128] for i in range(0, len(pairs), 128)]
        for batch, loaded in zip(batches, load_images(samples, batches, workers, ("vision", "tactile")), strict=True):
            usable = sorted(set(range(len(batch))) - {position for position, _, _ in loaded.faults})
            for modality, (positions, images) in loaded.images.items():
                images = images[[positions.index(i) for i in usable]]
                channels = images.mean(1, keepdim=True) if modality == "vision" else images
                pixels[modality].append(images.half())
                power[modality].append(spectra[modality](channels).half())
            rows += [batch[i][0] for i in usable]
            bar.update(len(batch))
    if len(rows) < len(pairs):
        reason = f"{len(pairs) - len(rows)} rows have an image that cannot be used"
        log.warning("skipped rows: %s", reason)
        Tolerance().check(len(pairs) - len(rows), len(pairs), reason)
    images_of, power_of = ({m: torch.cat(parts) for m, parts in found.items()} for found in (pixels, power))
    return Images(images_of, power_of, torch.tensor(rows))


def _fit(
    stage1: Stage1,
    targets: nn.ModuleDict,
    samples: Samples,
    images: Images,
    config: PretrainConfig,
    device: torch.device,
    quiet: bool,
) -> None:
    modules = nn.ModuleDict({"stage1": stage1, "targets": targets})
    words, betas = stage1.clip.token_embedding, (0.9, 0.98)
    optimizer = make_adamw(
        ((name, p) for name, p in modules.named_parameters() if p is not words.weight), config.weight_decay, betas
    )
    # a dense gradient of all 49,408 words and its AdamW would take a twentieth of a step; words that a batch lacks stay
    words.sparse = True
    of_words = torch.optim.SparseAdam([words.weight], betas=betas)
    rows, captions = images.rows, samples.caption_ids()
    per_epoch = len(rows) // config.batch_size
    total = per_epoch * config.epochs
    schedule = Schedule(config.lr, total, warmup=max(1, total // 20))
    text_rng = random.Random(config.seed)
    half = config.precision == "bf16" or (config.precision == "auto" and multiplies_bf16(device))
    weights = {"pixels": config.pixel_weight, "spectrum": config.spectrum_weight, "words": config.words_weight}
    stage1.train()
    with progress(total, "pretrain", "step", quiet) as bar:
        for step in range(total):
            epoch, i = divmod(step, per_epoch)
            if i == 0:
                order = torch.randperm(len(rows), generator=generator(config.seed, epoch))
            batch = order[i * config.batch_size : (i + 1) * config.batch_size]
            photo, touch = (images.batch(m, batch, device) for m in ("vision", "tactile"))
            # with 17 tokens plain attention is as fast as the fused one, whose backward pass in bf16 is slow on a CPU
            with sdpa_kernel(SDPBackend.MATH):
                losses = _losses(stage1, targets, samples, rows[batch], captions, photo, touch, text_rng, half)
            through = partial(backward_together, parts=losses.parts(weights))
            backward_and_step(losses.values["contrastive"], optimizer, schedule(step), through)
            optimizer_step(of_words, schedule(step))
            if step % 20 == 0:
                bar.set_postfix({name: f"{value:.2f}" for name, value in losses.values.items()}, refresh=False)
            bar.update()


@dataclass(frozen=True)
class EncodedBatch:
    """A batch in one modality: pooled features (n, E), and the errors of the targets of its tokens, {name: ()}."""

    pooled: Tensor
    errors: dict[str, Tensor]


@dataclass(frozen=True)
class Losses:
    """The losses of a batch by name, and what they were computed from.

    Encoders run in threads, forward and backward: a step has some 3,000 small operations, which gain little from more torch
    threads. So the contrastive loss, the only value with a graph, is computed from detached features, the leaves; their
    gradients are then passed to each encoder.
    """

    values: dict[str, Tensor]
    encoded: list[EncodedBatch]
    leaves: list[Tensor]

    def parts(self, weights: Mapping[str, float]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(features, their leaf, the weighted sum of the errors) of each modality; weights: {name of an error: weight}."""
        own = [torch.stack([weights[name] * e for name, e in of.errors.items()]).sum() for of in self.encoded]
        return [(of.pooled, leaf, error) for of, leaf, error in zip(self.encoded, self.leaves, own, strict=True)]


def _losses(
    stage1: Stage1,
    targets: nn.ModuleDict,
    samples: Samples,
    rows: Tensor,
    captions: Tensor,
    photo: tuple[Tensor, Tensor],
    touch: tuple[Tensor, Tensor],
    text_rng: random.Random,
    half: bool,
) -> Losses:
    """The InfoNCE loss, mean over pairs of modalities and both directions, and the errors of pixels, spectrum and words.

    photo, touch: images and their log power (see `Images.batch`). half: compute in bf16 (autocast).
    """
    device = photo[0].device
    sentences = [_sentence(samples.rows[row].caption, text_rng) for row in rows.tolist()]
    ids = {s: i for i, s in enumerate(dict.fromkeys(sentences))}  # every distinct sentence is encoded once
    sentence_ids = torch.tensor([ids[s] for s in sentences])
    keys = torch.stack([captions[rows], sentence_ids], dim=-1).to(device)
    has_text = torch.tensor([samples.rows[row].caption is not None for row in rows.tolist()], device=device)
    token_ids = stage1.tokenize(list(ids)).to(device)

    def of_images(encode: Callable[[Tensor], Any], modality: str, images: Tensor, power: Tensor) -> EncodedBatch:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            tokens, _, pooled = encode(images)
            pixels, spectrum = targets[modality](tokens, images, power)
        return EncodedBatch(pooled.float(), {"pixels": pixels, "spectrum": spectrum})

    def of_text() -> EncodedBatch:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            tokens, mask, pooled = stage1.encode_text(token_ids)
            words = targets["text"](tokens, mask, token_ids)
        return EncodedBatch(pooled.float(), {"words": words})

    work: list[Callable[[], EncodedBatch]] = [  # the longest first
        partial(of_images, stage1.encode_touch, "tactile", *touch),
        partial(of_images, stage1.encode_vision, "vision", *photo),
        of_text,
    ]
    encoded = run_together(work, device)
    leaves = [e.pooled.detach().requires_grad_() for e in encoded]
    tactile, vision, distinct = (F.normalize(leaf, dim=-1) for leaf in leaves)
    text = distinct[sentence_ids.to(device)]
    scale = stage1.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    all_rows, diagonal = torch.ones_like(has_text), torch.eye(len(rows), dtype=torch.bool, device=device)
    same_text = diagonal | positive_mask(keys, keys)
    contrastive = torch.zeros((), device=device)
    for a, b, positives, valid in (
        (vision, tactile, diagonal, all_rows),
        (vision, text, same_text, has_text),
        (tactile, text, same_text, has_text),
    ):
        both = info_nce(a, b, scale, positives, valid, valid) + info_nce(b, a, scale, positives, valid, valid)
        contrastive = contrastive + both / 6 / valid.sum().clamp(min=1)
    values = {"contrastive": contrastive}
    for of in encoded:
        for name, error in of.errors.items():
            values[name] = values.get(name, torch.zeros_like(error)) + error.detach()
    return Losses(values, encoded, leaves)


def _sentence(caption: str | None, rng: random.Random) -> str:
    """A random sentence of every form that Stage 2 may use: with or without the prompt, all adjectives or a subset."""
    prompt = PROMPT if rng.random() < 0.5 else ""
    if caption is None:
        return prompt
    return evaluation_text(caption, prompt) if rng.random() < 0.5 else training_text(caption, prompt, rng, shuffle=True)


def _save(stage1: Stage1, config: PretrainConfig) -> Path:
    """Save `checkpoint.pth` in TVL's format and `clip.pt` in OpenCLIP's. Returns the path of the first."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    weights = {k: v.cpu().contiguous() for k, v in stage1.state_dict().items()}
    clip = {k.removeprefix("clip."): v for k, v in weights.items() if k.startswith("clip.")}
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    args = argparse.Namespace(
        **plain,
        tactile_model=TOUCH_MODEL,
        tactile_overrides=SMALL_TOUCH,
        clip_vision_model=SMALL_CLIP,
        clip_pretrain_data="clip.pt",
        made_by=provenance(),
    )
    content = {
        "model": {k: v for k, v in weights.items() if not k.startswith("clip.")},
        "optimizer": {},
        "epoch": config.epochs - 1,
        "scaler": {},
        "args": args,
    }
    torch.save(clip, config.output_dir / "clip.pt")
    torch.save(content, config.output_dir / "checkpoint.pth")
    return config.output_dir / "checkpoint.pth"
