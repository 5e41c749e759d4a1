"""Process groups, devices, seeds, signals, provenance, and parallel tasks."""

import math
import multiprocessing
import os
import pickle
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import finish, run, spawn, start

from tvl_align.losses.complementary import log_error
from tvl_align.system import provenance as provenance_module
from tvl_align.system.console import UserError
from tvl_align.system.distributed import (
    gather,
    gather_with_grad,
    joint_mean,
    mean_over_processes,
    rank,
    single_process,
    world_size,
)
from tvl_align.system.provenance import provenance
from tvl_align.system.runtime import generator, keep_freed_memory, pick_device
from tvl_align.system.signals import SUBMITIT
from tvl_align.system.workers import MAX_LANES, run_in_processes, run_in_threads


def _one_of_three(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=3)
    x = torch.full((2, 2), float(index + 1), requires_grad=True)
    gathered = gather_with_grad(x)
    ((index + 1) * gathered.square()).sum().backward()  # the loss differs between processes
    own = torch.tensor(float(index), requires_grad=True)
    with single_process():
        alone = (rank(), world_size(), len(gather(x.detach())))
    result = {
        "gathered": gathered.detach(),
        "grad": x.grad,
        "unequal": gather(torch.full((index,), index)),
        "mean": mean_over_processes({"a": torch.tensor(float(index))})["a"],
        "count": joint_mean(torch.tensor(float(index))),
        "log_error": log_error(own, 0.5).detach(),
        "log_error_grad": torch.autograd.grad(log_error(own, 0.5), own)[0],
        "alone": alone,
    }
    torch.save(result, f"{folder}/{index}.pt")
    dist.destroy_process_group()


def test_gathering_on_three_processes(tmp_path: Path) -> None:
    """all_gather has a gradient: every row receives the sum of the gradients of all processes."""
    spawn(_one_of_three, (str(tmp_path),), 3)
    for index in range(3):
        result = torch.load(tmp_path / f"{index}.pt")
        assert result["gathered"][:, 0].tolist() == [1, 1, 2, 2, 3, 3]
        assert torch.allclose(result["grad"], torch.full((2, 2), (1 + 2 + 3) * 2.0 * (index + 1)))
        assert result["unequal"].tolist() == [1, 2, 2]
        assert result["mean"] == result["count"].item() == 1
        assert result["log_error"].item() == pytest.approx(math.log(3))  # of the joint error, 1, with floor 0.5
        assert result["log_error_grad"].item() == pytest.approx(1 / 1.5)
        assert result["alone"] == (0, 1, 2)


