"""Properties on made-up input: samplers, settings, manifests. Texts, splits and prefixes have theirs beside their tests."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tvl_align.config import from_plain, parse, to_plain
from tvl_align.features.inputs import DataConfig
from tvl_align.features.store import FeatureStore
from tvl_align.system.console import UserError
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.sampling import epoch_batches, epoch_views, shard_batches
from tvl_align.training.settings import RunConfig

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(rows=st.integers(0, 300), joined=st.integers(1, 64), processes=st.integers(1, 7))
def test_shares_hold_every_row_once_in_order(rows: int, joined: int, processes: int) -> None:
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tvl_align.training.sampling.world_size", lambda: processes)
        for rank in range(processes):
            patch.setattr("tvl_align.training.sampling.rank", lambda rank=rank: rank)
            parts.append(shard_batches(torch.arange(rows), joined))
    assert len({part.shape for part in parts}) == 1
    together = torch.cat(parts, dim=1)
    assert together[together >= 0].tolist() == list(range(rows))
    assert all(int((batch >= 0).sum()) <= joined for batch in together)


@given(
    rows=st.integers(1, 200), batch=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 9), last=st.booleans()
)
def test_an_epoch_is_a_permutation(rows: int, batch: int, seed: int, epoch: int, last: bool) -> None:
    if last and rows < batch:
        with pytest.raises(UserError, match="fewer than one batch"):
            epoch_batches(rows, batch, seed, epoch, drop_last=last)
        return
    drawn = epoch_batches(rows, batch, seed, epoch, drop_last=last)
    real = drawn[drawn >= 0]
    assert len(set(real.tolist())) == len(real) == (rows // batch * batch if last else rows)
    views = epoch_views(len(drawn), batch, 3, seed, epoch)
    assert views.shape == drawn.shape
    assert ((views >= 0) & (views <= 3)).all()


VALUES = {
    "bool": st.booleans(),
    "int": st.integers(0, 10**9),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "str": st.text(max_size=20),
}


@pytest.mark.parametrize("cls", [OptimConfig, RunConfig])
@given(data=st.data())
def test_settings_survive_json(cls: type, data: st.DataObject) -> None:
    simple = {f.name: VALUES[str(f.type)] for f in fields(cls) if str(f.type) in VALUES}
    made = cls(**{name: data.draw(values, label=name) for name, values in simple.items()})
    again = from_plain(cls, json.loads(json.dumps(to_plain(made))))
    assert to_plain(again) == to_plain(made)


@given(words=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_strange_flags_end_with_a_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Either settings or exit code 2 (0 for --help): never another exception."""
    code: object = 0
    try:
        parse(DataConfig, [f"--{word}" for word in words])
    except SystemExit as end:
        code = end.code
    except UserError:
        code = 2
    capsys.readouterr()
    assert code in (0, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = {m: np.random.default_rng(0).normal(size=(30, 2, 4)) for m in ("left", "right")}
    return FeatureStore.from_arrays(rows, tmp_path_factory.mktemp("fuzz") / "store").folder


@given(path=st.lists(st.integers(0, 3), min_size=1, max_size=4), value=JSON)
def test_a_manifest_of_anything_is_read_or_refused(store: Path, path: list[int], value: Any) -> None:
    """One entry, however deep, is replaced by anything JSON can say."""
    manifest = json.loads((store / "manifest.json").read_text())
    place: Any = manifest
    for step in path[:-1]:
        inner = list(place.values()) if isinstance(place, dict) else place
        if not isinstance(inner, list) or not inner or not isinstance(inner[step % len(inner)], (dict, list)):
            break
        place = inner[step % len(inner)]
    if isinstance(place, dict) and place:
        place[list(place)[path[-1] % len(place)]] = value
    elif isinstance(place, list) and place:
        place[path[-1] % len(place)] = value
    torn = store.with_name("torn")
    shutil.rmtree(torn, ignore_errors=True)
    shutil.copytree(store, torn)
    (torn / "manifest.json").write_text(json.dumps(manifest))
    try:
        for split in FeatureStore(torn).splits.values():
            split.read(torch.arange(len(split)))
    except UserError:
        pass
