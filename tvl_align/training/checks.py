"""What every method must fulfil. Each check takes a method and fails by an assertion.

`python experiments/stage2/test_modules.py` runs them all, pytest too.
"""

import importlib
import math
import tempfile
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tvl_align.contract import MODALITIES, Features, FeatureSpec, Method, Output, Tokens
from tvl_align.methods.registry import load_method
from tvl_align.system.distributed import rank
from tvl_align.training.optimisation import backward_and_step, make_adamw

LIMIT = 600.0  # seconds for two processes to end
SPECS = {"vision": FeatureSpec(24, 17, 16), "tactile": FeatureSpec(12, 17, 16), "text": FeatureSpec(16, 9, 16)}


def random_features(batch: int, seed: int = 0) -> Features:
    """Made-up features of every modality; all rows present, all captions different."""
    g = torch.Generator().manual_seed(seed)
    modalities = {}
    for name, spec in SPECS.items():
        tokens = torch.randn(batch, spec.tokens, spec.width, generator=g)
        pooled = nn.functional.normalize(torch.randn(batch, spec.pooled_width, generator=g), dim=-1)
        mask = torch.ones(batch, spec.tokens, dtype=torch.bool)
        modalities[name] = Tokens(tokens, mask, pooled, torch.ones(batch, dtype=torch.bool))
    return Features(modalities, torch.arange(batch)[:, None], torch.arange(batch))


def build(method: Method, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A small model and loss of a method, initialised from the seed."""
    knobs = method.knobs(register_token_dim=32, num_heads=4)
    torch.manual_seed(seed)
    return method.model(knobs, SPECS), method.loss(knobs, MODALITIES)


def flat(output: Output) -> Tensor:
    """All register tokens of an output in one vector."""
    groups = [output["overlapping_tokens"], output["complementary_tokens"]]
    return torch.cat([tokens.flatten() for group in groups for tokens in group.values()])


def check_shapes(method: Method) -> None:
    """Token shapes, for one row too (a `squeeze` would drop it); all entries of the contract are there."""
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
    """In evaluation there is no nested dropout and two passes agree to the bit."""
    model, _ = build(method)
    first, second = (model.eval()(random_features(4)) for _ in range(2))
    assert "nested_dropout_mask" not in first
    assert torch.equal(flat(first), flat(second))


def check_dropped_registers_carry_nothing(method: Method) -> None:
    """A prefix of registers gives the same tokens whatever the registers after it are, and those come out as zero."""
    model, _ = build(method)
    features = random_features(3)
    count = model.registers.shape[0]
    for k in range(1, count):
        kept = (torch.arange(count) < k).expand(3, count)
        before = model.eval()(features, kept=kept)
        with torch.no_grad():
            model.registers[k:] += 1.0
        after = model.eval()(features, kept=kept)
        assert torch.equal(flat(before), flat(after))
        for name in MODALITIES:
            whole = torch.cat([after["overlapping_tokens"][name], after["complementary_tokens"][name]], dim=1)
            assert not whole[:, k:].any()
            assert whole[:, :k].any()


def check_queries_matter(method: Method) -> None:
    """Another register reads something else: with one key alone it could not."""
    model, _ = build(method)
    before = flat(model.eval()(random_features(2)))
    with torch.no_grad():
        model.registers += torch.randn_like(model.registers)
    assert not torch.allclose(before, flat(model.eval()(random_features(2))), atol=1e-3)


def check_absent_modality(method: Method) -> None:
    """What an absent row's features hold changes neither tokens nor loss."""
    model, loss = build(method)
    features = random_features(4)
    touch = features.modalities["tactile"]
    there = torch.tensor([True, False, True, True])

    def with_noise(noise: float) -> Features:
        tokens = torch.where(there[:, None, None], touch.tokens, noise)
        masked = Tokens(tokens, touch.mask & there[:, None], touch.pooled, there)
        return Features(features.modalities | {"tactile": masked}, features.caption_keys, features.rows)

    one, other = (model.eval()(with_noise(noise), joint=True) for noise in (0.0, 7.0))
    assert torch.allclose(flat(one), flat(other))
    assert torch.allclose(one["register_tokens"], other["register_tokens"])
    assert torch.allclose(loss(one)["total_loss"], loss(other)["total_loss"])


LEAST_GRADIENT = 3e-8  # of the norm of all gradients together: rounding alone gives at most 3e-9, the least real one 5e-7


def check_gradients(method: Method) -> None:
    """Every parameter learns, except the queries of registers that read a single key: the softmax over one key is 1."""
    model, loss = build(method)
    features = random_features(8)
    for tokens in features.modalities.values():
        tokens.tokens.requires_grad_(False)
    output = model.train()(features, kept=torch.ones(8, model.registers.shape[0], dtype=torch.bool), joint=False)
    numbers = loss(output)
    assert all(value.ndim == 0 and torch.isfinite(value) for value in numbers.values()), numbers
    numbers["total_loss"].backward()
    norms = {name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in model.named_parameters()}
    least = LEAST_GRADIENT * math.hypot(*norms.values())
    single_key = all(spec.tokens == 1 for spec in model.specs.values())
    queries = (".cross.query.", ".cross_norm.") if single_key else ()
    still = [name for name, norm in norms.items() if norm <= least and not any(part in name for part in queries)]
    assert not still, f"no gradient: {still}"


def one_step(method: Method, features: Features, kept: Tensor) -> dict[str, Tensor]:
    """The gradients of one step on the given rows, and the parameters after it, as the engine takes it."""
    model, loss = build(method)
    wrapped = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.0)
    backward_and_step(
        loss(wrapped.train()(features, kept=kept, joint=False))["total_loss"], optimizer, lr=1e-3, update=False
    )
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    optimizer.step()
    return {"gradients": gradients, "parameters": torch.cat([p.detach().flatten() for p in model.parameters()])}


