"""Complementary codes that are trained again, beside the overlapping codes of a trained run of the base.

`python -m benchmarks.second_phase RUN` takes the overlapping half of the run as it is and trains the other half from its
closed form, with the same options but those given here. In the base both halves learn at once, so critics and decoder
follow a shared code that moves. This shows what that costs. It is no method: it needs a run that is trained already, and
its decoder sees all registers in training, so errors of shorter prefixes mean nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from tvl_align.config import parse
from tvl_align.contract import Features, FeatureSpec, Implementation, Method
from tvl_align.evaluation.measure import EvaluateConfig, measure
from tvl_align.methods.base import BaseLoss, Stage2Config, TVLStage2, model_options
from tvl_align.synthetic.demo import timed
from tvl_align.system.bounds import at_least
from tvl_align.system.checkpoint import load_checkpoint
from tvl_align.system.console import UserError, reports_errors
from tvl_align.training.engine import fit
from tvl_align.training.run import load_run

EXAMPLES = ("python -m benchmarks.second_phase demo/runs/base", "python -m benchmarks.second_phase RUN --split val")
LEARNT = ("own_stack", "readers", "comp_narrow", "comp_linear", "decoders", "critics")  # parts that are trained again


@dataclass(frozen=True)
class SecondPhaseModelConfig(Stage2Config):
    """The registers and their loss."""

    first: str = ""
    """Run folder that the overlapping half is taken from."""


class SecondPhase(TVLStage2):
    """The base, of which only the complementary half has gradients. The other half is that of the run `knobs.first`."""

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: SecondPhaseModelConfig) -> None:
        super().__init__(specs, **model_options(knobs))
        for name, part in self.named_children():
            part.requires_grad_(name in LEARNT)
        for p in (self.registers, self.logit_scale):
            p.requires_grad_(False)
        state: dict[str, Any] = load_checkpoint(Path(knobs.first) / "checkpoint.pth")["model"]
        bases = ("codes.over", "codes.comp", "widen", *LEARNT)
        self.load_state_dict({k: x for k, x in state.items() if not k.startswith(bases)}, strict=False)
        if not self.knobs.num_cross_attn_layers:
            self.readers.requires_grad_(False)

    def calibrate(self, batches: Callable[[], Iterable[Features]]) -> None:
        """The principal components are those of the first run: fitted anew they may turn by rounding."""
        self.start_complementary(batches)

    def train(self, mode: bool = True) -> "SecondPhase":
        """Without dropout before the trunk, which does not learn."""
        super().train(mode)
        self.trunk.eval()
        return self


SECOND_PHASE = Method(
    Implementation("second_phase", "1.0", "SECOND PHASE"), SecondPhaseModelConfig, lambda k, s: SecondPhase(s, k), BaseLoss
)


@dataclass(frozen=True)
class SecondPhaseConfig:
    """Train the complementary half of a run of base again, beside its overlapping half, and evaluate it."""

    run: tyro.conf.Positional[Path]
    """Run folder of base."""
    complementary_units: int = 12
    """Units of a complementary token."""
    levels: int = 3
    """Levels of a unit, an odd number."""
    independence_weight: float = 0.03
    """Weight of what critics tell of the other modalities."""
    split: Literal["test", "val"] = "test"
    """Split to evaluate. Use val to choose settings."""

    def __post_init__(self) -> None:
        at_least(1, self, "complementary_units")


def second_phase(config: SecondPhaseConfig) -> Path:
    """Train and evaluate; returns the run folder, next to that of the run. Raises UserError for a run of another method."""
    settings, method, _ = load_run(config.run)
    if type(settings.knobs) is not Stage2Config:
        raise UserError(f"{config.run} is a run of {method.implementation.experiment_id}; give a run of base.")
    own = {name: getattr(config, name) for name in ("complementary_units", "levels", "independence_weight")}
    first = str(config.run.resolve())
    knobs = SecondPhaseModelConfig(**vars(settings.knobs) | own | {"first": first, "nested_dropout_rate": 0.0})
    name = "-".join([config.run.resolve().name, "again", *(f"{value:g}" for value in own.values())])
    run = replace(settings.run, log_name=name, output_dir=Path(first).parent, method="benchmarks.second_phase:SECOND_PHASE")
    settings = replace(settings, knobs=knobs, run=run)
    timed(f"{settings.folder}", lambda: fit(settings, SECOND_PHASE))
    timed(f"{config.split} split", lambda: measure(EvaluateConfig(settings.folder, split=config.split)))
    return settings.folder


@reports_errors
def main() -> None:
    """Entry point of `python -m benchmarks.second_phase`."""
    second_phase(parse(SecondPhaseConfig, prog="python -m benchmarks.second_phase", examples=EXAMPLES))


if __name__ == "__main__":
    main()
