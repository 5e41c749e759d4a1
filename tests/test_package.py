"""Packaging: contents of the wheel, the installed package outside the checkout, dependencies and extras."""

import ast
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import processes
import pytest

from tvl_align.cli.main import COMMANDS
from tvl_align.system.console import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]


def environment(path: Path | None = None) -> dict[str, str]:
    """Environment variables without PYTHONPATH; path: folder to put first in PATH."""
    known = {name: value for name, value in processes.quiet().items() if name != "PYTHONPATH"}
    return known | ({"PATH": os.pathsep.join([str(path), known["PATH"]])} if path else {})


def run(command: str | list[str | Path], folder: Path, expect: int = 0, path: Path | None = None) -> str:
    parts = shlex.split(command) if isinstance(command, str) else command
    code, said = processes.run(parts, cwd=folder, env=environment(path))
    assert code == expect, f"{command}\nexit code {code}\n{said}"
    return said


def normal(name: str) -> str:
    """Normalised distribution name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirements: list[str]) -> set[str]:
    """Names of the required distributions, including those of this package's own extras."""
    found = set()
    for requirement in requirements:
        match = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement)
        assert match is not None, requirement
        if normal(match[1]) == PROJECT["name"]:
            for extra in match[2].split(","):
                found |= required(PROJECT["optional-dependencies"][extra])
        else:
            found.add(normal(match[1]))
    return found


PLAIN = required(PROJECT["dependencies"])


def distribution(module: str) -> str:
    return {"sklearn": "scikit-learn", "faiss": "faiss-cpu"}.get(module, normal(module))


@pytest.mark.parametrize(("module", "extra"), EXTRAS.items())
def test_extras_contain_the_packages_that_errors_name(module: str, extra: str) -> None:
    assert distribution(module) in required(PROJECT["optional-dependencies"][extra])
    assert distribution(module) not in PLAIN


def test_every_import_is_a_dependency() -> None:
    """Either a plain dependency or a package listed in EXTRAS."""
    known = {module: {normal(name) for name in names} for module, names in packages_distributions().items()}
    imported: dict[str, Path] = {}
    for path in sorted((ROOT / "tvl_align").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported.setdefault(node.module.partition(".")[0], path)
            elif isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0]: path for alias in node.names}
    others = {name: path for name, path in imported.items() if name not in sys.stdlib_module_names | {"tvl_align"}}
    assert {"torch", "open_clip", "scipy"} <= others.keys()
    for name, path in others.items():
        assert name in EXTRAS or known.get(name, {normal(name)}) & PLAIN, f"{path} imports {name}"


@pytest.mark.parametrize("code", ["import tvl_align", "from tvl_align.cli.main import main; main()"], ids=["import", "help"])
def test_import_and_help_do_not_import_torch(code: str) -> None:
    ask = "print('heavy:', sorted({'torch', 'numpy', 'tyro', 'timm', 'open_clip'} & sys.modules.keys()))"
    said = run([sys.executable, "-c", f"import sys; sys.argv = ['tvl-align', '--help']; {code}; {ask}"], ROOT)
    assert "heavy: []" in said
    assert ("usage: tvl-align COMMAND" in said) == ("main" in code)


@pytest.mark.parametrize("command", ["explore", "compare", "features", "world", "bench"])
def test_light_commands_do_not_import_torch(command: str) -> None:
    """Reports of measured runs, and the help of what needs no model, take a second."""
    ask = "print('heavy:', sorted({'torch', 'torchvision', 'timm', 'open_clip', 'sklearn'} & sys.modules.keys()))"
    code = f"import sys, tvl_align.cli.{command}, tvl_align.report.plots, tvl_align.data.pictures; {ask}"
    assert "heavy: []" in run([sys.executable, "-c", code], ROOT)


MISSING = r"error: [^\n]*\b{module}\b[^\n]*pip install 'tvl-align\[{extra}\]'\.\n"  # one line that names package and extra


def without_extras(code: str, folder: Path, expect: int = 0) -> str:
    """Run code in a process where importing any package in EXTRAS fails."""
    block = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules.update(dict.fromkeys({sorted(EXTRAS)!r}))"
    return run([sys.executable, "-c", f"{block}; {code}"], folder, expect)


