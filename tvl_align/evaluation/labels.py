"""Label files: the factors that probes predict."""

import csv
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tvl_align.data.text import is_absent
from tvl_align.system.console import UserError

QUANTILES = 5  # levels of a real-valued factor, equally frequent
NAMED = "named"  # column of the factors that a caption really names
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """Labels of the rows of a data folder.

    levels: {factor: level names}. values: {row name: {factor: level index}}. ownership: {factor: modalities that contain
    it}, empty if unknown. numbers: {factor: {row name: value}} of real-valued factors, whose levels are quantiles.
    text_factors: the factors that captions name; captions of equal levels have equal meaning. named: {row name: the factors
    that its caption names}.
    """

    levels: dict[str, list[str]]
    values: dict[str, dict[str, int]]
    ownership: dict[str, tuple[str, ...]]
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    text_factors: tuple[str, ...] = ()
    named: dict[str, frozenset[str]] = field(default_factory=dict)

    def of(self, factor: str, names: Sequence[str]) -> np.ndarray:
        """(M,) int64 level of every named row; -1 if it has no label."""
        return np.array([self.values.get(name, {}).get(factor, -1) for name in names], dtype=np.int64)

    def told(self, modality: str, factors: Sequence[str], names: Sequence[str]) -> np.ndarray:
        """(M, f) int64 levels of the factors in a modality of the rows; -1: no label, or the caption does not name it."""
        levels = np.stack([self.of(f, names) for f in factors], axis=1)
        if modality == "text" and self.named:
            told = [
                [f not in self.text_factors or f in self.named.get(n, frozenset(factors)) for f in factors] for n in names
            ]
            levels = np.where(np.array(told), levels, -1)
        return levels


def read_labels(path: Path, table: tuple[list[str], list[dict[str, str]]] | None = None) -> Labels:
    """Read a CSV with a row-name column (`vision` or `row`) and one column per factor.

    A .json file with the same stem may hold {"factors": {name: {"ownership": [modality, ...], "kind": "number", "levels":
    [level, ...]}}, "text_factors": [name, ...]}; the kind marks real-valued factors. A column `named` lists the factors that
    the caption names. A cell that is empty or says "no value", such as "nan" or "None", is no label, unless `levels` lists
    the word. table: the header and the rows, where they are not those of the file, such as the labels of a table of pairs.
    Raises UserError for missing or malformed files, and for a row that has two different labels.
    """
    header, rows = table or _read_csv(path)
    twice = next((c for c in header if header.count(c) > 1), None)
    if twice is not None:
        raise UserError(f"{path} has {header.count(twice)} columns named {twice!r}; keep one of them.")
    key = next((c for c in ("vision", "row") if c in header), None)
    columns = [c for c in header if c not in ("split", key, NAMED)]
    if key is None or not columns:
        raise UserError(f"{path} needs a vision column (or row) and a column per factor; add what is missing to {header}.")
    for row in rows:
        if None in row or None in row.values():
            raise UserError(f"{path} has a row with more or fewer cells than columns ({row[key]!r}); correct that row.")
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if lines.setdefault(row[key], row) != row:
            raise UserError(f"{path} has two different lines for {row[key]!r}; keep one of them.")
    rows = list(lines.values())
    legend = _read_legend(path.with_suffix(".json"), columns)
    for c in columns:
        _blank(path, rows, c, legend["levels"][c])
    numbers = {c: _numbers(path, c, {r[key]: r[c] for r in rows if r[c]}) for c in columns if legend["kinds"][c] == "number"}
    levels = {c: sorted({row[c] for row in rows if row[c]}) for c in columns if c not in numbers}
    values: dict[str, dict[str, int]] = {row[key]: {} for row in rows}
    for c in columns:
        if c in numbers:
            edges = np.quantile(list(numbers[c].values()) or [0.0], np.linspace(0, 1, QUANTILES + 1)[1:-1])
            levels[c] = [f"quantile {i + 1}" for i in range(QUANTILES)]
            for name, number in numbers[c].items():
                values[name][c] = int(np.searchsorted(edges, number))
        else:
            index = {name: i for i, name in enumerate(levels[c])}
            for row in rows:
                if row[c]:
                    values[row[key]][c] = index[row[c]]
    levels = {c: levels[c] for c in columns}
    named = {row[key]: frozenset(row[NAMED].split()) for row in rows} if NAMED in header else {}
    text_factors = tuple(f for f in legend["text_factors"] if f in levels)
    return Labels(levels, values, legend["ownership"], numbers, text_factors, named)


def _blank(path: Path, rows: Sequence[dict[str, str]], column: str, levels: Sequence[str]) -> None:
    """Empty the cells of a column that say "no value" in a word that is not one of its levels."""
    words: Counter[str] = Counter()
    for row in rows:
        if is_absent(row[column]) and row[column] not in levels:
            words[row[column].strip()] += 1
            row[column] = ""
    for word, count in words.items():
        if word:
            text = "%s: %d cells of %s are %r, which is no label; list it in `levels` of %s if it is one"
            log.warning(text, path, count, column, word, path.with_suffix(".json").name)


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    if not path.is_file():
        raise UserError(f"no such label file: {path}; --labels takes a CSV with a vision column and one column per factor.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a UTF-8 CSV file ({error}); save it as UTF-8.") from error


def _read_legend(path: Path, columns: Sequence[str]) -> Mapping[str, Any]:
    """Ownership, kinds, levels and text factors of the columns; empty where the file says nothing."""
    factors: dict[str, Any] = {}
    text_factors: list[str] = []
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            factors, text_factors = content.get("factors", {}), [str(f) for f in content.get("text_factors", [])]
            ownership = {c: tuple(map(str, factors[c]["ownership"])) if c in factors else () for c in columns}
            kinds = {c: factors[c].get("kind", "") if c in factors else "" for c in columns}
            levels = {c: [str(x) for x in factors[c].get("levels", [])] if c in factors else [] for c in columns}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            expected = "{factors: {name: {ownership: [...]}}}"
            raise UserError(f"{path} is malformed ({error!r}); it must contain {expected}.") from error
        return {"ownership": ownership, "kinds": kinds, "levels": levels, "text_factors": text_factors}
    empty: dict[str, Any] = {"ownership": (), "kinds": "", "levels": []}
    return {what: dict.fromkeys(columns, nothing) for what, nothing in empty.items()} | {"text_factors": []}


def _numbers(path: Path, column: str, cells: Mapping[str, str]) -> dict[str, float]:
    try:
        numbers = {name: float(cell) for name, cell in cells.items()}
    except ValueError as error:
        raise UserError(f"{path}: the column {column} is marked as number, but {error}; correct that cell.") from error
    bad = [name for name, number in numbers.items() if not np.isfinite(number)]
    if bad:
        raise UserError(f"{path}: {column} of {bad[0]} is not finite; leave the cell empty if it is unknown.")
    return numbers
