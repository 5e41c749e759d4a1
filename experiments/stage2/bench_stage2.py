"""`make bench`: what things cost, as ratios to a reference measured in the same run -> a table and bench.json.

Both sides of a ratio are timed in turns on the same cores, and the best of several turns counts: this tells apart code, not
machines. All weights are random, all numbers made up.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.stage2.methods import METHODS
from tvl_align.accumulation import large_batch_gradient
from tvl_align.console import UserError, progress
from tvl_align.contract import MODALITIES, Features, FeatureSpec, Tokens
from tvl_align.encoders.small import SMALL_CLIP, SMALL_TOUCH, register_small_clip
from tvl_align.encoders.tvl import Stage1, create_touch_encoder
from tvl_align.evaluation import retrieval
from tvl_align.optimisation import descend, make_adamw
from tvl_align.runtime import provenance

SMALL = {"vision": FeatureSpec(192, 17, 128), "tactile": FeatureSpec(192, 17, 128), "text": FeatureSpec(128, 9, 128)}


@dataclass(frozen=True)
class BenchConfig:
    """Measure what things cost, as ratios."""

    out: Path = Path("bench.json")
    """Where the figures are written."""
    batch: int = 256
    """Rows of a training step."""
    gallery: int = 8000
    """Rows of the retrieval gallery."""
    turns: int = 5
    """Turns per side; the best counts."""
    parts: tuple[str, ...] = ("step", "accumulation", "retrieval", "store")
    """What to measure."""


@dataclass(frozen=True)
class Figure:
    """One line: ours and the reference in `unit`, and ours over the reference."""

    name: str
    ours: float
    reference: float
    ratio: float
    unit: str


def bench(config: BenchConfig) -> list[Figure]:
    """Returns the figures it wrote."""
    known = {"step": _step, "accumulation": _parts_of_a_batch, "retrieval": _retrieval, "store": _store_and_encoders}
    unknown = [name for name in config.parts if name not in known]
    if unknown:
        raise UserError(f"unknown part {unknown[0]!r}; --parts takes {', '.join(known)}.")
    figures: list[Figure] = []
    with progress(len(config.parts), "bench", "part") as bar:
        for name in config.parts:
            figures += known[name](config)
            bar.update()
    config.out.write_text(
        json.dumps([asdict(f) for f in figures] + [{"made_by": provenance(), "threads": torch.get_num_threads()}], indent=1)
    )
    table = Table(title="costs, ours over the reference", title_justify="left")
    for column in ("what", "ours", "reference", "ratio", "unit"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right")
    for f in figures:
        table.add_row(f.name, f"{f.ours:.4g}", f"{f.reference:.4g}", f"{f.ratio:.2f}", f.unit)
    Console().print(table)
    return figures


def compare(name: str, ours: Callable[[], Any], reference: Callable[[], Any], turns: int, per: float = 1.0) -> Figure:
    """Time both in turns; `per`: how many units one call of ours does for one call of the reference."""
    ours(), reference()
    best = [float("inf"), float("inf")]
    for _ in range(turns):
        for i, job in enumerate((ours, reference)):
            began = time.perf_counter()
            job()
            best[i] = min(best[i], time.perf_counter() - began)
    return Figure(name, best[0] / per, best[1], best[0] / per / best[1], "s")


def made_up(specs: dict[str, FeatureSpec], rows: int) -> Features:
    """Random features of every modality."""
    g = torch.Generator().manual_seed(0)
    modalities = {
        m: Tokens(
            torch.randn(rows, s.tokens, s.width, generator=g),
            torch.ones(rows, s.tokens, dtype=torch.bool),
            F.normalize(torch.randn(rows, s.pooled_width, generator=g), dim=-1),
            torch.ones(rows, dtype=torch.bool),
        )
        for m, s in specs.items()
    }
    return Features(modalities, torch.arange(rows)[:, None], torch.arange(rows))


class MatrixProducts(TorchDispatchMode):
    """Notes the shapes of every matrix product that runs inside, those of fused attention included."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[Sequence[int], Sequence[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.shapes.append((args[0].shape, args[1].shape))
        elif func is torch.ops.aten.addmm.default:
            self.shapes.append((args[1].shape, args[2].shape))
        elif func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self._attention(*(t.shape for t in args[:3]))
        elif func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            q, k, v = (t.shape for t in args[1:4])
            self._attention(q, k, v)  # scores again, and gradients of weights, values, queries and keys
            self.shapes += [((*q[:3], k[2]), k), ((*q[:2], k[2], q[2]), q), ((*q[:2], k[2], q[2]), q)]
        return func(*args, **(kwargs or {}))

    def _attention(self, q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> None:
        self.shapes += [(q, (*q[:2], q[3], k[2])), ((*q[:3], k[2]), v)]

    def again(self) -> Callable[[], None]:
        """The same products on numbers of their own."""
        held = {tuple(shape): torch.randn(*shape) for pair in self.shapes for shape in pair}

        def run() -> None:
            for a, b in self.shapes:
                torch.matmul(held[tuple(a)], held[tuple(b)])

        return run


def _step(config: BenchConfig) -> Iterator[Figure]:
    """A training step at the documented sizes against its own bare matrix products."""
    features = made_up(SMALL, config.batch)
    for name in ("base", "cursor"):
        method = METHODS[name]
        knobs = method.knobs()
        torch.manual_seed(0)
        model, loss = method.model(knobs, SMALL).train(), method.loss(knobs, MODALITIES)
        optimizer = make_adamw(model.named_parameters(), 0.05)

        def step(model: Any = model, loss: Any = loss, optimizer: Any = optimizer) -> None:
            descend(loss(model(features, joint=False))["total_loss"], optimizer, 1e-4)

        with MatrixProducts() as products:
            step()
        yield compare(
            f"step of {name} (batch {config.batch}, width 768) / its matrix products", step, products.again(), config.turns
        )


def _parts_of_a_batch(config: BenchConfig) -> Iterator[Figure]:
    """The exact gradient of a batch in 4 parts against the batch at once."""
    features, method = made_up(SMALL, config.batch), METHODS["base"]
    knobs = method.knobs(register_token_dim=256)
    model, loss = method.model(knobs, SMALL).train(), method.loss(knobs, MODALITIES)
    optimizer = make_adamw(model.named_parameters(), 0.0)
    size = config.batch // 4
    parts = [features.map(lambda t, i=i: t[i * size : (i + 1) * size]) for i in range(4)]

    def whole() -> None:
        descend(loss(model(features, joint=False))["total_loss"], optimizer, 0.0, update=False)
        model.zero_grad()

    def in_parts() -> None:
        runs = [lambda p=p: model(p, joint=False) for p in parts]
        large_batch_gradient(runs, loss, lambda scalar, part: descend(scalar, optimizer, 0.0, update=False))
        model.zero_grad()

    yield compare("gradient of a batch in 4 parts / at once", in_parts, whole, config.turns)


def _retrieval(config: BenchConfig) -> Iterator[Figure]:
    """Whole-gallery retrieval against its bare matrix products."""
    g = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(config.gallery, 768, generator=g), dim=-1) for _ in range(2))
    keys = torch.randint(200, (config.gallery, 2), generator=g)
    everyone = torch.ones(config.gallery, dtype=torch.bool)

    def bare() -> None:
        for a, b in ((x, y), (y, x)):
            for start in range(0, len(a), 1024):
                a[start : start + 1024] @ b.T

    for what, column in (("one partner each", None), ("captions", keys)):
        yield compare(
            f"retrieval, gallery {config.gallery}, {what} / its matrix products",
            lambda column=column: retrieval(x, y, everyone, column),
            bare,
            config.turns,
        )


