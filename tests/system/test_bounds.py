"""Numbers in options that are out of range are refused in one sentence, which names the value and the remedy."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tvl_align.encoders.tvl import Stage1Config
from tvl_align.evaluation.measure import EvaluateConfig
from tvl_align.features.inputs import DataConfig
from tvl_align.methods.registry import METHODS
from tvl_align.synthetic.contest import ContestConfig
from tvl_align.synthetic.demo import DemoConfig
from tvl_align.synthetic.pretrain import PretrainConfig
from tvl_align.system.console import UserError
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings


def pretrain(**changes: Any) -> PretrainConfig:
    return PretrainConfig(Path("w"), Path("s"), **changes)


def evaluate(**changes: Any) -> EvaluateConfig:
    return EvaluateConfig(Path("run"), **changes)


KNOBS = {name: method.knobs for name, method in METHODS.items()}
OUT_OF_RANGE: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    *((OptimConfig, {name: bad}) for name in ("batch_size", "epochs", "accum_iter") for bad in (0, -1)),
    *((OptimConfig, {name: bad}) for name in ("lr", "blr", "min_lr", "weight_decay") for bad in (-1, math.nan, math.inf)),
    *((OptimConfig, {name: -1}) for name in ("warmup_epochs", "skip_nonfinite")),
    *((DataConfig, {name: -1}) for name in ("views", "keep_k_synonyms", "probe_rows", "num_workers")),
    *((DataConfig, {name: bad}) for name in ("percent_not_contact", "max_skipped") for bad in (-0.1, 1.5, math.nan)),
    (RunConfig, {"start_epoch": -1}),
    (evaluate, {"probe_steps": 0}),
    (evaluate, {"probe_rows": 3}),
    *((DemoConfig, {name: 0}) for name in ("epochs", "pretrain_epochs", "probe_steps", "probe_rows")),
    (DemoConfig, {"misregistration": 1.5}),
    *((ContestConfig, {name: 0}) for name in ("worlds", "jobs")),
    *((pretrain, {name: 0}) for name in ("epochs", "batch_size")),
    (pretrain, {"lr": -1.0}),
    *((k, {"nested_dropout_rate": 1.5}) for k in KNOBS.values()),
    *((k, {"drop_rate": 1.0}) for k in KNOBS.values()),
    *((k, {"preservation_weight": -1.0}) for k in KNOBS.values()),
    *((k, {"num_heads": 0}) for k in KNOBS.values()),
    *((k, {"register_token_dim": 0}) for k in KNOBS.values()),
    *((KNOBS[name], {"num_cross_attn_layers": 0}) for name in ("cursor", "flextok", "matryoshka", "disentangled")),
    *((KNOBS[name], {"units": 0}) for name in ("base", "closed", "mlp")),
    *((KNOBS["base"], {name: 0}) for name in ("block_width", "trunk_width", "num_keys")),
    (KNOBS["mlp"], {"hidden": 0}),
]


@pytest.mark.parametrize(("make", "change"), OUT_OF_RANGE, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_number_out_of_range_is_refused(make: Callable[..., Any], change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=rf"^--{name} {value} is out of range; give a number from "):
        make(**change)


def test_smallest_numbers_are_accepted() -> None:
    OptimConfig(batch_size=1, epochs=1, accum_iter=1, lr=0.0, warmup_epochs=0, weight_decay=0)
    DataConfig(views=0, probe_rows=0, num_workers=0, percent_not_contact=1.0, max_skipped=0.0)
    KNOBS["base"](num_cross_attn_layers=0, nested_dropout_rate=1.0, trunk_layers=0)
    assert KNOBS["flextok"]().nested_dropout_rate == 1


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "", "."])
def test_a_run_is_inside_its_output_folder(name: str) -> None:
    with pytest.raises(UserError, match="is no folder inside --output_dir; give a name without"):
        RunConfig(log_name=name)


def test_a_first_epoch_after_the_last_is_refused() -> None:
    settings = Settings, Stage1Config(None), KNOBS["base"](), DataConfig(store=Path("s"))
    with pytest.raises(UserError, match="--start_epoch 5 leaves nothing of --epochs 5; give a lower one"):
        settings[0](*settings[1:], OptimConfig(epochs=5), RunConfig(start_epoch=5))


def test_warmup_is_at_most_half_of_the_run() -> None:
    """With the default of 10 epochs a run of 3 would stop at 30% of the learning rate."""
    assert OptimConfig(epochs=3).warmup == 1.5
    assert OptimConfig(epochs=100).warmup == 10
    assert OptimConfig(epochs=10, warmup_epochs=5).warmup == 5
