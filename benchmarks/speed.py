"""`make bench`: time and memory relative to a reference that is measured in the same run -> a table and bench.json.

Both sides of a ratio are timed alternately on the same cores, and the best of several turns counts. The ratios therefore
depend little on the machine. All weights and features are random.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import jobs
from benchmarks.jobs import SMALL, random_features
from tvl_align.config import parse
from tvl_align.contract import MODALITIES, Features, FeatureSpec
from tvl_align.data.image_options import ImageOptions
from tvl_align.data.loading import load_images
from tvl_align.data.samples import TextOptions, make_samples
from tvl_align.data.tvl import PICTURES, read_tvl
from tvl_align.encoders.small import SMALL_CLIP, SMALL_TOUCH, register_small_clip
from tvl_align.encoders.tvl import Stage1, create_touch_encoder
from tvl_align.evaluation.probes import ProbeKind, Problem, Target, fit_probes
from tvl_align.features.encode import ENCODE_BATCH, open_or_encode
from tvl_align.features.store import FeatureStore
from tvl_align.inference.registers import Registers
from tvl_align.inference.search import ROWS, Found, Index
from tvl_align.methods.registry import METHODS
from tvl_align.metrics.retrieval import retrieval
from tvl_align.report.plots import growth_curves
from tvl_align.synthetic.world import write_world
from tvl_align.system.bounds import at_least
from tvl_align.system.console import UserError, progress, reports_errors
from tvl_align.system.files import atomic_file, write_atomically
from tvl_align.system.provenance import provenance
from tvl_align.system.runtime import keep_freed_memory
from tvl_align.system.signals import StopSignals
from tvl_align.training.engine import Learner, make_accelerator, train_one_epoch
from tvl_align.training.optimisation import Schedule, backward_and_step, make_adamw
from tvl_align.training.run import Progress

EXAMPLES = ("make bench", "tvl-align bench --parts step engine --turns 3")


@dataclass(frozen=True)
class BenchConfig:
    """Measure time and memory as ratios to a reference."""

    out: Path = Path("bench.json")
    """Output file; the part growth writes growth.json and growth.png beside it."""
    batch: int = 256
    """Rows of a training step."""
    width: int = 768
    """Width of the registers."""
    gallery: int = 8000
    """Gallery size of timed retrieval."""
    large_gallery: int = 44_000
    """Gallery size of retrieval whose memory is measured."""
    search_rows: int = 1_000_000
    """Rows of the gallery of the part search, of width 256; 100 queries ask for 5 each."""
    rows: int = 40_000
    """Training rows of the smaller store of the memory measurement; the larger store has 10 times as many."""
    pictures: int = 64
    """Rows to encode with ViT-L-14; 32 times as many with the small encoders."""
    turns: int = 5
    """Timed runs of either side of a ratio; the best counts."""
    parts: tuple[str, ...] = (
        *(
            "startup",
            "encode",
            "step",
            "engine",
            "accumulation",
            "retrieval",
            "search",
            "probes",
            "store",
            "processes",
            "memory",
            "growth",
        ),
    )
    """Parts to measure."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch", "width", "gallery", "large_gallery", "search_rows", "rows", "pictures", "turns")


@dataclass(frozen=True)
class Figure:
    """One measurement: `ours` and `reference` in `unit`, and their quotient `ratio`."""

    name: str
    ours: float
    reference: float
    ratio: float
    unit: str


