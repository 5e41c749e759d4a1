"""Comparison of several runs: one HTML page and the same tables as Markdown, averaged over seeds.

Only runs with the same feature store and the same test split can be compared.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvl_align.data.transforms import preview
from tvl_align.data.tvl import Row
from tvl_align.evaluation.probes import normalised_score
from tvl_align.report.page import as_url, fill_template, is_synthetic, number, read_metrics, score_text
from tvl_align.system.console import UserError

MAIN = "tactile_vision"
SUMMARY = ("shared_retention", "unique_retention", "unique_leak", "shared_leak")


def load_results(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Read results.json of every run. Raises UserError if one is missing or the runs are not comparable."""
    if len({run.resolve() for run in runs}) < 2:
        raise UserError("a comparison needs at least two different runs; give compare their folders.")
    results = []
    for run in runs:
        path = run / "results.json"
        if not path.is_file():
            raise UserError(f"{run} has no results.json; run tvl-align evaluate {run} first.")
        results.append(json.loads(path.read_text(encoding="utf-8")) | {"folder": str(run)})
    first = results[0]
    for other in results[1:]:
        for what, a, b in (
            ("feature stores", first["run"]["store"], other["run"]["store"]),
            ("splits", first["run"]["rows"], other["run"]["rows"]),
            ("sets of test rows", first["gallery"], other["gallery"]),
            ("label columns", _label_columns(first), _label_columns(other)),
        ):
            if a != b:
                raise UserError(
                    f"{first['folder']} and {other['folder']} were made on different {what} ({a} and {b}); "
                    "compare only runs of the same data, Stage 1 and data options."
                )
    return results


def _label_columns(results: Mapping[str, Any]) -> str:
    """The factors of every modality, as text."""
    return ", ".join(f"{m}: {f}" for m, table in sorted(results["factors"].items()) for f in sorted(table))


def main_pair(results: Mapping[str, Any]) -> str:
    """The pair that methods are ranked by: tactile-vision if it was evaluated, else the first one."""
    return MAIN if MAIN in results["retrieval"] else next(iter(results["retrieval"]))


