"""Layers with several copies of their weights, such as one for each modality.

Inputs go through their own copy at once, as one batched product instead of one call per copy. With one copy a layer is that
of torch.nn, for inputs of any leading dimension.

Shapes: G copies, of which parameters have one each along their first dimension.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linears(nn.Module):
    """(G, ..., inputs) -> (G, ..., outputs). Weights (G, inputs, outputs) and biases (G, outputs) start as in nn.Linear.

    Weights are transposed, so that their gradients come in the layout of the weights, without a copy.
    """

    def __init__(self, copies: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(copies, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(copies, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.weight) == 1:
            return F.linear(x, self.weight.squeeze(0).T, self.bias.squeeze(0))
        return torch.baddbmm(self.bias[:, None], x.flatten(1, -2), self.weight).unflatten(1, x.shape[1:-1])


class Norms(nn.Module):
    """LayerNorm over the last dimension: (G, ..., D) -> (G, ..., D)."""

    def __init__(self, copies: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(copies, dim))
        self.bias = nn.Parameter(torch.zeros(copies, dim))

    def forward(self, x: Tensor) -> Tensor:
        shape = self.weight.shape[1:]
        if len(self.weight) == 1:
            return F.layer_norm(x, shape, self.weight.squeeze(0), self.bias.squeeze(0))
        weight, bias = (p.view(len(p), *[1] * (x.ndim - 2), -1) for p in (self.weight, self.bias))
        return F.layer_norm(x, shape) * weight + bias


class Mlps(nn.Module):
    """An MLP with one hidden layer: (G, ..., inputs) -> (G, ..., outputs)."""

    def __init__(self, copies: int, inputs: int, hidden: int, outputs: int | None = None, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linears(copies, inputs, hidden), Linears(copies, hidden, outputs or inputs)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.fc1(x)), self.drop, self.training)
        return F.dropout(self.fc2(hidden), self.drop, self.training)


def join_copies(module: nn.Module, state: dict[str, Tensor], prefix: str, places: Mapping[str, Sequence[str]]) -> None:
    """Join weights that an earlier version kept in one module per copy, in a state dict that `module` is about to load.

    places: {name of a module, with a dot at the end: its names of before, one for each copy}; prefix: of all names in the
    state dict. A weight that is smaller than its copy is padded with zeros.
    """
    expected = module.state_dict()
    transposed = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, Linears)}
    for new, before in places.items():
        for key in [k for k in state if k.startswith(prefix + before[0])]:
            name = new + key.removeprefix(prefix + before[0])
            olds = [prefix + b + name.removeprefix(new) for b in before]
            if name not in expected or not all(old in state for old in olds):
                continue
            shape = expected[name].shape[1:]
            if state[key].ndim == len(shape):
                copies = [state.pop(old).T if name in transposed else state.pop(old) for old in olds]
                state[prefix + name] = torch.stack([_padded(copy, shape) for copy in copies])


def _padded(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros after the end of every dimension."""
    return F.pad(x, [n for old, new in zip(x.shape[::-1], shape[::-1], strict=True) for n in (0, new - old)])
