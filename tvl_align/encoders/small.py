"""Small encoders for the synthetic data: vision transformers with a convolutional stem (Xiao et al. 2021, arXiv:2106.14881).

With early convolutions a small ViT learns textures in minutes instead of hours. For vision this is the timm model
`conv_stem_vit_64`, used by the OpenCLIP config `TVL-small`. For touch it is a timm ViT with overrides that are saved in the
checkpoint.
"""

from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.layers import HybridEmbed
from timm.models import register_model
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

CLIP_CONFIGS = Path(__file__).parent / "open_clip_configs"
SMALL_CLIP = "TVL-small"
SMALL_TOUCH: dict[str, Any] = {"img_size": 64, "embed_dim": 192, "depth": 4, "conv_stem": [32, 64, 128, 192]}


def touch_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    """The `tactile_overrides` of a checkpoint -> keyword arguments of `timm.create_model`.

    `conv_stem` lists the channels of 3x3 convolutions with stride 2 that replace the patch embedding. All other entries are
    arguments of timm (img_size, embed_dim, depth, num_heads, patch_size).
    """
    arguments = dict(overrides)
    channels = arguments.pop("conv_stem", None)
    if channels:
        stem = ConvStem(depth=len(channels), channels=tuple(channels), stride=(2,) * len(channels), act_layer=nn.GELU)
        arguments |= {"embed_layer": partial(HybridEmbed, backbone=stem), "patch_size": 1}
    return arguments


@register_model
def conv_stem_vit_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The ViT of `SMALL_TOUCH` for images of 64 pixels, registered in timm for OpenCLIP configs. No pretrained weights."""
    assert not pretrained
    return timm.create_model("vit_tiny_patch16_224", **(touch_overrides(SMALL_TOUCH) | kwargs))


def register_small_clip() -> None:
    """Register the model config `TVL-small` in OpenCLIP. Repeated calls have no effect."""
    import open_clip

    open_clip.add_model_config(CLIP_CONFIGS)
