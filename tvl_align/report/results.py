"""What a report reads from a run folder: results.json and metrics.jsonl."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvl_align.config import from_plain
from tvl_align.data import tvl
from tvl_align.data.image_options import ImageOptions
from tvl_align.system.console import UserError


def read_results(run: Path) -> dict[str, Any]:
    """The content of results.json. Raises UserError if it is missing, damaged or from an older version."""
    path = run / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{run} has no results.json; run tvl-align evaluate {run} first.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged; run tvl-align evaluate {run} again.") from error
    if not isinstance(results, dict) or "label_free" not in results:
        raise UserError(f"{path} is from an older version; run tvl-align evaluate {run} again.")
    return results


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run folder, one dict per epoch, from metrics.jsonl. Raises UserError if it is missing or damaged."""
    path = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise UserError(f"{run} has no metrics.jsonl, which training writes; give the whole run folder.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged; give the whole run folder, as training wrote it.") from error


def is_synthetic(results: Mapping[str, Any]) -> bool:
    """True for results on the data folder of a synthetic world."""
    return tvl.is_synthetic(Path(results["root"]))


def image_options(results: Mapping[str, Any]) -> ImageOptions | None:
    """The transforms of the run's images; None for imported features and for runs of earlier versions."""
    images = results["run"].get("features", {}).get("images")
    return from_plain(ImageOptions, images) if images else None
