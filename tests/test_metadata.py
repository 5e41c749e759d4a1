"""Metadata: first lines, READMEs and METHODS agree on experiment ID and version. Both ways to add a method work."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import processes
import pytest

from tvl_align.contract import Method
from tvl_align.features.store import FeatureStore
from tvl_align.methods.registry import METHODS, load_method
from tvl_align.system.console import UserError
from tvl_align.system.modules import import_named

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
STAGE2 = ROOT / "experiments" / "stage2"
LIBRARY = ROOT / "tvl_align" / "methods"
BASE_FILES = ["tvl_stage2.py", "loss_stage2.py"]
METADATA = (
    "Origin of the idea",
    "Date",
    "Experiment ID",
    "Version",
    "Approach",
    "Design decisions",
    "Usage",
    "Known limits",
)


def files_of(name: str) -> tuple[list[Path], Path]:
    """The source files of a method, with its entry points, and its README."""
    folder, code = STAGE2 / name, [LIBRARY / f"{name}.py"]
    if name == "base":
        return [*code, *(STAGE2 / f for f in BASE_FILES)], STAGE2 / "README.md"
    if folder.is_dir():
        return [*code, *sorted(folder.glob("*.py"))], folder / "README.md"
    return [*code, STAGE2 / "variants" / f"{name}.py"], STAGE2 / "variants" / "README.md"


@pytest.mark.parametrize(("name", "method"), METHODS.items(), ids=METHODS)
def test_experiment_id_and_version_are_the_same_everywhere(name: str, method: Method) -> None:
    title = f"{method.implementation.experiment_id} v{method.implementation.version}"
    code, readme = files_of(name)
    assert code
    for path in code:
        assert path.read_text().splitlines()[0].startswith(f'"""{title}. '), path
    section = re.search(rf"^#+ {re.escape(title)}$(.*?)(?=^#|\Z)", readme.read_text(), re.S | re.M)
    assert section is not None, f"{readme} has no section {title}"
    for entry in METADATA:
        assert f"- **{entry}**: " in section[1], entry
    assert f"- **Experiment ID**: {method.implementation.experiment_id}\n" in section[1]
    assert f"- **Version**: {method.implementation.version}\n" in section[1]


def test_names_and_tags_are_unique() -> None:
    assert len({m.implementation.experiment_id for m in METHODS.values()}) == len(METHODS)
    assert len({m.implementation.tag for m in METHODS.values()}) == len(METHODS)


TOY = '''"""toy_registers v1. One line: shared weights."""

from dataclasses import dataclass

from tvl_align.contract import Implementation, Method
from tvl_align.losses.register_loss import RegisterLoss
from tvl_align.registers.model import RegisterConfig, RegisterModel


@dataclass(frozen=True)
class ToyConfig(RegisterConfig):
    """The registers and their loss."""


class Toy(RegisterModel):
    def __init__(self, specs, knobs):
        super().__init__(specs, knobs, share_weights=True)


TOY = Method(Implementation("toy_registers", "1", "TOY"), ToyConfig, lambda knobs, specs: Toy(specs, knobs), RegisterLoss)
'''


