"""What this process may use of the machine. Imports no torch."""

import os


def cores() -> int:
    """CPU cores that this process may use: fewer than the machine has in a Slurm job or under taskset.

    OMP_PROC_BIND binds the main thread to one of them, so then all of the machine are counted.
    """
    bound = os.environ.get("OMP_PROC_BIND", "false").lower() != "false"
    return os.cpu_count() or 1 if bound or not hasattr(os, "sched_getaffinity") else len(os.sched_getaffinity(0))
