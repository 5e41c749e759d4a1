"""Comparison of several runs: one HTML page and the same tables as Markdown.

Runs of one method with other options are methods of their own. Runs of the same feature store are compared directly. Runs of
several stores (worlds, or seeds of the data) are compared if they have the same pairs, factors and number of test rows:
methods are averaged over stores and seeds, and differences are taken between runs of the same store and seed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tvl_align.evaluation.explore_file import NAME, Exploration
from tvl_align.evaluation.scores import t_interval
from tvl_align.report.page import as_urls, fill_template, pictures_of
from tvl_align.report.pictures import sheet
from tvl_align.report.results import is_synthetic, read_metrics, read_results
from tvl_align.report.tables import (
    GROUPS,
    LEAKS,
    Cells,
    HeatTable,
    Shaded,
    both_groups,
    leak,
    mean_known,
    number,
    plain,
    scale_of,
    score,
    score_text,
    shaded,
    with_owners,
)
from tvl_align.system.console import UserError

MAIN = "tactile_vision"
SUMMARY = ("shared_retention", "unique_retention", "joint_unique_retention", "unique_leak", "shared_leak")
SHUFFLED = ", shuffled pairs"
ERRORS, SIDE = 8, 112  # retrieval errors that are shown of a method, and pixels of a side of their pictures
Results = Mapping[str, Any]
Groups = Mapping[str, Sequence[Results]]


def load_results(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Read results.json of every run. Raises UserError if one is missing or the runs are not comparable."""
    if len({run.resolve() for run in runs}) < 2:
        raise UserError("a comparison needs at least two different runs; give compare their folders.")
    results = [read_results(run) | {"folder": str(run)} for run in runs]
    for other in results[1:]:
        store = other["run"]["store"]
        same = next(r for r in results if r["run"]["store"] == store)
        for first, what, of in (
            (results[0], "pairs", lambda r: ", ".join(sorted(r["retrieval"]))),
            (results[0], "label columns", _label_columns),
            (results[0], "sets of test rows", lambda r: r["gallery"]),
            (same, "splits", lambda r: r["run"]["rows"]),
            (same, "probe rows", lambda r: r["probe_rows"]),
        ):
            a, b = of(first), of(other)
            if a != b:
                raise UserError(
                    f"{first['folder']} and {other['folder']} were made on different {what} ({a} and {b}); "
                    "compare only runs of the same data, Stage 1 and data options, or of worlds of one kind."
                )
    return results


def _label_columns(results: Results) -> str:
    """The factors of every modality, as text; with those that had too few rows for a probe."""
    tables = (results["factors"], results.get("left_out", {}))
    return ", ".join(sorted({f"{m}: {f}" for table in tables for m, factors in table.items() for f in factors}))


def main_pair(results: Results) -> str:
    """The pair that methods are ranked by: tactile-vision if it was evaluated, else the first one."""
    return MAIN if MAIN in results["retrieval"] else next(iter(results["retrieval"]))


def method_name(results: Results, first: Results | None = None) -> str:
    """Name and version of the method, and the options that differ from those of its first run.

    A run that was trained on shuffled pairs is a method of its own.
    """
    shuffled = results["run"].get("settings", {}).get("data", {}).get("shuffle_pairs", False)
    own, reference = _options(results), _options(results if first is None else first)
    changed = [_flag(name, value) for name, value in own.items() if value != reference.get(name)]
    return f"{results['method']} v{results['version']}" + "".join(f" {c}" for c in changed) + (SHUFFLED if shuffled else "")


def _options(results: Results) -> dict[str, Any]:
    """The options of the method and of the optimisation."""
    settings = results["run"].get("settings", {})
    return {**settings.get("knobs", {}), **settings.get("optim", {})}


def _flag(name: str, value: Any) -> str:
    return f"--{name} {value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no_{name}"


def by_method(results: Sequence[Results]) -> dict[str, list[Results]]:
    """Group runs by method and options, sorted by the Acc@1 of the main pair, best first; shuffled pairs come last."""
    groups: dict[str, list[Results]] = {}
    first: dict[tuple[str, str], Results] = {}
    for result in results:
        reference = first.setdefault((result["method"], result["version"]), result)
        groups.setdefault(method_name(result, reference), []).append(result)
    pair = main_pair(results[0])
    accuracy = {m: mean_known([r["retrieval"][pair]["acc1"] for r in rs]) or 0.0 for m, rs in groups.items()}
    order = sorted(groups, key=lambda m: (m.endswith(SHUFFLED), -accuracy[m]))
    return {name: groups[name] for name in order}


@dataclass(frozen=True)
class Metric:
    """A column of the comparison: how it is read from results, and whether more is better."""

    title: str
    read: Callable[[Results], float | None]
    more: bool = True
    digits: int = 1


