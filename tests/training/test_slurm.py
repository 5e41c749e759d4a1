"""Training as a job of submitit's local executor, with real processes."""

import json
import sys
from pathlib import Path

import processes
import pytest

from tvl_align.system.console import UserError
from tvl_align.training.slurm import split_slurm_options, submit, wait

BIN = Path(sys.executable).parent

pytestmark = pytest.mark.slow


def test_options_are_taken_out_of_the_flags() -> None:
    options, rest = split_slurm_options(["--epochs", "3", "--slurm", "partition=gpu", "--slurm=nodes=2", "--lr", "1"])
    assert options == {"partition": "gpu", "nodes": "2"}
    assert rest == ["--epochs", "3", "--lr", "1"]
    for bad in (["--slurm", "gpu"], ["--slurm"], ["--slurm=partition="]):
        with pytest.raises(UserError, match="is not key=value"):
            split_slurm_options(bad)


def test_two_tasks_train_as_two_processes(world: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    command = f"train --stage1_checkpoint {stage1_checkpoint} --datasets_dir {world} --output_dir {tmp_path} --log_name job"
    command += " --register_token_dim 32 --num_heads 4 --epochs 1 --batch_size 8 --views 1 --num_workers 1 --device cpu"
    command += " --slurm cluster=local --slurm tasks_per_node=2 --slurm timeout_min=10"
    code, said = processes.run([BIN / "tvl-align", *command.split()])
    logs = "".join(p.read_text() for p in (tmp_path / "job" / "jobs").glob("*_log.*"))
    assert code == 0, said + logs
    assert json.loads((tmp_path / "job" / "config.json").read_text())["processes"] == 2
    assert len((tmp_path / "job" / "metrics.jsonl").read_text().splitlines()) == 1
    assert "[STAGE2] epoch 1/1" in logs


def test_a_task_that_fails_is_said_in_one_sentence(tmp_path: Path) -> None:
    job = submit("base", ["--stage1_checkpoint", str(tmp_path / "none.pth")], {"cluster": "local"}, tmp_path)
    with pytest.raises(UserError, match=f"job {job.job_id} failed"):
        wait(job)


def test_what_cannot_be_queued_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # hides Slurm, also on a cluster
    for options in ({"partition": "gpu"}, {"cluster": "local", "colour": "red"}, {"cluster": "moon"}):
        with pytest.raises(UserError, match="was not queued"):
            submit("base", [], options, tmp_path)
