"""An encode of a source in two processes, as torchrun starts them."""

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import spawn
from same_stores import assert_same

from tvl_align.cli.encode import run
from tvl_align.features import parts
from tvl_align.features.store import FeatureStore

ROWS, BLOCK = 40, 8
KEYS = {"vision": "photo", "tactile": "touch", "sentence": "what", "split": "split"}
FLAGS = [*(f"--{k}_key={v}" for k, v in KEYS.items()), "--label_keys=force", "--device=cpu"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photo of row 38 is that of row 2, which another process encodes."""
    folder, draw = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    lines = ["photo,touch,what,split,force"]
    for i in range(ROWS):
        for kind in ("p", "t"):
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{kind}{i}.png")
        side = ("train", "val", "test", "train")[i % 4]
        lines.append(f"p{i}.png,t{i}.png,A piece of {('felt', 'steel')[i % 2]}.,{side},{i / 8}")
    shutil.copy(folder / "p2.png", folder / "p38.png")
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return folder / "t.csv"


def encode_in_group(rank: int, port: int, done: Path, flags: list[str]) -> None:
    """One of two processes, which notes the parts that it writes."""
    torch.set_num_threads(1)
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} | places
    write_part = parts.write_part

    def noted(*arguments: object) -> None:
        write_part(*arguments)
        with (done / f"rank-{rank}").open("a") as file:
            file.write(f"{Path(str(arguments[2])).name} ")

    parts.write_part = noted
    run(flags)


@pytest.mark.slow
def test_two_processes_take_turns_and_make_the_store_of_one(table: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    flags = [f"--source=pairs:{table}", f"--stage1_checkpoint={stage1_checkpoint}", *FLAGS]
    run([*flags, f"--out={tmp_path / 'one'}"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(encode_in_group, (port, tmp_path, [*flags, f"--out={tmp_path / 'two'}", f"--block_rows={BLOCK}"]), 2)
    assert (tmp_path / "rank-0").read_text().split() == ["000000", "000002", "000004"]
    assert (tmp_path / "rank-1").read_text().split() == ["000001", "000003"]
    assert_same(FeatureStore(tmp_path / "two"), FeatureStore(tmp_path / "one"))
