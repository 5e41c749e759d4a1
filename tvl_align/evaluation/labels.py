"""Label files: the factors that probes predict."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tvl_align.system.console import UserError


@dataclass(frozen=True)
class Labels:
    """Labels of the rows of a data folder.

    levels: {factor: level names}. values: {row name: {factor: level index}}. ownership: {factor: modalities that contain
    it}, empty if unknown.
    """

    levels: dict[str, list[str]]
    values: dict[str, dict[str, int]]
    ownership: dict[str, tuple[str, ...]]

    def of(self, factor: str, names: Sequence[str]) -> np.ndarray:
        """(M,) int64 level of every named row; -1 if it has no label."""
        return np.array([self.values.get(name, {}).get(factor, -1) for name in names], dtype=np.int64)


def read_labels(path: Path) -> Labels:
    """Read a CSV with a row-name column (`vision` or `row`) and one column per factor.

    A .json file with the same stem holds the owners: {"factors": {name: {"ownership": [modality, ...]}}}. Raises UserError
    for missing or malformed files.
    """
    if not path.is_file():
        raise UserError(f"no such label file: {path}; --labels takes a CSV with a vision column and one column per factor.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or ())
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a UTF-8 CSV file ({error}); save it as UTF-8.") from error
    key = next((c for c in ("vision", "row") if c in header), None)
    columns = [c for c in header if c not in ("split", key)]
    if key is None or not columns:
        raise UserError(f"{path} needs a vision column (or row) and a column per factor; add what is missing to {header}.")
    for row in rows:
        if None in row or None in row.values():
            raise UserError(f"{path} has a row with more or fewer cells than columns ({row[key]!r}); correct that row.")
    levels = {c: sorted({row[c] for row in rows if row[c]}) for c in columns}
    index = {c: {name: i for i, name in enumerate(names)} for c, names in levels.items()}
    values = {row[key]: {c: index[c][row[c]] for c in columns if row[c]} for row in rows}
    legend_path = path.with_suffix(".json")
    if legend_path.is_file():
        try:
            legend = json.loads(legend_path.read_text(encoding="utf-8")).get("factors", {})
            return Labels(levels, values, {c: tuple(legend[c]["ownership"]) if c in legend else () for c in columns})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            expected = "{factors: {name: {ownership: [...]}}}"
            raise UserError(f"{legend_path} is malformed ({error!r}); it must contain {expected}.") from error
    return Labels(levels, values, {c: () for c in columns})
