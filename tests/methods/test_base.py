"""The base model and its loss."""

import math
from dataclasses import replace

import pytest
import torch

from tvl_align.contract import Features, Output, Tokens
from tvl_align.encoders.tvl import Stage1, load_stage1
from tvl_align.losses import contrastive
from tvl_align.losses import independence as independence_module
from tvl_align.losses.alignment import pair_name
from tvl_align.losses.independence import independence
from tvl_align.methods.base import (
    BaseLoss,
    Predictors,
    Stage2Config,
    Stage2Loss,
    TVLStage2,
    on_grid,
    quantise,
    rounded,
    unit_owners,
)
from tvl_align.methods.codes import Codes
from tvl_align.registers.pooling import pooled_overlapping
from tvl_align.system.console import UserError
from tvl_align.training.checks import SPECS, random_features


def model(**changes: object) -> TVLStage2:
    torch.manual_seed(0)
    return TVLStage2(SPECS, **({"register_token_dim": 32, "num_heads": 4} | changes))


def test_documented_defaults_give_a_finite_loss_and_gradients() -> None:
    """4 registers, 3 of them overlapping, in the first step."""
    net = model()
    numbers = Stage2Loss()(net.train()(random_features(6)))
    numbers["total_loss"].backward()
    assert math.isfinite(numbers["total_loss"].item())
    grads = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert [name for name, grad in grads.items() if grad is None or not torch.isfinite(grad).all()] == []


def test_prefixes_count_as_often_as_the_documented_rate_keeps_them() -> None:
    """The loss of one's own loop is that of a run with the same rate."""
    net = model(nested_dropout_rate=0.9).train()
    output = net(random_features(6))
    own, of_run = (loss(output)["overlapping_loss"] for loss in (Stage2Loss(nested_dropout_rate=0.9), BaseLoss(net.knobs)))
    assert torch.equal(own, of_run)
    assert not torch.isclose(own, Stage2Loss()(output)["overlapping_loss"], rtol=1e-4)


def test_without_attention_overlapping_codes_are_a_linear_projection_of_the_trunk() -> None:
    """The ablation of registers; every parameter that is trained has a gradient, as several processes need."""
    net, features = model(num_cross_attn_layers=0, resolution=0.0).train(), random_features(6)
    BaseLoss(net.knobs)(net(features))["total_loss"].backward()
    assert [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None] == []
    net.eval()
    codes = Codes.units(net(features).overlapping_tokens["vision"], net.codes.over)
    projected = net.linear(net.trunk(net.codes.read_all(features)[0]))[list(SPECS).index("vision")]
    own = unit_owners(list(SPECS), net.codes.counts, True)[list(SPECS).index("vision")]
    added = (codes - projected)[:, own]
    assert torch.allclose(added, added[:1].expand_as(added), atol=1e-5)
    assert (codes[:, own].std(0) > 1e-3).all()


def test_the_documented_formula() -> None:
    output = model(independence_weight=0.0).train()(random_features(6))
    numbers = Stage2Loss(complementary_reg_weight=0.3, preservation_weight=0.0)(output)
    pairs = [numbers[f"{p}_loss"] for p in ("tactile_vision", "tactile_text", "text_vision")]
    assert torch.allclose(numbers["overlapping_loss"], torch.stack(pairs).mean())
    assert torch.allclose(numbers["total_loss"], numbers["overlapping_loss"] + 0.3 * numbers["complementary_reg"])
    weighed = Stage2Loss(complementary_reg_weight=0.3, preservation_weight=2.0)(output)
    assert torch.allclose(weighed["total_loss"], numbers["total_loss"] + 2 * weighed["preservation"])
    errors = torch.stack([r.error.detach().mean() for r in output.reconstruction.values()])
    assert weighed["preservation"].item() == pytest.approx(float((1 + 100 * errors).log().mean()), rel=1e-5)
    assert "prediction" not in weighed
    predicted = Stage2Loss(preservation_weight=2.0, independence_weight=0.5)(model().train()(random_features(6)))
    terms = {
        "overlapping_loss": 1.0,
        "complementary_reg": 0.01,
        "preservation": 2.0,
        "prediction": 1.0,
        "independence": 0.5,
    }
    assert torch.allclose(predicted["total_loss"], sum(w * predicted[name] for name, w in terms.items()))


