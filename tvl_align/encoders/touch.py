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
