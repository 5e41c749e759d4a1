"""Runs of the base that a benchmark trains again in another way, next to the run."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tvl_align.contract import Method
from tvl_align.evaluation.measure import EvaluateConfig, measure
from tvl_align.methods.base import Stage2Config
from tvl_align.synthetic.demo import timed
from tvl_align.system.console import UserError
from tvl_align.training.engine import fit
from tvl_align.training.run import load_run
from tvl_align.training.settings import Settings


def load_base(run: Path) -> tuple[Settings[Any], Mapping[str, Any]]:
    """The settings and the config.json of a run of base. Raises UserError for a run of another method."""
    settings, method, recorded = load_run(run)
    if type(settings.knobs) is not Stage2Config:
        raise UserError(f"{run} is a run of {method.implementation.experiment_id}; give a run of base.")
    return settings, recorded


def train_next_to(
    run: Path,
    suffix: str,
    settings: Settings[Any],
    knobs: Stage2Config,
    name: str,
    method: Method,
    split: Literal["test", "val"],
) -> Path:
    """Train a method and evaluate it; returns its run folder, that of `run` with -suffix.

    settings: of the run; knobs: options of the method. name: package.module:NAME that loads the method.
    """
    place = run.resolve()
    own = replace(settings.run, log_name=f"{place.name}-{suffix}", output_dir=place.parent, method=name)
    settings = replace(settings, knobs=knobs, run=own)
    timed(f"{settings.folder}", lambda: fit(settings, method))
    timed(f"{split} split", lambda: measure(EvaluateConfig(settings.folder, split=split)))
    return settings.folder
