"""`make bench`: what things cost, as ratios to a reference measured in the same run -> a table and bench.json.

Both sides of a ratio are timed in turns on the same cores, and the best of several turns counts: this tells apart code, not
machines. All weights are random, all numbers made up.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model._linear_loss import LinearModelLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import jobs as jobs
from benchmarks.jobs import SMALL, random_features
from tvl_align.config import parse
from tvl_align.contract import MODALITIES, Features
from tvl_align.data.loading import load_images
from tvl_align.data.samples import TextOptions, make_samples
from tvl_align.data.transforms import ImageOptions
from tvl_align.data.tvl import read_tvl
from tvl_align.encoders.small import SMALL_CLIP, SMALL_TOUCH, register_small_clip
from tvl_align.encoders.tvl import Stage1, create_touch_encoder
from tvl_align.evaluation.probes import attentive_probe, linear_probe
from tvl_align.features.encode import ENCODE_BATCH, open_or_encode
from tvl_align.features.store import FeatureStore
from tvl_align.methods.registry import METHODS
from tvl_align.metrics.retrieval import retrieval
from tvl_align.registers.blocks import Attention
from tvl_align.report.plots import growth_curves
from tvl_align.synthetic.world import write_world
from tvl_align.system.console import UserError, progress, reports_errors
from tvl_align.system.files import atomic_file, write_atomically
from tvl_align.system.provenance import provenance
from tvl_align.system.runtime import keep_freed_memory
from tvl_align.system.signals import StopSignals
from tvl_align.training.engine import make_accelerator, train_one_epoch
from tvl_align.training.optimisation import Schedule, backward_and_step, make_adamw
from tvl_align.training.run import Progress

EXAMPLES = ("make bench", "tvl-align bench --parts step engine --turns 3")


@dataclass(frozen=True)
class BenchConfig:
    """Measure what things cost, as ratios."""

    out: Path = Path("bench.json")
    """Where the figures are written; growth goes to growth.json and growth.png beside it."""
    batch: int = 256
    """Rows of a training step."""
    width: int = 768
    """Width of registers."""
    gallery: int = 8000
    """Rows of the retrieval gallery."""
    large_gallery: int = 44_000
    """Rows of the gallery whose memory is measured."""
    rows: int = 40_000
    """Rows of the smaller store whose memory is measured; the larger one has ten times as many."""
    pictures: int = 64
    """Rows that are encoded with encoders of real size; 32 times as many with the small ones."""
    turns: int = 5
    """Turns per side; the best counts."""
    parts: tuple[str, ...] = (
        *("encode", "step", "engine", "accumulation", "retrieval", "probes", "store", "processes", "memory", "growth"),
    )
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
    known = {
        "step": _step,
        "engine": _engine,
        "accumulation": _parts_of_a_batch,
        "retrieval": _retrieval,
        "probes": _probes,
        "store": _store_and_encoders,
        "encode": _encode,
        "processes": _processes,
        "memory": _memory,
        "growth": _growth,
    }
    unknown = [name for name in config.parts if name not in known]
    if unknown:
        raise UserError(f"unknown part {unknown[0]!r}; --parts takes {', '.join(known)}.")
    keep_freed_memory()  # as trainings and encodes have it
    figures: list[Figure] = []
    with progress(len(config.parts), "bench", "part") as bar:
        for name in config.parts:
            bar.set_postfix_str(name)
            figures += known[name](config)
            written = [asdict(f) for f in figures] + [{"made_by": provenance(), "threads": torch.get_num_threads()}]
            write_atomically(config.out, json.dumps(written, indent=1))
            bar.update()
    table = Table(title="costs, ours over the reference", title_justify="left")
    for column in ("what", "ours", "reference", "ratio", "unit"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right")
    for f in figures:
        table.add_row(f.name, f"{f.ours:.4g}", f"{f.reference:.4g}", f"{f.ratio:.2f}", f.unit)
    Console().print(table)
    return figures


def compare(name: str, ours: Callable[[], Any], reference: Callable[[], Any], turns: int, warm: bool = True) -> Figure:
    """Time both in turns. warm: call both once before."""
    if warm:
        ours(), reference()
    best = [float("inf"), float("inf")]
    for _ in range(turns):
        for i, job in enumerate((ours, reference)):
            began = time.perf_counter()
            job()
            best[i] = min(best[i], time.perf_counter() - began)
    return Figure(name, best[0], best[1], best[0] / best[1], "s")


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

    def again(self, cold: bool = False) -> Callable[[], None]:
        """The same products on made-up numbers: of one shape the same ones, which may stay in a cache, or, cold, on operands
        of their own, as what they stand for has them."""
        held = {tuple(shape): torch.randn(*shape) for pair in self.shapes for shape in pair}

        def operand(shape: Sequence[int]) -> Tensor:
            return held[tuple(shape)].clone() if cold else held[tuple(shape)]

        operands = [(operand(a), operand(b)) for a, b in self.shapes]

        def run() -> None:
            for a, b in operands:
                torch.matmul(a, b)

        return run


def _training(
    name: str, config: BenchConfig, specs: Any = SMALL, features: Features | None = None, **more: Any
) -> Callable[[], None]:
    """A training step of a method on one batch held in memory."""
    features = random_features(specs, config.batch) if features is None else features
    method = METHODS[name]
    knobs = method.knobs(register_token_dim=config.width, **more)
    torch.manual_seed(0)
    model, loss = method.model(knobs, specs).train(), method.loss(knobs, list(specs))
    optimizer = make_adamw(model.named_parameters(), 0.05)
    return lambda: backward_and_step(loss(model(features, joint=False))["total_loss"], optimizer, 1e-5)


def _step(config: BenchConfig) -> Iterator[Figure]:
    """A training step at the documented sizes against its own bare matrix products, and against a step that projects every
    token to keys and values."""
    size = f"batch {config.batch}, width {config.width}"
    for name in ("base", "cursor"):
        step = _training(name, config)
        with MatrixProducts() as products:
            step()
        for what, cold in (("its matrix products", False), ("the same on operands of their own", True)):
            yield compare(f"step of {name} ({size}) / {what}", step, products.again(cold), config.turns)
    short = Attention._absorbing_is_cheaper
    step = _training("base", config)

    def usual_way() -> None:
        Attention._absorbing_is_cheaper = lambda *_: False  # type: ignore[method-assign]
        try:
            step()
        finally:
            Attention._absorbing_is_cheaper = short  # type: ignore[method-assign]

    yield compare(f"step of base ({size}) / with every token projected", step, usual_way, config.turns)


def _engine(config: BenchConfig) -> Iterator[Figure]:
    """What the loop adds to its steps: reading the store, drawing, checking, logging."""
    count = 8
    with jobs.scratch() as folder:
        jobs.write_store(folder / "store", SMALL, count * config.batch)
        settings = jobs.run_settings(folder / "store", folder, config.batch, config.width)
        source = FeatureStore(folder / "store").splits["train"]
        method, accelerator = METHODS["base"], make_accelerator(settings)
        torch.manual_seed(0)
        model, loss = method.model(settings.knobs, SMALL).train(), method.loss(settings.knobs, MODALITIES)
        optimizer = make_adamw(model.named_parameters(), 0.05)
        held = [source.read(rows).float() for rows in torch.arange(count * config.batch).split(config.batch)]

        def loop() -> None:
            train_one_epoch(
                *(model, model, loss, optimizer, source, settings, Schedule(1e-5, count, 0), accelerator),
                *(Progress(), StopSignals()),
            )

        def bare() -> None:
            for features in held:
                kept = model.draw_kept(len(features))
                backward_and_step(loss(model(features, kept=kept, joint=False))["total_loss"], optimizer, 1e-5)

        yield compare(f"epoch of {count} steps in the engine / its bare steps", loop, bare, max(1, config.turns // 2))


def _parts_of_a_batch(config: BenchConfig) -> Iterator[Figure]:
    """The exact gradient of a batch in 4 parts against the batch at once, and its memory against that of one part."""
    in_parts, whole = (jobs.batch_gradient(config.batch, n) for n in (4, 1))
    yield compare("gradient of a batch in 4 parts / at once", in_parts, whole, config.turns)
    rows = 8 * config.batch
    for what, live in (("memory in use", True), ("resident memory", False)):
        in_parts, part, whole = (
            jobs.cost(jobs.batch_gradient, *x, live=live).megabytes for x in ((rows, 8), (config.batch, 1), (rows, 1))
        )
        yield Figure(f"{what}: batch of {rows} in 8 parts / one part", in_parts, part, in_parts / part, "MB")
        yield Figure(f"{what}: batch of {rows} in 8 parts / at once", in_parts, whole, in_parts / whole, "MB")


def _retrieval(config: BenchConfig) -> Iterator[Figure]:
    """Whole-gallery retrieval, both directions, against the one bare matrix product that it takes."""
    x, y = jobs.unit_rows(config.gallery, 768)
    captions = torch.randint(200, (config.gallery, 1), generator=torch.Generator().manual_seed(0)).expand(-1, 2)
    everyone = torch.ones(config.gallery, dtype=torch.bool)

    def bare() -> None:
        for rows in x.split(1024):
            rows @ y.T

    for what, keys in (("one partner each", None), ("200 captions", captions)):
        name = f"retrieval, gallery {config.gallery}, {what} / its matrix product"
        yield compare(name, lambda keys=keys: retrieval(x, y, everyone, keys), bare, config.turns)
    found = jobs.cost(jobs.gallery_retrieval, config.large_gallery)
    held = 2 * config.large_gallery * 768 * 4 / 2**20
    name = f"retrieval, gallery {config.large_gallery}: memory above the features / the features"
    yield Figure(name, found.megabytes, held, found.megabytes / held, "MB")


def _probes(config: BenchConfig) -> Iterator[Figure]:
    """Training and reading a probe on one core, as `evaluate` has them, against its bare matrix products: of a linear one
    two whenever it looks at its loss and one whenever it predicts, by NumPy as scikit-learn's."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (config.gallery,), generator=g)
    centres = 0.05 * torch.randn(5, 768, generator=g)
    rows = torch.randn(config.gallery, 768, generator=g) + centres[labels]
    given = rows, labels.numpy(), rows, labels.numpy()
    evaluate, predict = LinearModelLoss.loss_gradient, LogisticRegression.decision_function
    evaluated: list[int] = []
    predicted: list[int] = []

    def evaluating(self: LinearModelLoss, weights: Any, x: Any, *more: Any, **named: Any) -> Any:
        evaluated.append(len(x))
        return evaluate(self, weights, x, *more, **named)

    def predicting(self: LogisticRegression, x: Any) -> Any:
        predicted.append(len(x))
        return predict(self, x)

    with (
        mock.patch.object(LinearModelLoss, "loss_gradient", evaluating),
        mock.patch.object(LogisticRegression, "decision_function", predicting),
    ):
        linear_probe(*given)
    x, read_out = rows.numpy(), centres.numpy()

    def bare() -> None:
        for count in evaluated:
            (x[:count] @ read_out.T).T @ x[:count]
        for count in predicted:
            x[:count] @ read_out.T

    features = random_features(SMALL, config.batch).modalities["vision"]
    tokens, mask, factors = features.tokens, features.mask, [labels[: config.batch].numpy()] * 5

    def attentive() -> None:
        attentive_probe(tokens, mask, factors, tokens, mask, factors, steps=40)

    with MatrixProducts() as products:
        attentive()
    for name, probe, reference in (
        (f"linear probe, {len(rows)} rows / its matrix products", lambda: linear_probe(*given), bare),
        ("attentive probe, 5 factors / its matrix products", attentive, products.again()),
    ):
        with jobs.one_thread():
            found = compare(name, probe, reference, config.turns)
        yield found


