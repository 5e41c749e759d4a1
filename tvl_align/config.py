"""Dataclasses <-> flags <-> JSON. tyro makes the flags and their help text from the fields and the strings under them."""

import shutil
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro

from tvl_align.system.console import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ignored:
    """Marks a field whose flag is accepted but has no effect: `tyro.conf.Suppress[Annotated[bool, Ignored("reason")]]`."""

    reason: str


def ignored_flags(cls: type) -> dict[str, str]:
    """{name: reason} of every field marked as Ignored in a dataclass and in the dataclasses nested in it."""
    return {name: mark.reason for name, (_, mark) in _ignored(cls).items()}


def _ignored(cls: Any) -> dict[str, tuple[type, Ignored]]:
    """{name: (type, mark)} of every field marked as Ignored, nested dataclasses included."""
    found: dict[str, tuple[type, Ignored]] = {}
    for name, hint in _hints(cls).items():
        base = getattr(hint, "__origin__", hint)
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Ignored):
                found[name] = base, mark
        if is_dataclass(base):
            found |= _ignored(base)
    return found


def _hints(cls: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass; the type parameters of a generic dataclass are replaced by its arguments."""
    generic = typing.get_origin(cls) or cls
    arguments = dict(zip(getattr(generic, "__parameters__", ()), typing.get_args(cls), strict=False))

    def resolve(hint: Any) -> Any:
        inner = getattr(hint, "__origin__", hint)
        return arguments.get(inner, hint) if isinstance(inner, TypeVar) else hint

    return {name: resolve(hint) for name, hint in typing.get_type_hints(generic, include_extras=True).items()}


def _split_ignored(cls: Any, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split flags into those for tyro and the values of the ignored ones."""
    known, flags = _ignored(cls), iter(argv)
    rest: list[str] = []
    found: dict[str, Any] = {}
    for flag in flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        off = name.startswith("no_") and name not in known
        name = name.removeprefix("no_") if off else name
        if not flag.startswith("--") or name not in known or (off and known[name][0] is not bool):
            rest.append(flag)
        elif known[name][0] is bool:
            found[name] = not off
        else:
            text = value if equals else next(flags, "")
            try:
                found[name] = known[name][0](text)
            except ValueError as error:
                raise UserError(f"--{name} takes a {known[name][0].__name__}, not {text!r}.") from error
    return rest, found


def _with_fields(value: T, found: Mapping[str, Any]) -> T:
    """Copy of a dataclass with the named fields replaced, in nested dataclasses too."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    inner = {f.name: _with_fields(getattr(value, f.name), found) for f in fields(value)}
    return replace(value, **(inner | {name: x for name, x in found.items() if name in inner}))


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    about: str = "",
    examples: Sequence[str] = (),
) -> T:
    """Parse flags into a dataclass. `--resume` without a value means `auto`.

    An unknown flag exits with code 2 and suggests the nearest known flag. argv: default sys.argv[1:]. about: first text of
    the help; default: the docstring of the dataclass. examples: commands printed at the end of the help,
    after one paragraph with the flags that have no effect.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    for i, flag in enumerate(given):
        if flag == "--resume" and (i + 1 == len(given) or given[i + 1].startswith("--")):
            given[i] = "--resume=auto"
    try:
        given, found = _split_ignored(cls, given)
        return _with_fields(tyro.cli(cls, args=given, prog=prog, description=about or None, use_underscores=True), found)
    except SystemExit as end:
        if end.code in (0, None) and examples:
            ignored = "; ".join(f"--{name} ({reason})" for name, reason in ignored_flags(cls).items())
            if ignored:
                width = min(shutil.get_terminal_size().columns, 100)
                print(textwrap.fill(f"Accepted without effect: {ignored}.", width), end="\n\n")
            print("examples:\n" + "\n".join(f"  {line}" for line in examples))
        raise


def to_plain(value: Any) -> Any:
    """Convert dataclasses to dicts and lists for JSON. Paths become absolute, so a run can be loaded from any folder."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: to_plain(v) for name, v in ((f.name, getattr(value, f.name)) for f in fields(value))}
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def from_plain(cls: type[T], plain: Mapping[str, Any]) -> T:
    """Inverse of `to_plain` for one dataclass. Raises UserError for an unknown key."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(plain.keys() - known)
    if unknown:
        raise UserError(f"unknown option {unknown[0]!r} for {cls.__name__}; use the version of tvl-align that wrote it.")
    return cls(**{name: _restore(hints[name], value) for name, value in plain.items()})


def _restore(hint: Any, value: Any) -> Any:
    """Convert a JSON value to the type of its field: lists to tuples, strings to paths."""
    if value is None:
        return None
    options = typing.get_args(hint)
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and (hint is Path or Path in options):
        return Path(value)
    return value
