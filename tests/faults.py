"""The fault campaign: `make faults`. Real faults on real processes and files; a table says what was tried and what was lost.

Every function below makes one kind of fault and returns its outcome; tests/test_faults.py runs each of them a few times.
"""

import argparse
import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import processes as child
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tvl_align.data.text import read_synonyms
from tvl_align.data.tvl import Tolerance, read_tvl
from tvl_align.encoders.tvl import load_stage1
from tvl_align.evaluation.labels import read_labels
from tvl_align.features.arrays import read_npz
from tvl_align.features.store import FeatureStore
from tvl_align.synthetic.pretrain import PretrainConfig, pretrain
from tvl_align.synthetic.world import write_world
from tvl_align.system.checkpoint import load_checkpoint
from tvl_align.system.console import UserError

BIN = Path(sys.executable).parent
LONGEST = 8.0  # seconds after which a training is killed at the latest, if it still runs
ENVIRONMENT = child.quiet()


@dataclass(frozen=True)
class Outcome:
    """A line of the table: what was done how often, how it ended, what was lost ("" for nothing)."""

    fault: str
    times: int
    outcome: str
    lost: str = ""


@dataclass(frozen=True)
class Ground:
    """What faults are made on: a small world, its Stage 1, a store of random features, a folder for runs."""

    root: Path
    seed: int = 0

    @property
    def world(self) -> Path:
        return self.root / "world"

    @property
    def checkpoint(self) -> Path:
        return self.root / "stage1" / "checkpoint.pth"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @classmethod
    def prepare(cls, root: Path, seed: int = 0) -> "Ground":
        ground = cls(root, seed)
        if not ground.world.exists():
            write_world(ground.world, 96, 24, seed=3, workers=1, quiet=True)
        if not ground.checkpoint.exists():
            pretrain(PretrainConfig(ground.world, root / "stage1", epochs=1, batch_size=32, num_workers=0), quiet=True)
        if not ground.store.exists():
            g = np.random.default_rng(0)
            split = np.array(["train"] * 160 + ["val"] * 40 + ["test"] * 40)
            FeatureStore.from_arrays({m: g.normal(size=(240, 4, 32)) for m in ("left", "right")}, ground.store, split=split)
        return ground

    def train(self, name: str, more: str = "", epochs: int = 4) -> list[str]:
        flags = f"train --store {self.store} --register_token_dim 64 --batch_size 16 --epochs {epochs} --warmup_epochs 1"
        flags += f" --lr 1e-3 --drop_rate 0.1 --device cpu --output_dir {self.root / 'runs'} --log_name {name} {more}"
        return [str(BIN / "tvl-align"), *flags.split()]

    def encode(self, name: str) -> list[str]:
        flags = f"encode --stage1_checkpoint {self.checkpoint} --datasets_dir {self.world} --views 4 --num_workers 1"
        return [str(BIN / "tvl-align"), *flags.split(), "--device", "cpu", "--output_dir", str(self.root / name)]

    def run(self, name: str) -> Path:
        return self.root / "runs" / name


def start(command: Sequence[str], **more: Any) -> "subprocess.Popen[str]":
    return child.start(command, env=ENVIRONMENT, **more)


def finish(command: Sequence[str], **more: Any) -> tuple[int, str]:
    return child.run(command, env=ENVIRONMENT, **more)


def same_run(one: Path, other: Path) -> str:
    """ "" where two runs ended with equal weights, optimizer, progress and metrics; else what differs."""
    a, b = (load_checkpoint(folder / "checkpoint.pth") for folder in (one, other))
    for part in ("model", "optimizer", "progress"):
        if not _equal(a[part], b[part]):
            return part
    metrics = [(folder / "metrics.jsonl").read_text() for folder in (one, other)]
    return "" if metrics[0] == metrics[1] else "metrics.jsonl"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def whole_run(ground: Ground) -> Path:
    """The uninterrupted run that others must equal."""
    if not (ground.run("whole") / "metrics.jsonl").exists():
        code, said = finish(ground.train("whole"))
        assert code == 0, said
    return ground.run("whole")


