"""The processes of a Ray cluster, of this machine or of many, encode the blocks of a source.

Ray places the processes, gives each its GPU, and starts one again that has died; `tvl_align.features.parts` says what they
do. Nothing but the numbers of blocks goes through Ray: features are written to a folder that all machines share.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvl_align.data.sources import Block, import_extra
from tvl_align.features.parts import Task, Work
from tvl_align.system.console import UserError

HERE = ("local", "auto")
OBJECT_STORE = 100 * 2**20  # bytes, of a Ray that is started here; hardly used
WORKER_CPUS = 4  # of a worker, at most: encoders do not get faster with many more
RETRIES = 3  # of a block whose worker has died
PATIENCE = 10  # seconds until an address that does not answer is given up


@dataclass(frozen=True)
class Cluster:
    """A Ray that is connected. gpus: their number. cpus: cores of a worker. workers: how many there are; each has a GPU if
    there are any."""

    ray: Any
    gpus: int
    cpus: int
    workers: int

    def encode(self, tasks: Sequence[Task], make: Callable[[], Work]) -> Iterator[int]:
        """An `Engine` of `tvl_align.features.parts`.

        A block whose worker dies is encoded again, by a new worker. Raises what work raises, and UserError for a block whose
        workers die again and again.
        """
        ray, waiting = self.ray, iter(tasks)
        remote = ray.remote(num_cpus=self.cpus, num_gpus=min(1, self.gpus), max_restarts=-1, max_task_retries=RETRIES)
        running: dict[Any, tuple[Any, Task]] = {}

        def give(worker: Any) -> None:
            if (task := next(waiting, None)) is not None:
                running[worker.work.remote(*task)] = worker, task
            else:
                ray.kill(worker)  # another one that is started again may need its place

        for _ in range(min(self.workers, len(tasks))):
            give(remote(_Worker).remote(make))
        while running:
            (done,), _ = ray.wait(list(running))
            worker, (number, block) = running.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError | OSError):
                    raise error.cause from None
                if isinstance(error.cause, ModuleNotFoundError):
                    raise UserError(f"a worker lacks {error.cause.name}; install the same on all machines.") from error
                raise
            except ray.exceptions.RayActorError as error:
                raise UserError(
                    f"{RETRIES + 1} workers died of {block.name}; give them more memory, or look for the cause in the logs "
                    "of Ray, and run the same command again."
                ) from error
            yield number
            give(worker)


class _Worker:
    """Makes its work when the first block comes, so that an error there is one of the block."""

    def __init__(self, make: Callable[[], Work]) -> None:
        self.make, self.made = make, list[Work]()

    def work(self, number: int, block: Block) -> None:
        self.made = self.made or [self.make()]
        self.made[0](number, block)


@contextmanager
def ray_cluster(address: str, worker_cpus: int | None = None) -> Iterator[Cluster]:
    """Connect to Ray while the block runs.

    address: `local` starts one on this machine, `auto` connects to that of the variable RAY_ADDRESS or starts one; else
    HOST:PORT of a cluster, or ray://HOST:PORT. worker_cpus: cores of a worker; default: at most 4. Ray's statistics of use,
    its dashboard and the logs of its processes are off.

    Raises UserError if Ray is not installed, if the address does not answer, and if the cluster has fewer cores.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = import_extra("ray", "ray")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    given = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    scratch = None
    try:
        if given is None or given in HERE:
            scratch = tempfile.mkdtemp(prefix="ray-")  # its name is short, as names of sockets must be
            options = {"include_dashboard": False, "object_store_memory": OBJECT_STORE, "_temp_dir": scratch}
            ray.init(address="local", **options, **quiet)
        else:
            _connect(ray, given, quiet)
        yield _cluster(ray, worker_cpus)
    finally:
        ray.shutdown()
        if scratch is not None:
            shutil.rmtree(Path(scratch), ignore_errors=True)


def _connect(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()  # Ray itself waits for minutes
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"no Ray answers at {address} ({reason}); give --ray HOST:PORT of its head, or --ray local."
        ) from error


def _cluster(ray: Any, worker_cpus: int | None) -> Cluster:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    shares = [node.get("CPU", 0) / max(1, node.get("GPU", 0)) for node in nodes if node.get("GPU", 0) or not gpus]
    cpus = worker_cpus or max(1, min(WORKER_CPUS, int(min(shares, default=1))))
    workers = gpus or sum(int(node.get("CPU", 0) // cpus) for node in nodes)
    if not workers or max(shares) < cpus:
        raise UserError(f"no machine of the cluster has {cpus} cores for each worker; give a smaller --worker_cpus.")
    return Cluster(ray, gpus, cpus, workers)
