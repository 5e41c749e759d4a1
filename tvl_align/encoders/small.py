"""The small encoders of the synthetic world: vision transformers on a convolutional stem.

Early convolutions let small transformers see textures after minutes of training instead of hours (Xiao et al. 2021,
arXiv:2106.14881). Two forms: a timm model named `conv_stem_vit_64` for OpenCLIP's vision tower (config `TVL-small`), and
overrides of a timm ViT, stored in the checkpoint, for touch.
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
    """Plain numbers from a checkpoint -> arguments of `timm.create_model`.

    `conv_stem`: channels of a stem of stride-2 3x3 convolutions in place of the patch embedding; all other entries are
    timm's own (img_size, embed_dim, depth, num_heads, patch_size).
    """
    arguments = dict(overrides)
    channels = arguments.pop("conv_stem", None)
    if channels:
        stem = ConvStem(depth=len(channels), channels=tuple(channels), stride=(2,) * len(channels), act_layer=nn.GELU)
        arguments |= {"embed_layer": partial(HybridEmbed, backbone=stem), "patch_size": 1}
    return arguments


@register_model
def conv_stem_vit_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A 64-pixel ViT of the size of `SMALL_TOUCH`, under a name that OpenCLIP configs can use. It has no weights."""
    assert not pretrained
    return timm.create_model("vit_tiny_patch16_224", **(touch_overrides(SMALL_TOUCH) | kwargs))


def register_small_clip() -> None:
    """Make `TVL-small` known to OpenCLIP; calling it again changes nothing."""
    import open_clip

    open_clip.add_model_config(CLIP_CONFIGS)
