"""Dataclasses <-> flags <-> JSON. Flags are made by tyro from the fields and the strings under them."""

import sys
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
    """Marks a flag that is accepted and has no effect: `tyro.conf.Suppress[Annotated[bool, Ignored("reason")]]`."""

    reason: str


def ignored_flags(cls: type) -> dict[str, str]:
    """{name: reason} of every field of a dataclass, or of those nested in it, that is marked as Ignored."""
    return {name: mark.reason for name, (_, mark) in _ignored(cls).items()}


def _ignored(cls: Any) -> dict[str, tuple[type, Ignored]]:
    found: dict[str, tuple[type, Ignored]] = {}
    for name, hint in _hints(cls).items():
        kind = getattr(hint, "__origin__", hint)
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Ignored):
                found[name] = kind, mark
        if is_dataclass(kind):
            found |= _ignored(kind)
    return found


def _hints(cls: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass, those of a generic one with its arguments filled in."""
    generic = typing.get_origin(cls) or cls
    given = dict(zip(getattr(generic, "__parameters__", ()), typing.get_args(cls), strict=False))

    def filled(hint: Any) -> Any:
        inner = getattr(hint, "__origin__", hint)
        return given.get(inner, hint) if isinstance(inner, TypeVar) else hint

    return {name: filled(hint) for name, hint in typing.get_type_hints(generic, include_extras=True).items()}


def _take_ignored(cls: Any, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Flags without those that are ignored, and the values of these."""
    known, rest, found, flags = _ignored(cls), [], {}, iter(argv)
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
            given = value if equals else next(flags, "")
            try:
                found[name] = known[name][0](given)
            except ValueError as error:
                raise UserError(f"--{name} takes a {known[name][0].__name__}, not {given!r}.") from error
    return rest, found


def _put(value: T, found: Mapping[str, Any]) -> T:
    """A dataclass with these fields of its own, and of dataclasses in it, changed."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    inner = {f.name: _put(getattr(value, f.name), found) for f in fields(value)}
    return replace(value, **(inner | {name: x for name, x in found.items() if name in inner}))


def parse(
    cls: type[T], argv: Sequence[str] | None = None, prog: str | None = None, about: str = "", examples: Sequence[str] = ()
) -> T:
    """Flags -> dataclass. Unknown flags exit with code 2 and the nearest known one; `--resume` alone means `auto`.

    about: what the help begins with; default: the dataclass's docstring. examples: commands that the help ends with.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    for i, flag in enumerate(given):
        if flag == "--resume" and (i + 1 == len(given) or given[i + 1].startswith("--")):
            given[i] = "--resume=auto"
    try:
        given, found = _take_ignored(cls, given)
        return _put(tyro.cli(cls, args=given, prog=prog, description=about or None, use_underscores=True), found)
    except SystemExit as end:
        if end.code in (0, None) and examples:
            print("examples:\n" + "\n".join(f"  {line}" for line in examples))
        raise


def to_plain(value: Any) -> Any:
    """Dataclasses -> what JSON holds; paths become absolute, so that a run can be read from any folder."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: to_plain(v) for name, v in ((f.name, getattr(value, f.name)) for f in fields(value))}
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def from_plain(cls: type[T], plain: Mapping[str, Any]) -> T:
    """What `to_plain` wrote -> the dataclass; an unknown key is an error."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(plain.keys() - known)
    if unknown:
        raise UserError(f"unknown option {unknown[0]!r} for {cls.__name__}; was this run made by another version?")
    return cls(**{name: _restore(hints[name], value) for name, value in plain.items()})


def _restore(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    options = typing.get_args(hint)
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and (hint is Path or Path in options):
        return Path(value)
    return value
