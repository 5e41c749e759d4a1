"""The tables of one results.json as text cells, for the terminal and for pages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tvl_align.evaluation.scores import mean_leak, normalised_score, strongest

Cells = list[list[str]]
CEILING = "stage1"  # the group of the frozen features
GROUPS = ("overlapping", "complementary", "untrained_overlapping", "untrained_complementary")
LEAKS = ("shared from complementary", "unique from overlapping")  # what is read without labels
ABOVE_CEILING = 102.0  # scores that a ceiling which is right does not allow
RETRIEVAL_COLUMNS = ("pair", "Acc@1", "Acc@5", "Stage 1", "untrained", "oracle", "chance")
SUMMARY_COLUMNS = ("score", "strongest probe", "linear", "half rows", "untrained", "usable bits")
FACTOR_COLUMNS = ("factor", "owners", "chance", "ceiling", "overlapping", "complementary")
BITS_COLUMNS = ("factor", "entropy", "ceiling", "overlapping", "complementary")
R2_COLUMNS = ("factor", "ceiling", "overlapping", "complementary")
PREFIX_COLUMNS = ("registers", "Acc@1", "added", "shared retention", "usable bits of shared factors", "reconstruction error")
LEAK_COLUMNS = ("modality", "read", "strongest probe", "linear", "mlp", "half rows")


def number(value: float | None, digits: int = 1) -> str:
    """A number as text; None is a dash."""
    return "-" if value is None else f"{value:z.{digits}f}"


def with_interval(value: float | None, low: float | None, high: float | None, digits: int = 1) -> str:
    """A number with its 95% interval as text: "12.3 [10.1, 14.0]"; None is a dash."""
    if value is None or low is None or high is None:
        return number(value, digits)
    return f"{value:z.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"


def _bounded(entry: Mapping[str, Any], name: str, digits: int = 0) -> str:
    """The number of an entry with its interval as text; without the interval where results of before have none."""
    return with_interval(entry.get(name), entry.get(f"{name}_low"), entry.get(f"{name}_high"), digits)


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


def direction_table(results: Mapping[str, Any]) -> tuple[list[str], Cells]:
    """Columns and rows: Acc@1 of every direction with its interval, also by data set, in percent; the columns after Acc@5
    are Acc@1 too."""
    datasets = sorted({n["dataset"] for n in results["directions"] if n["dataset"]})
    found: dict[tuple[str, str], dict[str | None, Mapping[str, Any]]] = {}
    for n in results["directions"]:
        found.setdefault((n["query"], n["gallery"]), {})[n["dataset"]] = n
    rows = []
    for (query, gallery), by_dataset in found.items():
        of_all = by_dataset[None]
        by_set = [by_dataset.get(d) for d in datasets]
        rows.append(
            [
                f"{query} → {gallery}",
                with_interval(of_all["acc1"], of_all["low"], of_all["high"]),
                number(of_all["acc5"]),
                number(of_all["stage1_acc1"]),
                number(of_all["chance1"], 2),
                *(f"{with_interval(n['acc1'], n['low'], n['high'])} ({n['rows']})" if n else "-" for n in by_set),
            ]
        )
    return ["query → finds", "Acc@1", "Acc@5", "Stage 1", "chance", *datasets], rows


def tvl_table(results: Mapping[str, Any]) -> tuple[list[str], Cells]:
    """Columns and rows: Acc@1 and Acc@5 under TVL's protocol at its thresholds, in percent, with those of Stage 1."""
    protocol = results["tvl_protocol"]
    rows = [
        [f"{pair.replace('_', '-')} Acc@{k}", *(f"{number(n[f'acc{k}'])} ({number(n[f'stage1_acc{k}'])})" for n in of_pair)]
        for pair, of_pair in protocol.items()
        for k in (1, 5)
    ]
    thresholds = [number(n["threshold"], 3) for n in next(iter(protocol.values()), [])]
    return ["threshold", *thresholds], rows


def summary_rows(results: Mapping[str, Any], bounded: bool = True) -> Cells:
    """Cells under SUMMARY_COLUMNS: normalised scores, and usable bits in percent of the ceiling; all with intervals, or, for
    80 columns, only the score."""
    others = ("linear", "half", "untrained", "bits")
    return [
        [
            plain(name),
            with_interval(s["score"], s["low"], s["high"], 0),
            *(_bounded(s, column) if bounded else number(s.get(column), 0) for column in others),
        ]
        for name, s in results.get("summary", {}).items()
    ]


def leak(results: Mapping[str, Any], name: str) -> float | None:
    """R2 of the strongest probe without labels, mean over modalities; None if nothing could be read."""
    return mean_leak(results["label_free"], name)


