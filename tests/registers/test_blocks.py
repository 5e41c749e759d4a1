"""Register blocks: attention equals the reference implementation, masks hide keys, queries get gradients."""

import numpy as np
import pytest
import reference
import torch
from torch import nn

from tvl_align.contract import FeatureSpec
from tvl_align.registers import blocks as blocks_module
from tvl_align.registers.blocks import (
    Attention,
    BlockOptions,
    KeyProjection,
    RegisterBlock,
    RegisterStack,
    additive,
    attend_jointly,
)
from tvl_align.registers.copies import Linears
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
        torch.randn(1, 2, 3, 6),
        torch.randn(1, 2, 5, 6),
        torch.tensor([[[True] * 5, [True, False, True, False, True]]]),
    )
    k, v = layer.key_value(keys).chunk(2, dim=-1)
    for row in range(2):
        attended = reference.attention(*(t[0, row].detach().numpy() for t in (layer.query(z), k, v)), mask[0, row].numpy())
        expected = layer.out(torch.from_numpy(attended).float())
        assert torch.allclose(layer(z, keys, additive(mask))[0, row], expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("copies", [1, 2])
def test_absorbed_projections_give_the_same_result(copies: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients agree, with biases and masks, for registers that differ between rows or not (rows = 1), with
    shared and with own weights. The absorbed form is used exactly once."""
    torch.manual_seed(0)
    layer = Attention(BlockOptions(dim=16, num_heads=4), copies)
    nn.init.normal_(layer.key_value.bias)
    z, keys, mask = torch.randn(2, rows, 2, 16), torch.randn(2, 3, 20, 16), torch.rand(2, 3, 20) > 0.4
    results, absorbed_calls = [], []
    absorbed = Attention._absorbed
    monkeypatch.setattr(blocks_module, "NARROW", 0)
    monkeypatch.setattr(Attention, "_absorbed", lambda self, *args: absorbed_calls.append(1) or absorbed(self, *args))
    mask = additive(mask)
    for given in (mask, mask[:, :, None].expand(-1, -1, 2, -1)):  # a mask per query uses the standard form
        leaves = z.clone().requires_grad_(), keys.clone().requires_grad_()
        layer.zero_grad()
        attended = layer(*leaves, given)
        attended.sin().sum().backward()
        results.append([attended, *(x.grad for x in leaves), *(p.grad for p in layer.parameters())])
    assert absorbed_calls == [1]
    for absorbed_form, standard_form in zip(*results, strict=True):
        assert torch.allclose(absorbed_form, standard_form, atol=1e-5)


def test_projections_are_absorbed_where_that_saves_time() -> None:
    """Not for narrow tokens, not for many queries, and not on a GPU, where wide heads fall to a slow kernel."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    z, keys = torch.empty(1, 1, 3, 768, device="meta"), torch.empty(1, 9, 17, 768, device="meta")
    wide, narrow = Attention(BlockOptions(768)), Attention(BlockOptions(64))
    assert wide._absorbing_is_cheaper(z, keys)
    assert not wide._absorbing_is_cheaper(torch.empty(1, 9, 32, 768, device="meta"), keys)
    assert not narrow._absorbing_is_cheaper(z[..., :64], keys[..., :64])
    assert not wide._absorbing_is_cheaper(z.as_subclass(OnGPU), keys)


def test_copies_are_the_modules_one_by_one() -> None:
    """A stack with a copy for each of 3 modalities gives what 3 stacks with their weights give, and so do gradients."""
    torch.manual_seed(0)
    options = BlockOptions(dim=16, num_heads=4)
    together = RegisterStack(options, 2, registers=3, causal=True, copies=3)
    for parameter in together.parameters():
        nn.init.normal_(parameter, std=0.3)
    registers, keys, mask = torch.randn(3, 16), torch.randn(3, 4, 5, 16), torch.rand(3, 4, 5) > 0.3
    kept = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [True] * 3])
    found = together(registers, keys, mask, kept)
    found.sin().sum().backward()
    for i in range(3):
        alone = RegisterStack(options, 2, registers=3, causal=True)
        alone.load_state_dict({name: p[i : i + 1] for name, p in together.state_dict().items()})
        one = alone(registers, keys[i : i + 1], mask[i : i + 1], kept)
        assert torch.allclose(found[i], one[0], atol=1e-5)
        one.sin().sum().backward()
        for p, q in zip(together.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(p.grad[i], q.grad[0], atol=1e-4)


def test_a_shared_stack_is_that_of_each_modality() -> None:
    layers, registers, keys, mask = stack(), torch.randn(3, 16), torch.randn(2, 4, 5, 16), torch.rand(2, 4, 5) > 0.3
    both = layers(registers, keys, mask, ones(4, 3))
    for i in range(2):
        assert torch.allclose(both[i], layers(registers, keys[i : i + 1], mask[i : i + 1], ones(4, 3))[0], atol=1e-5)


def test_a_mask_of_whole_rows_is_that_of_all_their_keys() -> None:
    layers, registers, keys = stack(), torch.randn(3, 16), torch.randn(1, 4, 5, 16)
    rows = torch.tensor([[[True], [False], [True], [True]]])
    found = layers(registers, keys, rows, ones(4, 3))
    by_key = layers(registers, keys, rows.expand(1, 4, 5), ones(4, 3))
    assert torch.allclose(found, by_key, atol=1e-6) and found.isfinite().all()


def test_masked_keys_and_other_rows_have_no_effect() -> None:
    layers, registers, keys = stack(), torch.randn(3, 16), torch.randn(1, 2, 5, 16)
    mask = torch.tensor([[[True, True, False, False, True], [True] * 5]])
    before = layers(registers, keys, mask, ones(2, 3))
    keys = keys.clone()
    keys[0, 0, 2:4] = 50.0
    keys[0, 1] = torch.randn(5, 16)
    assert torch.allclose(before[0, 0], layers(registers, keys, mask, ones(2, 3))[0, 0])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_dropped_register_has_no_effect(layers: int) -> None:
    """It changes no other register."""
    blocks, registers, keys = stack(layers=layers), torch.randn(4, 16), torch.randn(1, 2, 5, 16)
    kept = torch.tensor([[True, True, False, False]] * 2)
    before = blocks(registers, keys, ones(1, 2, 5), kept)
    registers = registers.clone()
    registers[2:] = torch.randn(2, 16) * 10
    assert torch.equal(before[:, :, :2], blocks(registers, keys, ones(1, 2, 5), kept)[:, :, :2])


def test_queries_get_gradients_from_token_sequences() -> None:
    """With one key the softmax is 1 for every query, so only several keys give gradients."""
    for tokens, learns in ((5, True), (1, False)):
        blocks = stack(layers=1)
        registers = nn.Parameter(torch.randn(3, 16))
        blocks(registers, torch.randn(1, 2, tokens, 16), ones(1, 2, tokens), ones(2, 3)).square().sum().backward()
        assert (blocks.blocks[0].cross.query.weight.grad.abs().max() > 1e-6) == learns


def test_stochastic_depth_drops_branches_of_rows_in_training_only() -> None:
    torch.manual_seed(0)
    block = RegisterBlock(BlockOptions(16, 4, drop_path_rate=0.5), self_attention=False)
    z, keys = torch.randn(1, 400, 3, 16), torch.randn(1, 400, 5, 16)
    full = block.eval()(z, keys, None, None)
    branch = block._drop_path(z)
    assert torch.equal(branch, z) and torch.equal(full, block(z, keys, None, None))
    dropped = block.train()._drop_path(z)
    zero = (dropped == 0).flatten(2).all(2)
    assert 0.4 < float(zero.float().mean()) < 0.6
    assert torch.allclose(dropped[~zero], 2 * z[~zero])


def test_joint_attention_to_one_modality_equals_its_own_stack() -> None:
    blocks, registers, keys = stack(), torch.randn(3, 16), torch.randn(1, 2, 5, 16)
    mask, kept = ones(1, 2, 5), ones(2, 3)
    alone = blocks(registers, keys, mask, kept)[0]
    assert torch.allclose(alone, attend_jointly([blocks], registers, [keys], [mask], kept), atol=1e-6)
    other, more = stack(1), torch.randn(1, 2, 4, 16)
    both = attend_jointly([blocks, other], registers, [keys, more], [mask, ~ones(1, 2, 4)], kept)
    assert torch.allclose(alone, both, atol=1e-6)
    mixed = attend_jointly([blocks, other], registers, [keys, more], [mask, ones(1, 2, 4)], kept)
    assert not torch.allclose(alone, mixed, atol=1e-2)


def test_key_projection_is_linear_only_if_widths_differ() -> None:
    assert isinstance(KeyProjection(FeatureSpec(16, 5, 8), 16).project, nn.Identity)
    assert isinstance(KeyProjection(FeatureSpec(12, 5, 8), 16).project, Linears)


def test_decoder_uses_kept_registers_only() -> None:
    torch.manual_seed(0)
    decoder, z = TokenDecoder(FeatureSpec(12, 5, 8), 16), torch.randn(1, 2, 4, 16)
    kept = torch.tensor([[True, True, True, False]] * 2)
    before = decoder(z, kept, 5)
    z = z.clone()
    z[:, :, 3] = 9.0
    assert torch.equal(before, decoder(z, kept, 5))
    assert before.shape == (1, 2, 5, 12)


def test_pooling_is_the_mean_of_the_kept_registers() -> None:
    tokens = torch.randn(2, 3, 4)
    kept = torch.tensor([[True, False, False], [True, True, False]])
    expected = np.stack([tokens[0, 0], tokens[1, :2].mean(0)])
    assert torch.allclose(pool_kept(tokens, kept), torch.from_numpy(expected))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="30 is not divisible by 8 heads"):
        BlockOptions(dim=30, num_heads=8)
