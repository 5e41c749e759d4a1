"""Rows with the same picture under one or several names."""

import logging
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from tvl_align.data.image_options import ImageOptions
from tvl_align.data.samples import TextOptions, make_samples
from tvl_align.data.split import file_keys
from tvl_align.data.tvl import Row, TVLData


def folder(root: Path) -> TVLData:
    """Six training rows: row 1 is row 0 with another caption, row 2 has a copy of its photo. Test has that photo as well."""
    rows = [Row("ssvtp", f"v{i}", f"t{i}", None, f"word{i}", f"g{i}") for i in range(6)]
    rows[1] = replace(rows[0], caption="other")
    rows[4], rows[5] = replace(rows[4], tactile=None), replace(rows[5], tactile=None)
    for i in range(6):
        (root / f"v{i}").write_bytes(b"photo" + str(0 if i == 2 else i).encode())
        (root / f"t{i}").write_bytes(b"touch" + str(i).encode())
    (root / "v9").write_bytes(b"photo0")
    pictures = file_keys({path.name: path for path in root.iterdir()})
    test = [Row("ssvtp", "v9", None, None, "test", "g9")]
    return TVLData(root, rows, [replace(rows[3], vision="v1")], test, pictures=pictures)


def test_rows_with_the_same_picture_have_the_same_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = make_samples(folder(tmp_path), ImageOptions(64, 64), TextOptions(), 0)
    keys = samples["train"].content_keys
    equal = {m: [(i, j) for i, j in combinations(range(6), 2) if k[i] == k[j]] for m, k in keys.items()}
    assert equal == {"vision": [(0, 1), (0, 2), (1, 2)], "tactile": [(0, 1)]}  # absent ones differ
    assert samples["val"].content_keys == samples["test"].content_keys == {}
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "train: 2 rows repeat the vision of another row",
        "train: 1 rows repeat the tactile of another row",
        "4 rows have a picture that is on both sides of the test split",
    ]
