"""docs/explore.ipynb: it runs on a small demo, and prints what the run is."""

import json
import re
import shutil
from pathlib import Path

import processes
import pytest
from test_documented_blocks import BIN, ROOT, Once, prepared

NOTEBOOK = ROOT / "docs" / "explore.ipynb"


def test_it_is_committed_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 4
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.mark.slow
def test_it_runs_on_a_small_demo(tmp_path: Path, once: Once) -> None:
    prepared(ROOT / "docs" / "use.md", tmp_path / "reader", once)
    (tmp_path / "reader" / "docs").mkdir()
    copy = Path(shutil.copy(NOTEBOOK, tmp_path / "reader" / "docs"))
    environment = processes.quiet({"PYTHONWARNINGS": "ignore", "JUPYTER_PREFER_ENV_PATH": "1"})
    code, said = processes.run([BIN / "jupyter-execute", "--inplace", copy.name], cwd=copy.parent, env=environment)
    assert code == 0, said
    cells = [cell for cell in json.loads(copy.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    printed = ["".join("".join(out.get("text", "")) for out in cell["outputs"]) for cell in cells]
    assert "4 registers of vision, tactile, text" in printed[0]
    assert "tactile: overlapping (40, 3, 256), complementary (40, 1, 256)" in printed[1]
    rank = re.search(r"the photo of the same sample is number (\d+) of 40", printed[2])
    assert rank is not None
    assert 1 <= int(rank[1]) <= 40
    found = re.findall(r"first (\d): touch finds ([\d.]+)% of the photos \(chance 2.5%\)", printed[3])
    assert [number for number, _ in found] == ["1", "2", "3"]
    assert all(0 <= float(share) <= 100 for _, share in found)
    figures = [sum("image/png" in out.get("data", {}) for out in cell["outputs"]) for cell in cells]
    assert figures == [0, 0, 1, 0, 1, 1]
