"""Batches of small models: G models of one kind and shape, trained side by side, each on data of its own.

Every weight has a leading dimension G, so a layer of all models is one batched matrix product. The models start from
the same weights and drop units by the same random numbers, but share no gradient: each learns what it would learn alone.

Shapes: G models, B rows, K features, L tokens of width W, H hidden units, T targets, C outputs of a target.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 256  # units of a hidden layer of an MLP
ATTENDED = 64  # width of an attentive probe
QUERIES = 4  # of an attentive probe, for each target
Weights = Mapping[str, Tensor]  # by name, each with a leading dimension for the models


class Batched(nn.Module, ABC):
    """G models: one for each entry of `dropout` and `decay`, its rates. Weights and dropout are drawn from `seed`.

    inputs: (K,) features, or (L, W) tokens and their width. outputs: (T, C).
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: tuple[int, int],
        dropout: Sequence[float],
        decay: Sequence[float],
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.outputs, self.models = outputs, len(dropout)
        self.start, self.draw = (torch.Generator(d).manual_seed(seed) for d in ("cpu", device))
        self.rates = torch.tensor(dropout, device=device)[:, None, None]
        self.decays = torch.tensor(decay, device=device)
        self.weights = nn.ParameterDict(self.build(*inputs)).to(device)

    @abstractmethod
    def build(self, *inputs: int) -> dict[str, Tensor]:
        """The first weights, by name; those whose name starts with "matrix" have weight decay."""

    def matrix(self, *shape: int) -> Tensor:
        """(G, *shape), uniform, by the number of inputs: the last dimension but one."""
        return self._of_every_model((2 * torch.rand(shape, generator=self.start) - 1) / shape[-2] ** 0.5)

    def vector(self, *shape: int, std: float = 0.0) -> Tensor:
        """(G, *shape), normal: a bias or a learned input."""
        return self._of_every_model(std * torch.randn(shape, generator=self.start))

    def _of_every_model(self, weight: Tensor) -> Tensor:
        return weight.repeat(self.models, *[1] * weight.ndim)

    def copy_of(self, model: int) -> Weights:
        """A copy of the weights of one model, as a batch of one: what the model is now, for `forward` later."""
        return {name: weight[model : model + 1].detach().clone() for name, weight in self.weights.items()}

    def dropout(self, x: Tensor) -> Tensor:
        """Dropout of (G, B, H) in training, at the rate of each model."""
        if not self.training:
            return x
        kept = torch.rand(x.shape[1:], generator=self.draw, device=x.device) >= self.rates
        return x * (kept / (1 - self.rates))

    @torch.no_grad()
    def decay(self, lr: float) -> None:
        """Decoupled weight decay of one step, as in AdamW, at the rate of each model."""
        for name, weight in self.weights.items():
            if name.startswith("matrix"):
                weight.mul_((1 - lr * self.decays).view(-1, *[1] * (weight.ndim - 1)))

    def keep(self, models: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Go on with some of the models only, (g,) indices."""
        fewer = {p: nn.Parameter(p.detach()[models]) for p in self.weights.values()}
        for old, new in fewer.items():
            optimizer.state[new] = {k: x[models] if x.ndim else x for k, x in optimizer.state.pop(old).items()}
        for group in optimizer.param_groups:
            group["params"] = [fewer[p] for p in group["params"]]
        self.weights = nn.ParameterDict({name: fewer[p] for name, p in self.weights.items()})
        self.rates, self.decays = self.rates[models], self.decays[models]


class Linear(Batched):
    """(G, B, K) -> (G, B, T, C)."""

    def build(self, *inputs: int) -> dict[str, Tensor]:
        count = math.prod(self.outputs)
        return {"matrix": self.matrix(*inputs, count), "bias": self.vector(1, count)}

    def forward(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        return _layer(x, weights or self.weights).unflatten(2, self.outputs)


class MLP(Batched):
    """(G, B, K) -> two hidden layers, each normalised, with GELU and dropout -> (G, B, T, C)."""

    def build(self, *inputs: int) -> dict[str, Tensor]:
        sizes = (*inputs, HIDDEN, HIDDEN, math.prod(self.outputs))
        made = {f"matrix{i}": self.matrix(*sizes[i : i + 2]) for i in range(3)}
        return made | {f"bias{i}": self.vector(1, sizes[i + 1]) for i in range(3)}

    def forward(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        w = weights or self.weights
        for i in ("0", "1"):
            x = _layer(x, w, i)
            x = self.dropout(F.gelu(F.layer_norm(x, x.shape[-1:])))
        return _layer(x, w, "2").unflatten(2, self.outputs)


class Attentive(Batched):
    """Tokens (G, B, L, W) and mask (G, B, L) -> attention pooling by learned queries of each target, followed by an MLP with
    one hidden layer per target -> (G, B, T, C)."""

    def build(self, *inputs: int) -> dict[str, Tensor]:
        (targets, outputs), hidden = self.outputs, ATTENDED
        return {
            "positions": self.vector(*inputs, std=0.02),
            "queries": self.vector(hidden, targets * QUERIES, std=0.02),
            "matrix_keys": self.matrix(inputs[1], hidden),
            "matrix_values": self.matrix(inputs[1], hidden),
            "bias_values": self.vector(1, hidden),
            "matrix_in": self.matrix(targets, QUERIES * hidden, hidden),
            "bias_in": self.vector(targets, 1, hidden),
            "matrix_out": self.matrix(targets, hidden, outputs),
            "bias_out": self.vector(targets, 1, outputs),
        }

    def forward(self, tokens: Tensor, mask: Tensor, weights: Weights | None = None) -> Tensor:
        w, (g, rows, length, _) = weights or self.weights, tokens.shape
        x = F.layer_norm(tokens.float(), tokens.shape[-1:]) + w["positions"][:, None, :length]
        x = x.flatten(1, 2)
        keys = w["matrix_keys"] @ w["queries"] / w["queries"].shape[1] ** 0.5  # small, so keys of all tokens are not needed
        scores = (x @ keys).view(g, rows, length, -1).masked_fill(~mask[..., None], -1e9)
        values = _layer(x, w, "_values").view(g, rows, length, -1)
        pooled = (scores.softmax(2).transpose(2, 3) @ values).view(g, rows, self.outputs[0], -1).transpose(1, 2)
        hidden = F.gelu(pooled @ w["matrix_in"] + w["bias_in"])  # (G, T, B, H)
        hidden = self.dropout(hidden.flatten(1, 2)).view_as(hidden)
        return (hidden @ w["matrix_out"] + w["bias_out"]).transpose(1, 2)


def _layer(x: Tensor, weights: Weights | nn.ParameterDict, name: str = "") -> Tensor:
    """(G, B, K) -> (G, B, H)."""
    return torch.baddbmm(weights[f"bias{name}"], x, weights[f"matrix{name}"])
