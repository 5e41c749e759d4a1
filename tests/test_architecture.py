"""The house: floors, no cycles, thin doors, one loop that takes gradients, a tree in the docs that is the disk's."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for top in ("tvl_align", "experiments", "benchmarks") for p in (ROOT / top).rglob("*.py"))
ENTRIES = {"main_train_stage2.py", "test_modules.py", "train.py"}
DOORS = sorted(p for p in SOURCES if p.is_relative_to(ROOT / "experiments"))

# Rooms by floor. An import points into its own room or to a lower floor, never up and never to a neighbour.
FLOORS = (
    ("tvl_align.system", "tvl_align.contract"),
    ("tvl_align.config",),
    ("tvl_align.data", "tvl_align.encoders"),
    ("tvl_align.registers", "tvl_align.features"),
    ("tvl_align.losses",),
    ("tvl_align.metrics", "tvl_align.methods"),
    ("tvl_align.training",),
    ("tvl_align.evaluation",),
    ("tvl_align.report", "tvl_align.inference"),
    ("tvl_align.synthetic",),
    ("tvl_align.cli",),
    ("tvl_align.__main__", "experiments", "benchmarks"),
)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(p) for p in SOURCES}


def imports(path: Path) -> set[str]:
    """Modules of this repository that a file imports, wherever in the file; the package itself (its version) excepted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & NAMES) - {"tvl_align"}


def room_of(module: str) -> str:
    rooms = [room for floor in FLOORS for room in floor if module == room or module.startswith(f"{room}.")]
    assert len(rooms) == 1, f"{module} lies in {rooms or 'no room'}"
    return rooms[0]


def floor_of(room: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if room in floor)


def test_every_import_points_down() -> None:
    wrong = []
    for path in SOURCES:
        module = name_of(path)
        if module == "tvl_align":  # public names, resolved on first use
            continue
        here = room_of(module)
        for other in imports(path):
            there = room_of(other)
            if there != here and floor_of(there) >= floor_of(here):
                wrong.append(f"{module} imports {other}")
    assert not wrong, wrong


def test_importing_the_package_imports_no_room() -> None:
    tree = ast.parse((ROOT / "tvl_align/__init__.py").read_text(encoding="utf-8"))
    top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert {n.names[0].name if isinstance(n, ast.Import) else n.module for n in top} == {
        *("importlib", "importlib.metadata", "typing"),
    }


def test_the_library_knows_no_door() -> None:
    for path in SOURCES:
        if path.is_relative_to(ROOT / "tvl_align"):
            assert not re.search(r"^\s*(from|import) (experiments|benchmarks)\b", path.read_text(), re.M), path


def test_no_import_cycle() -> None:
    graph = {name_of(p): imports(p) - {name_of(p)} for p in SOURCES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_methods_import_no_other_method() -> None:
    """Except an ablation, which is the method that it ablates with another default."""
    shipped = {p.stem for p in (ROOT / "tvl_align/methods").glob("*.py")} & {
        *("base", "cursor", "flextok", "matryoshka", "disentangled", "closed", "mlp"),
    }
    assert len(shipped) == 7
    for name in shipped:
        allowed = {name, "base"} if name == "disentangled" else {name}
        others = {f"tvl_align.methods.{other}" for other in shipped - allowed} | {"tvl_align.methods.registry"}
        assert not imports(ROOT / f"tvl_align/methods/{name}.py") & others, name


@pytest.mark.parametrize("path", DOORS, ids=lambda p: str(p.relative_to(ROOT)))
def test_doors_are_thin(path: Path) -> None:
    """They re-export or call; they define nothing."""
    defined = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert not defined
    assert len(path.read_text().splitlines()) <= 20


def test_rooms_are_opened_by_name() -> None:
    for path in ROOT.glob("tvl_align/*/__init__.py"):
        assert not path.read_text(), path


def test_gradients_are_taken_in_one_place() -> None:
    found = {p.name for p in SOURCES if re.search(r"\.backward\b", p.read_text())}
    assert found - {"checks.py"} == {"engine.py", "optimisation.py"}  # the engine hands accelerate's to the optimiser's


def test_only_entry_files_touch_the_import_path() -> None:
    """And `system/modules.py`, which makes the current folder importable, last, for a module that the user names."""
    touching = {p for p in SOURCES if "sys.path" in p.read_text()}
    imports = ROOT / "tvl_align/system/modules.py"
    assert {p.name for p in touching - {imports}} <= ENTRIES
    assert re.findall(r"sys\.path\.\w+\(.*", imports.read_text()) == [
        "sys.path.append(str(Path.cwd()))  # last, so that nothing installed is shadowed"
    ]
    for path in touching - {imports}:
        lines = re.findall(r"sys\.path.*", path.read_text())
        assert len(lines) == 1
        assert re.fullmatch(r"sys\.path\[0\] = str\(Path\(__file__\)\.resolve\(\)\.parents\[[23]\]\)  # .*", lines[0])


def test_nothing_loads_pickles_or_hides_warnings() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert "weights_only=False" not in text, path
        assert 'filterwarnings("ignore' not in text, path
        assert "allow_pickle=True" not in text, path


def test_the_tree_in_the_design_is_the_one_on_disk() -> None:
    """One line a room: every room of the disk is in the tree, and nothing else."""
    tree = re.search(r"## The tree\n.*?```\n(.*?)```", (ROOT / "docs/DESIGN.md").read_text(), re.S)
    assert tree is not None
    named, above = set(), ""
    for line in tree[1].splitlines():
        entry = re.match(r"( *)(\S+)", line)
        if entry is None:
            continue
        above = "" if not entry[1] else above
        named.add(f"{above}{entry[2]}")
        above = entry[2] if not entry[1] and entry[2].endswith("/") else above
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    code = {p for p in tracked if p.endswith(".py")}
    rooms = {f"{p.split('/')[0]}/" for p in code}
    rooms |= {"/".join(p.split("/")[:2]) + "/" for p in code if p.startswith("tvl_align/") and p.count("/") > 1}
    files = {p for p in code if re.fullmatch(r"tvl_align/(?!__)\w+\.py", p)}
    assert rooms | files <= named, f"not in the tree: {sorted((rooms | files) - named)}"
    assert all((ROOT / f).exists() for f in named), [f for f in named if not (ROOT / f).exists()]


def test_test_files_have_different_names() -> None:
    """pytest imports them by their names alone: of two that are called the same it runs one."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("conftest.py", "__init__.py")]
    assert sorted(names) == sorted(set(names))