def killed_training(ground: Ground, times: int) -> Outcome:
    """SIGKILL at random moments, every second time while a checkpoint is being written; the same command until it ends."""
    whole, rng, kills, in_writes, differs = whole_run(ground), random.Random(ground.seed), 0, 0, Counter[str]()
    number = 0
    while kills < times:
        name = f"killed{number}"
        process = start(ground.train(name))
        if kills % 2:
            written = _wait_for(ground.run(name) / "checkpoint.pth.tmp", process, rng.uniform(2, LONGEST))
            in_writes += written
        else:
            _sleep(process, rng.uniform(2, LONGEST))
        if process.poll() is None:
            process.kill()
            kills += 1
            child.finish(process)
            continue
        said = child.finish(process)
        assert process.returncode == 0, said
        number += 1
        differs[same_run(whole, ground.run(name))] += 1
    code, said = finish(ground.train(f"killed{number}"))
    assert code == 0, said
    differs[same_run(whole, ground.run(f"killed{number}"))] += 1
    lost = ", ".join(f"{part} differs {n} times" for part, n in differs.items() if part)
    return Outcome(
        f"training killed ({in_writes} while a checkpoint was written)",
        kills,
        f"{sum(differs.values())} runs ended, bit-identical to the uninterrupted one: {differs['']}",
        lost,
    )


def _wait_for(path: Path, process: "subprocess.Popen[str]", at_most: float) -> bool:
    end = time.monotonic() + at_most
    while time.monotonic() < end and process.poll() is None:
        if path.exists():
            return True
        time.sleep(0.0005)
    return False


def _sleep(process: "subprocess.Popen[str]", seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)


def killed_encode(ground: Ground, times: int) -> Outcome:
    """SIGKILL while the store is being written; the same command until it is whole."""
    code, said = finish(ground.encode("stores/whole"))
    assert code == 0, said
    whole, rng, kills = FeatureStore(Path(said.strip().splitlines()[-1])), random.Random(ground.seed), 0
    lost, number = "", 0
    while kills < times:
        process = start(ground.encode(f"stores/killed{number}"))
        _sleep(process, rng.uniform(2, 9))
        if process.poll() is None:
            process.kill()
            child.finish(process)
            kills += 1
            continue
        number += 1
        lost = lost or _store_differs(whole, Path(child.finish(process).strip().splitlines()[-1]))
    code, said = finish(ground.encode(f"stores/killed{number}"))
    lost = lost or (_store_differs(whole, Path(said.strip().splitlines()[-1])) if code == 0 else said[-200:])
    return Outcome("encode killed", kills, f"{number + 1} stores became whole", lost)


def _store_differs(whole: FeatureStore, folder: Path) -> str:
    other = FeatureStore(folder)
    for name, split in whole.splits.items():
        rows = torch.arange(len(split)).repeat_interleave(split.views + 1)
        views = torch.arange(split.views + 1).repeat(len(split))
        one, two = split.read(rows, views), other.splits[name].read(rows, views)
        for m, tokens in one.modalities.items():
            columns = ("tokens", "mask", "pooled", "present")
            if not all(torch.equal(getattr(tokens, c), getattr(two.modalities[m], c)) for c in columns):
                return f"{name} {m} differs"
    return ""


