"""What this process may use of the machine. Imports no torch."""

import os


def cores() -> int:
    """CPU cores that this process may use: fewer than the machine has in a Slurm job, a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
