"""Shared fixtures: a tiny synthetic data set and a tiny Stage 1 trained on it, made once for all test processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network for weights

import hypothesis
import pytest
import torch

from tvl_align.synthetic.pretrain import PretrainConfig, pretrain
from tvl_align.synthetic.world import write_world
from tvl_align.system.files import lock_folder

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests run on the CPU; those marked cuda start processes that see the GPUs
torch.set_num_threads(1)
hypothesis.settings.register_profile("any machine", deadline=None)  # no test depends on how fast a machine is
hypothesis.settings.load_profile("any machine")
TRAIN, TEST = 96, 24

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """once(name, make): a folder that make(folder) fills, by whichever test process of this session comes first."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        with lock_folder(base / f"{name}.lock", wait=True, why="makes"):
            if not (base / f"{name}.made").exists():
                make(base / name)
                (base / f"{name}.made").touch()
        return base / name

    return made


@pytest.fixture(scope="session")
def world(once: Once) -> Path:
    """A data set of 96 + 24 synthetic samples."""
    return once("world", lambda folder: write_world(folder, TRAIN, TEST, seed=3, workers=1, quiet=True))


@pytest.fixture(scope="session")
def stage1_checkpoint(once: Once, world: Path) -> Path:
    """A small Stage 1 after one epoch: barely trained, in the real formats."""

    def make(folder: Path) -> None:
        pretrain(PretrainConfig(world, folder, epochs=1, batch_size=32, num_workers=0), quiet=True)

    return once("stage1", make) / "checkpoint.pth"


@pytest.fixture(scope="session")
def feature_dir(once: Once) -> Path:
    """Feature stores of `world`, shared by all tests that encode it."""
    return once("features", lambda folder: folder.mkdir())


@pytest.fixture(scope="session")
def on_gpu() -> Callable[..., str]:
    """on_gpu(code, *arguments): what Python code prints in a process that sees the GPUs. Skips where there is none."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if GPUS is not None:
        environment["CUDA_VISIBLE_DEVICES"] = GPUS

    def run(code: str, *arguments: object, expected: int = 0) -> str:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == expected, done.stdout + done.stderr
        return done.stdout + done.stderr

    if "True" not in run("import torch; print(torch.cuda.is_available())"):
        pytest.skip("PyTorch finds no GPU on this machine")
    return run
