"""The complete pipeline on synthetic data: data -> small Stage 1 -> features -> Stage 2 -> evaluation -> report page."""

import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tvl_align.config import parse
from tvl_align.data.tvl import file_of, read_tvl
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.evaluation.factors import MIN_ROWS
from tvl_align.evaluation.measure import EvaluateConfig, measure
from tvl_align.features.inputs import DataConfig
from tvl_align.methods.registry import METHODS, load_method
from tvl_align.report.page import print_table, write_page
from tvl_align.synthetic.pretrain import PretrainConfig, PretrainPrecision, pretrain
from tvl_align.synthetic.world import write_world
from tvl_align.system.bounds import at_least, between
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings

T = TypeVar("T")
WIDTH = 256  # register width in benchmarks
WIDE = ("cursor", "flextok", "matryoshka")  # methods whose blocks have the width of the registers


@dataclass(frozen=True)
class DemoConfig:
    """Run the complete pipeline on synthetic data. Parts that are complete in the output folder are reused."""

    out: Path = Path("demo")
    """Folder for the data, Stage 1, features and the run."""
    train: int = 10_000
    """Number of training samples, 10% of them for validation."""
    test: int = 1000
    """Number of test samples."""
    pretrain_epochs: int = 6
    """Epochs of the small Stage 1."""
    pretrain_precision: PretrainPrecision = "auto"
    """Precision of the training of the small Stage 1; auto: bf16 where the processor multiplies in it, else float32."""
    epochs: int = 40
    """Epochs of Stage 2."""
    views: int = 4
    """Additional views per training row; only their sentences differ."""
    seed: int = 0
    """Seed of the data, Stage 1 and Stage 2."""
    misregistration: float = 1.0
    """From 0, photo and touch image are registered to the pixel, to 1, they share no frame (`tvl-align world`)."""
    probe_rows: int = DataConfig.probe_rows
    """Maximal number of probe rows."""
    probe_steps: int = EvaluateConfig.probe_steps
    """Most training steps of a probe."""

    def __post_init__(self) -> None:
        at_least(1, self, "pretrain_epochs", "epochs", "probe_steps")
        at_least(0, self, "views")
        at_least(MIN_ROWS, self, "probe_rows")
        between(0, 1, self, "misregistration")


def demo(config: DemoConfig) -> Path:
    """Run the pipeline. Prints the results and returns the path of the report page."""
    world, checkpoint = prepare(config)
    settings = small_settings(config, world, checkpoint, "base", "base")
    timed(f"Stage 2: features, then {config.epochs} epochs", lambda: fit(settings, METHODS["base"]))
    evaluation = EvaluateConfig(settings.folder, probe_rows=config.probe_rows, probe_steps=config.probe_steps)
    timed("test split: retrieval and probes", lambda: measure(evaluation))
    page = write_page(settings.folder)
    print_table(settings.folder / "results.json")
    print(f"page: {page.resolve()}\nThree things to try next:")
    for title, command in next_steps(config, settings.folder).items():
        print(f"  {title}:\n    {command}")
    return page


def next_steps(config: DemoConfig, run: Path) -> dict[str, str]:
    """What to do with the run of a demo: {title: command}. Words in capitals are the user's."""
    program = "tvl-align" if shutil.which("tvl-align") else sys.argv[0]  # outside its environment it has no name
    world, checkpoint = paths(config)
    test = read_tvl(world).test
    row = next((row for row in test if row.dataset == "ssvtp"), test[0])  # whose photos lie in one folder
    return {
        "find the photos that fit a touch image": (
            f"{program} search {run} --tactile {file_of(world, row.files['tactile'])} "
            f"--gallery {file_of(world, row.files['vision']).parent} --top 5"
        ),
        "embed photos of your own": f"{program} embed {run} --vision FOLDER --out tokens.npz",
        "train on pairs of your own (docs/own_data.md)": (
            f"{program} train --pairs TABLE.csv --stage1_checkpoint {checkpoint} --log_name mine"
        ),
    }


def prepare(config: DemoConfig) -> tuple[Path, Path]:
    """Write the synthetic data and train the small Stage 1, unless they exist. Returns (data folder, checkpoint)."""
    world, checkpoint = paths(config)
    if not (world / "factors.json").is_file():
        title = f"data: {config.train} + {config.test} synthetic samples"
        registration = config.misregistration
        timed(title, lambda: write_world(world, config.train, config.test, config.seed, misregistration=registration))
    if not checkpoint.is_file():
        epochs, precision = config.pretrain_epochs, config.pretrain_precision
        settings = PretrainConfig(world, checkpoint.parent, epochs=epochs, precision=precision, seed=config.seed)
        timed(f"Stage 1: small encoders, {epochs} epochs", lambda: pretrain(settings))
    return world, checkpoint


def paths(config: DemoConfig) -> tuple[Path, Path]:
    """(data folder, checkpoint of Stage 1)."""
    return config.out / "world", config.out / "stage1" / "checkpoint.pth"


def with_options(text: str) -> tuple[str, Any]:
    """A method and its options, "base --units 32" -> its name and knobs, with registers of the width of benchmarks."""
    name, *flags = shlex.split(text)
    knobs: Any = parse(load_method(name).knobs, ["--register_token_dim", str(WIDTH), *flags], prog=f"the options of {name}")
    return name, knobs


def run_name(text: str) -> str:
    """Name of the run folders of a method and its options: "base --units 32" -> base-units-32."""
    return "-".join(re.findall(r"[\w.]+", text.rpartition(":")[2]))


def small_settings(config: DemoConfig, world: Path, checkpoint: Path, text: str, name: str) -> Settings[Any]:
    """The settings of a Stage-2 run on the synthetic data: narrower registers and fewer epochs than the defaults.

    text: a method and its options, see `with_options`.
    """
    method, knobs = with_options(text)
    return Settings(
        Stage1Config(checkpoint),
        knobs,
        DataConfig(
            world,
            views=config.views,
            augment_pictures=False,  # the small Stage 1 is trained without image augmentation
            no_text_prompt=True,
            shuffle_text=True,
            replace_synonyms=True,
            num_workers=2,
        ),
        optimisation_of(method, config.epochs, int(0.65 * config.train)),
        RunConfig(config.out / "runs", name, seed=config.seed, method=method),
    )


def optimisation_of(method: str, epochs: int, rows: int = 10_000) -> OptimConfig:
    """The optimisation of a method in benchmarks: 4e-3 for narrow blocks, 1e-3 for wide ones (chosen on validation rows).

    rows: training rows; few of them have smaller batches, so that an epoch has some steps.
    """
    return OptimConfig(
        batch_size=min(256, max(8, rows // 8)), epochs=epochs, warmup_epochs=1, lr=1e-3 if method in WIDE else 4e-3
    )


def timed(title: str, function: Callable[[], T]) -> T:
    """Print the title, call the function, print its duration in seconds and return its result."""
    print(f"== {title}", flush=True)
    start = time.perf_counter()
    result = function()
    print(f"   {time.perf_counter() - start:.0f} s", flush=True)
    return result