def metrics(groups: Groups) -> list[Metric]:
    """The columns of these runs: Acc@1 of every pair, retention and leak, leak without labels, Acc@1 with one register."""
    runs = [r for rs in groups.values() for r in rs]
    found = [Metric(f"{pair.replace('_', '-')} Acc@1", partial(_acc1, pair)) for pair in runs[0]["retrieval"]]
    found += [
        Metric(plain(name), partial(_summary, name, "score"), not name.endswith("leak"))
        for name in SUMMARY
        if any(name in r.get("summary", {}) for r in runs)
    ]
    found += [Metric(f"{name} (R2)", partial(_leak, name), False, 2) for name in LEAKS]
    return [*found, Metric("Acc@1 with 1 register (% of all)", _first_register), Metric("training, s", _seconds, False, 0)]


def _acc1(pair: str, results: Results) -> float | None:
    return results["retrieval"][pair]["acc1"]


def _summary(name: str, column: str, results: Results) -> float | None:
    return results.get("summary", {}).get(name, {}).get(column)


def _leak(name: str, results: Results) -> float | None:
    return leak(results, name)


def _seconds(results: Results) -> float | None:
    """Seconds of training, on the machine of the run, without validation; None if they were not kept."""
    path = Path(results["folder"]) / "times.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return sum(json.loads(line)["train"] for line in lines) if lines else None


def _first_register(results: Results) -> float | None:
    first, last = results["prefix"][0]["acc1"], results["prefix"][-1]["acc1"]
    return None if first is None or not last else 100 * first / last


@dataclass(frozen=True)
class Leaderboard:
    """columns and rows of cells; bold: (row, column) of methods that are better than all others.

    differences: rows of the paired differences to the best method of each metric, under the same columns as the metrics.
    """

    columns: list[str]
    rows: Cells
    bold: frozenset[tuple[int, int]]
    differences: Cells


def leaderboard(groups: Groups) -> Leaderboard:
    """Mean ± standard deviation over the runs of each method, then the floors: Stage 1, untrained, oracle and chance."""
    some, columns = next(iter(groups.values()))[0], metrics(groups)
    rows = [
        [m, str(len({r["run"]["store"] for r in rs})), ", ".join(map(str, sorted({r["seed"] for r in rs})))]
        + [_spread([c.read(r) for r in rs], c.digits) for c in columns]
        for m, rs in groups.items()
    ]
    differences, bold = [[m] for m in groups], set()
    for at, metric in enumerate(columns):
        cells, best = _against_best(groups, metric)
        for row, cell in zip(differences, cells, strict=True):
            row.append(cell)
        if best is not None:
            bold.add((best, at + 3))
    everything = [r for rs in groups.values() for r in rs]
    for name, column in (("Stage 1, frozen", "stage1_acc1"), ("oracle", "oracle_acc1"), ("chance", "chance1")):
        accuracy = [mean_known([r["retrieval"][p][column] for r in everything]) for p in some["retrieval"]]
        cells = ["" if a is None else number(a, 2 if name == "chance" else 1) for a in accuracy]
        rows.append([name, "", "", *cells, *[""] * (len(columns) - len(cells))])
    real = [r for m, rs in groups.items() if not m.endswith(SHUFFLED) for r in rs] or everything
    untrained = [mean_known([r["retrieval"][p]["untrained_acc1"] for r in real]) for p in some["retrieval"]]
    for metric in columns[len(untrained) :]:
        names = [name for name in SUMMARY if plain(name) == metric.title]
        untrained.append(mean_known([_summary(names[0], "untrained", r) for r in real]) if names else None)
    cells = ["" if value is None else number(value) for value in untrained]
    rows.insert(len(groups) + 1, ["untrained, mean of methods", "", "", *cells])
    return Leaderboard(["method", "stores", "seeds", *(c.title for c in columns)], rows, frozenset(bold), differences)


