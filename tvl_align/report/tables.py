"""The tables of one results.json as text cells, for the terminal and for pages."""

from collections.abc import Mapping, Sequence
from typing import Any

from tvl_align.evaluation.scores import mean_leak, normalised_score

Cells = list[list[str]]
CEILING = "stage1"  # the group of the frozen features
GROUPS = ("overlapping", "complementary", "untrained_overlapping", "untrained_complementary")
LEAKS = ("shared from complementary", "unique from overlapping")  # what is read without labels
RETRIEVAL_COLUMNS = ("pair", "Acc@1", "Acc@5", "Stage 1", "untrained", "oracle", "chance")
SUMMARY_COLUMNS = ("score", "strongest probe", "linear", "half rows", "untrained", "usable bits")
FACTOR_COLUMNS = ("factor", "owners", "chance", "ceiling", "overlapping", "complementary")
BITS_COLUMNS = ("factor", "entropy", "ceiling", "overlapping", "complementary")
LEAK_COLUMNS = ("modality", "read", "linear", "mlp", "strongest")


def number(value: float | None, digits: int = 1) -> str:
    """A number as text; None is a dash."""
    return "-" if value is None else f"{value:z.{digits}f}"


def with_interval(value: float | None, low: float | None, high: float | None, digits: int = 1) -> str:
    """A number with its 95% interval as text: "12.3 [10.1, 14.0]"; None is a dash."""
    if value is None or low is None or high is None:
        return number(value, digits)
    return f"{value:z.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"


def score_text(score: float | None) -> str:
    """A normalised score as text; None if the ceiling is at chance."""
    return "ceiling at chance" if score is None else f"{score:z.0f}"


def plain(name: str) -> str:
    """A name of results.json as words."""
    return name.replace("_", " ")


def score(entry: Mapping[str, Any], group: str, kind: str | None = None) -> float | None:
    """Normalised score of a factor in a group, by its strongest probe or the given kind; None: ceiling at chance, unread."""
    if not entry["readable"] or group not in entry["accuracy"]:
        return None
    read, ceiling = entry["accuracy"][group], max(entry["accuracy"][CEILING].values())
    return normalised_score(read[kind] if kind else max(read.values()), entry["chance"], ceiling)


def retrieval_rows(results: Mapping[str, Any]) -> Cells:
    """Cells under RETRIEVAL_COLUMNS, in percent; the columns after Acc@5 are Acc@1 too."""
    return [
        [
            pair.replace("_", "-"),
            with_interval(n["acc1"], n["low"], n["high"]),
            number(n["acc5"]),
            number(n["stage1_acc1"]),
            number(n["untrained_acc1"]),
            number(n["oracle_acc1"]),
            number(n["chance1"], 2),
        ]
        for pair, n in results["retrieval"].items()
    ]


def summary_rows(results: Mapping[str, Any]) -> Cells:
    """Cells under SUMMARY_COLUMNS: normalised scores, and usable bits in percent of the ceiling."""
    return [
        [
            plain(name),
            with_interval(s["score"], s["low"], s["high"], 0),
            *(number(s.get(column), 0) for column in ("linear", "half", "untrained", "bits")),
        ]
        for name, s in results.get("summary", {}).items()
    ]


def leak(results: Mapping[str, Any], name: str) -> float | None:
    """R2 of the strongest probe without labels, mean over modalities; None if nothing could be read."""
    return mean_leak(results["label_free"], name)


def leak_rows(results: Mapping[str, Any]) -> Cells:
    """Cells under LEAK_COLUMNS: R2 of what is read without labels, for every modality."""
    return [
        [modality, name, number(read["linear"], 2), number(read["mlp"], 2), number(max(read.values()), 2)]
        for modality, entry in results["label_free"].items()
        for name, read in entry.items()
    ]


def entries(factors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, Mapping[str, Any]]]:
    """[("modality: factor", its results)]."""
    return [(f"{m}: {f}", entry) for m, table in factors.items() for f, entry in table.items()]


def factor_rows(results: Mapping[str, Any]) -> Cells:
    """Cells under FACTOR_COLUMNS: accuracies in percent, those of groups as "linear / strongest probe"."""
    rows = []
    for name, e in entries(results["factors"]):
        read, kind = max((accuracy, kind) for kind, accuracy in e["accuracy"][CEILING].items())
        ceiling = f"{read:.1f} ({kind})" if e["readable"] else f"{read:.1f} (at chance)"
        cells = [f"{e['accuracy'][g]['linear']:.1f} / {max(e['accuracy'][g].values()):.1f}" for g in GROUPS[:2]]
        rows.append([name, ", ".join(e["ownership"]), f"{e['chance']:.1f}", ceiling, *cells])
    return rows


def bits_rows(results: Mapping[str, Any]) -> Cells:
    """Cells under BITS_COLUMNS: bits, those of the ceiling and of groups by their strongest probe."""
    return [
        [name, f"{e['entropy']:.2f}", *(f"{max(e['bits'][g].values()):z.2f}" for g in (CEILING, *GROUPS[:2]))]
        for name, e in entries(results["factors"])
    ]


def unreadable(results: Mapping[str, Any]) -> list[str]:
    """The factors with a ceiling at chance."""
    return [name for name, entry in entries(results["factors"]) if not entry["readable"]]


def left_out(results: Mapping[str, Any]) -> list[str]:
    """The factors that no probe was fitted to, each with the reason."""
    return [f"{m}: {f} ({why})" for m, table in results.get("left_out", {}).items() for f, why in table.items()]


def probe_rows(results: Mapping[str, Any]) -> str:
    """Which rows the probes were fitted on, as part of a sentence."""
    split, rows = results["probe_rows"]["split"], results["probe_rows"]["rows"]
    reason = "set aside from training" if split == "probe" else "on which checkpoints and settings may have been chosen"
    return f"{rows} {'rows' if split == 'probe' else split + ' rows'} {reason}"


def mean_known(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
