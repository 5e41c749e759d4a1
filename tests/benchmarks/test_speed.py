"""The bench runs and writes its figures; their values are not checked."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import speed
from benchmarks.jobs import products_at_once
from benchmarks.speed import BenchConfig, MatrixProducts, bench
from tvl_align.system.console import UserError

pytestmark = pytest.mark.slow


def test_figures_are_written_with_their_reference(tmp_path: Path) -> None:
    sizes = {"batch": 8, "width": 64, "gallery": 64, "large_gallery": 64, "rows": 2000, "pictures": 8, "turns": 1}
    parts = ("startup", "step", "engine", "accumulation", "retrieval", "probes", "memory")
    figures = bench(BenchConfig(tmp_path / "bench.json", parts=parts, **sizes))
    *records, metadata = json.loads((tmp_path / "bench.json").read_text())
    assert len(records) == len(figures) == 27
    assert all({"name", "ours", "reference", "ratio", "unit"} == f.keys() for f in records)
    assert "commit" in metadata["made_by"]
    with pytest.raises(UserError, match="unknown part 'speed'"):
        bench(BenchConfig(tmp_path / "bench.json", parts=("speed",)))


def test_encoding_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the small encoders only; ViT-L-14 takes minutes."""
    monkeypatch.setattr(speed, "SIZES", speed.SIZES[:1])
    sizes = {"batch": 8, "width": 192, "pictures": 2, "turns": 1}
    figures = bench(BenchConfig(tmp_path / "bench.json", parts=("encode", "store"), **sizes))
    assert ["small Stage 1" in f.name and f.ours > 0 for f in figures] == [True] * 4


def test_search_is_measured(tmp_path: Path) -> None:
    """Clustering needs faiss, which `dev` includes."""
    exact, memory, clustering, approximate, recall = bench(
        BenchConfig(tmp_path / "bench.json", parts=("search",), search_rows=20_000, turns=1)
    )
    assert min(exact.ours, exact.reference, clustering.ours, approximate.ours) > 0
    assert memory.reference == 20_000 * 256 * 4 / 2**20 and memory.ours > 0
    assert recall.unit == "%" and 90 < recall.ours <= 100


def test_processes_that_multiply_start_together() -> None:
    assert all(products_at_once(processes, 8, 4, turns=2) > 0 for processes in (1, 2))


def test_matrix_products_of_forward_and_backward_are_recorded() -> None:
    layer, x = torch.nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)
    with MatrixProducts() as products:
        layer(x).sum().backward()
    assert sorted(tuple(a) + tuple(b) for a, b in products.shapes) == [(5, 7, 7, 3), (7, 3, 3, 5), (7, 5, 5, 3)]
    products.replay()()
