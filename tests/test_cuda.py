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
