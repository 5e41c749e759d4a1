"""Checkpoints of touch encoders that others have trained -> a timm ViT with their weights: AnyTouch and Sparsh.

The weights are loaded strictly: no weight of the ViT stays random, and none of the encoder in the file is left out.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tvl_align.encoders.tvl import load_strictly
from tvl_align.system.console import UserError

ANYTOUCH_PARTS = (  # weights in its checkpoints that are not those of a layer
    "touch_model.embeddings.class_embedding",
    "touch_model.embeddings.position_embedding.weight",
    "video_patch_embedding.weight",
    "touch_projection.weight",
    "sensor_token",
)
ANYTOUCH_NAMES = {  # of layers: {in its checkpoints: in timm}
    "pre_layrnorm": "norm_pre",
    "post_layernorm": "norm",
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
}
SPARSH_PLACES = (  # of the encoder in a checkpoint, by method: DINO and DINOv2, I-JEPA, MAE, a task, the encoder alone
    *("teacher_encoder.backbone.", "target_encoder.backbone.", "target_encoder.", "encoder.", "model_encoder.", ""),
)
SPARSH_SIDE = 224  # pixels; its places are sinusoids, so that any size has them
BANDS, PATCHES = "pos_embed.frequency_bands", "patch_embed.proj.weight"


def anytouch_vit(weights: Mapping[str, Tensor], path: Path) -> VisionTransformer:
    """The touch encoder in the weights of an AnyTouch checkpoint `path` (Feng et al. 2025, arXiv:2502.12191).

    It is CLIP's ViT with 5 tokens of the sensor behind the class token and a patch embedding for 3 frames. As where AnyTouch
    is evaluated on single images, the image stands for each frame; the sensor is the universal one, the last of its table.
    Its head projects the class token.
    """
    file = {name.removeprefix("touch_mae_model."): value for name, value in weights.items()}
    if lacking := [name for name in ANYTOUCH_PARTS if name not in file]:
        raise UserError(f"{path} is no checkpoint of AnyTouch, it lacks {', '.join(lacking)}; give one with sensor tokens.")
    class_token, places, frames, projection, sensors = (file[name] for name in ANYTOUCH_PARTS)
    width, patch, sensor = len(class_token), frames.shape[-1], sensors[-1]
    state = {
        "patch_embed.proj.weight": frames.sum(2),
        "cls_token": class_token.view(1, 1, width),
        "reg_token": sensor[None],
        "pos_embed": torch.cat([places[:1], torch.zeros_like(sensor), places[1:]])[
            None
        ],  # the sensor's tokens have no place
        "head.weight": projection,
    }
    for name, value in file.items():
        part, _, kind = name.removeprefix("touch_model.").removeprefix("encoder.").rpartition(".")
        layer = re.match(r"layers\.(\d+)\.", part)
        if not name.startswith("touch_model.") or name.startswith("touch_model.embeddings."):
            continue
        if layer is None:
            state[f"{ANYTOUCH_NAMES.get(part, part)}.{kind}"] = value
        elif part.endswith("self_attn.q_proj"):
            whole = [file.get(name.replace("q_proj", x)) for x in ("q_proj", "k_proj", "v_proj")]
            state[f"blocks.{layer[1]}.attn.qkv.{kind}"] = torch.cat([x for x in whole if x is not None])
        elif not part.endswith(("self_attn.k_proj", "self_attn.v_proj")):
            inner = part[layer.end() :]
            state[f"blocks.{layer[1]}.{ANYTOUCH_NAMES.get(inner, inner)}.{kind}"] = value
    model = VisionTransformer(
        img_size=math.isqrt(len(places) - 1) * patch,
        patch_size=patch,
        embed_dim=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_heads=max(1, width // 64),
        reg_tokens=len(sensor),
        num_classes=0,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    model.head = nn.Linear(width, len(projection), bias=False)
    load_strictly(model, state, path, "give --tactile_encoder anytouch: an unchanged checkpoint of AnyTouch")
    return model


def sparsh_vit(weights: Mapping[str, Tensor], path: Path) -> VisionTransformer:
    """The encoder of two touch frames in the weights of a Sparsh checkpoint `path` (Higuera et al. 2024, arXiv:2410.24090).

    It is a ViT for 6 channels, the present frame and then the earlier one, with registers that have no place, layer scale,
    and sinusoids as the places of patches, whose frequencies are in the file. Its pooled vector is the mean of the patches.
    Of the networks that a checkpoint of training has, the teacher (target) is taken, as Sparsh does.
    """
    place = next((place for place in SPARSH_PLACES if place + PATCHES in weights), None)
    if place is None:
        raise UserError(f"{path} is no checkpoint of Sparsh, it has no {PATCHES}; give that of an encoder.")
    file = {name.removeprefix(place): value for name, value in weights.items() if name.startswith(place)}
    patches = file[PATCHES]
    if patches.ndim != 4 or patches.shape[1] != 6 or BANDS not in file:
        video = " (a V-JEPA of Sparsh takes four)" if patches.ndim == 5 else ""
        raise UserError(f"{path} is no encoder of two touch frames{video}; give a DINO, DINOv2, MAE or I-JEPA of Sparsh.")
    width, patch, tokens = len(patches), patches.shape[-1], file.pop("register_tokens", None)
    file["pos_embed"] = _sinusoids(file.pop(BANDS), SPARSH_SIDE // patch)[None, :, :width]
    if tokens is not None:
        file["reg_token"] = tokens
    model = VisionTransformer(
        img_size=SPARSH_SIDE,
        patch_size=patch,
        in_chans=6,
        embed_dim=width,
        depth=len({name.split(".")[1] for name in file if name.startswith("blocks.")}),
        num_heads=max(1, width // 64),
        init_values=1.0 if "blocks.0.ls1.gamma" in file else None,
        class_token=False,
        reg_tokens=0 if tokens is None else tokens.shape[1],
        no_embed_class=True,
        global_pool="avg",
        fc_norm=False,
        num_classes=0,
    )
    load_strictly(model, file, path, "give --tactile_encoder sparsh: an unchanged checkpoint of Sparsh")
    return model


def _sinusoids(bands: Tensor, side: int) -> Tensor:
    """Places of the patches of a square grid, row by row: (2, K) frequencies -> (side * side, 4 * K).

    Of each axis, y and then x, the sines and then the cosines of the index of the patch times the frequencies.
    """
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.stack([y, x], dim=-1).view(-1, 2, 1) * bands.float()
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
