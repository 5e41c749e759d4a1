"""The files of a store where the file system has no memory maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import MemoryMappedTensor, TensorDict

from tvl_align.features.store import FeatureStore
from tvl_align.system.console import UserError
from tvl_align.system.files import warn_once

TOKENS = np.random.default_rng(0).normal(size=(40, 2, 3)).astype(np.float32)


def refused(*_: object, **__: object) -> None:
    raise RuntimeError("unable to mmap 12 bytes from file <x>: No such device (19)")


def test_without_maps_a_store_is_read_into_memory_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mapped = FeatureStore.from_arrays({"a": TOKENS, "b": -TOKENS}, tmp_path / "s").splits["train"]
    rows = torch.arange(len(mapped))
    expected = mapped.read(rows)
    monkeypatch.setattr(MemoryMappedTensor, "from_filename", refused)
    warn_once.cache_clear()
    split = FeatureStore(tmp_path / "s").splits["train"]
    for _ in range(2):  # reading releases the pages of maps, which would empty plain memory
        for batch in split.batches([rows], [torch.zeros_like(rows)], torch.device("cpu")):
            for name, tokens in expected.modalities.items():
                assert torch.equal(batch.modalities[name].tokens, tokens.tokens)
                assert torch.equal(batch.modalities[name].pooled, tokens.pooled)
                assert torch.equal(batch.modalities[name].present, tokens.present)
            assert torch.equal(batch.caption_keys, expected.caption_keys)
    assert split.names[3] == mapped.names[3]
    lines = [line for line in caplog.messages if "without memory maps" in line]
    assert len(lines) == 1


def test_without_maps_writing_a_store_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorDict, "memmap", refused)
    with pytest.raises(UserError, match=r"s is on a file system without memory maps.*--feature_dir.*local disk"):
        FeatureStore.from_arrays({"a": TOKENS, "b": -TOKENS}, tmp_path / "s")


def test_other_errors_are_not_taken_for_missing_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TensorDict, "memmap", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        FeatureStore.from_arrays({"a": TOKENS, "b": -TOKENS}, tmp_path / "s")
