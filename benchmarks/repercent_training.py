"""RePercENT itself, on the rows that other methods see: `python -m benchmarks.repercent_training --data clones`.

Model, loss, views and settings are those of the clone: src/models/repercent.py and perceiver.py, `augment_data` of
src/utils/synthetic_dataset.py, and configs/{data,model,training}/*_<M>m.yaml. The clone's entry point trains two modalities
only and needs a service for logging, so the loop is this one: as there, Adam with a constant rate, and the weights of the
epoch with the lowest validation loss at fixed weights. It needs pyyaml (`pip install -e '.[benchmarks]'`).
"""

import copy
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.clones import file_of_clone, module_of_clone
from benchmarks.repercent import URL, Readings, arrays, distance, pair, report
from tvl_align.config import parse
from tvl_align.features.arrays import Arrays
from tvl_align.system.bounds import at_least, between
from tvl_align.system.console import UserError, progress, reports_errors
from tvl_align.training.optimisation import backward_and_step

EXAMPLES = ("python -m benchmarks.repercent_training --data clones --modalities 2",)
# Folder of settings: start of the file.
CONFIGS = {"data": "synthetic_data", "model": "repercent", "training": "train_synthetic"}
# Options of their loss.
WEIGHTS = ("alpha", "beta", "lmd", "lmd_start_value", "lmd_end_value", "lmd_n_iterations", "lmd_start_iteration")


@dataclass(frozen=True)
class TrainingConfig:
    """Train RePercENT's own model on the rows of the benchmark `repercent`, and write its distance to the ideal."""

    data: Path
    """Folder that holds the clone."""
    modalities: int = 3
    """All 3, or 2: the pair of the benchmark `repercent_pair`."""
    epochs: int = 150
    """Epochs. Its configs have 150 of 105,000 rows; here 14,000 are for training."""
    seed: int = 0
    """Seed of weights, order of rows and views. The rows are those of seed 0."""
    out: Path = Path("away/repercent_training.json")
    """File of the result."""

    def __post_init__(self) -> None:
        between(2, 3, self, "modalities")
        at_least(1, self, "epochs")


def train(config: TrainingConfig) -> Readings:
    """Train, and read the labels of test rows from the representations. Raises UserError for a missing clone or package."""
    root, count = config.data / "RePercENT", config.modalities
    drawn = arrays(config.data, 0) if count == 3 else pair(config.data, 0)
    splits = {name: _tokens(drawn, drawn.split == name) for name in ("train", "val", "test")}
    settings = {k: _settings(root / "configs" / k / f"{f}_{count}m.yaml") for k, f in CONFIGS.items()}
    with ExitStack() as stack:
        theirs = {
            name: stack.enter_context(module_of_clone(root / "src" / f"{name}.py", URL, config.seed, root))
            for name in ("models/perceiver", "models/repercent", "utils/synthetic_dataset")
        }
        model = _model(theirs, settings, count)
        weights = {key: settings["training"]["disen_loss"][key] for key in WEIGHTS}
        loss = theirs["models/repercent"].DisenLoss(**weights, M=count)
        augment = theirs["utils/synthetic_dataset"].GenerateData.augment_data
        _fit(model, loss, augment, splits, settings["training"], config)
    found = [_representations(model, splits[name]) for name in ("train", "test")]
    unique, shared = ({k: np.concatenate([f[g][k] for f in found]) for k in found[0][g]} for g in (0, 1))
    rows = np.concatenate([np.flatnonzero(drawn.split == name) for name in ("train", "test")])
    labels = {name: np.asarray(column)[rows] for name, column in drawn.labels.items()}
    fitted = np.asarray(drawn.split)[rows] == "train"
    return distance(unique, shared, labels, fitted, ~fitted)


def _settings(path: Path) -> dict[str, Any]:
    """The content of a file of settings. Raises UserError if it or pyyaml is missing."""
    try:
        import yaml
    except ImportError as error:
        raise UserError("the settings of RePercENT are YAML; install pyyaml: pip install -e '.[benchmarks]'.") from error
    content: dict[str, Any] = yaml.safe_load(file_of_clone(path, URL).read_text(encoding="utf-8"))
    return content


def _tokens(drawn: Arrays, rows: np.ndarray) -> list[Tensor]:
    """The chosen rows of all modalities, each (n, tokens, width)."""
    return [torch.from_numpy(np.asarray(x.tokens)[rows]).float() for x in drawn.modalities.values()]