def test_generators_depend_on_all_their_parts() -> None:
    draws = [torch.rand(1, generator=generator(*parts)).item() for parts in ((0, 1), (0, 1), (1, 0), (0, 1, 0))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    for name in ("gpu0", "cuda:x", "meta", "mps"):
        with pytest.raises(UserError, match=f"unknown device '{name}': --device takes cuda, cuda:N or cpu"):
            pick_device(name)


def test_a_gpu_that_is_not_there_is_named_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, found in ((0, "no GPU on this machine; use --device cpu"), (2, "2 GPUs, numbered from 0,.*--device cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(UserError, match=f"--device cuda:7: PyTorch finds {found}"):
            pick_device("cuda:7")
    assert pick_device("cuda:1") == torch.device("cuda:1")


def test_results_carry_what_made_them() -> None:
    made = provenance()
    assert set(made) == {"command", "folder", "version", "commit", "packages", "processes"}
    assert made["packages"]["torch"] == torch.__version__.split("+")[0]


def test_a_task_of_submitit_leaves_sigterm_and_hands_its_signal_on() -> None:
    """Slurm sends SIGTERM with the signal on which submitit requeues the job; ending on SIGTERM would lose the job."""
    code = """
import os, signal
from tvl_align.system.signals import StopSignals
passed_on = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda n, _: passed_on.append(n))
with StopSignals() as signals:
    signal.raise_signal(signal.SIGTERM)
    assert signals.received is None and passed_on == [signal.SIGTERM]
    signal.raise_signal(signal.SIGUSR2)
    assert signals.received == signal.SIGUSR2 and passed_on == [signal.SIGTERM]
    try:
        signals.end()
    except SystemExit as end:
        print(end.code, passed_on == [signal.SIGTERM, signal.SIGUSR2])
"""
    environment = os.environ | {SUBMITIT: "slurm"}
    _, said = run([sys.executable, "-c", code], env=environment)
    assert said.split() == ["143", "True"], said


def test_work_side_by_side_keeps_its_order_and_takes_no_more_than_it_needs() -> None:
    """Results keep their order, few tasks are pending, an error is raised, and the number of torch threads is restored."""
    threads, taken = torch.get_num_threads(), 0

    def tasks() -> Iterator[partial[tuple[int, int]]]:
        nonlocal taken
        for i in range(40):
            taken += 1
            yield partial(lambda i: (i, torch.get_num_threads()), i)

    for i, (result, share) in enumerate(run_in_threads(tasks())):
        assert result == i
        assert share * min(MAX_LANES, threads) <= threads
        assert taken - i <= max(2, MAX_LANES) + 1
    assert list(run_in_threads([])) == []
    with pytest.raises(ZeroDivisionError):
        list(run_in_threads(partial(divmod, 1, x) for x in (1, 0, 1)))
    assert torch.get_num_threads() == threads


def test_an_interrupt_waits_for_no_piece_of_work() -> None:
    code = """
import sys, time
from functools import partial
from tvl_align.system.console import reports_errors
from tvl_align.system.workers import run_in_threads

@reports_errors
def main():
    print("begun", flush=True)
    list(run_in_threads(partial(time.sleep, 3600) for _ in range(9)))

main()
"""
    process = start([sys.executable, "-c", code])
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    said = finish(process)
    assert process.returncode == 130
    assert said.startswith("interrupted; ") and len(said.splitlines()) == 1


@pytest.mark.parametrize("command", ["--help", "train --help"])
def test_a_reader_that_has_gone_is_no_error(command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    tool = str(Path(sys.executable).parent / "tvl-align")
    ended = run([tool, *command.split()], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert ended == (141, "")


def _pages_taken_again(index: int, folder: str) -> None:
    keep_freed_memory()
    before = 0
    for _ in range(8):  # the last round reuses the memory of the others
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones(2**22) for _ in range(8)]
        del held
    Path(folder, str(index)).write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_taken_again_without_new_pages(tmp_path: Path) -> None:
    """Page faults of 32,768 possible ones, in three processes: without the setting some keep their memory by chance."""
    spawn(_pages_taken_again, (str(tmp_path),), 3)
    assert max(int(found.read_text()) for found in tmp_path.iterdir()) < 1000


def _end(how: str, beside: str) -> None:
    Path(beside).write_text(str(os.getpid()))
    other = Path(beside).with_name("waits")
    while how in ("killed", "refused") and not (other.exists() and other.read_text()):
        time.sleep(0.05)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "refused":
        raise UserError("one sentence.")
    if how == "waits":
        time.sleep(3600)


@pytest.mark.parametrize(("how", "said"), [("killed", "was killed by SIGKILL"), ("refused", "failed with exit code 2")])
def test_a_worker_that_dies_ends_the_others_and_is_named(how: str, said: str, tmp_path: Path) -> None:
    jobs = {name: (_end, name, str(tmp_path / name)) for name in ("waits", how, "never begun")}
    with pytest.raises(UserError, match=f"the process of {how} {said}"):
        run_in_processes(jobs, at_once=2, threads=1)
    assert not (tmp_path / "never begun").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "waits").read_text()), 0)


def test_a_job_that_cannot_start_says_why_and_ends_the_others(tmp_path: Path) -> None:
    jobs = {"waits": (_end, "waits", str(tmp_path / "waits")), "nameless": (lambda: None,)}
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError), match="pickle|lambda"):
        run_in_processes(jobs, at_once=2, threads=1)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_jobs_run_in_processes_of_their_own(tmp_path: Path) -> None:
    run_in_processes({name: (_end, "", str(tmp_path / name)) for name in "abc"}, at_once=2, threads=1)
    assert len({(tmp_path / name).read_text() for name in "abc"} | {str(os.getpid())}) == 4


def test_another_projects_repository_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package installed in an environment inside a repository does not report that repository's commit."""
    assert provenance_module.git_commit() != "unknown" or not (Path(__file__).parents[2] / ".git").exists()
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "--quiet"], [*identity, "commit", "--quiet", "--allow-empty", "--message", "theirs"]):
        assert run(["git", *command], cwd=tmp_path)[0] == 0
    monkeypatch.setattr(provenance_module, "__file__", str(tmp_path / "provenance.py"))
    assert provenance_module.git_commit() == "unknown"
