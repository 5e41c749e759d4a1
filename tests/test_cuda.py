"""What is about GPUs: the same numbers as on a CPU, and refusals. One GPU is enough; skipped where there is none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cuda, pytest.mark.slow]
OnGPU = Callable[..., str]

STEPS = """
import json, torch
from tvl_align.methods.registry import METHODS
from tvl_align.training.checks import build, eight_rows
from tvl_align.system.runtime import pick_device

def gradients(method, device, bf16):
    model, loss = build(method)
    features, kept = eight_rows(len(model.registers))
    model.to(device).train()
    torch.manual_seed(0)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        output = model.eval()(features.to(device), kept=kept, joint=False)
    numbers = loss(output)
    numbers["total_loss"].backward()
    norm = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]).norm()
    return {"loss": float(numbers["total_loss"]), "norm": float(norm)}

cpu, gpu = torch.device("cpu"), pick_device("cuda")
runs = {"cpu": (cpu, False), "cuda": (gpu, False), "bf16": (gpu, True)}
print(json.dumps({n: {k: gradients(m, *a) for k, a in runs.items()} for n, m in METHODS.items()}))
"""


def test_a_step_of_every_method_is_that_of_the_cpu(on_gpu: OnGPU) -> None:
    for name, found in json.loads(on_gpu(STEPS).splitlines()[-1]).items():
        for key in ("loss", "norm"):
            assert found["cuda"][key] == pytest.approx(found["cpu"][key], rel=1e-3), (name, key)
        assert found["bf16"]["loss"] == pytest.approx(found["cpu"]["loss"], rel=0.01), name


RECORDED = """
import json, torch
from accelerate import Accelerator
from tvl_align.methods.registry import METHODS
from tvl_align.system.runtime import pick_device, seed_everything
from tvl_align.training.checks import build, eight_rows
from tvl_align.training.engine import Learner
from tvl_align.training.optimisation import make_adamw, optimizer_step

def losses(method, recorded):
    model, loss = build(method)
    model.to(gpu).train()
    learner = Learner(model, model, loss, make_adamw(model.named_parameters(), 0.05), Accelerator(), recorded)
    features, kept = eight_rows(len(model.registers))
    found = []
    for step in range(8):
        g = torch.Generator().manual_seed(step)
        batch = features.map(lambda t: t + torch.randn(t.shape, generator=g) if t.is_floating_point() else t.roll(step, 0))
        seed_everything(step)
        scalars = learner.gradients([(batch.to(gpu), kept)])
        optimizer_step(learner.optimizer, 1e-3, skip=scalars["gradient"] < 0)
        found.append(float(scalars["total_loss"]))
    graphs = len(learner._of_one_part.graphs) if recorded else 0
    return {"losses": found, "graphs": graphs}

gpu = pick_device("cuda")
methods = {n: m for n, m in METHODS.items() if m.recordable}
print(json.dumps({n: {"direct": losses(m, False), "recorded": losses(m, True)} for n, m in methods.items()}))
"""


def test_recorded_steps_are_those_that_python_launches(on_gpu: OnGPU) -> None:
    """Batches, dropout and learning differ from step to step, in replays too: steps 4 to 7."""
    for name, found in json.loads(on_gpu(RECORDED).splitlines()[-1]).items():
        assert found["recorded"]["graphs"] == 1, name
        direct, recorded = found["direct"]["losses"], found["recorded"]["losses"]
        assert len({round(loss, 3) for loss in direct}) > 4, name
        assert recorded == pytest.approx(direct, rel=0.01), name


TRAIN = """
import sys
from tvl_align.__main__ import main
sys.argv = ["tvl-align", *sys.argv[1:]]
main()
"""


def test_a_run_is_trained_measured_and_used(on_gpu: OnGPU, world: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    """Encoding, training and measuring on the GPU, whose features are those of the CPU."""
    flags = [*("--datasets_dir", world, "--stage1_checkpoint", stage1_checkpoint, "--output_dir", tmp_path, "--views", 1)]
    flags += [*("--epochs", 2, "--batch_size", 16, "--num_workers", 0, "--log_name", "run", "--device", "cuda")]
    assert "epoch 2/2" in on_gpu(TRAIN, "train", *flags)
    on_gpu(TRAIN, "evaluate", tmp_path / "run", "--device", "cuda")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["split"] == "test"
    code = """
import sys, torch, tvl_align
from pathlib import Path
names = sorted(str(p) for p in Path(sys.argv[2]).rglob("*.png"))[:8]
runs = [tvl_align.load(sys.argv[1], device=d) for d in ("cpu", "cuda")]
one, other = (run.embed(vision=names, precision="float32").pooled["vision"] for run in runs)
print(float((one - other).abs().max()))
"""
    assert float(on_gpu(code, tmp_path / "run", world).splitlines()[-1]) < 1e-3


def test_two_processes_on_one_gpu_are_refused_in_one_sentence(on_gpu: OnGPU) -> None:
    code = """
import os, torch
from datetime import timedelta
from tvl_align.system.console import UserError
from tvl_align.system.distributed import join_process_group
gpus = torch.cuda.device_count()
os.environ |= {"WORLD_SIZE": str(gpus + 1), "RANK": str(gpus), "LOCAL_RANK": str(gpus), "LOCAL_WORLD_SIZE": str(gpus + 1)}
try:
    join_process_group(torch.device("cuda"), timedelta(seconds=9))
except UserError as error:
    print(error)
"""
    said = on_gpu(code)
    assert "and each needs its own; start" in said and "--device cpu" in said