def leak_rows(results: Mapping[str, Any]) -> Cells:
    """Cells under LEAK_COLUMNS: R2 of what is read without labels, for every modality."""
    return [
        [
            modality,
            name,
            with_interval(strongest(read), read.get("low"), read.get("high"), 2),
            *(number(read.get(column), 2) for column in ("linear", "mlp", "half")),
        ]
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


def r2_rows(results: Mapping[str, Any]) -> Cells:
    """Cells under R2_COLUMNS: R2 of the factors that are numbers, by their strongest probe."""
    return [
        [name, *(f"{max(e['r2'][g].values()):z.2f}" for g in (CEILING, *GROUPS[:2]))]
        for name, e in entries(results["factors"])
        if e["r2"]
    ]


def unreadable(results: Mapping[str, Any]) -> list[str]:
    """The factors with a ceiling at chance."""
    return [name for name, entry in entries(results["factors"]) if not entry["readable"]]


def above_ceiling(results: Mapping[str, Any]) -> list[str]:
    """The factors that tokens tell better than the frozen features do, with their scores."""
    found = []
    for name, entry in entries(results["factors"]):
        most = max((score(entry, group) or 0.0 for group in GROUPS[:2]), default=0.0)
        if most > ABOVE_CEILING:
            found.append(f"{name} ({score_text(most)})")
    return found


def prefix_rows(results: Mapping[str, Any]) -> Cells:
    """Cells under PREFIX_COLUMNS, in percent: what the first k registers find, what the last of them adds to it, and what
    they hold and rebuild."""
    return [
        [
            str(p["k"]),
            with_interval(p["acc1"], p["low"], p["high"]),
            _bounded(p, "added", 1),
            *(_bounded(p, column, 1) for column in ("shared_retention", "shared_bits", "reconstruction")),
        ]
        for p in results["prefix"]
    ]


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


class Shaded(NamedTuple):
    """A cell of a heat table: its text, and the class of its colour, such as "leak-7"; see `shades`."""

    text: str
    shade: str


@dataclass(frozen=True)
class HeatTable:
    """A table of shaded numbers. heads: names above groups of columns, with their numbers of columns. rows: names and cells;
    None: the ceiling of the factor is at chance. gaps: columns that have space before them."""

    title: str
    heads: list[tuple[str, int]]
    columns: list[str]
    rows: list[tuple[str, list[Shaded] | None]]
    gaps: frozenset[int] = frozenset()


STEPS = 10  # of a colour scale
SCALES = {"retention": (8, 69, 126), "leak": (150, 52, 0), "share": (58, 58, 58)}  # the colours of 100


def shades() -> dict[str, list[tuple[str, str]]]:
    """{scale: (background, ink) of 0, 10, ... 100}: from white to the colour of the scale. The ink is black or white,
    whichever has the larger contrast, which is 4.5 or more."""
    found: dict[str, list[tuple[str, str]]] = {}
    for scale, colour in SCALES.items():
        for step in range(STEPS + 1):
            mixed = [round(250 + (c - 250) * step / STEPS) for c in colour]
            linear = [((x / 255 + 0.055) / 1.055) ** 2.4 for x in mixed]
            luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
            ink = "#000" if luminance > 0.18 else "#fff"
            found.setdefault(scale, []).append(("#{:02x}{:02x}{:02x}".format(*mixed), ink))
    return found


def shaded(value: float | None, scale: str) -> Shaded:
    """A normalised score as a cell, coloured by its scale; empty if the group was not read."""
    if value is None:
        return Shaded("", "")
    return Shaded(f"{value:z.0f}", f"{scale}-{round(STEPS * min(max(value, 0), 100) / 100)}")


def scale_of(entry: Mapping[str, Any], group: str) -> str:
    """What a score of a factor in overlapping or complementary tokens is: retention, leak, or, without owners, a share."""
    if not entry["ownership"]:
        return "share"
    return "retention" if (len(entry["ownership"]) > 1) == (group == "overlapping") else "leak"


def with_owners(name: str, entry: Mapping[str, Any]) -> str:
    """The name of a factor and whether it is shared or unique."""
    owners = len(entry["ownership"])
    return f"{name} ({'shared' if owners > 1 else 'unique'})" if owners else name


def both_groups(entry: Mapping[str, Any]) -> tuple[str, str]:
    """The group of tokens where a factor is retained, and the one where it leaks; without owners as they are."""
    return ("overlapping", "complementary") if scale_of(entry, "overlapping") != "leak" else ("complementary", "overlapping")


def score_table(factors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> HeatTable:
    """Retention and leak of every factor, by linear and by the strongest probes, and of the untrained model."""
    rows: list[tuple[str, list[Shaded] | None]] = []
    for name, entry in entries(factors):
        cells = [
            shaded(value, scale_of(entry, group))
            for group in both_groups(entry)
            for value in (score(entry, group, "linear"), score(entry, group), score(entry, f"untrained_{group}"))
        ]
        rows.append((with_owners(name, entry), cells if entry["readable"] else None))
    columns = ["linear", "strongest", "untrained"]
    return HeatTable("factor", [("retention", 3), ("leak", 3)], 2 * columns, rows, frozenset({3}))


def register_table(factors: Mapping[str, Mapping[str, Mapping[str, Any]]], overlapping: int) -> HeatTable | None:
    """What a linear probe reads of every factor from each register alone; None if no register was read alone."""
    read = {group for _, entry in entries(factors) for group in entry["accuracy"] if group.startswith("register_")}
    if not read:
        return None
    groups = [(f"register_{n + 1}", "overlapping" if n < overlapping else "complementary") for n in range(len(read))]
    rows = [
        (
            with_owners(name, entry),
            [shaded(score(entry, register), scale_of(entry, group)) for register, group in groups]
            if entry["readable"]
            else None,
        )
        for name, entry in entries(factors)
    ]
    heads = [("overlapping", overlapping), ("complementary", len(read) - overlapping)]
    columns = [f"register {n + 1}" for n in range(len(read))]
    return HeatTable("factor", [head for head in heads if head[1]], columns, rows, frozenset({overlapping}))
