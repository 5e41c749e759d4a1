"""Training as a Slurm job: `tvl-align train ... --slurm partition=gpu --slurm nodes=2 --slurm tasks_per_node=8`.

One task is one process (one GPU). The options are those of submitit: partition, account, nodes, tasks_per_node,
gpus_per_node, cpus_per_task, mem_gb, timeout_min, ... With `cluster=local` the tasks run on this machine, without Slurm. A
job that is pre-empted or reaches its time limit is requeued and resumes from its last checkpoint.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tvl_align.system.console import UserError
from tvl_align.system.signals import SUBMITIT

if TYPE_CHECKING:
    import submitit
    from submitit.helpers import DelayedSubmission

# Parameters of AutoExecutor that all clusters share; any other needs the prefix of its cluster, such as slurm_partition.
SHARED_OPTIONS = (
    "nodes",
    "tasks_per_node",
    "gpus_per_node",
    "cpus_per_task",
    "mem_gb",
    "timeout_min",
    "name",
    "stderr_to_stdout",
)


@dataclass
class Task:
    """Callable that submitit runs in every task: set up the process-group environment, then call `work(flags)`."""

    work: Callable[[list[str]], None]
    flags: list[str]

    def __call__(self) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        environment = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if os.environ.get(SUBMITIT) == "local":
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        if environment.world_size == 1:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name)
        self.work(self.flags)

    def checkpoint(self) -> "DelayedSubmission":
        """What submitit requeues when the job is pre-empted: the same task, which resumes from its last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def split_slurm_options(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split flags into {key: value} of every `--slurm key=value`, and the rest."""
    options: dict[str, str] = {}
    rest: list[str] = []
    flags = iter(argv)
    for flag in flags:
        if flag != "--slurm" and not flag.startswith("--slurm="):
            rest.append(flag)
            continue
        option = flag.removeprefix("--slurm=") if "=" in flag else next(flags, "")
        key, equals, value = option.partition("=")
        if not key or not equals or not value:
            raise UserError(f"--slurm {option!r} is not key=value; give for example --slurm partition=gpu.")
        options[key] = value
    return options, rest


def submit(
    work: Callable[[list[str]], None], flags: Sequence[str], options: dict[str, str], run: Path
) -> "submitit.Job[None]":
    """Submit a job that calls `work(flags)` in every task. Its logs are written to <run>/jobs.

    Raises UserError if submitit rejects the options or the submission fails.
    """
    import submitit

    remaining = dict(options)
    cluster = remaining.pop("cluster", "slurm")
    prefix = "slurm_" if cluster == "slurm" else ""
    values = {(k if k in SHARED_OPTIONS else f"{prefix}{k}"): int(v) if v.isdigit() else v for k, v in remaining.items()}
    try:
        executor = submitit.AutoExecutor(folder=run / "jobs", cluster=cluster)
        executor.update_parameters(**values)
        return executor.submit(Task(work, list(flags)))
    except (RuntimeError, ValueError, TypeError, NameError, submitit.core.utils.FailedJobError) as error:
        raise UserError(
            f"the job was not queued ({' '.join(str(error).split())[:300]}); correct the --slurm options."
        ) from error


def wait(job: "submitit.Job[None]") -> None:
    """Wait until every task has ended. Raises UserError if one failed."""
    import submitit

    try:
        job.results()
    except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
        raise UserError(f"job {job.job_id} failed; see the task logs in {job.paths.folder}.") from error
