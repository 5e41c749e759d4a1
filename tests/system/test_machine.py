"""What a process may use of the machine."""

import os
import subprocess
import sys

import pytest

from tvl_align.system.machine import cores


def test_cores_are_those_that_the_process_may_use() -> None:
    """As in a Slurm job with fewer cores than the machine has."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not bind processes to cores")
    one = sorted(os.sched_getaffinity(0))[:1]
    code = f"import os; os.sched_setaffinity(0, {one}); from tvl_align.system.machine import cores; print(cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
    bound = {**os.environ, "OMP_PROC_BIND": "true"}  # the main thread is bound to one core, the others are not
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bound)
    assert done.stdout == f"{os.cpu_count()}\n"
    assert 1 <= cores() <= (os.cpu_count() or 1)
