"""Checkpoints of Sparsh with random weights, in the names of its public code."""

import torch
from torch import Tensor

WIDTH, DEPTH, PATCH = 64, 2, 16


def sparsh_weights(place: str = "", registers: int = 1, scaled: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """The weights of an encoder of two frames, of 1 head, under names that begin with `place`."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, mean: float = 0.0) -> Tensor:
        return mean + torch.randn(*shape, generator=g) / 8

    found = {
        "patch_embed.proj.weight": draw(WIDTH, 6, PATCH, PATCH),
        "patch_embed.proj.bias": draw(WIDTH),
        "pos_embed.frequency_bands": 10_000 ** -torch.linspace(0, 1, WIDTH // 4 + 1)[:-1].repeat(2, 1),
        "norm.weight": draw(WIDTH, mean=1),
        "norm.bias": draw(WIDTH),
    }
    if registers:
        found["register_tokens"] = draw(1, registers, WIDTH)
    for i in range(DEPTH):
        for name, shape in (("attn.qkv", (3 * WIDTH, WIDTH)), ("attn.proj", (WIDTH, WIDTH))):
            found |= {f"blocks.{i}.{name}.weight": draw(*shape), f"blocks.{i}.{name}.bias": draw(shape[0])}
        for name, shape in (("mlp.fc1", (4 * WIDTH, WIDTH)), ("mlp.fc2", (WIDTH, 4 * WIDTH))):
            found |= {f"blocks.{i}.{name}.weight": draw(*shape), f"blocks.{i}.{name}.bias": draw(shape[0])}
        for name in ("norm1", "norm2"):
            found |= {f"blocks.{i}.{name}.weight": draw(WIDTH, mean=1), f"blocks.{i}.{name}.bias": draw(WIDTH)}
        if scaled:
            found |= {f"blocks.{i}.{name}.gamma": draw(WIDTH, mean=1) for name in ("ls1", "ls2")}
    return {f"{place}{name}": value for name, value in found.items()}