def told_to_end(ground: Ground, times: int) -> Outcome:
    """SIGTERM or SIGUSR1 in the middle of an epoch: checkpoint, a message, exit code 143; the same command ends as if
    nothing had been."""
    whole, faults, inside = whole_run(ground), Counter[str](), 0
    for i in range(times):
        name = f"told{i}"
        process = start(ground.train(name))
        rng = random.Random(f"{ground.seed} {i}")
        _wait_for(ground.run(name) / "config.json", process, child.LIMIT)
        _sleep(process, rng.uniform(0.0, 1.5))
        process.send_signal(signal.SIGUSR1 if i % 2 else signal.SIGTERM)
        said = child.finish(process)
        if process.returncode == 0 or "epoch 4/4" in said:  # it was over, at most on its way out
            faults["ended before the signal came"] += 1
        elif process.returncode != 143 or "stopped by a signal" not in said:
            faults[f"exit code {process.returncode}: {said[-200:]}"] += 1
            continue
        inside += load_checkpoint(ground.run(name) / "checkpoint.pth")["progress"]["step"] > 0
        code, said = finish(ground.train(name))
        faults[same_run(whole, ground.run(name)) if code == 0 else said[-200:]] += 1
    lost = ", ".join(f"{what} ({n} times)" for what, n in faults.items() if what and what != "ended before the signal came")
    return Outcome(
        f"SIGTERM, SIGUSR1 ({inside} inside an epoch)", times, f"exit code 143, went on to equal weights: {faults['']}", lost
    )


def full_disk(ground: Ground) -> Outcome:
    """No file may grow beyond 64 KB while a run goes on: one sentence, and the previous checkpoint is untouched."""
    name = "full"
    process = start(ground.train(name))
    _wait_for(ground.run(name) / "checkpoint.pth", process, child.LIMIT)
    process.send_signal(signal.SIGTERM)
    child.finish(process)
    before = (ground.run(name) / "checkpoint.pth").read_bytes()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, 64 * 1024))

    code, said = finish(ground.train(name), preexec_fn=limited)
    after = (ground.run(name) / "checkpoint.pth").read_bytes()
    left = list(ground.run(name).glob("*.tmp"))
    sentence = next((line for line in said.splitlines() if line.startswith("error:")), said[-300:])
    lost = (
        ""
        if code == 2 and before == after and not left and "Traceback" not in said
        else f"code {code}, {left}: {said[-300:]}"
    )
    code, said = finish(ground.train(name))
    lost = lost or (same_run(whole_run(ground), ground.run(name)) if code == 0 else said[-300:])
    return Outcome("disk full at a checkpoint", 1, sentence, lost)