def by_method(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group runs by method, sorted by the Acc@1 of the main pair, best first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(f"{result['method']} v{result['version']}", []).append(result)
    pair = main_pair(results[0])
    order = sorted(groups, key=lambda m: -np.mean([r["retrieval"][pair]["acc1"] for r in groups[m]]))
    return {name: groups[name] for name in order}


def leaderboard(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Column names and text cells: mean ± standard deviation over the seeds of each method."""
    some = next(iter(groups.values()))[0]
    columns = ["method", "seeds", *(f"{pair.replace('_', '-')} Acc@1" for pair in some["retrieval"])]
    columns += [name.replace("_", " ") for name in SUMMARY if name in some.get("summary", {})]
    columns += ["Acc@1 with 1 register (% of all)"]
    rows = []
    for method, runs in groups.items():
        cells = [method, ", ".join(str(r["seed"]) for r in runs)]
        cells += [_spread([r["retrieval"][pair]["acc1"] for r in runs]) for pair in some["retrieval"]]
        cells += [_score_spread([r["summary"][name] for r in runs]) for name in SUMMARY if name in some.get("summary", {})]
        cells.append(_spread([100 * r["prefix"][0]["acc1"] / max(r["prefix"][-1]["acc1"], 1e-9) for r in runs]))
        rows.append(cells)
    stage1 = ["Stage 1, frozen", "", *(number(n["stage1_acc1"]) for n in some["retrieval"].values())]
    chance = ["chance", "", *(f"{n['chance1']:.2f}" for n in some["retrieval"].values())]
    return columns, [*rows, *(row + [""] * (len(columns) - len(row)) for row in (stage1, chance))]


def _spread(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation as text; values of None are left out."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    return f"{np.mean(known):.1f}" + (f" ± {np.std(known, ddof=1):.1f}" if len(known) > 1 else "")


def _score_spread(scores: Sequence[float | None]) -> str:
    """As `_spread`, for normalised scores, which are NaN if the ceiling is not above chance."""
    undefined = any(score is not None and math.isnan(score) for score in scores)
    return score_text(math.nan) if undefined else _spread(scores)


def mean_factors(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The factor results, averaged over runs."""
    first = runs[0]["factors"]
    return {
        m: {
            f: {
                k: v if k == "ownership" else float(np.mean([r["factors"][m][f][k] for r in runs])) for k, v in entry.items()
            }
            for f, entry in table.items()
        }
        for m, table in first.items()
    }


def write_comparison(runs: Sequence[Path], out: Path, command: str) -> Path:
    """Write report.html (self-contained) and report.md into `out`; returns the path of the page.

    command: the command line shown on the page. Raises UserError if the runs are not comparable.
    """
    from tvl_align.report import plots

    results = load_results(runs)
    groups = by_method(results)
    columns, rows = leaderboard(groups)
    root = Path(results[0]["root"])
    figures = {"score": as_url(plots.methods_against_k({m: [r["prefix"] for r in rs] for m, rs in groups.items()}))}
    figures["curves"] = as_url(
        plots.methods_curves(
            {m: [read_metrics(Path(r["folder"])) for r in rs] for m, rs in groups.items()}, main_pair(results[0])
        )
    )
    if results[0]["factors"]:
        figures["heat"] = as_url(plots.methods_heat_map({m: mean_factors(rs) for m, rs in groups.items()}))
    confusions = {m: _confusion(root, rs[0]["confusions"]) for m, rs in groups.items()}
    commands = [(r["method"], r["seed"], r["folder"], r["run"]["command"], r["run"]["commit"]) for r in results]
    facts = {
        "columns": columns,
        "rows": rows,
        "synthetic": is_synthetic(root),
        "gallery": results[0]["gallery"],
        "store": results[0]["run"]["store"],
        "commands": commands,
        "command": command,
    }
    out.mkdir(parents=True, exist_ok=True)
    page = fill_template("compare.html", **facts, **figures, confusions=confusions)
    (out / "report.html").write_text(page, encoding="utf-8")
    (out / "report.md").write_text(_markdown(facts, groups), encoding="utf-8")
    return out / "report.html"


def _confusion(root: Path, confusions: Sequence[Mapping[str, Any]]) -> str | None:
    """Figure of retrieval errors: touch image, its photo, the retrieved photo. None without image files."""
    strip = []
    for entry in confusions:
        query, wrong = Row(**entry["query"]), Row(**entry["found"])
        if all((root / path).is_file() for row in (query, wrong) for path in (row.vision or "", row.tactile or "")):
            photo, touch = preview(root, query)
            strip.append((touch, photo, preview(root, wrong)[0]))
    from tvl_align.report import plots

    return as_url(plots.confusion(strip)) if strip else None


def _markdown(facts: Mapping[str, Any], groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The tables of the page as Markdown."""

    def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in [columns, *rows]]
        return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])

    from tvl_align.report import plots

    kind = "Synthetic data. " if facts["synthetic"] else ""
    parts = [f"{kind}Retrieval over {facts['gallery']} test rows, feature store {facts['store']}; in percent."]
    parts.append(table(facts["columns"], facts["rows"]))
    for method, runs in groups.items():
        factors = mean_factors(runs)
        rows = [
            [
                f"{m}: {f}",
                ", ".join(e["ownership"]),
                *(score_text(normalised_score(e[g], e["chance"], e["stage1"])) for g in plots.GROUPS),
            ]
            for m, entries in factors.items()
            for f, e in entries.items()
        ]
        if rows:
            head = ["factor", "owners", *(g.replace("_", " ") for g in plots.GROUPS)]
            parts.append(f"{method}: normalised scores (0 = chance, 100 = Stage 1)\n\n{table(head, rows)}")
        prefixes = [
            [
                str(p["k"]),
                _spread([r["prefix"][i]["acc1"] for r in runs]),
                _score_spread([r["prefix"][i]["shared_retention"] for r in runs]),
                _spread([r["prefix"][i]["reconstruction"] for r in runs]),
            ]
            for i, p in enumerate(runs[0]["prefix"])
        ]
        head = ["registers kept", "mean Acc@1", "shared retention", "reconstruction error"]
        parts.append(f"{method}: prefixes of registers\n\n{table(head, prefixes)}")
    parts.append("\n".join(f"- {m}, seed {s}, {c[:12]}: `{command}`" for m, s, _, command, c in facts["commands"]))
    return "\n\n".join([*parts, f"Command of this report: `{facts['command']}`"]) + "\n"