def test_a_disabled_pair_is_not_in_the_average() -> None:
    output = model().train()(random_features(6))
    some = Stage2Loss(disable_vision_text_loss=True)(output)
    every = Stage2Loss()(output)
    expected = (every["tactile_vision_loss"] + every["tactile_text_loss"]) / 2
    assert "text_vision_loss" not in some
    assert torch.allclose(some["overlapping_loss"], expected)
    one = Stage2Loss(disable_vision_text_loss=True, disable_tactile_text_loss=True)(output)
    assert torch.allclose(one["overlapping_loss"], every["tactile_vision_loss"])
    with pytest.raises(UserError, match="no pair to align"):
        Stage2Loss(["vision", "text"], disable_vision_text_loss=True)


def test_a_pair_without_a_row_is_not_in_the_average() -> None:
    features = random_features(4)
    text = features.modalities["text"]
    none = Tokens(text.tokens, text.mask, text.pooled, torch.zeros(4, dtype=torch.bool))
    numbers = Stage2Loss()(
        model().train()(Features(features.modalities | {"text": none}, features.caption_keys, features.rows))
    )
    assert torch.allclose(numbers["overlapping_loss"], numbers["tactile_vision_loss"])
    assert torch.isfinite(numbers["total_loss"])


def test_the_temperature_is_clamped() -> None:
    """At 100, as in CLIP."""
    net = model()
    with torch.no_grad():
        net.logit_scale.fill_(50.0)
    assert net.eval()(random_features(2))["logit_scale"].item() == pytest.approx(100)


def test_each_loss_term_has_gradients_for_its_own_group_only() -> None:
    """Complementary tokens get no alignment gradient; overlapping tokens get only the alignment gradient."""
    output: Output = model().train()(random_features(5), kept=torch.ones(5, 4, dtype=torch.bool))
    groups = {kind: list(output[f"{kind}_tokens"].values()) for kind in ("overlapping", "complementary")}
    numbers = Stage2Loss()(output)
    for term, group in (
        ("overlapping_loss", "complementary"),
        ("preservation", "overlapping"),
        ("complementary_reg", "overlapping"),
    ):
        grads = torch.autograd.grad(numbers[term], groups[group], retain_graph=True, allow_unused=True)
        assert all(g is None or not g.any() for g in grads), (term, group)


def gradients(net: TVLStage2, term: torch.Tensor) -> dict[str, float]:
    """{first part of a parameter's name: largest absolute gradient of the term}."""
    found: dict[str, float] = {}
    grads = torch.autograd.grad(term, list(net.parameters()), retain_graph=True, allow_unused=True)
    for (name, _), g in zip(net.named_parameters(), grads, strict=True):
        part = name.partition(".")[0]
        found[part] = max(found.get(part, 0.0), 0.0 if g is None else float(g.abs().max()))
    return found


def test_predictors_and_encoders_are_trained_by_their_own_terms() -> None:
    """Predictors get no gradient from the penalty, and encoders none from the loss of the predictors."""
    net = model().train()
    numbers = Stage2Loss()(net(random_features(6), kept=torch.ones(6, 4, dtype=torch.bool)))
    prediction, penalty = gradients(net, numbers["prediction"]), gradients(net, numbers["independence"])
    assert {part for part, g in prediction.items() if g} == {"predictors"}
    assert not any(penalty[part] for part in ("predictors", "linear", "narrow", "trunk", "decoders"))
    assert all(penalty[part] for part in ("comp_linear", "comp_narrow", "own_stack", "readers"))
    assert not penalty["shared_stack"]


def test_each_direction_has_gradients_for_its_own_side_only() -> None:
    """In both directions the loss trains the predictor of this direction, and the penalty the complementary code."""
    torch.manual_seed(0)
    predictors = Predictors(2, 4, 3)
    code, unique = torch.randn(2, 9, 4), torch.randn(2, 9, 3, requires_grad=True)
    parts = [*predictors.of_complementary.parameters(), *predictors.of_overlapping.parameters(), unique]
    everyone = {m: torch.ones(9, dtype=torch.bool) for m in ("vision", "text")}
    for i, part in enumerate((slice(0, -4), slice(-4, None))):
        predictions = dict(zip(everyone, predictors(code, unique)[..., part], strict=True))
        loss, penalty = (
            [g is not None and bool(g.any()) for g in torch.autograd.grad(t, parts, retain_graph=True, allow_unused=True)]
            for t in independence(predictions, everyone)
        )
        count = len(parts) // 2
        assert loss == [i == 0] * count + [i == 1] * count + [False]
        assert penalty == [False] * 2 * count + [True]
    with torch.no_grad():
        quiet = predictors(code, unique)
    assert torch.equal(quiet, predictors(code, unique))