def _registers(method: Method) -> int:
    return build(method)[0].registers.shape[0]


def eight_rows(count: int) -> tuple[Features, Tensor]:
    """Rows of which the two halves differ in everything that is counted: kept registers, present rows, equal captions."""
    features = random_features(8)
    touch = features.modalities["tactile"]
    there = torch.tensor([True, False, True, True, True, True, True, True])
    masked = Tokens(touch.tokens, touch.mask & there[:, None], touch.pooled, there)
    keys = torch.tensor([0, 1, 2, 3, 0, 4, 4, 5])[:, None]
    kept = torch.arange(count) < torch.tensor([1, 2, 4, 4, 4, 3, 4, 2])[:, None]
    return Features(features.modalities | {"tactile": masked}, keys, features.rows), kept


def _one_of_two(index: int, meeting: str, out: str, home: str, experiment_id: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=index, world_size=2)
    module = vars(importlib.import_module(home))
    listed = [*module.values(), *module.get("METHODS", {}).values()]
    method = next(m for m in listed if isinstance(m, Method) and m.implementation.experiment_id == experiment_id)
    features, kept = eight_rows(_registers(method))
    mine = slice(4 * rank(), 4 * rank() + 4)
    torch.save(one_step(method, features.map(lambda t: t[mine]), kept[mine]), f"{out}/{index}.pt")
    dist.destroy_process_group()


def check_two_processes(method: Method) -> None:
    """One step on 2 processes of 4 rows has the gradients of one process with the same 8 rows."""
    who = method.model.__module__, method.implementation.experiment_id
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(_one_of_two, (f"{folder}/meeting", folder, *who), nprocs=2, join=False)
        end = time.monotonic() + LIMIT
        while not processes.join(timeout=1.0):
            if time.monotonic() > end:
                for process in processes.processes:
                    process.kill()
                raise AssertionError(f"two processes did not end within {LIMIT:.0f} s")
        first, second = (torch.load(f"{folder}/{i}.pt") for i in range(2))
    alone = one_step(method, *eight_rows(_registers(method)))
    assert torch.equal(first["parameters"], second["parameters"])
    worst = (first["gradients"] - alone["gradients"]).abs().max()
    assert worst < 1e-5, f"gradients differ by {worst}"


CHECKS = {name.removeprefix("check_"): check for name, check in sorted(globals().items()) if name.startswith("check_")}


def check_all(methods: Mapping[str, Method], names: Sequence[str] = ()) -> None:
    """Run every check on every method, or on those named: keys of `methods`, or package.module:NAME."""
    chosen = {name: methods[name] if name in methods else load_method(name) for name in names or methods}
    for name, method in chosen.items():
        for what, check in CHECKS.items():
            check(method)
            print(f"ok  {name}: {what.replace('_', ' ')}", flush=True)
    print(f"{len(chosen) * len(CHECKS)} passed, 0 failed")
