"""Checks that every method must pass. Each takes a method and raises AssertionError.

`python experiments/stage2/test_modules.py` and pytest run all of them.
"""

import importlib
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tvl_align.contract import MODALITIES, Features, FeatureSpec, Method, Output, Tokens
from tvl_align.methods.registry import load_method
from tvl_align.system.distributed import rank
from tvl_align.training.optimisation import backward_and_step, make_adamw

TIMEOUT = 600.0  # seconds for two processes to end
SPECS = {"vision": FeatureSpec(24, 17, 16), "tactile": FeatureSpec(12, 17, 16), "text": FeatureSpec(16, 9, 16)}


def random_features(batch: int, seed: int = 0) -> Features:
    """Random features of every modality; all rows present, all captions different."""
    g = torch.Generator().manual_seed(seed)
    modalities = {}
    for name, spec in SPECS.items():
        tokens = torch.randn(batch, spec.tokens, spec.width, generator=g)
        pooled = nn.functional.normalize(torch.randn(batch, spec.pooled_width, generator=g), dim=-1)
        mask = torch.ones(batch, spec.tokens, dtype=torch.bool)
        modalities[name] = Tokens(tokens, mask, pooled, torch.ones(batch, dtype=torch.bool))
    return Features(modalities, torch.arange(batch)[:, None], torch.arange(batch))


def build(method: Method, seed: int = 0) -> tuple[Any, nn.Module]:
    """A small model and the loss of a method; the seed initialises the weights."""
    knobs = method.knobs(register_token_dim=32, num_heads=4)
    torch.manual_seed(seed)
    return method.model(knobs, SPECS), method.loss(knobs, MODALITIES)


def flat_tokens(output: Output) -> Tensor:
    """All overlapping and complementary tokens of an output in one vector."""
    groups = [output["overlapping_tokens"], output["complementary_tokens"]]
    return torch.cat([tokens.flatten() for group in groups for tokens in group.values()])


def check_shapes(method: Method) -> None:
    """Shapes of all entries of the output, also for a batch of one row, which a `squeeze` would drop."""
    model, _ = build(method)
    for batch in (1, 3):
        output = model.train()(random_features(batch))
        kept = output["nested_dropout_mask"]
        assert kept.dtype == torch.bool
        assert len(kept) == batch
        for name in MODALITIES:
            over, comp = output["overlapping_tokens"][name], output["complementary_tokens"][name]
            assert over.ndim == comp.ndim == 3
            assert len(over) == len(comp) == batch
            assert over.shape[1] + comp.shape[1] == kept.shape[1]
            assert output["stage1_features"][name].shape == (batch, SPECS[name].pooled_width)
        assert output["register_tokens"].shape == (batch, kept.shape[1], over.shape[2])
        assert output["logit_scale"].ndim == 0


def check_evaluation_drops_nothing(method: Method) -> None:
    """In evaluation nothing is dropped, and two forward passes are bit-identical."""
    model, _ = build(method)
    first, second = (model.eval()(random_features(4)) for _ in range(2))
    assert "nested_dropout_mask" not in first
    assert torch.equal(flat_tokens(first), flat_tokens(second))


def check_dropped_registers_carry_nothing(method: Method) -> None:
    """The tokens of kept registers do not depend on the dropped registers, and the dropped tokens are zero."""
    model, _ = build(method)
    features = random_features(3)
    count = model.registers.shape[0]
    for k in range(1, count):
        kept = (torch.arange(count) < k).expand(3, count)
        before = model.eval()(features, kept=kept)
        with torch.no_grad():
            model.registers[k:] += 1.0
        after = model.eval()(features, kept=kept)
        assert torch.equal(flat_tokens(before), flat_tokens(after))
        for name in MODALITIES:
            tokens = torch.cat([after["overlapping_tokens"][name], after["complementary_tokens"][name]], dim=1)
            assert not tokens[:, k:].any()
            assert tokens[:, :k].any()


def check_queries_matter(method: Method) -> None:
    """Changing the registers changes the output: they are used as attention queries."""
    model, _ = build(method)
    before = flat_tokens(model.eval()(random_features(2)))
    with torch.no_grad():
        model.registers += torch.randn_like(model.registers)
    assert not torch.allclose(before, flat_tokens(model.eval()(random_features(2))), atol=1e-3)


def check_absent_modality(method: Method) -> None:
    """The feature values of an absent modality change neither tokens nor loss."""
    model, loss = build(method)
    features = random_features(4)
    touch = features.modalities["tactile"]
    present = torch.tensor([True, False, True, True])

    def with_noise(noise: float) -> Features:
        tokens = torch.where(present[:, None, None], touch.tokens, noise)
        masked = Tokens(tokens, touch.mask & present[:, None], touch.pooled, present)
        return Features(features.modalities | {"tactile": masked}, features.caption_keys, features.rows)

    one, other = (model.eval()(with_noise(noise), joint=True) for noise in (0.0, 7.0))
    assert torch.allclose(flat_tokens(one), flat_tokens(other))
    assert torch.allclose(one["register_tokens"], other["register_tokens"])
    assert torch.allclose(loss(one)["total_loss"], loss(other)["total_loss"])


