"""The smallest encoders of one's own, `own_encoders:NAME` wherever an option takes one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Encoded = tuple[Tensor, Tensor, Tensor]


class Colours(nn.Module):
    """Of pictures: the mean colour of each quarter."""

    size, mean, std = 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def encode(self, images: Tensor) -> Encoded:
        tokens = F.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), F.normalize(tokens.flatten(1), dim=-1)


class Letters(nn.Module):
    """Of text: a vector for each letter."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Embedding.from_pretrained(torch.eye(128, 6) + 0.1)

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        ids = torch.zeros(len(sentences), 10, dtype=torch.int64)
        for i, sentence in enumerate(sentences):
            ids[i, : min(10, len(sentence))] = torch.tensor([ord(x) for x in sentence[:10]], dtype=torch.int64)
        return ids

    def encode(self, ids: Tensor) -> Encoded:
        tokens, mask = self.vectors(ids), (ids > 0) | (torch.arange(ids.shape[1]) == 0)
        return tokens, mask, F.normalize((tokens * mask[..., None]).sum(1), dim=-1)


class Curves(nn.Module):
    """Of curves, .npy files or arrays of 12 numbers: three tokens of four numbers."""

    shape = (12,)

    def transform(self, source: Any) -> Tensor:
        return torch.as_tensor(np.asarray(source if isinstance(source, np.ndarray | Tensor) else np.load(source))).float()

    def encode(self, curves: Tensor) -> Encoded:
        tokens = curves.unflatten(1, (3, 4))
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), F.normalize(curves, dim=-1)


class OtherCurves(Curves):
    """The same in another version."""

    name = "2"
