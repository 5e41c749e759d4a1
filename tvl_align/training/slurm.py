"""The same training as a Slurm job: `tvl-align train ... --slurm partition=gpu --slurm nodes=2 --slurm tasks_per_node=8`.

One task is one process (one GPU). Options are submitit's: partition, account, nodes, tasks_per_node, gpus_per_node,
cpus_per_task, mem_gb, timeout_min, ...; `cluster=local` runs the tasks here, without Slurm. A job that is pre-empted or
runs out of time is queued again and goes on from its last checkpoint.
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

PLAIN = ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min", "name", "stderr_to_stdout")


@dataclass
class Task:
    """What every task of a job does: call `work` with these flags, on the processes of the job."""

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
        """What submitit queues when the job is taken away: the same, which goes on from its last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def take_slurm(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Take every `--slurm key=value` out of the flags."""
    options: dict[str, str] = {}
    rest: list[str] = []
    flags = iter(argv)
    for flag in flags:
        if flag != "--slurm" and not flag.startswith("--slurm="):
            rest.append(flag)
            continue
        given = flag.removeprefix("--slurm=") if "=" in flag else next(flags, "")
        key, equals, value = given.partition("=")
        if not key or not equals or not value:
            raise UserError(f"--slurm {given!r} is not key=value; for example --slurm partition=gpu.")
        options[key] = value
    return options, rest


def submit(
    work: Callable[[list[str]], None], flags: Sequence[str], options: dict[str, str], run: Path
) -> "submitit.Job[None]":
    """Queue a training; its logs go to `jobs` in its run folder. Raises UserError for what submitit does not take."""
    import submitit

    given = dict(options)
    cluster = given.pop("cluster", "slurm")
    prefix = "slurm_" if cluster == "slurm" else ""
    values = {(k if k in PLAIN else f"{prefix}{k}"): int(v) if v.isdigit() else v for k, v in given.items()}
    try:
        executor = submitit.AutoExecutor(folder=run / "jobs", cluster=cluster)
        executor.update_parameters(**values)
        return executor.submit(Task(work, list(flags)))
    except (RuntimeError, ValueError, TypeError, NameError, submitit.core.utils.FailedJobError) as error:
        raise UserError(
            f"the job was not queued ({' '.join(str(error).split())[:300]}); mend the --slurm options."
        ) from error


def wait(job: "submitit.Job[None]") -> None:
    """Until every task has ended. Raises UserError where one failed."""
    import submitit

    try:
        job.results()
    except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
        raise UserError(f"job {job.job_id} failed; its tasks say why in {job.paths.folder}.") from error
