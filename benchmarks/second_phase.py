"""Complementary codes that are trained again, beside the overlapping codes of a trained run of the base.

`python -m benchmarks.second_phase RUN` takes the overlapping half of the run as it is and trains the other half from its
closed form, with the same options but those given here. In the base both halves learn at once, so critics and decoder
follow a shared code that moves. This shows what that costs. It is no method: it needs a run that is trained already, and
its decoder sees all registers in training, so errors of shorter prefixes mean nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.base_runs import load_base, train_next_to
from tvl_align.config import parse
from tvl_align.contract import Features, FeatureSpec, Implementation, Method
from tvl_align.methods.base import BaseLoss, Stage2Config, TVLStage2, model_options
from tvl_align.system.bounds import at_least
from tvl_align.system.checkpoint import load_checkpoint
from tvl_align.system.console import reports_errors

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
    settings, _ = load_base(config.run)
    own = {name: getattr(config, name) for name in ("complementary_units", "levels", "independence_weight")}
    first = {"first": str(config.run.resolve()), "nested_dropout_rate": 0.0}
    knobs = SecondPhaseModelConfig(**vars(settings.knobs) | own | first)
    suffix, name = "-".join(["again", *(f"{value:g}" for value in own.values())]), "benchmarks.second_phase:SECOND_PHASE"
    return train_next_to(config.run, suffix, settings, knobs, name, SECOND_PHASE, config.split)


@reports_errors
def main() -> None:
    """Entry point of `python -m benchmarks.second_phase`."""
    second_phase(parse(SecondPhaseConfig, prog="python -m benchmarks.second_phase", examples=EXAMPLES))


if __name__ == "__main__":
    main()