def _store_and_encoders(config: BenchConfig) -> Iterator[Figure]:
    """A step on stored features against the same step through the frozen encoders, random weights."""
    for label, clip_name, touch, rows, pixels in (
        ("small Stage 1", SMALL_CLIP, SMALL_TOUCH, 32, 64),
        ("ViT-L-14 and ViT-Tiny at 224", "ViT-L-14", {}, 4, 224),
    ):
        register_small_clip()
        clip = open_clip.create_model(clip_name, pretrained=None)
        tokenizer, width = open_clip.get_tokenizer(clip_name), clip.text_projection.shape[-1]
        stage1 = Stage1(clip, tokenizer, create_touch_encoder("vit_tiny_patch16_224", width, touch)).freeze()
        g = torch.Generator().manual_seed(0)
        raw = {m: torch.randn(rows, 3, pixels, pixels, generator=g) for m in ("vision", "tactile")}
        raw["text"] = stage1.tokenize(["grooved, coarse and a little sticky"] * rows)
        with torch.no_grad():
            stored = stage1.encode(raw)
        method = METHODS["base"]
        knobs = method.knobs()
        model, loss = method.model(knobs, stage1.specs).train(), method.loss(knobs, MODALITIES)
        optimizer = make_adamw(model.named_parameters(), 0.05)

        def step(source: Callable[[], Features], model: Any = model, loss: Any = loss, optimizer: Any = optimizer) -> None:
            descend(loss(model(source(), joint=False))["total_loss"], optimizer, 1e-5)

        def encoded(stage1: Stage1 = stage1, raw: dict[str, Tensor] = raw) -> Features:
            with torch.no_grad():
                return stage1.encode(raw)

        yield compare(
            f"step through the encoders / from the store ({label}, {rows} rows, width 768)",
            lambda encoded=encoded, step=step: step(encoded),
            lambda stored=stored, step=step: step(lambda: stored),
            2,
        )
