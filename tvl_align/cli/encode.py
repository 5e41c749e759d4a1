"""`tvl-align encode`: write the feature store that `train` reads."""

from collections.abc import Sequence

from tvl_align.cli.train import read_settings
from tvl_align.data.tvl import Tolerance
from tvl_align.features.encode import open_or_encode
from tvl_align.features.inputs import load_samples
from tvl_align.system.console import UserError
from tvl_align.system.distributed import is_main
from tvl_align.training.engine import make_accelerator

ABOUT = "Encode a data set once into a feature store. With the same flags, train uses this store."
EXAMPLES = (
    "tvl-align encode --stage1_checkpoint stage1/checkpoint.pth --datasets_dir world",
    "torchrun --nproc_per_node=8 --no_python tvl-align encode --stage1_checkpoint P --datasets_dir D --views 4",
)


def run(argv: Sequence[str]) -> None:
    settings, _, _ = read_settings(argv, "tvl-align encode", ABOUT, EXAMPLES)
    if settings.data.store is not None:
        raise UserError(f"{settings.data.store} is already a feature store; pass it to train with --store.")
    if settings.data.views == 0:
        raise UserError("--views 0 means no feature store; give --views 1 or more.")
    data, device = settings.data, make_accelerator(settings).device
    stage1, samples = load_samples(settings.stage1, data, settings.run.seed, device)
    tolerance = Tolerance(data.strict, data.max_skipped)
    store = open_or_encode(settings.feature_dir, stage1, samples, data.views, data.num_workers, tolerance=tolerance)
    if is_main():
        print(store.folder)
