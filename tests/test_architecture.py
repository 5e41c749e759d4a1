"""The house: imports point one way, packages are empty, the README's tree is the disk's, one loop takes gradients."""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for top in ("tvl_align", "experiments") for p in (ROOT / top).rglob("*.py"))
ENTRIES = {"main_train_stage2.py", "test_modules.py", "train.py"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    names = {name_of(p) for p in SOURCES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & names


def test_the_library_knows_no_experiment() -> None:
    for path in SOURCES:
        if path.is_relative_to(ROOT / "tvl_align"):
            assert not any(name.startswith("experiments") for name in imports(path)), path


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


def test_packages_are_empty() -> None:
    for path in ROOT.glob("tvl_align/**/__init__.py"):
        assert not path.read_text(), path


def test_gradients_are_taken_in_one_place() -> None:
    callers = [p.name for p in SOURCES if re.search(r"\.backward\b", p.read_text()) and p.name not in ENTRIES]
    assert callers == ["engine_stage2.py", "optimisation.py"]  # the engine hands accelerate's to descend()


def test_only_entry_files_touch_the_import_path() -> None:
    touching = {p.name for p in SOURCES if "sys.path" in p.read_text()}
    assert touching <= ENTRIES
    for path in SOURCES:
        if path.name in touching:
            lines = re.findall(r"sys\.path.*", path.read_text())
            assert len(lines) == 1
            assert re.fullmatch(r"sys\.path\[0\] = str\(Path\(__file__\)\.resolve\(\)\.parents\[[23]\]\)  # .*", lines[0])


def test_nothing_loads_pickles_or_hides_warnings() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert "weights_only=False" not in text, path
        assert 'filterwarnings("ignore' not in text, path
        assert "allow_pickle=True" not in text, path


def test_the_tree_in_the_readme_is_the_one_on_disk() -> None:
    tree = re.search(r"## The tree\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert tree is not None
    named, folders = set(), [""]
    for line in tree[1].splitlines():
        entry = re.match(r"( *)(\S+)", line)
        if entry is None:
            continue
        depth = len(entry[1]) // 2
        path = "/".join([*folders[1 : depth + 1], entry[2]]).replace("//", "/")
        if entry[2].endswith("/"):
            folders = [*folders[: depth + 1], entry[2].rstrip("/")]
        named.add(path)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    code = {f for f in tracked if f.endswith(".py") and not f.endswith("__init__.py") and not f.startswith("tests/")}
    files = {f for f in named if not f.endswith("/")}
    assert code <= files, f"not in the tree: {sorted(code - files)}"
    assert all((ROOT / f).exists() for f in named), [f for f in named if not (ROOT / f).exists()]
