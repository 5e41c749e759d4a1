"""Loading images in worker processes: as many as fit into shared memory, and none whose death goes unnoticed."""

import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tvl_align.data import loading
from tvl_align.data.image_options import ImageOptions
from tvl_align.data.loading import HELD, PREFETCH, RESERVED, load_images
from tvl_align.data.samples import Samples, TextOptions, make_samples
from tvl_align.data.tvl import read_tvl
from tvl_align.system.console import UserError
from tvl_align.system.files import warn_once

BATCHES = [[(i, 0), (i + 1, 0)] for i in range(40)]
BYTES = 2 * 3 * 4 * (32**2 + 16**2)
BOTH = ("vision", "tactile")


@pytest.fixture
def samples(world: Path) -> Samples:
    return make_samples(read_tvl(world), ImageOptions(32, 16), TextOptions(), 0)["train"]


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "cores", lambda: 8)
    warn_once.cache_clear()


def with_room_for(batches: float, monkeypatch: pytest.MonkeyPatch, shared_by: int = 1) -> None:
    """A shared memory with room for so many batches in flight, in each of `shared_by` processes."""
    free = shared_by * (RESERVED + int((HELD + batches) * BYTES))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free, f_blocks=2**26, f_frsize=1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(shared_by))


@pytest.mark.parametrize("shared_by", [1, 4])
@pytest.mark.parametrize(
    ("room", "workers", "prefetch"), [(100, 4, 2), (8, 4, 2), (7, 4, 1), (4, 4, 1), (3, 3, 1), (1, 1, 1)]
)
def test_batches_in_flight_fit_into_shared_memory(
    room: int,
    workers: int,
    prefetch: int,
    shared_by: int,
    samples: Samples,
    cores: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with_room_for(room, monkeypatch, shared_by)
    assert loading._workers_that_fit(samples, BATCHES, 4) == (workers, prefetch)
    assert len(caplog.records) == (workers < 4)


def test_without_room_the_main_process_loads_the_same_images(
    samples: Samples, cores: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = list(load_images(samples, BATCHES, 0, BOTH))
    with_room_for(-HELD, monkeypatch)
    for batches in (BATCHES, [[(0, 0)]]):
        loaded = []
        for batch in load_images(samples, batches, 2, BOTH):
            assert not multiprocessing.active_children()
            loaded.append(batch)
        if batches is BATCHES:
            pairs = list(zip(loaded, expected, strict=True))
            assert all(torch.equal(a.images[m][1], b.images[m][1]) for a, b in pairs for m in BOTH)
    (record,) = caplog.records
    assert record.getMessage().startswith("/dev/shm of 64 MiB is too small for --num_workers 2: fewer or none load images")


def test_a_machine_without_that_file_system_keeps_its_workers(
    samples: Samples, cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SHARED_MEMORY", "/nowhere")
    assert loading._workers_that_fit(samples, BATCHES, 3) == (3, PREFETCH)
    assert loading._workers_that_fit(samples, [], 3) == (0, None)


def test_a_shared_memory_without_a_limit_keeps_its_workers(
    samples: Samples, cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=0, f_blocks=0, f_frsize=4096))
    assert loading._workers_that_fit(samples, BATCHES, 3) == (3, PREFETCH)


def test_a_worker_without_shared_memory_ends_in_one_sentence(
    samples: Samples, cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In spite of the estimate, since others use it too."""

    def full(size: int, device: str) -> None:
        raise RuntimeError("unable to allocate shared memory(shm)\nNo space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.raises(UserError, match=r"No space left on device \(28\)\); give --num_workers 0, .*/dev/shm") as caught:
        list(load_images(samples, BATCHES, 2, BOTH))
    assert "\n" not in str(caught.value)


def test_workers_that_are_killed_end_in_one_sentence(samples: Samples, cores: None) -> None:
    """Where the next batch is awaited, not in the middle of whatever is done with the last one."""
    steps = 0

    def load() -> None:
        nonlocal steps
        for _ in load_images(samples, BATCHES, 2, BOTH):
            assert "torch" not in getattr(signal.getsignal(signal.SIGCHLD), "__module__", "")
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGKILL)
                worker.join()
            steps += 1

    with pytest.raises(UserError, match=r"DataLoader worker .*; give --num_workers 0, .*/dev/shm"):
        load()
    assert steps


class _Refusing(Samples):
    def __getitem__(self, index: tuple[int, int]) -> object:  # type: ignore[override]
        raise UserError("the row has no background image; add one.")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_samples_refuse_is_said_as_they_say_it(workers: int, samples: Samples, cores: None) -> None:
    samples.__class__ = _Refusing
    with pytest.raises(UserError, match=r"^the row has no background image; add one\.$"):
        list(load_images(samples, BATCHES, workers, BOTH))


def test_a_loader_that_pins_pins_the_images(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = next(load_images(samples, BATCHES[:1], 0, BOTH))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x + 1)  # marks a tensor as pinned, without a GPU
    pinned = batch.pin_memory()
    assert pinned.faults == batch.faults
    for modality, (positions, images) in batch.images.items():
        assert pinned.images[modality][0] == positions
        assert torch.equal(pinned.images[modality][1], images + 1)
    assert torch.utils.data._utils.pin_memory.pin_memory(batch).images.keys() == batch.images.keys()
