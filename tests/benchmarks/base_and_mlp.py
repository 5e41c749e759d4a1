"""A run of the base and one of another method, on random arrays."""

from collections.abc import Callable
from pathlib import Path

from test_away import arrays

from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features.arrays import Arrays
from tvl_align.features.inputs import DataConfig
from tvl_align.features.store import FeatureStore
from tvl_align.methods.registry import METHODS
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings


def train_base_and_mlp(folder: Path, reader: Callable[[Path, int], Arrays] = arrays) -> Path:
    """Train "base" for 2 epochs and "mlp" for 1 on what `reader` makes; returns the folder of both runs."""
    FeatureStore.from_arrays(reader(folder, 0), folder / "store")
    for name, epochs in (("base", 2), ("mlp", 1)):
        optim = OptimConfig(batch_size=32, epochs=epochs, warmup_epochs=0, lr=4e-3)
        knobs = METHODS[name].knobs(register_token_dim=64)
        data, run = DataConfig(store=folder / "store"), RunConfig(folder / "runs", name, device="cpu", method=name)
        fit(Settings(Stage1Config(None), knobs, data, optim, run), METHODS[name])
    return folder / "runs"
