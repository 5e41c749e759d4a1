"""Processes: gathering with exact gradients, seeds, provenance."""

import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tvl_align.console import UserError
from tvl_align.runtime import (
    MOST_LANES,
    SUBMITIT,
    alone,
    gather,
    gather_with_grad,
    generator,
    keep_freed_memory,
    mean_count,
    mean_over_processes,
    pick_device,
    provenance,
    rank,
    side_by_side,
    world_size,
)


def _one_of_three(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=3)
    x = torch.full((2, 2), float(index + 1), requires_grad=True)
    everyone = gather_with_grad(x)
    ((index + 1) * everyone.square()).sum().backward()  # each process says something else about all rows
    with alone():
        lone = (rank(), world_size(), len(gather(x.detach())))
    result = {
        "gathered": everyone.detach(),
        "grad": x.grad,
        "unequal": gather(torch.full((index,), index)),
        "mean": mean_over_processes({"a": torch.tensor(float(index))})["a"],
        "count": mean_count(torch.tensor(float(index))),
        "alone": lone,
    }
    torch.save(result, f"{folder}/{index}.pt")
    dist.destroy_process_group()


def test_gathering_on_three_processes(tmp_path: Path) -> None:
    """Trap 3: all_gather without gradient is wrong; here every row gets what every process says about it."""
    mp.spawn(_one_of_three, (str(tmp_path),), nprocs=3)
    for index in range(3):
        result = torch.load(tmp_path / f"{index}.pt")
        assert result["gathered"][:, 0].tolist() == [1, 1, 2, 2, 3, 3]
        assert torch.allclose(result["grad"], torch.full((2, 2), (1 + 2 + 3) * 2.0 * (index + 1)))
        assert result["unequal"].tolist() == [1, 2, 2]
        assert result["mean"] == result["count"].item() == 1
        assert result["alone"] == (0, 1, 2)


def test_generators_depend_on_all_their_parts() -> None:
    draws = [torch.rand(1, generator=generator(*parts)).item() for parts in ((0, 1), (0, 1), (1, 0), (0, 1, 0))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="unknown device 'gpu0'"):
        pick_device("gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no GPU"):
            pick_device("cuda")


def test_results_carry_what_made_them() -> None:
    made = provenance()
    assert set(made) == {"command", "folder", "commit", "packages", "processes"}
    assert made["packages"]["torch"] == torch.__version__.split("+")[0]


def test_a_task_of_submitit_leaves_sigterm_and_hands_its_signal_on() -> None:
    """Slurm sends SIGTERM along with the signal on which submitit queues the job again; to leave on it loses the job."""
    code = """
import os, signal
from tvl_align.runtime import StopSignals
told = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda n, _: told.append(n))
with StopSignals() as signals:
    signal.raise_signal(signal.SIGTERM)
    assert signals.received is None and told == [signal.SIGTERM]
    signal.raise_signal(signal.SIGUSR2)
    assert signals.received == signal.SIGUSR2 and told == [signal.SIGTERM]
    try:
        signals.end()
    except SystemExit as end:
        print(end.code, told == [signal.SIGTERM, signal.SIGUSR2])
"""
    environment = os.environ | {SUBMITIT: "slurm"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["143", "True"], done.stderr


def test_work_side_by_side_keeps_its_order_and_takes_no_more_than_it_needs() -> None:
    """Results are those of one after another; few pieces are held; an error is told; the process keeps its threads."""
    threads, taken = torch.get_num_threads(), 0

    def pieces() -> Iterator[partial[tuple[int, int]]]:
        nonlocal taken
        for i in range(40):
            taken += 1
            yield partial(lambda i: (i, torch.get_num_threads()), i)

    for i, (result, share) in enumerate(side_by_side(pieces())):
        assert result == i
        assert share * min(MOST_LANES, threads) <= threads
        assert taken - i <= max(2, MOST_LANES) + 1
    assert list(side_by_side([])) == []
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(partial(divmod, 1, x) for x in (1, 0, 1)))
    assert torch.get_num_threads() == threads


def test_an_interrupt_waits_for_no_piece_of_work() -> None:
    code = """
import sys, time
from functools import partial
from tvl_align.console import says_it_plainly
from tvl_align.runtime import side_by_side

@says_it_plainly
def main():
    print("begun", flush=True)
    list(side_by_side(partial(time.sleep, 3600) for _ in range(9)))

main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=100)
    assert process.returncode == 130
    assert said.startswith("interrupted; ") and len(said.splitlines()) == 1


@pytest.mark.parametrize("command", ["--help", "train --help"])
def test_a_reader_that_has_gone_is_no_error(command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    tool = str(Path(sys.executable).parent / "tvl-align")
    done = subprocess.run([tool, *command.split()], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def _pages_taken_again(index: int, folder: str) -> None:
    keep_freed_memory()
    before = 0
    for _ in range(8):  # the last round takes what the others gave back
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones(2**22) for _ in range(8)]
        del held
    Path(folder, str(index)).write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator's own business")
def test_freed_memory_is_taken_again_without_new_pages(tmp_path: Path) -> None:
    """Of 32,768 pages; in three processes, since without it some of them happen to keep theirs."""
    mp.start_processes(_pages_taken_again, args=(str(tmp_path),), nprocs=3, start_method="spawn")
    assert max(int(found.read_text()) for found in tmp_path.iterdir()) < 1000