def _against_best(groups: Groups, metric: Metric) -> tuple[list[str], int | None]:
    """Difference of every method to the best one, as text, and the index of the best if all others differ from it.

    The best method is never one that was trained on shuffled pairs, which are a control. A difference is the mean over the
    stores, each the mean over the seeds that both methods have, with a 95% t interval over stores: "none" if it contains 0.
    Runs of one store are not independent, so with one store there is no interval and nothing is better. A dash: no common
    store and seed.
    """
    values = {m: _paired(rs, metric) for m, rs in groups.items()}
    ranked = [m for m, found in values.items() if found and not m.endswith(SHUFFLED)]
    if not ranked:
        return ["-"] * len(groups), None
    best = (max if metric.more else min)(ranked, key=lambda m: float(np.mean(list(values[m].values()))))
    cells, differ = [], len(ranked) > 1
    for name, found in values.items():
        by_store: dict[str, list[float]] = {}
        for store, seed in sorted(found.keys() & values[best].keys()):
            by_store.setdefault(store, []).append(found[store, seed] - values[best][store, seed])
        pairs = [float(np.mean(of_store)) for of_store in by_store.values()]
        cell = "best" if name == best else f"{np.mean(pairs):+z.{metric.digits}f}" if pairs else "-"
        beyond = False
        if name != best and len(pairs) > 1:
            low, high = t_interval(pairs)
            beyond = not low <= 0 <= high
            cell = f"{cell} [{low:+.{metric.digits}f}, {high:+.{metric.digits}f}]" if beyond else "none"
        differ &= name == best or name not in ranked or beyond
        cells.append(cell)
    return cells, list(groups).index(best) if differ else None