def _stage1(clip_name: str, touch: dict[str, Any]) -> Stage1:
    register_small_clip()
    clip = open_clip.create_model(clip_name, pretrained=None)
    tokenizer, width = open_clip.get_tokenizer(clip_name), clip.text_projection.shape[-1]
    return Stage1(clip, tokenizer, create_touch_encoder("vit_tiny_patch16_224", width, touch)).freeze()


# label, CLIP, touch encoder; of BenchConfig.pictures, how many times as many make a store, and which part one batch
SIZES = (("small Stage 1", SMALL_CLIP, SMALL_TOUCH, 32, 1), ("ViT-L-14 and ViT-Tiny at 224", "ViT-L-14", {}, 1, 8))


def _store_and_encoders(config: BenchConfig) -> Iterator[Figure]:
    """An epoch that encodes what it reads against one that reads stored features, per row and view; random weights."""
    for label, clip_name, touch, _, part in SIZES:
        stage1 = _stage1(clip_name, touch)
        rows = max(1, config.pictures // part)
        raw = {m: torch.randn(rows, 3, s, s) for m, s in (("vision", stage1.photo_size), ("tactile", stage1.touch_size))}
        raw["text"] = stage1.tokenize(["grooved, coarse and a little sticky"] * rows)
        stored = stage1.encode(raw)
        batch = stored.map(lambda t, rows=rows: t[torch.arange(config.batch) % rows])
        for name in ("base", "cursor"):
            step = _training(name, config, stage1.specs, batch)
            timed = compare("", lambda s=stage1, r=raw: s.encode(r), step, 2)
            encoded, trained = timed.ours / rows, timed.reference / config.batch
            what = f"row of an epoch of {name} through the encoders / from the store ({label})"
            yield Figure(what, encoded + trained, trained, (encoded + trained) / trained, "s")


def _encode(config: BenchConfig) -> Iterator[Figure]:
    """`tvl-align encode` against the bare forward pass of its encoders on data in memory; random weights."""
    for label, clip_name, touch, more, _ in SIZES:
        stage1, rows = _stage1(clip_name, touch), more * config.pictures
        with jobs.scratch() as folder:
            world = write_world(folder / "world", rows, 32, seed=0, quiet=True)
            images = ImageOptions(stage1.photo_size, stage1.touch_size)
            samples = {"train": make_samples(read_tvl(world), images, TextOptions(), 0)["train"]}
            count = len(samples["train"])
            parts = [[(i, 0) for i in at.tolist()] for at in torch.arange(count).split(ENCODE_BATCH)]
            pictures = [
                {m: x for m, (_, x) in p.images.items()} for p in load_images(samples["train"], parts, 0, stage1.modalities)
            ]
            texts = sorted({str(samples["train"].sentence(i, 0)) for i in range(count)})
            ids = stage1.tokenize(texts).split(ENCODE_BATCH)
            made: list[int] = []
            assert stage1.specs  # found by encoding a blank row, once per process: not part of the throughput

            def ours(stage1: Stage1 = stage1, samples: Any = samples, folder: Path = folder, made: Any = made) -> None:
                made.append(0)
                open_or_encode(folder / f"store{len(made)}", stage1, samples, 0, 2)

            def bare(stage1: Stage1 = stage1, pictures: Any = pictures, ids: Any = ids) -> None:
                for part in pictures:
                    stage1.encode(part)
                for part in ids:
                    stage1.encode({"text": part})

            yield compare(f"encode {count} rows / bare forward pass ({label})", ours, bare, 2, warm=more > 1)


def _processes(config: BenchConfig) -> Iterator[Figure]:
    """An epoch of 3 steps on 1 process of 1 thread against 2 such processes, same joined batch: 2 would be perfect. What
    processes exchange in a step, the gradients of all weights, does not grow with the batch."""
    for name, batch in product(("base", "cursor"), (config.batch, 4 * config.batch)):
        with jobs.scratch() as folder:
            jobs.write_store(folder / "store", SMALL, 3 * batch, validation=config.batch)
            costs = [jobs.epoch_on_processes(folder / "store", name, n, batch, config.width) for n in (1, 2)]
            one, two = (given.seconds for given in costs)
            what = f"epoch of {name} (width {config.width}, joined batch {batch}) on 1 process / on 2"
            yield Figure(what, one, two, one / two, "s")
    one, two = (jobs.products_at_once(n, 4 * config.batch, config.width) for n in (1, 2))
    yield Figure("bare matrix products on 1 process / on 2, which exchange nothing", one, two, one / two, "s")


def _memory(config: BenchConfig) -> Iterator[Figure]:
    """Peak resident memory of a training, mapped pages included, with ten times as many rows."""
    specs = {m: jobs.FeatureSpec(64, 4, 64) for m in ("vision", "tactile")}
    found = []
    for rows in (10 * config.rows, config.rows):
        with jobs.scratch() as folder:
            jobs.cost(_write, folder / "store", specs, rows)
            found.append(jobs.cost(jobs.training, folder / "store", 1024, 64).megabytes)
    large, small = found
    name = f"peak memory of a training on {10 * config.rows} rows / on {config.rows}"
    yield Figure(name, large, small, large / small, "MB")


def _write(*given: Any) -> Callable[[], None]:
    return lambda: jobs.write_store(*given)


def _growth(config: BenchConfig) -> Iterator[Figure]:
    """Time and memory against rows, registers, tokens, gallery and processes -> growth.json, growth.png; no ratios."""
    scale = config.rows / 40_000
    found: dict[str, list[dict[str, float]]] = {"rows": []}

    def note(what: str, at: float, given: jobs.Cost) -> None:
        found.setdefault(what, []).append({"at": at, "seconds": given.seconds, "megabytes": given.megabytes})

    specs = {m: jobs.FeatureSpec(64, 4, 64) for m in ("vision", "tactile")}
    for rows in (int(4000 * scale), int(40_000 * scale), int(400_000 * scale)):
        with jobs.scratch() as folder:
            jobs.cost(_write, folder / "store", specs, rows)
            note("rows", rows, jobs.cost(jobs.training, folder / "store", 256, 64))
    for registers in (4, 8, 16, 32, 64):
        note("registers", registers, jobs.cost(jobs.steps, registers, 17, turns=4))
    for tokens in (1, 4, 16, 64, 256):
        note("key tokens", tokens, jobs.cost(jobs.steps, 4, tokens, turns=4))
    for rows in (1000, 4000, 16_000):
        note("gallery", int(rows * scale), jobs.cost(jobs.gallery_retrieval, int(rows * scale), turns=4))
    with jobs.scratch() as folder:
        jobs.write_store(folder / "store", SMALL, 8 * config.batch, validation=config.batch)
        for processes in (1, 2):
            given = jobs.epoch_on_processes(folder / "store", "base", processes, config.batch, config.width // 3)
            note("processes", processes, given)
    out = config.out.with_name("growth.json")
    write_atomically(out, json.dumps({"made_by": provenance(), "growth": found}, indent=1))
    with atomic_file(out.with_suffix(".png")) as file:
        file.write(growth_curves(found))
    yield from ()


@reports_errors
def main() -> None:
    bench(parse(BenchConfig, prog="python -m benchmarks.speed", examples=EXAMPLES))


if __name__ == "__main__":
    main()