@pytest.mark.slow
def test_commands_import_without_extras(tmp_path: Path) -> None:
    modules = ", ".join(f"tvl_align.cli.{name}" for name in COMMANDS)
    assert without_extras(f"import {modules}", tmp_path) == ""
    said = without_extras(
        "sys.argv = ['tvl-align', 'train', '--help']; from tvl_align.cli.main import main; main()", tmp_path
    )
    assert "--register_token_dim" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "module"),
    [
        ("train --store store --register_token_dim 16 --num_heads 4 --device cpu", "accelerate"),
        ("train --store store --slurm cluster=debug", "submitit"),
        ("world --out world --train 64 --test 32", "scipy"),
    ],
)
def test_a_missing_package_is_reported_with_its_extra(flags: str, module: str, tmp_path: Path) -> None:
    arrays = "{m: np.random.rand(64, 2, 4) for m in ('left', 'right')}"
    make = f"FeatureStore.from_arrays({arrays}, Path('store'))"
    code = f"import numpy as np; from pathlib import Path; from tvl_align import FeatureStore; {make}"
    code = f"{code}; sys.argv = ['tvl-align', *{flags.split()!r}]; from tvl_align.cli.main import main; main()"
    said = without_extras(code, tmp_path, expect=2)
    assert re.fullmatch(MISSING.format(module=module, extra=EXTRAS[module]), said), said


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout without build artefacts."""
    copy = tmp_path_factory.mktemp("checkout") / "copy"
    copy.mkdir()
    for name in ("tvl_align", "experiments", "benchmarks", "tests"):
        left_out = shutil.ignore_patterns("__pycache__", "output_dir", ".hypothesis")
        shutil.copytree(ROOT / name, copy / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation"], checkout)
    (made,) = (checkout / "dist").iterdir()
    return made


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(wheel: Path, checkout: Path) -> None:
    about = f"tvl_align-{VERSION}.dist-info"
    assert wheel.name == f"tvl_align-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{about}/METADATA").decode()
    package = {str(p.relative_to(checkout)) for p in (checkout / "tvl_align").rglob("*") if p.is_file()}
    assert {name for name in names if not name.startswith(f"{about}/")} == package
    assert "tvl_align/py.typed" in names
    assert any(re.fullmatch(r"tvl_align/report/templates/\w+\.html", name) for name in names)
    assert any(re.fullmatch(r"tvl_align/encoders/open_clip_configs/[\w-]+\.json", name) for name in names)
    assert f"{about}/licenses/LICENSE" in names
    assert "License-Expression: MIT\n" in metadata
    assert {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")} == {
        *PROJECT["optional-dependencies"]
    }


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new virtual environment: the wheel, then the dependencies of the running environment.

    The editable install of the checkout is not visible there: Python reads .pth files in the environment's own
    site-packages, not in folders that a .pth file adds.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", wheel]
    run([sys.executable, "-m", "pip", "--python", python, *install], folder.parent)
    (own,) = folder.glob("lib/python*/site-packages")
    others = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (own / "dependencies.pth").write_text("".join(f"{p}\n" for p in others))
    return python.parent


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    """The digits example of the quick start, in an empty folder."""
    python = installed / "python"
    said = run([python, "-c", "import tvl_align; print(tvl_align.__file__, tvl_align.__version__)"], tmp_path)
    home, version = said.split()
    assert Path(home).is_relative_to(installed.parent)
    assert version == VERSION
    assert "No module named 'experiments'" in run([python, "-c", "import experiments"], tmp_path, expect=1)

    assert run("tvl-align --version", tmp_path, path=installed) == f"tvl-align {VERSION}\n"
    assert "--pretrain_epochs" in run("tvl-align demo --help", tmp_path, path=installed)
    assert "clone" in run("tvl-align bench", tmp_path, expect=2, path=installed)

    section = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8").split("## Bring your own features", 1)[1]
    code, lines = (re.search(rf"```{kind}\n(.*?)```", section, re.S) for kind in ("python", "bash"))
    assert code is not None and lines is not None
    assert "--epochs 10 " in lines[1]
    run([python, "-c", code[1]], tmp_path)
    smaller = lines[1].replace("--epochs 10 ", "--epochs 1 ").replace("evaluate output", "evaluate --probe_steps 20 output")
    for line in smaller.strip().splitlines():
        said = run(line, tmp_path, path=installed)
    page = Path(said.strip().splitlines()[-1])
    assert page.name == "report.html"
    assert "<html" in (tmp_path / page).read_text(encoding="utf-8")

    made = json.loads((tmp_path / "output_dir" / "digits" / "config.json").read_text(encoding="utf-8"))
    assert (made["version"], made["commit"]) == (VERSION, "unknown")

    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)!r}))"
    call = "sys.argv = ['tvl-align', 'evaluate', 'output_dir/digits']; from tvl_align.cli.main import main; main()"
    said = run([python, "-c", f"{block}; {call}"], tmp_path, expect=2)
    assert re.fullmatch(MISSING.format(module=r"\w+", extra="train"), said), said
