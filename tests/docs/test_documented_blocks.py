"""Every code block of README.md and docs/ runs; where it cannot, its page says why, and its commands and flags exist.

A page says so in comments above a block, which no reader sees:

    <!-- not run: REASON -->              parsed only
    <!-- tested with: A => B; C => D -->  smaller numbers
    <!-- file: NAME -->                   Python code that the reader saves as NAME
    <!-- in the checkout -->              runs in the repository, not in an empty folder
    <!-- after: PAGE#SECTION -->          above the first heading of a page: the blocks of that section run before

The blocks of a page run in their order in one folder, Python blocks as scripts, bash blocks with `bash -e`.
"""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import processes
import pytest

from tvl_align.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "index.md")]  # it is README.md
NOTE = re.compile(r"<!-- (not run|tested with|file|in the checkout|after)(?:: (.+?))? -->")
BLOCK = re.compile(r"(?P<notes>(?:^<!--[^\n]*-->\n)*)^```(?P<language>\S*)\n(?P<code>.*?)^```$", re.M | re.S)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

LEFT = {  # what the blocks of a page leave behind
    "README.md": ("demo/runs/base/report.html",),
    "own_data.md": ("output_dir/mine/results.json", "tokens.npz", "test.npz", "press.npz", "own_store/manifest.json"),
    "own_encoders.md": ("own.npz", "knocks.npz", "output_dir/knocks/results.json"),
    "own_method.md": ("output_dir/squeezed/results.json",),
    "quickstart.md": ("output_dir/mine/report.html", "output_dir/digits/report.html"),
    "train.md": ("comparison/report.html",),
    "use.md": ("tokens.npz", "test.npz", "photos.index", "touch-registers/model.safetensors"),
}


@dataclass(frozen=True)
class Block:
    """A fenced block. section: anchor of the heading above it. notes: {kind: text} of the comments above it."""

    language: str
    code: str
    section: str
    notes: dict[str, str]

    @property
    def tested(self) -> str:
        """The code with the numbers that the test uses. Fails if the page names a number that is not there."""
        code = self.code
        for change in filter(None, self.notes.get("tested with", "").split("; ")):
            old, new = change.split(" => ")
            assert old in code, f"{old!r} is not in the block:\n{self.code}"
            code = code.replace(old, new)
        return code


@cache
def blocks_of(page: Path) -> list[Block]:
    """The code blocks of a page, in order. Blocks without a language are figures, not code."""
    text = page.read_text(encoding="utf-8")
    fences = [(m.start(), m.end()) for m in BLOCK.finditer(text)]
    headings = [m for m in re.finditer(r"^#+ (.+)$", text, re.M) if not any(a <= m.start() < b for a, b in fences)]
    found = []
    for match in BLOCK.finditer(text):
        if not match["language"]:
            continue
        above = [h[1] for h in headings if h.start() < match.start()]
        section = re.sub(r"[^\w -]", "", above[-1].lower()).strip().replace(" ", "-") if above else ""
        notes = {m[1]: m[2] or "" for m in NOTE.finditer(match["notes"])}
        found.append(Block(match["language"], match["code"], section, notes))
    return found


def run_block(block: Block, folder: Path, number: int) -> None:
    """Run a block in a folder, or save it there. Fails with what it said if it fails."""
    if "not run" in block.notes:
        return
    if "file" in block.notes:
        (folder / block.notes["file"]).write_text(block.tested, encoding="utf-8")
        return
    script = folder / f"block{number}.{block.language}"
    script.write_text(block.tested, encoding="utf-8")
    where = ROOT if "in the checkout" in block.notes else folder
    environment = processes.quiet({"PATH": f"{BIN}:{os.environ['PATH']}"} | ({"PYTHONPATH": "."} if where == ROOT else {}))
    command = [sys.executable] if block.language == "python" else ["bash", "-e"]
    code, said = processes.run([*command, script], cwd=where, env=environment)
    assert code == 0, f"{block.tested}\nexit code {code}\n{said}"


Once = Callable[[str, Callable[[Path], object]], Path]