def _paired(runs: Sequence[Results], metric: Metric) -> dict[tuple[str, int], float]:
    """{(store, seed): value}, averaged over runs with the same; without runs that lack the value."""
    found: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        value = metric.read(run)
        if value is not None:
            found.setdefault((run["run"]["store"], run["seed"]), []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def incomplete(groups: Groups) -> list[str]:
    """The methods that lack a (store, seed) which another one has; their means are over fewer worlds or seeds."""
    keys = {m: {(r["run"]["store"], r["seed"]) for r in rs} for m, rs in groups.items()}
    return [m for m, found in keys.items() if found != set().union(*keys.values())]


def _spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean ± standard deviation as text; values of None are left out."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    return f"{np.mean(known):z.{digits}f}" + (f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else "")


def readers(groups: Groups) -> tuple[list[str], Cells]:
    """What other readings say: each summary row of a method by linear probes, fewer rows, in bits, and without training."""
    columns = ["method", "score", "strongest probe", "linear", "half the rows", "untrained", "usable bits (%)"]
    rows = [
        [
            m,
            plain(name),
            *(_spread([_summary(name, c, r) for r in rs]) for c in ("score", "linear", "half", "untrained", "bits")),
        ]
        for m, rs in groups.items()
        for name in SUMMARY
        if any(name in r.get("summary", {}) for r in rs)
    ]
    return columns, rows


def mean_factors(runs: Sequence[Results]) -> dict[str, dict[str, Any]]:
    """{"modality: factor": {"ownership", group: score}}, averaged over runs.

    A score is None if a run has a ceiling at chance or left the factor out.
    """
    names = {(m, f): e["ownership"] for r in runs for m, table in r["factors"].items() for f, e in table.items()}
    found: dict[str, dict[str, Any]] = {}
    for (m, f), owners in names.items():
        found[f"{m}: {f}"] = {"ownership": owners}
        for group in GROUPS:
            scores = [score(r["factors"][m][f], group) if f in r["factors"].get(m, {}) else None for r in runs]
            found[f"{m}: {f}"][group] = None if None in scores else mean_known(scores)
    return found


def write_comparison(runs: Sequence[Path], out: Path, command: str, images: Path | None = None) -> Path:
    """Write report.html (self-contained) and report.md into `out`; returns the path of the page.

    command: the command line shown on the page. images: data folder of the images that are shown; default: the recorded one.
    Raises UserError if the runs are not comparable.
    """
    from tvl_align.report import plots

    results = load_results(runs)
    groups = by_method(results)
    factors = _with_all({m: mean_factors(rs) for m, rs in groups.items()})
    prefixes = {m: [r["prefix"] for r in rs] for m, rs in groups.items()}
    trained = {m: [read_metrics(Path(r["folder"])) for r in rs] for m, rs in groups.items()}
    errors = {m: retrieval_errors(rs[0], images) for m, rs in groups.items()}
    shown = {
        "prefixes": as_urls(plots.methods_against_k(prefixes)),
        "curves": as_urls(plots.methods_curves(trained, main_pair(results[0]))),
        "heat": heat_of_methods(factors) if any(factors.values()) else None,
        "errors": as_urls({m: strip for m, strip in errors.items() if strip}, "jpeg"),
    }
    facts = {
        "board": leaderboard(groups),
        "readers": readers(groups),
        "synthetic": all(map(is_synthetic, results)),
        "gallery": results[0]["gallery"],
        "stores": sorted({r["run"]["store"] for r in results}),
        "incomplete": incomplete(groups),
        "commands": [(m, r["seed"], r["run"]["command"], r["run"]["commit"]) for m, rs in groups.items() for r in rs],
        "command": command,
    }
    out.mkdir(parents=True, exist_ok=True)
    page = fill_template("compare.html", **facts, **shown)
    (out / "report.html").write_text(page, encoding="utf-8")
    (out / "report.md").write_text(_markdown(facts, groups, factors), encoding="utf-8")
    return out / "report.html"


def _with_all(factors: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The same factors for every method, without scores where a method has none."""
    names = {
        f: {"ownership": e["ownership"]} | dict.fromkeys(GROUPS) for table in factors.values() for f, e in table.items()
    }
    return {m: {f: table.get(f, empty) for f, empty in names.items()} for m, table in factors.items()}


def heat_of_methods(factors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> HeatTable:
    """Retention and leak by the strongest probe, of every factor and method. factors: {method: `mean_factors`}."""
    some = next(iter(factors.values()))
    rows: list[tuple[str, list[Shaded] | None]] = []
    for name, entry in some.items():
        cells = [
            shaded(of_method[name][group], scale_of(entry, group))
            for of_method in factors.values()
            for group in both_groups(entry)
        ]
        rows.append((with_owners(name, entry), cells if any(cell.text for cell in cells) else None))
    heads, gaps = [(method, 2) for method in factors], frozenset(range(2, 2 * len(factors), 2))
    return HeatTable("factor", heads, ["retention", "leak"] * len(factors), rows, gaps)


def retrieval_errors(results: Results, images: Path | None = None) -> bytes | None:
    """The first touch images whose nearest photo is a wrong one, by all registers of a run, as a JPEG of ERRORS columns:
    touch image, its photo, the photo that is found. None without errors, pictures or an explore.npz. results: those of
    `load_results`. images: data folder of the pictures; default: the recorded one."""
    run = Path(results["folder"])
    if not (run / NAME).is_file():
        return None
    found = Exploration.load(run)
    pictures, names = pictures_of(found, results, images), found.modalities.tolist()
    if not {"tactile", "vision"} <= set(pictures.modalities):
        return None
    d = found.directions.tolist().index([names.index("tactile"), names.index("vision")])
    nearest, right = found.finds[-1, d, :, 0], found.right[-1, d, :, 0]
    queries = np.flatnonzero((nearest >= 0) & ~right)[:ERRORS]
    if not len(queries):
        return None
    lines = (("tactile", queries), ("vision", queries), ("vision", nearest[queries]))
    return sheet([pictures.picture(m, row) for m, rows in lines for row in rows], SIDE, len(queries))


def _markdown(facts: Mapping[str, Any], groups: Groups, factors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The tables of the page as Markdown."""

    def table(columns: Sequence[str], rows: Cells) -> str:
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in [columns, *rows]]
        return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])

    kind, board = "Synthetic data. " if facts["synthetic"] else "", facts["board"]
    stores = ", ".join(facts["stores"])
    parts = [f"{kind}Retrieval over {facts['gallery']} test rows, feature store {stores}; in percent, R2 from 0 to 1."]
    rows = [[f"**{c}**" if (i, j) in board.bold else c for j, c in enumerate(row)] for i, row in enumerate(board.rows)]
    parts.append(table(board.columns, rows))
    if facts["incomplete"]:
        parts.append(f"Without some of the stores or seeds: {'; '.join(facts['incomplete'])}.")
    text = 'Differences to the best method, with 95% t intervals over several stores; "none": the interval contains 0'
    parts.append(f"{text}\n\n{table(['method', *board.columns[3:]], board.differences)}")
    if facts["readers"][1]:
        parts.append(f"Retention and leak by other readings\n\n{table(*facts['readers'])}")
    for method, runs in groups.items():
        rows = [
            [name, ", ".join(e["ownership"]), *(score_text(e[group]) for group in GROUPS)]
            for name, e in factors[method].items()
        ]
        if rows:
            head = ["factor", "owners", *map(plain, GROUPS)]
            parts.append(f"{method}: normalised scores (0 = chance, 100 = ceiling)\n\n{table(head, rows)}")
        found = [{p["k"]: p for p in r["prefix"]} for r in runs]
        columns = ("acc1", "added", "shared_retention", "shared_bits", "reconstruction")
        rows = [
            [str(k), *(_spread([f[k].get(column) for f in found]) for column in columns)]
            for k in sorted(set(found[0]).intersection(*found))
        ]
        head = [
            "registers kept",
            "mean Acc@1",
            "added",
            "shared retention",
            "usable bits of shared factors",
            "reconstruction error",
        ]
        parts.append(f"{method}: prefixes of registers\n\n{table(head, rows)}")
    parts.append("\n".join(f"- {m}, seed {s}, {c[:12]}: `{command}`" for m, s, command, c in facts["commands"]))
    return "\n\n".join([*parts, f"Command of this report: `{facts['command']}`"]) + "\n"