def _model(theirs: Mapping[str, Any], settings: Mapping[str, Any], count: int) -> nn.Module:
    """Their model, built from their settings as their training builds it."""
    options, data = settings["model"]["perceiver"], settings["data"]["create_data"]
    width, module = options["latent_dim"], theirs["models/repercent"]
    encoders = []
    for length, channels in zip(data["ts"], options["input_channels"], strict=True):
        highest = math.ceil(length / 2)
        perceiver = theirs["models/perceiver"].Perceiver(
            depth=options["depth"],
            num_freq_bands=math.floor(math.log2(highest)) + 1,
            max_freq=highest,
            input_channels=channels,
            input_axis=options["input_axis"],
            num_latents=options["num_latents"],
            latent_dim=width,
            cross_heads=options["cross_heads"],
            latent_heads=options["latent_heads"],
            cross_dim_head=width // options["cross_heads"],
            latent_dim_head=width // options["latent_heads"],
            weight_tie_layers=options["weight_tie_layers"],
            fourier_encode_data=options["pos_encoding"],
            use_moeffn=options["use_moeffn"],
            use_slot_attn=True,
        )
        encoders.append(module.DisenEncoder(encoder_model=nn.Identity(), perceiver_model=perceiver))
    made: nn.Module = module.RePercENT(
        M=count, disenEncoder=encoders, disen_mapping=settings["model"]["repercent"]["disen_mapping"]
    )
    return made


def _fit(
    model: nn.Module,
    loss: nn.Module,
    augment: Any,
    splits: Mapping[str, list[Tensor]],
    settings: Mapping[str, Any],
    config: TrainingConfig,
) -> None:
    """Train; the model ends with the weights of the best epoch."""
    rate, size = settings["optimizer"]["lr"], settings["training"]["batch_size"]
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=settings["optimizer"]["weight_decay"])
    draw = torch.Generator().manual_seed(config.seed)
    best, kept = math.inf, model.state_dict()

    def losses(x: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
        views = [augment(t, aug_type="random", generator=draw) for t in x]
        found: tuple[Tensor, Mapping[str, float]] = loss(_outputs(model, x), _outputs(model, views))
        return found

    with progress(config.epochs, "RePercENT", "epoch") as bar:
        for _ in range(config.epochs):
            model.train()
            for rows in torch.randperm(len(splits["train"][0]), generator=draw).split(size):
                backward_and_step(losses([x[rows] for x in splits["train"]])[0], optimizer, rate)
            model.eval()
            with torch.no_grad():
                parts = zip(*(x.split(size) for x in splits["val"]), strict=True)
                reached = float(np.mean([losses(list(part))[1]["fw_loss"] for part in parts]))
            if reached < best:
                best, kept = reached, copy.deepcopy(model.state_dict())
            bar.update()
    if best == math.inf:
        raise UserError(
            "no epoch of RePercENT has a finite validation loss, so there is nothing to read; give another --seed."
        )
    model.load_state_dict(kept)


def _outputs(model: nn.Module, x: list[Tensor]) -> dict[str, Tensor]:
    """{"U" and "S_view": (n, M, M, D), ...} of rows."""
    outputs: dict[str, Tensor] = model(x, mask=[None] * len(x))
    return outputs


@torch.no_grad()
def _representations(model: nn.Module, x: list[Tensor]) -> tuple[dict[tuple[int, int], np.ndarray], ...]:
    """Unique {(i, j): (n, D)} and shared {(i, j): (n, 2 D)}, those of both sides, of a split."""
    outputs = [_outputs(model.eval(), [t[rows] for t in x]) for rows in torch.arange(len(x[0])).split(1024)]
    u, s = (torch.cat([part[name] for part in outputs]).numpy() for name in ("U", "S_view"))
    numbers = range(len(x))
    unique = {(i + 1, j + 1): u[:, i, j] for i, j in permutations(numbers, 2)}
    shared = {(i + 1, j + 1): np.concatenate([s[:, i, j], s[:, j, i]], axis=1) for i, j in combinations(numbers, 2)}
    return unique, shared


@reports_errors
def main() -> None:
    """Entry point of `python -m benchmarks.repercent_training`."""
    config = parse(TrainingConfig, prog="python -m benchmarks.repercent_training", examples=EXAMPLES)
    report("RePercENT, ", train(config), config)


if __name__ == "__main__":
    main()