def told(hides: str) -> tuple[float, float]:
    """Penalty of trained predictors on new rows, of moments of a complementary code, and of the overlapping code."""
    torch.manual_seed(0)
    predictors = Predictors(1, 2, 3)
    optimizer = torch.optim.Adam(predictors.parameters(), lr=1e-2)

    def terms(rows: int, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        shared, signs, size = torch.randn(rows, 2).sign(), torch.randn(rows, 3).sign(), 1 + torch.rand(rows, 1)
        code, unique = {
            "nothing": (shared, signs),
            "product of three": (shared, torch.cat([signs[:, :2], signs[:, :2].prod(1, keepdim=True) * shared[:, :1]], 1)),
            "size": (shared * size, signs * size),
        }[hides]
        predictions = predictors(code[None], unique[None])[0, ..., part]
        return independence({"text": predictions}, {"text": torch.ones(rows, dtype=torch.bool)})

    for _ in range(100):
        optimizer.zero_grad()
        terms(256, slice(None))[0].backward()
        optimizer.step()
    of_complementary, of_overlapping = (terms(4096, part)[1].item() for part in (slice(0, -2), slice(-2, None)))
    return of_complementary, of_overlapping


def test_each_direction_finds_what_the_other_does_not() -> None:
    """What is shared in a product of three units shows in no pair of them; what they share in size alone, the overlapping
    code's sign hides from the mean that a complementary code tells of it."""
    assert max(told("nothing")) < 0.05
    of_complementary, of_overlapping = told("product of three")
    assert of_complementary < 0.05 and of_overlapping > 0.5
    of_complementary, of_overlapping = told("size")
    assert of_complementary > 0.5 and of_overlapping < 0.05


def test_rows_without_a_code_are_not_predicted() -> None:
    """The predictors' terms are those of the rows that keep all registers and have the modality."""
    net, features = model().eval(), random_features(8)
    kept = torch.ones(8, 4, dtype=torch.bool)
    kept[:4, 3] = False
    features.modalities["text"].present[6:] = False
    output = net(features, kept=kept)
    numbers = Stage2Loss()(output)
    valid = {m: kept[:, 3] & rows for m, rows in output.present.items()}
    assert [int(rows.sum()) for rows in valid.values()] == [4, 4, 2]
    expected = independence(output.extras["predictions"], valid)
    assert torch.allclose(torch.stack(expected), torch.stack([numbers["prediction"], numbers["independence"]]))
    full = Stage2Loss()(net(features))
    assert not torch.allclose(full["prediction"], numbers["prediction"], atol=1e-6)


def test_complementary_registers_learn_from_pictures_that_are_not_augmented() -> None:
    """Rows with augmented pictures are aligned; their rebuilding and what is predicted of them is in no loss. Other
    modalities of the row count."""
    net, kept = model(noise=0.0, input_dropout=0.0).train(), torch.ones(8, 4, dtype=torch.bool)
    augmented = torch.tensor([False, True] * 4)
    features = replace(random_features(8), augmented={"vision": augmented, "tactile": augmented})

    def other(*names: str) -> dict[str, torch.Tensor]:
        changed = features.map(torch.clone)
        for m in names:
            changed.modalities[m].tokens[augmented] = changed.modalities[m].tokens[augmented].flip(-1)
        return Stage2Loss()(net(changed, kept=kept))

    numbers, pictures, text = other(), other("vision", "tactile"), other("text")
    assert torch.equal(numbers["preservation"], pictures["preservation"])
    assert not torch.allclose(numbers["preservation"], text["preservation"], rtol=1e-4)
    assert not torch.equal(numbers["overlapping_loss"], pictures["overlapping_loss"])
    output = net(features, kept=kept)
    valid = output.present | {m: ~augmented for m in ("vision", "tactile")}
    expected = independence(output.extras["predictions"], valid)
    assert torch.allclose(torch.stack(expected), torch.stack([numbers["prediction"], numbers["independence"]]))


def test_pooling_uses_kept_overlapping_tokens_only() -> None:
    """A dropped register does not enter the mean as a zero."""
    kept = torch.tensor([[True, False, False, False], [True, True, False, True], [True, True, True, False]])
    output = model().eval()(random_features(3), kept=kept)
    by_hand = {m: torch.stack([z[i, : i + 1].mean(0) for i in range(3)]) for m, z in output.overlapping_tokens.items()}
    loss = BaseLoss(Stage2Config(nested_dropout_rate=0.0))(output)["overlapping_loss"]
    for m, pooled in pooled_overlapping(output).items():
        assert torch.allclose(pooled, torch.nn.functional.normalize(by_hand[m], dim=-1), atol=1e-6)
    single = replace(output, overlapping_tokens={m: z[:, None] for m, z in by_hand.items()}, nested_dropout_mask=None)
    assert torch.allclose(Stage2Loss()(single)["overlapping_loss"], loss, atol=1e-5)


def test_registers_must_outnumber_overlapping_tokens() -> None:
    with pytest.raises(UserError, match="4 registers cannot hold 4 overlapping tokens"):
        model(num_overlapping_tokens=4)
    with pytest.raises(UserError, match="--num_overlapping_tokens 0 is out of range"):
        model(num_overlapping_tokens=0)


def test_blocks_of_overlapping_registers_are_shared_and_the_others_on_request() -> None:
    def parameters(stack: torch.nn.Module) -> int:
        return sum(p.numel() for p in stack.parameters())

    separate, shared = model(preservation=False), model(share_weights=True, preservation=False)
    assert parameters(shared.shared_stack) == parameters(separate.shared_stack)
    assert len(SPECS) * parameters(shared.own_stack) == parameters(separate.own_stack)
    features = random_features(3)
    before = separate.eval()(features)
    with torch.no_grad():
        for p in separate.own_stack.parameters():
            p.add_(0.1)
    after = separate(features)
    assert all(torch.equal(before.overlapping_tokens[m], after.overlapping_tokens[m]) for m in SPECS)
    assert not torch.equal(before.register_tokens[:, 3], after.register_tokens[:, 3])
    with torch.no_grad():
        for p in separate.shared_stack.parameters():
            p.add_(0.1)
    moved = separate(features)
    assert all(not torch.equal(before.overlapping_tokens[m], moved.overlapping_tokens[m]) for m in SPECS)


def test_the_loss_is_the_expectation_over_prefixes() -> None:
    """Weights are the probabilities that nested dropout keeps 1, 2 or all 3 overlapping tokens: 1/6, 1/6, 2/3."""
    net = model().train()
    features = random_features(6)
    output = net(features, kept=torch.ones(6, 4, dtype=torch.bool))
    numbers = Stage2Loss()(output)
    plain = BaseLoss(Stage2Config(nested_dropout_rate=0.0))

    def first(k: int) -> dict[str, torch.Tensor]:
        tokens = {m: z[:, :k] for m, z in output.overlapping_tokens.items()}
        return plain(replace(output, overlapping_tokens=tokens, extras={}))

    for name in ("overlapping_loss", "tactile_text_loss"):
        expected = first(1)[name] / 6 + first(2)[name] / 6 + first(3)[name] * 2 / 3
        assert torch.allclose(numbers[name], expected, atol=1e-5)
    assert torch.equal(numbers["average_acc5"], first(3)["average_acc5"])
    assert torch.allclose(Stage2Loss()(net.eval()(features))["overlapping_loss"], plain(net(features))["overlapping_loss"])
    independent = model(nested_dropout_mode="independent").train()(features)
    assert torch.equal(Stage2Loss()(independent)["overlapping_loss"], plain(independent)["overlapping_loss"])


def test_dropout_is_for_tokens_and_decoders_but_not_for_the_alignment() -> None:
    """What is drawn changes the tokens and their reconstruction; every row is aligned by all of its prefixes, and rebuilt
    from all registers too."""
    net, features = model(noise=0.0, input_dropout=0.0).train(), random_features(6)
    full = net(features, kept=torch.ones(6, 4, dtype=torch.bool))
    short = net(features, kept=torch.tensor([[True, False, False, False]] * 6))
    numbers = [Stage2Loss()(output) for output in (full, short)]
    assert torch.allclose(numbers[0]["overlapping_loss"], numbers[1]["overlapping_loss"], atol=1e-6)
    assert not short.overlapping_tokens["vision"][:, 1:].any() and full.overlapping_tokens["vision"][:, 1:].any()
    units = torch.zeros(len(SPECS), 6, sum(net.codes.counts) + sum(net.codes.comp_counts))
    units[0, :, : net.codes.counts[0]] = (
        short.overlapping_tokens["vision"][:, 0] @ net.codes.over[0, : net.codes.counts[0]].T
    )
    read = net.codes.read("vision", features.modalities["vision"])[0][:, : net.codes.principal.counts["vision"]]
    by_hand = (read - net.decoders(units)[0, :, : read.shape[1]]).square().mean(1, keepdim=True)
    kept_and_all = short.reconstruction["vision"].error
    assert torch.allclose(kept_and_all[:, :1], by_hand, atol=1e-5)
    assert not torch.allclose(kept_and_all[:, 1:], by_hand, atol=1e-3)
    assert torch.allclose(full.reconstruction["vision"].error, kept_and_all[:, 1:].expand(-1, 2), atol=1e-5)
    assert 0.6 < float(net.draw_kept(1000)[:, 2].float().mean()) < 0.73  # the documented 33% are dropped


def test_projections_of_features_that_stage_1_has_aligned_start_equal() -> None:
    """The same pooled feature gives the same trunk in every modality of the same width, and components add less."""
    net = model().eval()
    widths = {m: spec.pooled_width for m, spec in SPECS.items()}
    assert len(set(widths.values())) == 1
    pooled = torch.randn(4, widths["vision"])
    sizes = net.codes.principal.sizes
    read = torch.zeros(len(SPECS), 4, max(sizes.values()))
    for i, m in enumerate(SPECS):
        read[i, :, sizes[m] - widths[m] : sizes[m]] = pooled
    found = net.trunk(read)
    assert torch.allclose(found, found[:1].expand_as(found), atol=1e-5) and found.std() > 0.1
    other = TVLStage2(
        {"a": SPECS["vision"], "b": replace(SPECS["text"], pooled_width=7)}, register_token_dim=32, num_heads=4
    )
    assert other(Features(
        {
            "a": random_features(3).modalities["vision"],
            "b": replace(random_features(3).modalities["text"], pooled=torch.randn(3, 7)),
        },
        torch.arange(3)[:, None],
        torch.arange(3),
    )).overlapping_tokens["b"].isfinite().all()  # fmt: skip


def test_raw_inputs_and_their_features_give_the_same_output(stage1_checkpoint: object) -> None:
    """`forward` on images and text equals `forward` on their encoded features."""
    stage1: Stage1 = load_stage1(stage1_checkpoint)
    net = TVLStage2(stage1, register_token_dim=32, num_heads=4).eval()
    batch = {
        "vision": torch.rand(2, 3, 64, 64),
        "tactile": torch.rand(2, 3, 64, 64),
        "text": stage1.tokenize(["soft.", "soft and smooth."]),
    }
    raw, stored = net(batch), net(stage1.encode(batch))
    for name in ("vision", "tactile", "text"):
        assert torch.equal(raw["overlapping_tokens"][name], stored["overlapping_tokens"][name])
    assert not any("stage1" in key or "clip" in key for key in net.state_dict())
    assert not any(p is q for p in net.parameters() for q in stage1.parameters())
    part = net({"vision": batch["vision"], "tactile": batch["tactile"]})
    assert set(part["overlapping_tokens"]) == {"vision", "tactile"}
    with pytest.raises(UserError, match="built for stored features"):
        model()(batch)


def test_pair_names_do_not_depend_on_the_order() -> None:
    assert pair_name("vision", "tactile") == pair_name("tactile", "vision") == "tactile_vision"


def test_everything_is_gathered_in_one_call_of_each_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for all modalities and pairs; flags and keys survive packing."""
    calls = []

    def recorded(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x

    features = random_features(6)
    keys = torch.tensor([[2**62, 1], [0, 2], [-5, 3], [7, 4], [7, 5], [2**33 + 1, 6]])
    output = model().train()(Features(features.modalities, keys, features.rows))
    alone = Stage2Loss()(output)
    monkeypatch.setattr(contrastive, "world_size", lambda: 2)
    for losses in (contrastive, independence_module):
        monkeypatch.setattr(losses, "gather_with_grad", recorded)
    packed = Stage2Loss()(output)
    assert len(calls) == 2  # of alignment and of independence
    assert {n: x.item() for n, x in packed.items()} == pytest.approx({n: x.item() for n, x in alone.items()}, rel=1e-5)
    vectors, flags = torch.randn(2, 3, 6, 5), torch.rand(4, 6) > 0.5
    content = {"vision": torch.tensor([1, 1, 2**40, -3, 4, 5]), "text": torch.arange(6)}
    joined = contrastive.join(vectors, flags, ("vision", "text"), keys, content)
    assert torch.equal(joined.vectors, vectors) and torch.equal(joined.flags, flags)
    assert torch.equal(joined.all_keys, torch.cat([keys, content["vision"][:, None], content["text"][:, None]], dim=1))
    assert joined.columns == ((2,), (0, 1, 3))
    one = contrastive.join(
        vectors[:, :, :1], flags[:, :1], ("vision",), keys[:1], {}
    )  # an odd length: a view is not aligned
    assert torch.equal(one.all_keys, keys[:1])


def test_units_of_a_pair_are_zero_in_the_third_modality() -> None:
    """The first token belongs to all; with two modalities, or without `pair_units`, every unit does."""
    vision, touch, text = [True, True, False], [True, False, True], [False, True, True]
    assert unit_owners(["v", "t", "x"], [2, 2, 1], True) == [[True, True, *rest] for rest in (vision, touch, text)]
    assert unit_owners(["v", "t", "x"], [2, 2, 1], False) == unit_owners(["v", "t", "x"], [5], True) == [[True] * 5] * 3
    assert unit_owners(["v", "t"], [2, 2, 1], True) == [[True] * 5] * 2
    net = model(register_token_dim=64).train()
    output = net(random_features(6), kept=torch.ones(6, 4, dtype=torch.bool))
    own = [Codes.units(t, net.codes.over) for t in output.overlapping_tokens.values()]
    before = [t[:, -1] for t in output.extras["prefixes"].values()]
    for codes in (own, before):
        assert [(units.abs() > 1e-6).any(0).tolist() for units in codes] == unit_owners(list(SPECS), net.codes.counts, True)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(own, before, strict=True))


def test_rounded_units_have_no_small_traces_and_no_scale() -> None:
    g = torch.Generator().manual_seed(0)
    units = torch.randn(2, 50, 12, generator=g)
    trace = 1e-3 * torch.randn(2, 50, 1, generator=g).expand_as(units)
    found = rounded(units, 6, 0.25)
    assert torch.equal((found / 0.25).round() * 0.25, found)
    assert torch.equal(rounded(7 * units, 6, 0.25), found)
    assert (rounded(units + trace, 6, 0.25) == found).float().mean() > 0.98
    assert (found[..., :6].square().mean(-1).sqrt() - 1).abs().max() < 0.2
    assert torch.equal(rounded(torch.zeros(1, 12), 6, 0.25), torch.zeros(1, 12))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_units_that_are_not_finite_stay_visible(value: float) -> None:
    """A training that diverged must not end in finite codes."""
    units = torch.tensor([[0.5, value, 1.0, 2.0]])
    assert not any(rounded(units, first, 0.25).isfinite().all() for first in (1, 2))
    assert on_grid(units, 0.5).isfinite().tolist() == [[True, False, True, True]]
    assert quantise(torch.tensor([torch.nan]), 3).isnan().all()


def test_the_gradient_of_rounded_units_is_that_of_scaled_ones() -> None:
    units, weight = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    (found,) = torch.autograd.grad((rounded(units, 4, 0.5) * weight).sum(), units)
    scaled = units / units[:, :4].square().mean(1, keepdim=True).sqrt()
    (expected,) = torch.autograd.grad((scaled * weight).sum(), units)
    assert torch.allclose(found, expected, atol=1e-6)


def test_rounding_works_under_transforms_of_torch() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(torch.func.grad(lambda y: on_grid(y, 0.5).sum())(x), torch.ones(4, 6))
    assert torch.equal(torch.func.vmap(lambda y: on_grid(y, 0.5))(x), on_grid(x, 0.5))