def bench(config: BenchConfig) -> list[Figure]:
    """Measure the parts, write the figures to `config.out`, print them as a table and return them.

    Raises UserError for an unknown part.
    """
    functions = {
        "startup": _startup,
        "step": _step,
        "engine": _engine,
        "accumulation": _accumulation,
        "retrieval": _retrieval,
        "search": _search,
        "probes": _probes,
        "store": _store_and_encoders,
        "encode": _encode,
        "processes": _processes,
        "memory": _memory,
        "growth": _growth,
    }
    unknown = [name for name in config.parts if name not in functions]
    if unknown:
        raise UserError(f"unknown part {unknown[0]!r}; --parts takes {', '.join(functions)}.")
    keep_freed_memory()  # as in training and encoding
    figures: list[Figure] = []
    with progress(len(config.parts), "bench", "part") as bar:
        for name in config.parts:
            bar.set_postfix_str(name)
            figures += functions[name](config)
            records = [asdict(f) for f in figures] + [{"made_by": provenance(), "threads": torch.get_num_threads()}]
            write_atomically(config.out, json.dumps(records, indent=1, allow_nan=False))
            bar.update()
    table = Table(title="cost, ours / reference", title_justify="left")
    for column in ("what", "ours", "reference", "ratio", "unit"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right")
    for f in figures:
        table.add_row(f.name, f"{f.ours:.4g}", f"{f.reference:.4g}", f"{f.ratio:.2f}", f.unit)
    Console().print(table)
    return figures


def compare(name: str, ours: Callable[[], Any], reference: Callable[[], Any], turns: int, warm: bool = True) -> Figure:
    """Time two functions alternately, `turns` times each; the best time counts. warm: call both once before."""
    if warm:
        ours(), reference()
    best = [float("inf"), float("inf")]
    for _ in range(turns):
        for i, function in enumerate((ours, reference)):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
    return Figure(name, best[0], best[1], best[0] / best[1], "s")


class Operators(TorchDispatchMode):
    """Counts the operators inside the context: on a GPU kernels to launch. Views launch nothing and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        aliases = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        is_view = aliases or func is torch.ops.aten._unsafe_view.default or func.namespace == "profiler"
        self.count += not is_view
        return func(*args, **(kwargs or {}))


class MatrixProducts(TorchDispatchMode):
    """Records the operand shapes of every matrix product inside the context, including those of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[Sequence[int], Sequence[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.shapes.append((args[0].shape, args[1].shape))
        elif func in (torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default):
            self.shapes.append((args[1].shape, args[2].shape))
        elif func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self._attention(*(t.shape for t in args[:3]))
        elif func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            q, k, v = (t.shape for t in args[1:4])
            self._attention(q, k, v)  # recomputes the scores; then the gradients of values, queries and keys
            self.shapes += [((*q[:3], k[2]), k), ((*q[:2], k[2], q[2]), q), ((*q[:2], k[2], q[2]), q)]
        return func(*args, **(kwargs or {}))

    def _attention(self, q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> None:
        self.shapes += [(q, (*q[:2], q[3], k[2])), ((*q[:3], k[2]), v)]

    def replay(self, cold: bool = False) -> Callable[[], None]:
        """A function that runs the recorded products on random operands.

        By default operands of the same shape share memory, so they may stay in the CPU cache. cold: every product has
        operands of its own, as in the recorded code.
        """
        shared = {tuple(shape): torch.randn(*shape) for pair in self.shapes for shape in pair}

        def operand(shape: Sequence[int]) -> Tensor:
            return shared[tuple(shape)].clone() if cold else shared[tuple(shape)]

        operands = [(operand(a), operand(b)) for a, b in self.shapes]

        def run() -> None:
            for a, b in operands:
                torch.matmul(a, b)

        return run


def training_step(
    name: str, config: BenchConfig, specs: Any = SMALL, features: Features | None = None, condensed: bool = False
) -> Callable[[], None]:
    """A training step of a method on one batch in memory; condensed: as the engine gives it to the model."""
    features = random_features(specs, config.batch) if features is None else features
    method = METHODS[name]
    knobs = method.knobs(register_token_dim=config.width)
    torch.manual_seed(0)
    model, loss = method.model(knobs, specs).train(), method.loss(knobs, list(specs))
    optimizer = make_adamw(model.named_parameters(), 0.05)
    if condensed:
        features = jobs.condensed(model, features)
    return lambda: backward_and_step(loss(model(features, joint=False))["total_loss"], optimizer, 1e-5)


def _startup(config: BenchConfig) -> Iterator[Figure]:
    """Seconds until a command answers, in a new process, against the import of torch alone."""
    python, tool = sys.executable, str(Path(sys.executable).parent / "tvl-align")
    imports_torch = [python, "-c", "import torch"]
    for command in ([python, "-c", "import tvl_align"], [tool, "--help"], [tool, "train", "--help"]):
        name = " ".join(Path(part).name if part == command[0] else part for part in command)
        yield compare(
            f"{name} / import torch", partial(_quietly, command), partial(_quietly, imports_torch), config.turns, warm=False
        )


def _quietly(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _step(config: BenchConfig) -> Iterator[Figure]:
    """A training step relative to its matrix products, and to a step that projects every token to keys and values."""
    size = f"batch {config.batch}, width {config.width}"
    for name in ("base", "cursor"):
        step = training_step(name, config)
        with MatrixProducts() as products:
            step()
        for what, cold in (("its matrix products", False), ("the same on operands of their own", True)):
            yield compare(f"step of {name} ({size}) / {what}", step, products.replay(cold), config.turns)
    for name in METHODS:
        step = training_step(name, config, condensed=True)
        step()
        with Operators() as operators, MatrixProducts() as products:
            step()
        count = len(products.shapes)
        yield Figure(f"step of {name}: operators / matrix products", operators.count, count, operators.count / count, "")


def _engine(config: BenchConfig) -> Iterator[Figure]:
    """An epoch of the training loop (reading features, sampling, checks, logging) relative to its training steps."""
    count = 16
    with jobs.temporary_folder() as folder:
        jobs.write_store(folder / "store", SMALL, count * config.batch)
        settings = jobs.run_settings(folder / "store", folder, config.batch, config.width)
        method, accelerator = METHODS["base"], make_accelerator(settings)
        torch.manual_seed(0)
        model, loss = method.model(settings.knobs, SMALL).train(), method.loss(settings.knobs, MODALITIES)
        source = FeatureStore(folder / "store").splits["train"].condensed(model.condense, accelerator.device)
        optimizer = make_adamw(model.named_parameters(), 0.05)
        rows = torch.arange(count * config.batch).split(config.batch)
        batches = list(source.batches(rows, [torch.zeros_like(r) for r in rows], accelerator.device))

        learner = Learner(model, model, loss, optimizer, accelerator)

        def loop() -> None:
            train_one_epoch(learner, source, settings, Schedule(1e-5, count, 0), Progress(), StopSignals())

        def bare() -> None:
            for features in batches:
                kept = model.draw_kept(len(features))
                backward_and_step(loss(model(features, kept=kept, joint=False))["total_loss"], optimizer, 1e-5)

        yield compare(f"epoch of {count} steps in the engine / its bare steps", loop, bare, max(1, config.turns // 2))


def _accumulation(config: BenchConfig) -> Iterator[Figure]:
    """The exact gradient of a batch in micro-batches: time relative to the full batch, memory relative to both."""
    in_parts, at_once = (jobs.batch_gradient(config.batch, n) for n in (4, 1))
    yield compare("gradient of a batch in 4 parts / at once", in_parts, at_once, config.turns)
    rows = 8 * config.batch
    for what, live in (("memory in use", True), ("resident memory", False)):
        parts_mb, one_part_mb, at_once_mb = (
            jobs.cost(jobs.batch_gradient, *x, live=live).megabytes for x in ((rows, 8), (config.batch, 1), (rows, 1))
        )
        name = f"{what}: batch of {rows} in 8 parts"
        yield Figure(f"{name} / one part", parts_mb, one_part_mb, parts_mb / one_part_mb, "MB")
        yield Figure(f"{name} / at once", parts_mb, at_once_mb, parts_mb / at_once_mb, "MB")


def _retrieval(config: BenchConfig) -> Iterator[Figure]:
    """Retrieval over the full gallery in both directions, relative to the one matrix product that it needs."""
    x, y = jobs.unit_rows(config.gallery, 768)
    captions = torch.randint(200, (config.gallery, 1), generator=torch.Generator().manual_seed(0)).expand(-1, 2)
    present = torch.ones(config.gallery, dtype=torch.bool)

    def bare() -> None:
        for rows in x.split(1024):
            rows @ y.T

    for what, keys in (("one partner each", None), ("200 captions", captions)):
        name = f"retrieval, gallery {config.gallery}, {what} / its matrix product"
        yield compare(name, lambda keys=keys: retrieval(x, y, present, keys), bare, config.turns)
    measured = jobs.cost(jobs.gallery_retrieval, config.large_gallery)
    features_mb = 2 * config.large_gallery * 768 * 4 / 2**20
    name = f"retrieval, gallery {config.large_gallery}: memory above the features / the features"
    yield Figure(name, measured.megabytes, features_mb, measured.megabytes / features_mb, "MB")


def _search(config: BenchConfig) -> Iterator[Figure]:
    """Exact search relative to the matrix product that it needs, its memory, and what faiss gains and misses."""
    vectors, queries = jobs.clustered_rows(config.search_rows, queries=100)
    index = Index.build(vectors, [str(row) for row in range(len(vectors))], made_by="bench", modality="vision")
    del vectors

    def exact() -> Found:
        return index.search(queries, 5)

    def bare() -> None:
        for block in index.vectors.split(ROWS):
            queries @ block.T

    size = f"{len(index)} rows"
    yield compare(f"search, {size}, 100 queries / its matrix product", exact, bare, config.turns)
    with jobs.temporary_folder() as folder:
        index.save(folder)
        measured = jobs.cost(jobs.saved_search, folder, queries, 5)
    vectors_mb = index.vectors.nbytes / 2**20
    name = f"search, {size}, saved: memory / the vectors"
    yield Figure(name, measured.megabytes, vectors_mb, measured.megabytes / vectors_mb, "MB")
    if importlib.util.find_spec("faiss") is None:
        return

    def approximate() -> Found:
        return index.search(queries, 5, approximate=True)

    start = time.perf_counter()
    found = approximate()  # clusters the gallery
    seconds = time.perf_counter() - start
    figure = compare(f"search, {size}, approximate / exact", approximate, exact, config.turns)
    name = f"search, {size}, clustering the gallery once / an exact search"
    yield Figure(name, seconds, figure.reference, seconds / figure.reference, "s")
    yield figure
    recall = 100 * (found.rows[:, :, None] == exact().rows[:, None]).any(2).float().mean().item()
    yield Figure(f"search, {size}, approximate: recall@5 / exact", recall, 100.0, recall / 100, "%")


def _probes(config: BenchConfig) -> Iterator[Figure]:
    """Fitting probes of one kind for 5 factors and predicting with them, on one core, relative to their matrix products."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (config.gallery,), generator=g)
    rows = torch.randn(config.gallery, 768, generator=g) + 0.05 * torch.randn(5, 768, generator=g)[labels]
    tokens = random_features(SMALL, config.batch).modalities["vision"]
    inputs: dict[ProbeKind, Sequence[Tensor]] = {"linear": [rows], "mlp": [rows], "attentive": [tokens.tokens, tokens.mask]}
    for kind, content in inputs.items():
        targets = [Target(labels[: len(content[0])], 5)] * 5
        fitting = partial(fit_probes, [Problem(content, targets, content, frozen=True)], (kind,), max_steps=40)
        with MatrixProducts() as products:
            fitting()
        name = f"{kind} probes, 5 factors, {len(content[0])} rows / their matrix products"
        with jobs.one_thread():
            figure = compare(name, fitting, products.replay(), config.turns)
        yield figure


def random_stage1(clip_name: str, touch: dict[str, Any]) -> Stage1:
    register_small_clip()
    clip = open_clip.create_model(clip_name, pretrained=None)
    tokenizer, width = open_clip.get_tokenizer(clip_name), clip.text_projection.shape[-1]
    return Stage1(clip, tokenizer, create_touch_encoder("vit_tiny_patch16_224", width, touch)).freeze()


# (label, CLIP model, touch overrides, m, d): m * BenchConfig.pictures rows are stored, a batch has BenchConfig.pictures / d
SIZES = (("small Stage 1", SMALL_CLIP, SMALL_TOUCH, 32, 1), ("ViT-L-14 and ViT-Tiny at 224", "ViT-L-14", {}, 1, 8))


def _store_and_encoders(config: BenchConfig) -> Iterator[Figure]:
    """Training with encoding on the fly relative to training on stored features, seconds per row and view."""
    for label, clip_name, touch, _, divisor in SIZES:
        stage1 = random_stage1(clip_name, touch)
        rows = max(1, config.pictures // divisor)
        raw = {m: torch.randn(rows, 3, s, s) for m, s in (("vision", stage1.photo_size), ("tactile", stage1.touch_size))}
        raw["text"] = stage1.tokenize(["grooved, coarse and a little sticky"] * rows)
        stored = stage1.encode(raw)
        batch = stored.map(lambda t, rows=rows: t[torch.arange(config.batch) % rows])
        for name in ("base", "cursor"):
            step = training_step(name, config, stage1.specs, batch)
            timed = compare("", lambda s=stage1, r=raw: s.encode(r), step, 2)
            encoded, trained = timed.ours / rows, timed.reference / config.batch
            title = f"row of an epoch of {name} through the encoders / from the store ({label})"
            yield Figure(title, encoded + trained, trained, (encoded + trained) / trained, "s")


def _encode(config: BenchConfig) -> Iterator[Figure]:
    """`tvl-align encode` relative to the forward passes of the encoders on decoded images in memory."""
    for label, clip_name, touch, multiple, _ in SIZES:
        stage1, rows = random_stage1(clip_name, touch), multiple * config.pictures
        with jobs.temporary_folder() as folder:
            world = write_world(folder / "world", rows, 32, seed=0, quiet=True)
            options = ImageOptions(stage1.photo_size, stage1.touch_size)
            samples = {"train": make_samples(read_tvl(world), options, TextOptions(), 0)["train"]}
            count = len(samples["train"])
            batches = [[(i, 0) for i in rows.tolist()] for rows in torch.arange(count).split(ENCODE_BATCH)]
            loaded = load_images(samples["train"], batches, 0, stage1.modalities)
            images = [{m: x for m, (_, x) in batch.images.items()} for batch in loaded]
            texts = sorted({str(samples["train"].sentence(i, 0)) for i in range(count)})
            ids = stage1.tokenize(texts).split(ENCODE_BATCH)
            numbers = itertools.count()
            assert stage1.specs  # encodes a blank row once per process; excluded from the measured time

            def ours(stage1: Stage1 = stage1, samples: Any = samples, folder: Path = folder, numbers: Any = numbers) -> None:
                open_or_encode(folder / f"store{next(numbers)}", stage1, samples, 0, 2)

            def bare(stage1: Stage1 = stage1, images: Any = images, ids: Any = ids) -> None:
                for batch in images:
                    stage1.encode(batch)
                for batch in ids:
                    stage1.encode({"text": batch})

            yield compare(f"encode {count} rows / bare forward pass ({label})", ours, bare, 2, warm=multiple > 1)
            registers = random_registers(stage1, options, folder)
            given = [{m: str(world / str(getattr(row, m))) for m in PICTURES} for row in samples["train"].rows]

            def embed(registers: Registers = registers, given: Any = given) -> None:
                registers.embed(*([row[m] for row in given] for m in PICTURES), batch_size=ENCODE_BATCH)

            def bare_images(stage1: Stage1 = stage1, images: Any = images) -> None:
                for batch in images:
                    stage1.encode(batch)

            yield compare(f"embed {count} rows / bare forward pass ({label})", embed, bare_images, 2, warm=multiple > 1)


def random_registers(stage1: Stage1, options: ImageOptions, folder: Path) -> Registers:
    """A base model with random weights, as `tvl_align.load` gives one."""
    method, settings = METHODS["base"], jobs.run_settings(folder / "none", folder, 64, 256)
    features = {"encoders": stage1.fingerprint(), "images": asdict(options), "text": {"prompt": ""}}
    config = {"implementation": asdict(method.implementation), "store": None, "features": features}
    model = method.model(settings.knobs, stage1.specs)
    device = torch.device("cpu")
    return Registers(model, stage1.specs, method, settings, config, folder, device, "checkpoint.pth", stage1)


def _processes(config: BenchConfig) -> Iterator[Figure]:
    """An epoch of 3 steps on 1 process relative to 2 processes, 1 thread each, with the same global batch. Ideal ratio: 2.

    Each step the processes exchange the gradients of all weights, whose size does not depend on the batch.
    """
    for name, batch in product(("base", "cursor"), (config.batch, 4 * config.batch)):
        with jobs.temporary_folder() as folder:
            jobs.write_store(folder / "store", SMALL, 3 * batch, validation=config.batch)
            costs = [jobs.epoch_on_processes(folder / "store", name, n, batch, config.width) for n in (1, 2)]
            one, two = (cost.seconds for cost in costs)
            title = f"epoch of {name} (width {config.width}, joined batch {batch}) on 1 process / on 2"
            yield Figure(title, one, two, one / two, "s")
    one, two = (jobs.products_at_once(n, 4 * config.batch, config.width) for n in (1, 2))
    yield Figure("bare matrix products on 1 process / on 2, which exchange nothing", one, two, one / two, "s")


def _memory(config: BenchConfig) -> Iterator[Figure]:
    """Peak resident memory of a training run, mapped pages included, on a store with 10 times as many rows."""
    specs = {m: FeatureSpec(64, 4, 64) for m in ("vision", "tactile")}
    megabytes = []
    for rows in (10 * config.rows, config.rows):
        with jobs.temporary_folder() as folder:
            jobs.cost(_write, folder / "store", specs, rows)
            megabytes.append(jobs.cost(jobs.training, folder / "store", 1024, 64).megabytes)
    large, small = megabytes
    name = f"peak memory of a training on {10 * config.rows} rows / on {config.rows}"
    yield Figure(name, large, small, large / small, "MB")


def _write(*args: Any) -> Callable[[], None]:
    return lambda: jobs.write_store(*args)


def _growth(config: BenchConfig) -> Iterator[Figure]:
    """Time and memory as functions of rows, registers, tokens, gallery size and processes -> growth.json and growth.png."""
    scale = config.rows / 40_000
    curves: dict[str, list[dict[str, float]]] = {"rows": []}

    def add(variable: str, value: float, cost: jobs.Cost) -> None:
        curves.setdefault(variable, []).append({"at": value, "seconds": cost.seconds, "megabytes": cost.megabytes})

    specs = {m: FeatureSpec(64, 4, 64) for m in ("vision", "tactile")}
    for rows in (int(4000 * scale), int(40_000 * scale), int(400_000 * scale)):
        with jobs.temporary_folder() as folder:
            jobs.cost(_write, folder / "store", specs, rows)
            add("rows", rows, jobs.cost(jobs.training, folder / "store", 256, 64))
    for registers in (4, 8, 16, 32, 64):
        add("registers", registers, jobs.cost(jobs.steps, registers, 17, turns=4))
    for tokens in (1, 4, 16, 64, 256):
        add("key tokens", tokens, jobs.cost(jobs.steps, 4, tokens, turns=4))
    for rows in (1000, 4000, 16_000):
        add("gallery", int(rows * scale), jobs.cost(jobs.gallery_retrieval, int(rows * scale), turns=4))
    with jobs.temporary_folder() as folder:
        jobs.write_store(folder / "store", SMALL, 8 * config.batch, validation=config.batch)
        for processes in (1, 2):
            cost = jobs.epoch_on_processes(folder / "store", "base", processes, config.batch, config.width // 3)
            add("processes", processes, cost)
    out = config.out.with_name("growth.json")
    write_atomically(out, json.dumps({"made_by": provenance(), "growth": curves}, indent=1, allow_nan=False))
    with atomic_file(out.with_suffix(".png")) as file:
        file.write(growth_curves(curves))
    yield from ()


@reports_errors
def main() -> None:
    bench(parse(BenchConfig, prog="python -m benchmarks.speed", examples=EXAMPLES))


if __name__ == "__main__":
    main()
