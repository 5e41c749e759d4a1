"""`tvl-align embed`: the tokens of new pictures and sentences, or of a split, as an .npz file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from tvl_align.config import parse
from tvl_align.encoders.names import by_modality
from tvl_align.encoders.tvl import Precision
from tvl_align.evaluation.labels import read_labels
from tvl_align.inference.files import picture_rows, with_background, write_npz
from tvl_align.inference.registers import BATCH, Embeddings, Registers, load
from tvl_align.system.bounds import at_least
from tvl_align.system.console import UserError

EXAMPLES = (
    "tvl-align embed output_dir/mine --vision photos --tactile touches --out tokens.npz",
    "tvl-align embed output_dir/mine --tactile a.png b.png --text 'soft, woven' 'hard' --out tokens.npz",
    "tvl-align embed output_dir/mine --vision photos --more depth=depths audio=sounds --out tokens.npz",
    "tvl-align embed output_dir/mine --split test --out test.npz",
)


@dataclass(frozen=True)
class EmbedConfig:
    """Embed pictures and sentences, or a split of the run's feature store, with a trained run."""

    run: tyro.conf.Positional[str]
    """Run folder, folder written by `tvl-align export`, or model id of a hub."""
    out: Path
    """The .npz file to write."""
    vision: tuple[Path, ...] = ()
    """Photos: one folder, or files. In folders, files of the same name but for their suffix are a row."""
    tactile: tuple[Path, ...] = ()
    """Touch images: one folder, or files."""
    text: tuple[str, ...] = ()
    """Captions of adjectives, 'soft, woven', one per row."""
    more: tuple[str, ...] = ()
    """Further modalities of the run, each one folder, or files: depth=FOLDER, or depth=a.png depth=b.png."""
    sentences: bool = False
    """Texts are sentences, used as they are, without the prompt of the run; default: as in the run."""
    split: str | None = None
    """Embed the plain views of this split (train, val, test) instead, with its names and labels."""
    keep: int | None = None
    """Keep only the first registers; default: all."""
    attention: bool = False
    """Also write how much each frozen token moves each register."""
    touch_background: Path | None = None
    """The touch image without contact, of a run that subtracts it from touch images."""
    dataset: str | None = None
    """Data set of TVL in whose way photos are cropped: ssvtp, hct or hct/data3; default: by their place, else ssvtp."""
    stage1_checkpoint: Path | None = None
    """The Stage-1 checkpoint of the run; default: where the run found it."""
    checkpoint: str = "checkpoint.pth"
    """Checkpoint in a run folder: checkpoint.pth, checkpoint-acc1.pth or checkpoint-acc5.pth."""
    method: str | None = None
    """A method of your own, as for train; default: that of the run."""
    batch_size: int = BATCH
    """Rows that are encoded at a time."""
    precision: Precision | None = None
    """Precision of the encoders: float32, bf16 or fp16; default: that of the features that the run was trained on."""
    device: str | None = None
    """cuda or cpu; default: cuda if available, else cpu."""
    json: bool = False
    """Print what was written as JSON."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size", "keep")
        if bool(self.split) == bool(self.files or self.text):
            raise UserError("nothing to embed, or two kinds; give --vision, --tactile, --text and --more, or --split alone.")

    @property
    def files(self) -> dict[str, list[Path]]:
        """{modality: its folder or files}, of those that are given."""
        more = {m: [Path(value) for value in values] for m, values in by_modality("more", self.more).items()}
        given = {"vision": list(self.vision), "tactile": list(self.tactile), **more}
        return {m: paths for m, paths in given.items() if paths}


def run(argv: Sequence[str]) -> None:
    config = parse(EmbedConfig, argv, "tvl-align embed", examples=EXAMPLES)
    registers = load(
        config.run,
        checkpoint=config.checkpoint,
        stage1_checkpoint=config.stage1_checkpoint,
        method=config.method,
        device=config.device,
    )
    names, out, labels = _of_split(config, registers) if config.split else _of_files(config, registers)
    write_npz(config.out, names, out, registers.key, labels)
    shapes = {m: [list(out.overlapping[m].shape[1:]), list(out.complementary[m].shape[1:])] for m in out.pooled}
    if config.json:
        print(json.dumps({"out": str(config.out.resolve()), "rows": len(out), "tokens": shapes, "labels": list(labels)}))
    else:
        print(f"{len(out)} rows of {', '.join(out.pooled)} -> {config.out}")


def _of_files(config: EmbedConfig, registers: Registers) -> tuple[list[str], Embeddings, dict[str, Any]]:
    given: dict[str, Any] = {}
    names = list(config.text)
    if config.files:
        names, files = picture_rows(config.files, registers.takes_pictures)
        given = with_background(files, config.touch_background, registers)
    out = registers.embed(
        **given,
        text=list(config.text) or None,
        keep=config.keep,
        attention=config.attention,
        sentences=config.sentences or None,
        dataset=config.dataset,
        batch_size=config.batch_size,
        precision=config.precision,
        quiet=False,
    )
    return names, out, {}


def _of_split(config: EmbedConfig, registers: Registers) -> tuple[list[str], Embeddings, dict[str, Any]]:
    store, name = registers.open_store(), str(config.split)
    if name not in store.splits:
        raise UserError(f"{store.folder} has no split {name!r}; give --split one of {', '.join(store.splits)}.")
    source = store.splits[name]
    out = registers.embed_split(source, keep=config.keep, attention=config.attention, quiet=False)
    data = registers.settings.data
    path = data.store / "labels.csv" if data.store else data.datasets_dir / "factors.csv"
    labels: dict[str, Any] = {}
    if path.is_file():
        known = read_labels(path)
        for factor, levels in known.levels.items():
            labels[factor] = ["" if i < 0 else levels[i] for i in known.of(factor, source.names).tolist()]
    return list(source.names), out, labels