@pytest.fixture
def toy_checkout(tmp_path: Path) -> Path:
    """A checkout with an added method, as in experiments/stage2/README.md: a folder, its README, a line in methods.py."""
    for folder in ("experiments", "tvl_align"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    stage2 = tmp_path / "experiments" / "stage2"
    (stage2 / "toy").mkdir()
    (stage2 / "toy" / "__init__.py").write_text(TOY)
    (stage2 / "toy" / "README.md").write_text("# toy_registers v1\n")
    text = (stage2 / "methods.py").read_text()
    anchor = "from tvl_align.contract import Method\n"
    assert anchor in text and "    **SHIPPED,\n" in text
    text = text.replace(anchor, f"from experiments.stage2.toy import TOY\n{anchor}")
    (stage2 / "methods.py").write_text(text.replace("    **SHIPPED,\n", '    **SHIPPED,\n    "toy": TOY,\n'))
    return tmp_path


@pytest.mark.slow
def test_an_added_folder_and_line_make_a_method_that_is_checked(toy_checkout: Path) -> None:
    command = [sys.executable, toy_checkout / "experiments" / "stage2" / "test_modules.py", "toy"]
    code, output = processes.run(command, cwd=toy_checkout)
    assert code == 0, output
    assert "ok  toy: two processes" in output


def small_store(folder: Path) -> Path:
    g = np.random.default_rng(0)
    split = np.array(["train"] * 64 + ["val"] * 16 + ["test"] * 16)
    shared = g.normal(size=(96, 4, 16))
    arrays = {m: shared + g.normal(size=shared.shape) for m in ("left", "right")}
    labels = {"sign": (shared.mean((1, 2)) > 0).astype(int)}
    return FeatureStore.from_arrays(arrays, folder, split=split, labels=labels, owners={"sign": ["left", "right"]}).folder


SMALL = "--register_token_dim 32 --num_heads 4 --batch_size 16 --epochs 1 --warmup_epochs 0 --device cpu --lr 1e-3"


@pytest.mark.slow
def test_an_added_method_trains_from_the_entry_file(toy_checkout: Path, tmp_path: Path) -> None:
    entry = toy_checkout / "experiments" / "stage2" / "main_train_stage2.py"
    flags = f"--method toy --store {small_store(tmp_path / 'store')} --output_dir {tmp_path} --log_name toy {SMALL}"
    code, output = processes.run([sys.executable, entry, *flags.split()], cwd=tmp_path)
    assert code == 0, output
    assert "[TOY] toy_registers v1" in output
    command = [BIN / "tvl-align", "evaluate", tmp_path / "toy", "--probe_rows", "50", "--probe_steps", "10"]
    code, said = processes.run(command, cwd=toy_checkout)
    assert code == 0, said
    assert "toy_registers v1" in said


@pytest.mark.slow
def test_a_method_from_anywhere_is_trained_measured_compared_and_loaded(tmp_path: Path) -> None:
    """The run folder stores its module path. Nothing inside a run folder is imported."""
    work = tmp_path / "work"
    (work / "mine").mkdir(parents=True)
    (work / "mine" / "__init__.py").write_text("")
    (work / "mine" / "toy.py").write_text(TOY)
    store = small_store(tmp_path / "store")

    def run(line: str, expect: int = 0, folder: Path = work) -> str:
        code, output = processes.run([BIN / "tvl-align", *line.split()], cwd=folder)
        assert code == expect, output
        return output

    output = run(f"train --method mine.toy:TOY --store {store} --log_name own {SMALL}")
    assert "[TOY] toy_registers v1" in output
    run(f"train --store {store} --log_name base {SMALL}")
    assert "toy_registers v1" in run("evaluate output_dir/own --probe_rows 50 --probe_steps 10")
    run("evaluate output_dir/base --probe_rows 50 --probe_steps 10")
    run("compare output_dir/own output_dir/base")
    assert "toy_registers v1" in (work / "comparison" / "report.md").read_text()
    assert "toy_registers" in run(
        "evaluate output_dir/own --method mine.toy:TOY --probe_rows 50 --probe_steps 10 --split val"
    )
    assert "give its own --method" in run("evaluate output_dir/own --method base", expect=2)
    elsewhere = run(f"evaluate {work}/output_dir/own", expect=2, folder=tmp_path)
    assert "there is no module 'mine'" in elsewhere and "Traceback" not in elsewhere
    (work / "mine").rename(work / "output_dir" / "own" / "mine")
    inside = run("evaluate .", expect=2, folder=work / "output_dir" / "own")
    assert "nothing in a run folder is imported" in inside


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "transformer",
            "unknown method 'transformer'; --method takes base, cursor, flextok, matryoshka, disentangled, closed, mlp, or",
        ),
        (
            "broken:TOY",
            r"--method broken:TOY cannot be imported: ZeroDivisionError: division by zero \(.*broken.py, line 1\)",
        ),
        ("broken_name:TOY", "is not defined; it must name a tvl_align.contract.Method"),
        ("broken_name:x", "is a int; it must name a tvl_align.contract.Method"),
    ],
)
def test_unknown_and_broken_methods_are_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "broken_name.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "broken_name", raising=False)
    with pytest.raises(UserError, match=message):
        load_method(name)


def test_the_current_folder_is_importable_only_for_what_is_found_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a folder here with the name of a package that is not installed would count as that package."""
    (tmp_path / "found_here.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = list(sys.path)
    assert import_named("json", "--method", "").__name__ == "json"
    assert sys.path == before
    assert import_named("found_here", "--method", "").x == 1
    assert sys.path == [*before, str(tmp_path)]


def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "docs/PROMISES.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text() if test else (ROOT / file).is_file(), (file, test)