def prepared(page: Path, folder: Path, once: Once) -> None:
    """Make `folder`, with what the blocks of the section that `page` comes after have made."""
    head = page.read_text(encoding="utf-8").partition("# ")[0]
    before = next((m[2] for m in NOTE.finditer(head) if m[1] == "after"), None)
    if before is None:
        folder.mkdir(parents=True)
        return
    name, _, section = before.partition("#")
    other = (page.parent / name).resolve()

    def make(place: Path) -> None:
        prepared(other, place, once)
        chosen = [block for block in blocks_of(other) if block.section == section]
        assert chosen, f"{page.name} comes after {before}, which has no blocks"
        for number, block in enumerate(chosen):
            run_block(block, place, number)

    shutil.copytree(once(f"{other.stem}-{section}", make), folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=lambda p: p.name)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, once: Once) -> None:
    prepared(page, tmp_path / "reader", once)
    for number, block in enumerate(blocks_of(page)):
        run_block(block, tmp_path / "reader", number)
    for left in LEFT.get(page.name, ()):
        assert (tmp_path / "reader" / left).exists(), f"the blocks leave no {left}"


def commands(code: str) -> Iterator[list[str]]:
    """The words of every command of a bash block, without the variables that are set before it."""
    for line in code.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", "||", "|", ";"):
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def check_command(words: list[str], help_of: Callable[[str], str]) -> None:
    """A command of the documentation: its program, files, targets and flags exist."""
    head, rest = words[0], words[1:]
    if head == "torchrun":
        from torch.distributed.run import get_args_parser

        known = {name.replace("-", "_") for action in get_args_parser()._actions for name in action.option_strings}
        start = next(i for i, word in enumerate(rest) if not word.startswith("-"))
        for flag in rest[:start]:
            assert flag.partition("=")[0].replace("-", "_") in known, f"torchrun {flag}"
        head, rest = rest[start], rest[start + 1 :]
    if head == "tvl-align" or head.endswith(".py"):
        command, *flags = rest if head == "tvl-align" else ("train", *rest)
        assert command in COMMANDS, " ".join(words)
        if re.search(r"--method [\w.]+:", " ".join(flags)):
            return  # a method of one's own has flags of its own
        full = {"features": "features import", "encode": "encode --source x:y" if "--source" in flags else "encode"}
        known = set(re.findall(r"--\w[\w-]*", help_of(full.get(command, command))))
        for flag in flags:
            if flag.startswith("--"):
                assert flag.partition("=")[0] in known, f"tvl-align {command} has no flag {flag}"
    elif head == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
        assert {word for word in rest if "=" not in word} <= targets, " ".join(words)
    elif head in ("python", "bash"):
        if rest[0] == "-m":
            assert importlib.util.find_spec(rest[1]) is not None, " ".join(words)
        else:
            assert (ROOT / rest[0]).is_file(), " ".join(words)
    elif head == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        assert {name for word in rest for name in re.findall(r"\[(\w+)\]", word)} <= set(extras), " ".join(words)
    elif head == "cd":
        assert (ROOT / rest[0]).is_dir(), " ".join(words)
    else:
        assert head in ("export", "git", "."), f"{head} is no command of this project"


def check_python(code: str) -> None:
    """Python code: it compiles, and what it imports from this project exists."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("tvl_align", "experiments"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """help_of(command): what `tvl-align command --help` prints."""

    @cache
    def ask(command: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tvl-align", *command.split(), "--help"])
        with pytest.raises(SystemExit):
            main()
        return capfd.readouterr().out

    return ask


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_a_page_names_exists(page: Path, help_of: Callable[[str], str]) -> None:
    """Every block, also those that run elsewhere: comments are known, commands, flags, files and imports exist."""
    text = page.read_text(encoding="utf-8")
    for comment in re.findall(r"^<!--.*$", text, re.M):
        assert NOTE.fullmatch(comment), f"{comment!r} is no note of tests/docs/test_documented_blocks.py"
    assert "<!-- after:" not in text.partition("# ")[2], "what a page comes after must be said above its first heading"
    assert text.count("\n```") == 2 * len(BLOCK.findall(text)), "a block that is not closed, or indented"
    for block in blocks_of(page):
        assert block.language in ("python", "bash"), f"a block in {block.language}"
        assert "not run" not in block.notes or len(block.notes["not run"]) > 5, "no reason"
        if block.language == "python":
            check_python(block.code)
        else:
            for words in commands(block.code):
                check_command(words, help_of)


@pytest.mark.parametrize(
    "code",
    [
        "tvl-align train --no_such_flag 3",
        "tvl-align trian",
        "make no-such-target",
        "cd experiments/stage2 && torchrun --nproc_per_node=1 main_train_stage2.py --blrr 1",
        "torchrun --nprocs=2 --no_python tvl-align train",
        "python -m benchmarks.nothing",
        "pip install 'tvl-align[nothing]'",
    ],
)
def test_a_wrong_command_is_found(code: str, help_of: Callable[[str], str]) -> None:
    *_, last = commands(code)
    with pytest.raises(AssertionError):
        check_command(last, help_of)
