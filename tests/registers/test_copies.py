"""Layers with several copies of their weights are the layers of torch.nn one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tvl_align.registers.copies import Linears, Mlps, Norms, join_copies
from tvl_align.training.optimisation import decays


@pytest.mark.parametrize("copies", [1, 3])
def test_each_copy_is_the_layer_of_torch(copies: int) -> None:
    torch.manual_seed(0)
    linears, norms, x = Linears(copies, 5, 4), Norms(copies, 5), torch.randn(copies, 2, 6, 5)
    nn.init.normal_(norms.weight)
    nn.init.normal_(norms.bias)
    for i in range(copies):
        expected = F.linear(x[i], linears.weight[i].T, linears.bias[i])
        assert torch.allclose(linears(x)[i], expected, atol=1e-6)
        assert torch.allclose(norms(x)[i], F.layer_norm(x[i], (5,), norms.weight[i], norms.bias[i]), atol=1e-6)


def test_weights_start_as_those_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    ours, theirs = Linears(2, 400, 300), nn.Linear(400, 300)
    assert ours.weight.abs().max() <= 400**-0.5 and ours.bias.abs().max() <= 400**-0.5
    assert ours.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.02)


def test_gradients_have_the_layout_of_the_weights() -> None:
    """Otherwise each is copied once more in every step."""
    layer = Linears(3, 5, 4)
    layer(torch.randn(3, 7, 5)).sum().backward()
    assert layer.weight.grad.is_contiguous() and layer.bias.grad.is_contiguous()


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    mlp, x = Mlps(2, 6, 50, drop=0.5), torch.randn(2, 3, 6)
    assert torch.equal(mlp.eval()(x), mlp(x))
    assert not torch.equal(mlp.train()(x), mlp(x))


def test_matrices_decay_and_copies_of_norms_and_biases_do_not() -> None:
    net = nn.ModuleDict({"cross_norm": Norms(2, 4), "norm": Norms(2, 4), "query": Linears(2, 4, 4), "own": nn.Linear(4, 4)})
    assert {n for n, p in net.named_parameters() if decays(n, p)} == {"query.weight", "own.weight"}


def test_weights_of_modules_of_their_own_are_joined() -> None:
    """Transposed where needed, and smaller ones padded; names that do not fit are left for torch to refuse."""
    new = nn.ModuleDict({"read": Linears(2, 5, 3), "norm": Norms(2, 3)})
    old = {m: nn.ModuleDict({"read": nn.Linear(k, 3), "norm": nn.LayerNorm(3)}) for m, k in (("a", 5), ("b", 4))}
    state = {
        f"x.{part}.{m}.{n}": p for m, parts in old.items() for part in parts for n, p in parts[part].state_dict().items()
    }
    state["x.other.weight"] = torch.zeros(1)
    join_copies(new, state, "x.", {f"{part}.": [f"{part}.a.", f"{part}.b."] for part in new})
    assert set(state) == {"x.read.weight", "x.read.bias", "x.norm.weight", "x.norm.bias", "x.other.weight"}
    new.load_state_dict({name.removeprefix("x."): p for name, p in state.items() if "other" not in name})
    x = torch.randn(2, 7, 5)
    x[1, :, 4] = 9.0  # b has no fifth input
    found = new["norm"](new["read"](x))
    for i, (parts, width) in enumerate(zip(old.values(), (5, 4), strict=True)):
        assert torch.allclose(found[i], parts["norm"](parts["read"](x[i, :, :width])), atol=1e-5)