def dead_rank(ground: Ground, processes: int, restarts: int, within: float = child.LIMIT) -> Outcome:
    """SIGKILL to one of several processes: the others end within 30 s and the rank is named, or torchrun starts all anew."""
    name = f"dead{processes}-{restarts}"
    tool = [str(BIN / "torchrun"), f"--nproc_per_node={processes}", f"--max_restarts={restarts}", "--no_python"]
    command = [*tool, *ground.train(name, f"--batch_size {16 // processes}", epochs=8)]
    process = start(command)
    _wait_for(ground.run(name) / "checkpoint.pth", process, child.LIMIT)
    victim = _workers(process.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    said = child.finish(process)
    seconds = time.monotonic() - began
    if restarts:
        done = len((ground.run(name) / "metrics.jsonl").read_text().splitlines())
        lost = "" if process.returncode == 0 and done == 8 else f"{done} epochs: {said[-600:]}"
        return Outcome(f"1 of {processes} processes killed, --max_restarts=1", 1, f"back by itself, {done} epochs", lost)
    named = f"rank      : {processes - 1}" in said or f"rank: {processes - 1}" in said or "local_rank: " in said
    lost = "" if process.returncode and seconds < within and named else f"{seconds:.0f} s, named {named}: {said[-600:]}"
    return Outcome(f"1 of {processes} processes killed", 1, f"all ended after {seconds:.0f} s, the rank is named", lost)


def _workers(launcher: int) -> list[int]:
    """Process ids of a launcher's children, in the order they were started."""
    return sorted(int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())


def races(ground: Ground, times: int) -> Outcome:
    """Two trainings on one folder at the same moment, and two encodes of one store."""
    faults = Counter[str]()
    for i in range(times):
        if i % 2:
            both = [start(ground.train(f"race{i}", epochs=2)) for _ in range(2)]
            ends = [(child.finish(p), p.returncode) for p in both]
            codes = sorted(code for _, code in ends)
            told = any("another process trains in" in said for said, _ in ends)
            after = codes == [0, 0] and any("are done already" in said for said, _ in ends)  # one came after the other
            whole = len((ground.run(f"race{i}") / "metrics.jsonl").read_text().splitlines()) == 2
            faults["" if whole and ((codes == [0, 2] and told) or after) else f"{codes}: {ends[0][0][-200:]}"] += 1
        else:
            both = [start(ground.encode(f"stores/race{i}")) for _ in range(2)]
            ends = [(child.finish(p), p.returncode) for p in both]
            stores = {said.strip().splitlines()[-1] for said, _ in ends}
            good = [code for _, code in ends] == [0, 0] and len(stores) == 1 and FeatureStore(Path(stores.pop())).splits
            faults["" if good else f"{ends}"[-300:]] += 1
    lost = "; ".join(what for what in faults if what)
    return Outcome(
        "two at once on one run folder or store", times, f"one refused or waiting, nothing torn: {faults['']}", lost
    )


ABILITIES = {  # C code that takes an ability of the file system away from a process, as some file systems do
    "locks": """#include <errno.h>
int flock(int file, int operation) { errno = ENOSYS; return -1; }""",
    "maps": """#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/mman.h>
#include <sys/vfs.h>
typedef void *(*map)(void *, size_t, int, int, int, off_t);
void *mmap(void *at, size_t size, int access, int flags, int file, off_t start) {
  struct statfs system;  /* of type 0x01021994 is shared memory, which is no file system of the user's */
  int shared = file >= 0 && (flags & MAP_SHARED) && !fstatfs(file, &system) && system.f_type != 0x01021994;
  if (shared) { errno = ENODEV; return MAP_FAILED; }
  return ((map)dlsym(RTLD_NEXT, "mmap"))(at, size, access, flags, file, start);
}
void *mmap64(void *at, size_t size, int access, int flags, int file, off_t start) {
  return mmap(at, size, access, flags, file, start);
}""",
}
SKIPPED = "skipped: "  # an outcome that begins so says why a fault cannot be made on this machine


def without(ground: Ground, ability: str) -> Outcome:
    """A training without locks (Lustre) or memory maps (FUSE): it ends as on any other."""
    fault, name = f"file system without {ability}", f"without_{ability}"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return Outcome(fault, 0, f"{SKIPPED}no C compiler")
    library = ground.root / f"{name}.so"
    make = [compiler, "-shared", "-fPIC", "-x", "c", "-o", str(library), "-", "-ldl"]
    subprocess.run(make, input=ABILITIES[ability], text=True, check=True)
    code, said = child.run(ground.train(name), env=ENVIRONMENT | {"LD_PRELOAD": str(library)})
    if code:
        return Outcome(fault, 1, f"exit code {code}", said[-300:])
    wrong = {
        "locks": "" if said.count("file system without locks") == 1 else f"no single warning: {said[-300:]}",
        "maps": ""
        if said.count("without memory maps: features are read into") == 1
        else f"no single warning: {said[-300:]}",
    }
    left = [f.name for f in ground.run(name).iterdir() if f.suffix == ".tmp"]
    lost = same_run(whole_run(ground), ground.run(name)) or wrong[ability] or (f"{left} left" if left else "")
    return Outcome(fault, 1, "bit-identical to the uninterrupted run", lost)


def small_shared_memory(ground: Ground) -> Outcome:
    """An encode with a /dev/shm of 1 MB, as in a small container: the main process loads the images, and says so once."""
    fault = "1 MB of shared memory"
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    small = [*namespace, "sh", "-c", 'mount -t tmpfs -o size=1M tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or child.run([*small, "true"])[0]:
        return Outcome(fault, 0, f"{SKIPPED}no permission to mount a file system")
    code, said = finish(ground.encode("stores/whole"))
    assert code == 0, said
    whole = FeatureStore(Path(said.strip().splitlines()[-1]))
    code, said = finish([*small, *ground.encode("stores/small")])
    if code or said.count("is too small for --num_workers") != 1:
        return Outcome(fault, 1, f"exit code {code}", said[-300:] or "not a word")
    return Outcome(fault, 1, "the same store, one warning", _store_differs(whole, Path(said.strip().splitlines()[-1])))


def dead_loader(ground: Ground) -> Outcome:
    """SIGKILL to a process that loads images for an encode: the encode ends within 30 s with one sentence."""
    process = start([*ground.encode("stores/dead"), "--views", "40"])
    end = time.monotonic() + child.LIMIT
    while not (loaders := _loaders(process.pid)):
        assert process.poll() is None and time.monotonic() < end, "no process loads images"
        time.sleep(0.005)
    os.kill(loaders[0], signal.SIGKILL)
    began = time.monotonic()
    said = child.finish(process)
    seconds = time.monotonic() - began
    named = "--num_workers 0" in said and "/dev/shm" in said and "Traceback" not in said
    lost = "" if process.returncode == 2 and named and seconds < 30 else f"{seconds:.0f} s: {said[-300:]}"
    return Outcome("process that loads images killed", 1, f"one sentence after {seconds:.0f} s", lost)


def _loaders(parent: int) -> list[int]:
    """Process ids of the DataLoader workers of a process."""
    found = []
    for pid in _workers(parent):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if Path(f"/proc/{pid}/comm").read_text().strip() == "pt_data_worker":
                found.append(pid)
    return found


class Bomb:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def strangers(ground: Ground) -> Outcome:
    """Files that carry code, wrong shapes, wrong kinds, NaN or a zip bomb: refused in one sentence, nothing executed."""
    work = ground.root / "strangers"
    work.mkdir(exist_ok=True)
    mark = work / "executed"
    good = torch.load(ground.checkpoint, weights_only=False)
    some = next(k for k, v in good["model"].items() if k.startswith("tactile_encoder") and v.ndim > 1)
    own = load_checkpoint(whole_run(ground) / "checkpoint.pth")

    def saved(name: str, content: Any) -> Path:
        torch.save(content, work / name)
        return work / name

    def changed(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
        return content | {"model": content["model"] | {key: value}}

    def bombed(name: str) -> Path:
        with zipfile.ZipFile(work / name, "w", zipfile.ZIP_DEFLATED) as file, file.open("archive/data.pkl", "w") as inside:
            for _ in range(200):
                inside.write(bytes(2**20))
        return work / name

    def stage2(path: Path) -> Callable[[], Any]:
        return lambda: load_checkpoint(path)

    def store(damage: Callable[[Path], None]) -> Callable[[], Any]:
        folder = work / f"store{len(list(work.glob('store*')))}"
        shutil.copytree(ground.store, folder)
        damage(folder)
        return lambda: FeatureStore(folder).splits["train"].read(torch.arange(4))

    def pickled(folder: Path) -> None:
        """A table that says it is of a kind which tensordict would unpickle."""
        (folder / "train/left/other.pickle").write_bytes(pickle.dumps(Bomb(mark)))
        meta = folder / "train/left/meta.json"
        meta.write_text(
            json.dumps({"_type": "<class 'tensordict.tensorclass.NonTensorData'>", "shape": [], "device": "cpu"})
        )
        os.truncate(folder / "train/left/tokens.memmap", 10)

    def config(text: str) -> Callable[[], Any]:
        folder = work / f"run{len(list(work.glob('run*')))}"
        shutil.copytree(whole_run(ground), folder)
        (folder / "config.json").write_text(text)

        def evaluate() -> None:
            code, said = finish([str(BIN / "tvl-align"), "evaluate", str(folder)])
            if code == 2 and "Traceback" not in said:
                raise UserError(said)
            raise AssertionError(said)

        return evaluate

    first = next(iter(own["model"]))
    tried: dict[str, Callable[[], Any]] = {
        "Stage 1 with a pickle": lambda: load_stage1(saved("a.pth", good | {"args": Bomb(mark)})),
        "Stage 1, model is a pickle": lambda: load_stage1(saved("b.pth", {"model": Bomb(mark)})),
        "Stage 1, plain pickle file": lambda: load_stage1(_pickle(work / "c.pth", Bomb(mark))),
        "Stage 1, wrong shape": lambda: load_stage1(saved("d.pth", changed(good, some, torch.zeros(2, 2)))),
        "Stage 1, whole numbers": lambda: load_stage1(saved("e.pth", changed(good, some, good["model"][some].long()))),
        "Stage 1, NaN": lambda: load_stage1(saved("f.pth", changed(good, some, good["model"][some] * torch.nan))),
        "Stage 1, text for weights": lambda: load_stage1(saved("g.pth", changed(good, some, "weights"))),
        "Stage 1, zip bomb": lambda: load_stage1(bombed("h.pth")),
        "Stage 2 with a pickle": stage2(saved("i.pth", own | {"progress": Bomb(mark)})),
        "Stage 2, zip bomb": stage2(bombed("j.pth")),
        "Stage 2, NaN": stage2(saved("k.pth", changed(own, first, own["model"][first] * torch.nan))),
        "Stage 2, text for weights": stage2(saved("l.pth", changed(own, first, "weights"))),
        "store with a pickle": store(pickled),
        "store, manifest names a folder above": store(lambda f: _edit(f, splits={"../../x": {}})),
        "store, manifest of wrong kinds": store(lambda f: _edit(f, modalities={"left": [1, 2]})),
        "store, impossible sizes": store(
            lambda f: _edit(f, modalities={"left": {"width": 2**40, "tokens": 2**40, "pooled_width": -1}})
        ),
        "npz with objects": lambda: read_npz(_npz(work / "m.npz", np.array([Bomb(mark)] * 4, dtype=object))),
        "npz bomb": lambda: read_npz(_npz(work / "n.npz", np.zeros((40, 2**21), dtype=np.uint8))),
        "config that is a list": config("[1]"),
        "config of other kinds": config(json.dumps({"implementation": {"experiment_id": "stage2_base"}, "settings": 3})),
        "config of an unknown method": config(json.dumps({"implementation": {"experiment_id": "os.system"}})),
    }
    failures = []
    for what, attempt in tried.items():
        try:
            attempt()
            failures.append(f"{what}: accepted")
        except UserError:
            pass
        except Exception as error:
            failures.append(f"{what}: {type(error).__name__} {error}"[:160])
    executed = mark.exists()
    lost = "; ".join(failures + (["code of a file was executed"] if executed else []))
    return Outcome(
        "files from strangers", len(tried), f"{len(tried) - len(failures)} refused, {int(executed)} executed", lost
    )


def _pickle(path: Path, content: Any) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def _npz(path: Path, array: np.ndarray) -> Path:
    np.savez_compressed(path, left=array, right=array)
    return path


def _edit(folder: Path, **more: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def reproducible(ground: Ground) -> Outcome:
    """The same training with other workers, another hash seed, another order of files, and on 2 processes."""
    copy = ground.root / "copied" / "world"
    if not copy.exists():
        copy.mkdir(parents=True)
        for path in sorted(ground.world.rglob("*"), reverse=True):  # written in another order
            if path.is_file():
                (copy / path.relative_to(ground.world)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy / path.relative_to(ground.world))

    def train(name: str, world: Path, workers: int, hashes: str, processes: int = 1) -> list[dict[str, float]]:
        flags = f"train --stage1_checkpoint {ground.checkpoint} --datasets_dir {world} --views 1 --num_workers {workers}"
        flags += (
            f" --register_token_dim 64 --batch_size {16 // processes} --epochs 3 --warmup_epochs 1 --lr 1e-3 --device cpu"
        )
        flags += f" --device cpu --output_dir {ground.root / 'same' / name} --log_name run"
        tool = [str(BIN / "torchrun"), f"--nproc_per_node={processes}", "--no_python"] if processes > 1 else []
        command = [*tool, str(BIN / "tvl-align"), *flags.split()]
        code, said = child.run(command, env=ENVIRONMENT | {"PYTHONHASHSEED": hashes})
        assert code == 0, said
        lines = (ground.root / "same" / name / "run" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    first = train("first", ground.world, 0, "0")
    others = {
        "again, with 2 workers and another hash seed": train("again", ground.world, 2, "7"),
        "another order of files": train("order", copy, 0, "0"),
    }
    lost = [what for what, metrics in others.items() if metrics != first]
    two = train("two", ground.world, 0, "0", processes=2)
    apart = max(abs(a[k] - b[k]) / max(1.0, abs(a[k])) for a, b in zip(first, two, strict=True) for k in a)
    lost += [f"2 processes differ by {apart:.1e}"] if apart > 1e-4 else []
    found = (ground.root.glob(f"same/{name}/features/*/manifest.json") for name in ("first", "two"))
    one, other = (next(paths).parent for paths in found)
    tables = sorted(one.rglob("*.memmap"))
    assert tables
    if any(table.read_bytes() != (other / table.relative_to(one)).read_bytes() for table in tables):
        lost.append("2 processes encode other features")
    return Outcome(
        "same seed, other circumstances",
        len(others) + 1,
        f"identical metrics; 2 processes differ by {apart:.0e}",
        ", ".join(lost),
    )


def gone_bad(ground: Ground) -> Outcome:
    """A NaN in one row of a store: the run stops and names the rows; with --skip_nonfinite it leaves that step out."""
    store = ground.root / "nan"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(ground.store, store)
    tokens = np.memmap(store / "train/left/tokens.memmap", dtype=np.float16, mode="r+")
    tokens[: 4 * 32] = np.nan
    tokens.flush()
    stops = [part.replace(str(ground.store), str(store)) for part in ground.train("nan", epochs=1)]
    code, said = finish(stops)
    noted = json.loads((ground.run("nan") / "nonfinite.jsonl").read_text().splitlines()[0])
    lost = "" if code == 2 and "not finite" in said and 0 in noted["rows"] else f"code {code}: {said[-300:]}"
    skips = [part.replace("/nan", "/skip") if part == str(ground.run("nan")) else part for part in stops]
    skips[skips.index("nan")] = "skip"
    code, said = finish([*skips, "--skip_nonfinite", "1"])
    lost = lost or ("" if code == 0 else f"with --skip_nonfinite: {said[-300:]}")
    return Outcome("NaN in a stored row", 2, "stopped with the rows named; left out where allowed", lost)


READERS: dict[str, tuple[str, bytes]] = {
    "CSV of rows": (
        "ssvtp/train.csv",
        b'url,tactile,caption\nimages_rgb/image_1_rgb.jpg,images_tac/image_1_tac.jpg,"soft, lined"\n',
    ),
    "JSON of pairs": (
        "hct/data1/contact.json",
        b'{"vision": ["a/v/0.jpg"], "tactile": ["a/t/0.jpg"], "background": ["a/b.jpg"]}',
    ),
    "synonyms": ("synonyms.json", b'{"soft": ["plush", "tender"], "lined": []}'),
    "labels": ("labels.csv", b"vision,texture,hue\na.jpg,ridged,red\nb.jpg,,blue\n"),
    "manifest": ("manifest.json", b""),
}


def fuzzed(ground: Ground, seconds: float) -> Outcome:
    """Mutated CSV, JSON and manifest files for some time: every one is read or refused, none ends in a traceback."""
    rng, runs, crashes = random.Random(ground.seed), 0, Counter[str]()
    in_memory = Path("/dev/shm")  # thousands of files a second are no work for a disk
    held = tempfile.TemporaryDirectory(prefix="tvl-align-", dir=in_memory if in_memory.is_dir() else ground.root)
    work = Path(held.name)
    (work / "ssvtp").mkdir()
    (work / "hct/data1").mkdir(parents=True)
    shutil.copytree(ground.store, work / "store")
    valid = {what: content for what, (_, content) in READERS.items()}
    valid["manifest"] = (work / "store/manifest.json").read_bytes()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        what = rng.choice(list(READERS))
        place = work / ("store/manifest.json" if what == "manifest" else READERS[what][0])
        place.write_bytes(mutated(valid[what], rng))
        try:
            _read(what, work, place)
        except UserError:
            pass
        except Exception as error:
            crashes[f"{what}: {type(error).__name__}: {error}"[:120]] += 1
        runs += 1
    held.cleanup()
    lost = "; ".join(f"{what} ({n})" for what, n in crashes.most_common(3))
    return Outcome(f"mutated files for {seconds:.0f} s", runs, f"{crashes.total()} crashes", lost)


NASTY = (
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b",", b"\r\n", b"{", b"["),
    *(b"null", b"-1", b"1e999", b"../", b"/"),
)


def _read(what: str, work: Path, place: Path) -> None:
    anything = Tolerance(max_skipped=1.0)
    match what:
        case "CSV of rows":
            read_tvl(work, ["ssvtp"], tolerance=anything)
        case "JSON of pairs":
            read_tvl(work, ["hct"], tolerance=anything)
        case "synonyms":
            read_synonyms(place)
        case "labels":
            read_labels(place)
        case "manifest":
            FeatureStore(place.parent)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few random edits: bytes changed, dropped, doubled, and things that break readers put in."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if data:
                data[at % len(data)] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randint(1, 12)]
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 40)]
            case 3:
                data[at:at] = rng.choice(NASTY) * rng.choice((1, 1, 1, 300))
            case _:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
    return bytes(data)


def campaign(ground: Ground, kills: int, fuzz: float) -> Iterator[Callable[[], Outcome]]:
    """Every fault, as often as a campaign makes it."""
    import bad_inputs

    yield lambda: killed_training(ground, kills)
    yield lambda: killed_encode(ground, max(2, kills // 5))
    yield lambda: told_to_end(ground, max(2, kills // 5))
    yield lambda: full_disk(ground)
    yield lambda: dead_rank(ground, 2, 0, within=30)
    yield lambda: dead_rank(ground, 4, 0, within=30)
    yield lambda: dead_rank(ground, 2, 1)
    yield lambda: races(ground, max(2, kills // 5))
    yield lambda: without(ground, "locks")
    yield lambda: without(ground, "maps")
    yield lambda: small_shared_memory(ground)
    yield lambda: dead_loader(ground)
    yield lambda: bad_inputs.all_of_them(ground.root, ground.checkpoint)
    yield lambda: strangers(ground)
    yield lambda: gone_bad(ground)
    yield lambda: reproducible(ground)
    yield lambda: fuzzed(ground, fuzz)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="how often a training is killed; other faults in proportion")
    parser.add_argument("--fuzz", type=float, default=600, help="seconds of mutated files")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tvl-align-faults-") as folder:
        ground = Ground.prepare(Path(folder), given.seed)
        outcomes = [fault() for fault in tqdm(list(campaign(ground, given.kills, given.fuzz)), desc="faults", disable=None)]
    table = Table(title="faults", title_justify="left")
    for column in ("fault", "times", "outcome", "lost"):
        table.add_column(column, justify="right" if column == "times" else "left")
    for o in outcomes:
        table.add_row(o.fault, str(o.times), o.outcome, o.lost or "nothing")
    Console(width=160).print(table)
    sys.exit(1 if any(o.lost for o in outcomes) else 0)


if __name__ == "__main__":
    main()
