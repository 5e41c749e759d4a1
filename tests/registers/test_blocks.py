"""Register blocks: attention equals the reference implementation, masks hide keys, queries get gradients."""

import numpy as np
import pytest
import reference
import torch
from torch import nn

from tvl_align.contract import FeatureSpec
from tvl_align.registers.blocks import Attention, BlockOptions, KeyProjection, RegisterStack, attend_jointly
from tvl_align.registers.decoder import TokenDecoder
from tvl_align.registers.pooling import pool_kept
from tvl_align.system.console import UserError


def stack(seed: int = 0, layers: int = 2) -> RegisterStack:
    torch.manual_seed(seed)
    return RegisterStack(BlockOptions(dim=16, num_heads=4), layers, registers=3).eval()


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def test_attention_equals_the_reference() -> None:
    torch.manual_seed(0)
    layer = Attention(BlockOptions(dim=6, num_heads=1))
    z, keys, mask = (
        torch.randn(2, 3, 6),
        torch.randn(2, 5, 6),
        torch.tensor([[True] * 5, [True, False, True, False, True]]),
    )
    k, v = layer.key_value(keys).chunk(2, dim=-1)
    for row in range(2):
        attended = reference.attention(*(t[row].detach().numpy() for t in (layer.query(z), k, v)), mask[row].numpy())
        expected = layer.out(torch.from_numpy(attended).float())
        assert torch.allclose(layer(z, keys, mask)[row], expected, atol=1e-5)


def test_absorbed_projections_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients agree, with biases and masks. The absorbed form is used exactly once."""
    torch.manual_seed(0)
    layer = Attention(BlockOptions(dim=16, num_heads=4))
    nn.init.normal_(layer.key_value.bias)
    z, keys, mask = torch.randn(3, 2, 16), torch.randn(3, 20, 16), torch.rand(3, 20) > 0.4
    results, absorbed_calls = [], []
    absorbed = Attention._absorbed
    monkeypatch.setattr(Attention, "_absorbed", lambda self, *args: absorbed_calls.append(1) or absorbed(self, *args))
    for given in (mask, mask[:, None].expand(-1, 2, -1)):  # a mask per query uses the standard form
        leaves = z.clone().requires_grad_(), keys.clone().requires_grad_()
        layer.zero_grad()
        attended = layer(*leaves, given)
        attended.sin().sum().backward()
        results.append([attended, *(x.grad for x in leaves), *(p.grad for p in layer.parameters())])
    assert absorbed_calls == [1]
    for absorbed_form, standard_form in zip(*results, strict=True):
        assert torch.allclose(absorbed_form, standard_form, atol=1e-5)


def test_masked_keys_and_other_rows_have_no_effect() -> None:
    layers, registers, keys = stack(), torch.randn(3, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True, True, False, False, True], [True] * 5])
    before = layers(registers, keys, mask, ones(2, 3))
    keys = keys.clone()
    keys[0, 2:4] = 50.0
    keys[1] = torch.randn(5, 16)
    assert torch.allclose(before[0], layers(registers, keys, mask, ones(2, 3))[0])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_dropped_register_has_no_effect(layers: int) -> None:
    """It changes no other register, and its own output is zero."""
    blocks, registers, keys = stack(layers=layers), torch.randn(4, 16), torch.randn(2, 5, 16)
    kept = torch.tensor([[True, True, False, False]] * 2)
    before = blocks(registers, keys, ones(2, 5), kept)
    registers = registers.clone()
    registers[2:] = torch.randn(2, 16) * 10
    assert torch.equal(before, blocks(registers, keys, ones(2, 5), kept))
    assert not before[:, 2:].any()


def test_queries_get_gradients_from_token_sequences() -> None:
    """With one key the softmax is 1 for every query, so only several keys give gradients."""
    for tokens, learns in ((5, True), (1, False)):
        blocks = stack(layers=1)
        registers = nn.Parameter(torch.randn(3, 16))
        blocks(registers, torch.randn(2, tokens, 16), ones(2, tokens), ones(2, 3)).square().sum().backward()
        assert (blocks.blocks[0].cross.query.weight.grad.abs().max() > 1e-6) == learns


def test_joint_attention_to_one_modality_equals_its_own_stack() -> None:
    blocks, registers, keys = stack(), torch.randn(3, 16), torch.randn(2, 5, 16)
    mask, kept, present = ones(2, 5), ones(2, 3), ones(2)
    alone = blocks(registers, keys, mask, kept)
    assert torch.equal(alone, attend_jointly([blocks], registers, [keys], [mask], kept, [present]))
    other, absent = stack(1), torch.zeros(2, dtype=torch.bool)
    both = attend_jointly(
        [blocks, other], registers, [keys, torch.randn(2, 4, 16)], [mask, ones(2, 4)], kept, [present, absent]
    )
    assert torch.allclose(alone, both)
    mixed = attend_jointly(
        [blocks, other], registers, [keys, torch.randn(2, 4, 16)], [mask, ones(2, 4)], kept, [present, present]
    )
    assert not torch.allclose(alone, mixed, atol=1e-2)


def test_key_projection_is_linear_only_if_widths_differ() -> None:
    assert isinstance(KeyProjection(FeatureSpec(16, 5, 8), 16).project, nn.Identity)
    assert isinstance(KeyProjection(FeatureSpec(12, 5, 8), 16).project, nn.Linear)


def test_decoder_uses_kept_registers_only() -> None:
    torch.manual_seed(0)
    decoder, z = TokenDecoder(FeatureSpec(12, 5, 8), 16), torch.randn(2, 4, 16)
    kept = torch.tensor([[True, True, True, False]] * 2)
    before = decoder(z, kept, 5)
    z = z.clone()
    z[:, 3] = 9.0
    assert torch.equal(before, decoder(z, kept, 5))
    assert before.shape == (2, 5, 12)


def test_pooling_is_the_mean_of_the_kept_registers() -> None:
    tokens = torch.randn(2, 3, 4)
    kept = torch.tensor([[True, False, False], [True, True, False]])
    expected = np.stack([tokens[0, 0], tokens[1, :2].mean(0)])
    assert torch.allclose(pool_kept(tokens, kept), torch.from_numpy(expected))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="30 is not divisible by 8 heads"):
        BlockOptions(dim=30, num_heads=8)
