"""Who made what: first lines, READMEs and METHODS name the same experiment ID and version; five steps add a method."""

import re
import shutil
import sys
from pathlib import Path

import processes
import pytest

from experiments.stage2.methods import METHODS
from tvl_align.contract import Method

ROOT = Path(__file__).parents[1]
STAGE2 = ROOT / "experiments" / "stage2"
BASE_FILES = ["tvl_stage2.py", "loss_stage2.py"]
RECORD = ("Origin of the idea", "Date", "Experiment ID", "Version", "Approach", "Design decisions", "Usage", "Known limits")


def files_of(name: str) -> tuple[list[Path], Path]:
    """The code of a method and the README that records it."""
    if name == "base":
        return [STAGE2 / f for f in BASE_FILES], STAGE2 / "README.md"
    folder = STAGE2 / name
    if folder.is_dir():
        return sorted(folder.glob("*.py")), folder / "README.md"
    return [STAGE2 / "variants" / f"{name}.py"], STAGE2 / "variants" / "README.md"


@pytest.mark.parametrize(("name", "method"), METHODS.items(), ids=METHODS)
def test_experiment_id_and_version_are_the_same_everywhere(name: str, method: Method) -> None:
    who = f"{method.implementation.experiment_id} v{method.implementation.version}"
    code, readme = files_of(name)
    assert code
    for path in code:
        assert path.read_text().splitlines()[0].startswith(f'"""{who}. '), path
    section = re.search(rf"^#+ {re.escape(who)}$(.*?)(?=^#|\Z)", readme.read_text(), re.S | re.M)
    assert section is not None, f"{readme} has no section {who}"
    for entry in RECORD:
        assert f"- **{entry}**: " in section[1], entry
    assert f"- **Experiment ID**: {method.implementation.experiment_id}\n" in section[1]
    assert f"- **Version**: {method.implementation.version}\n" in section[1]


def test_names_and_tags_are_unique() -> None:
    assert len({m.implementation.experiment_id for m in METHODS.values()}) == len(METHODS)
    assert len({m.implementation.tag for m in METHODS.values()}) == len(METHODS)


def test_methods_do_not_import_each_other() -> None:
    for name in METHODS:
        others = [n for n in METHODS if n not in (name, "base")]
        for path in files_of(name)[0]:
            text = path.read_text()
            assert not [o for o in others if re.search(rf"import.*\b{o}\b|stage2\.(variants\.)?{o}\b", text)], path
            assert name == "base" or "tvl_stage2" not in text, path


TOY = '''"""toy_registers v1. One line: shared weights."""

from dataclasses import dataclass

from tvl_align.config import RegisterConfig
from tvl_align.register_model import RegisterModel


@dataclass(frozen=True)
class ToyConfig(RegisterConfig):
    """The registers and their loss."""


class Toy(RegisterModel):
    def __init__(self, specs, knobs):
        super().__init__(specs, knobs, share_weights=True)
'''


def test_the_five_steps_add_a_method(tmp_path: Path) -> None:
    """As the README of stage2 says: a folder, its entry in METHODS, nothing else; then the contract is checked."""
    for folder in ("experiments", "tvl_align"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    stage2 = tmp_path / "experiments" / "stage2"
    (stage2 / "toy").mkdir()
    (stage2 / "toy" / "toy.py").write_text(TOY)
    methods = stage2 / "methods.py"
    entry = (
        '    "toy": Method(Implementation("toy_registers", "1", "TOY"), ToyConfig, '
        "lambda knobs, specs: Toy(specs, knobs), RegisterLoss),\n}"
    )
    text = methods.read_text().rstrip()
    assert text.endswith("}")
    head = "from experiments.stage2.toy.toy import Toy, ToyConfig\n"
    anchor = "from tvl_align.alignment import RegisterLoss\n"
    assert anchor in text
    methods.write_text(text[:-1].replace(anchor, head + anchor, 1) + entry + "\n")
    code, said = processes.run([sys.executable, stage2 / "test_modules.py"], cwd=tmp_path)
    assert code == 0, said
    assert "ok  toy: two processes" in said


def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "docs/PROMISES.md").read_text()
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text() if test else (ROOT / file).is_file(), (file, test)