MIN_GRADIENT = 3e-8  # share of the total gradient norm; rounding gives at most 3e-9, the smallest true gradient is 5e-7


def check_gradients(method: Method) -> None:
    """Every parameter has a gradient, except query projections over a single key, where the softmax is constant."""
    model, loss = build(method)
    features = random_features(8)
    for tokens in features.modalities.values():
        tokens.tokens.requires_grad_(False)
    output = model.train()(features, kept=torch.ones(8, model.registers.shape[0], dtype=torch.bool), joint=False)
    scalars = loss(output)
    assert all(value.ndim == 0 and torch.isfinite(value) for value in scalars.values()), scalars
    scalars["total_loss"].backward()
    norms = {
        name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in model.named_parameters() if p.requires_grad
    }
    threshold = MIN_GRADIENT * math.hypot(*norms.values())
    single_key = all(spec.tokens == 1 for spec in model.specs.values())
    queries = (".cross.query.", ".cross_norm.") if single_key else ()
    missing = [name for name, norm in norms.items() if norm <= threshold and not any(part in name for part in queries)]
    assert not missing, f"no gradient: {missing}"


def one_step(method: Method, features: Features, kept: Tensor) -> dict[str, Tensor]:
    """One training step on the given rows -> {"gradients": (P,), "parameters": (P,)}, the parameters after the step."""
    model, loss = build(method)
    wrapped = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.0)
    backward_and_step(
        loss(wrapped.train()(features, kept=kept, joint=False))["total_loss"], optimizer, lr=1e-3, update=False
    )
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    optimizer.step()
    return {"gradients": gradients, "parameters": torch.cat([p.detach().flatten() for p in model.parameters()])}


def _register_count(method: Method) -> int:
    """Number of registers of the small model."""
    return build(method)[0].registers.shape[0]


def eight_rows(count: int) -> tuple[Features, Tensor]:
    """A batch whose halves differ in the numbers of kept registers, present rows, equal captions and augmented rows."""
    features = random_features(8)
    touch = features.modalities["tactile"]
    present = torch.tensor([True, False, True, True, True, True, True, True])
    masked = Tokens(touch.tokens, touch.mask & present[:, None], touch.pooled, present)
    keys = torch.tensor([0, 1, 2, 3, 0, 4, 4, 5])[:, None]
    kept = torch.arange(count) < torch.tensor([1, 2, 4, 4, 4, 3, 4, 2])[:, None]
    augmented = {"tactile": torch.tensor([True, True, False, False, True, False, False, False])}
    return Features(features.modalities | {"tactile": masked}, keys, features.rows, augmented=augmented), kept


def _one_of_two(index: int, rendezvous: str, out: str, module_names: Sequence[str], experiment_id: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=2)
    modules = [vars(importlib.import_module(name)) for name in module_names]
    candidates = [x for module in modules for x in (*module.values(), *module.get("METHODS", {}).values())]
    method = next(m for m in candidates if isinstance(m, Method) and m.implementation.experiment_id == experiment_id)
    features, kept = eight_rows(_register_count(method))
    half = slice(4 * rank(), 4 * rank() + 4)
    torch.save(one_step(method, features.map(lambda t: t[half]), kept[half]), f"{out}/{index}.pt")
    dist.destroy_process_group()


def check_two_processes(method: Method) -> None:
    """A step on 2 processes with 4 rows each has the gradients of 1 process with the same 8 rows."""
    modules = method.model.__module__, method.knobs.__module__  # a method may use the model of another one
    experiment_id = method.implementation.experiment_id
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(_one_of_two, (f"{folder}/rendezvous", folder, modules, experiment_id), nprocs=2, join=False)
        deadline = time.monotonic() + TIMEOUT
        while not processes.join(timeout=1.0):
            if time.monotonic() > deadline:
                for process in processes.processes:
                    process.kill()
                raise AssertionError(f"two processes did not end within {TIMEOUT:.0f} s")
        first, second = (torch.load(f"{folder}/{i}.pt") for i in range(2))
    alone = one_step(method, *eight_rows(_register_count(method)))
    assert torch.equal(first["parameters"], second["parameters"])
    difference = (first["gradients"] - alone["gradients"]).abs().max()
    assert difference < 1e-5, f"gradients differ by {difference}"


CHECKS = {name.removeprefix("check_"): check for name, check in sorted(globals().items()) if name.startswith("check_")}


def check_all(methods: Mapping[str, Method], names: Sequence[str] = ()) -> None:
    """Run every check on every method, or on those in `names`: keys of `methods`, or package.module:NAME."""
    chosen = {name: methods[name] if name in methods else load_method(name) for name in names or methods}
    for name, method in chosen.items():
        for title, check in CHECKS.items():
            check(method)
            print(f"ok  {name}: {title.replace('_', ' ')}", flush=True)
    print(f"{len(chosen) * len(CHECKS)} passed, 0 failed")
