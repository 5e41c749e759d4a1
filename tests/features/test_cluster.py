"""An encode in the processes of a Ray of this machine, in which processes are killed."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from same_stores import assert_same

from tvl_align.cli.encode import run
from tvl_align.features.cluster import _cluster, ray_cluster
from tvl_align.features.store import FeatureStore
from tvl_align.system.console import UserError

ROWS, BLOCK = 120, 20
KEYS = {"vision": "photo", "tactile": "touch", "sentence": "what", "split": "split"}
FLAGS = [*(f"--{k}_key={v}" for k, v in KEYS.items()), "--label_keys", "force"]
needs_ray = pytest.mark.usefixtures("ray_is_there")


@pytest.fixture(scope="session")
def ray_is_there() -> None:
    pytest.importorskip("ray", reason="needs the extra ray")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    draw = np.random.default_rng(0)
    lines = ["photo,touch,what,split,force"]
    for i in range(ROWS):
        for kind in ("p", "t"):
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{kind}{i}.png")
        lines.append(f"p{i}.png,t{i}.png,A piece of {('felt', 'steel')[i % 2]}.,{('train', 'val', 'test')[i % 3]},{i / 8}")
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return folder / "t.csv"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files, whose name is short, as names of Ray's sockets must be; all who use it end."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield folder
    until(lambda: not titles(folder))
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def command(table: Path, stage1_checkpoint: Path, scratch: Path) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """command(out): an encode by two workers, which is killed at the end of the test if it is still running."""
    started: list[subprocess.Popen[str]] = []

    def start(out: Path) -> subprocess.Popen[str]:
        flags = f"--source pairs:{table} --stage1_checkpoint {stage1_checkpoint} --out {out}".split()
        flags += f"--ray local --worker_cpus 1 --block_rows {BLOCK} --device cpu".split()
        code = "import sys; from tvl_align.cli.main import main; main()"
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"TMPDIR": str(scratch)}
        arguments = [sys.executable, "-c", code, "encode", *flags, *FLAGS]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(arguments, text=True, env=environment, cwd=Path(__file__).parents[2], **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def titles(scratch: Path) -> dict[int, str]:
    """{process: its title} of those whose temporary files are in a folder."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"TMPDIR={scratch}\0".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text(errors="replace")
    return found


def workers(scratch: Path) -> list[int]:
    """The processes that encode."""
    return [process for process, title in titles(scratch).items() if title.startswith("ray::_Worker")]


def until(holds: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def done(out: Path) -> list[str]:
    return sorted(p.parent.name for p in out.glob("parts/[0-9]*/about.json"))


def begun(out: Path) -> list[str]:
    return sorted(p.name[1:7] for p in out.glob("parts/.0*"))


@pytest.fixture(scope="module")
def expected(table: Path, stage1_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """The store that one process makes, without Ray."""
    out = tmp_path_factory.mktemp("one") / "store"
    run([f"--source=pairs:{table}", f"--stage1_checkpoint={stage1_checkpoint}", f"--out={out}", "--device=cpu", *FLAGS])
    store = FeatureStore(out)
    assert [len(split) for split in store.splits.values()] == [ROWS / 3] * 3
    return store


@needs_ray
@pytest.mark.slow
def test_a_killed_worker_costs_its_block_only(
    command: Callable[[Path], "subprocess.Popen[str]"], expected: FeatureStore, scratch: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    process = command(out)
    until(lambda: bool(done(out) and begun(out)) or process.poll() is not None)
    before = done(out)
    victims = workers(scratch)
    assert process.poll() is None and len(victims) == 2 and len(before) < ROWS / BLOCK
    os.kill(victims[0], signal.SIGKILL)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, said + errors
    assert said.endswith(f"vision, tactile, text: 40 train, 40 val, 40 test rows\n{out}\n")
    assert "Traceback" not in errors, errors
    assert_same(FeatureStore(out), expected)
    assert sorted(p.name for p in (out / "parts").glob("[!p.]*")) == [f"{i:06d}" for i in range(ROWS // BLOCK)]


@needs_ray
@pytest.mark.slow
def test_after_a_killed_driver_the_same_command_goes_on(
    command: Callable[[Path], "subprocess.Popen[str]"], expected: FeatureStore, scratch: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    process = command(out)
    until(lambda: len(done(out)) >= 2 or process.poll() is not None)
    assert process.poll() is None
    process.kill()
    process.communicate()
    until(lambda: not titles(scratch))  # Ray's processes end with their driver
    times = {name: (out / "parts" / name / "about.json").stat().st_mtime_ns for name in done(out)}
    assert 2 <= len(times) < ROWS / BLOCK and not (out / "manifest.json").exists()
    process = command(out)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, said + errors
    assert all((out / "parts" / name / "about.json").stat().st_mtime_ns == t for name, t in times.items())
    assert_same(FeatureStore(out), expected)


def nodes(*resources: dict[str, float]) -> object:
    """A Ray with these machines."""

    class Ray:
        def nodes(self) -> list[dict[str, object]]:
            return [{"Alive": True, "Resources": r} for r in resources] + [{"Alive": False, "Resources": {"CPU": 99.0}}]

    return Ray()


def test_a_worker_has_a_gpu_or_some_cores() -> None:
    def found(worker_cpus: int | None, *resources: dict[str, float]) -> tuple[int, int, int]:
        cluster = _cluster(nodes(*resources), worker_cpus)
        return cluster.gpus, cluster.cpus, cluster.workers

    assert found(None, {"CPU": 2}) == (0, 2, 1)
    assert found(1, {"CPU": 2}) == (0, 1, 2)
    assert found(None, {"CPU": 6}, {"CPU": 9}) == (0, 4, 3)
    assert found(None, {"CPU": 16, "GPU": 8}, {"CPU": 4}) == (8, 2, 8)
    assert found(None, {"CPU": 64, "GPU": 4}, {"CPU": 32, "GPU": 2}) == (6, 4, 6)
    with pytest.raises(UserError, match="has 8 cores for each worker; give a smaller --worker_cpus"):
        found(8, {"CPU": 4}, {"CPU": 6})


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "ray://127.0.0.1:1"])
def test_an_address_that_does_not_answer_is_one_sentence(address: str) -> None:
    with pytest.raises(UserError, match=f"no Ray answers at {address} .*; give --ray HOST:PORT of its head, or --ray local"):
        with ray_cluster(address):
            pass


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"ray is not installed; run pip install 'tvl-align\[ray\]'"):
        with ray_cluster("local"):
            pass
