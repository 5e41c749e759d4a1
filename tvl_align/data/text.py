"""Captions -> sentences for the text encoder, as in TVL (Fu et al. 2024, arXiv:2402.13232).

A caption is a comma-separated list of adjectives. Validation and test use all of them in their order. Training uses a random
non-empty subset, optionally in random order and with words replaced by synonyms. A `Sentence` is used as it is, everywhere.
"""

import json
import logging
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tvl_align.system.console import UserError

PROMPT = "This image gives tactile feelings of "
MAX_WORDS = 6  # later words of a caption are ignored, in every split
ABSENT = ("", "-", "nan", "none", "null", "n/a", "na", "<na>", "#n/a")  # as spreadsheets, pandas, R and Python write it
SEPARATORS = re.compile("[,;\uff0c\u3001\uff1b]")  # also the full-width comma, enumeration comma and semicolon
QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")
log = logging.getLogger(__name__)


class Sentence(str):
    """A caption that is a free sentence: it is not split, shuffled or changed, and has no prompt before it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Sentence({super().__repr__()})"


def is_absent(text: str) -> bool:
    """Whether a cell, caption or label says that there is no value: empty, or a word of `ABSENT` in any case."""
    return text.strip().lower() in ABSENT


def adjectives(caption: str) -> list[str]:
    """The first `MAX_WORDS` adjectives of a caption, in lower case: 'Soft, smooth.' -> ['soft', 'smooth'].

    A list as Python writes it, "['soft', 'smooth']", has the same adjectives. Words that say "no value" are none.
    """
    text = caption.strip().rstrip(".")
    words = SEPARATORS.split(text)
    if text.startswith("[") and text.endswith("]"):
        words = [a or b for a, b in QUOTED.findall(text)] or SEPARATORS.split(text[1:-1])
    words = [" ".join(re.sub("[.\u3002]", "", word).lower().split()) for word in words]
    return [word for word in words if not is_absent(word)][:MAX_WORDS]


def decoded(value: object, where: str) -> str:
    """A string, or UTF-8 bytes as h5py gives them, as a string. Raises UserError for other bytes, naming `where`."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} has the bytes {value[:40]!r}, which are not UTF-8; decode them before.") from error


def caption_key(caption: str) -> str:
    """The sorted distinct adjectives; of a sentence its words in lower case.

    Rows with equal keys are positives of each other in the contrastive loss.
    """
    if isinstance(caption, Sentence):
        return " ".join(caption.lower().split())
    return ", ".join(sorted(set(adjectives(caption))))


def sentence(words: Sequence[str], prompt: str) -> str:
    """The prompt, then ['a'] -> 'a.', ['a', 'b'] -> 'a and b.', ['a', 'b', 'c'] -> 'a, b, and c.'.

    Raises ValueError for an empty list.
    """
    match list(words):
        case []:
            raise ValueError("a sentence needs at least one word")
        case [word]:
            joined = word
        case [first, second]:
            joined = f"{first} and {second}"
        case [*head, last]:
            joined = f"{', '.join(head)}, and {last}"
    return f"{prompt}{joined}."


def evaluation_text(caption: str, prompt: str) -> str:
    """The sentence of validation and test: all adjectives of the caption, in their order."""
    if isinstance(caption, Sentence):
        return str(caption)
    return sentence(adjectives(caption), prompt)


def training_text(
    caption: str,
    prompt: str,
    rng: random.Random,
    shuffle: bool = False,
    synonyms: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """A training sentence: a uniformly sampled non-empty subset of the caption's adjectives.

    shuffle: random order. synonyms: {word: replacements}; a word is replaced by a uniform choice among itself and these.
    """
    if isinstance(caption, Sentence):
        return str(caption)
    words = adjectives(caption)
    subset = rng.randrange(1, 2 ** len(words))  # one bit per word
    words = [word for bit, word in enumerate(words) if subset >> bit & 1]
    if shuffle:
        rng.shuffle(words)
    if synonyms:
        words = [rng.choice([word, *synonyms.get(word, ())]) for word in words]
    return sentence(words, prompt)


def read_synonyms(path: Path, keep: int | None = None) -> dict[str, list[str]]:
    """Read `synonyms.json` ({word: [synonym, ...]}) and keep the first `keep` synonyms of each word.

    Returns {} if there is no such file; a file without synonyms is named in a warning too. Raises UserError if it is not a
    JSON object of word lists.
    """
    table: dict[str, list[str]] = {}
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            table = {str(word).lower(): [str(s).lower() for s in others][:keep] for word, others in content.items()}
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is not a JSON object of word lists ({error}); fix or remove the file.") from error
    if not any(table.values()):
        log.warning(
            "--replace_synonyms replaces no word: %s %s", path, "has no synonyms" if path.is_file() else "is missing"
        )
    return table
