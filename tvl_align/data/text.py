"""Captions -> the sentence that the text encoder reads, by the rules of TVL.

A caption is a comma-separated list of adjectives. Validation and test read all of them in their order; training reads a
random non-empty subset, in random order with `shuffle`, each word perhaps swapped for a synonym.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from tvl_align.system.console import UserError

PROMPT = "This image gives tactile feelings of "
MAX_WORDS = 6  # words beyond the sixth do not count, in any split


def adjectives(caption: str) -> list[str]:
    """'Soft, smooth.' -> ['soft', 'smooth']."""
    words = caption.replace(".", "").replace("\n", " ").lower().split(",")
    return [" ".join(word.split()) for word in words if word.strip()][:MAX_WORDS]


def caption_key(caption: str) -> str:
    """Equal for captions that say the same: the sorted adjectives. Rows with equal keys are positives of each other."""
    return ", ".join(sorted(set(adjectives(caption))))


def sentence(words: Sequence[str], prompt: str) -> str:
    """['a'] -> 'a.'; ['a', 'b'] -> 'a and b.'; ['a', 'b', 'c'] -> 'a, b, and c.'; after the prompt."""
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
    """The whole caption, in its order."""
    return sentence(adjectives(caption), prompt)


def training_text(
    caption: str,
    prompt: str,
    rng: random.Random,
    shuffle: bool = False,
    synonyms: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """A uniformly drawn non-empty subset of the caption's words (one draw of bits: the 2^n subsets are never listed).

    `synonyms` maps a word to its replacements; the word itself stays as likely as each of them.
    """
    words = adjectives(caption)
    chosen = rng.randrange(1, 2 ** len(words))
    words = [word for bit, word in enumerate(words) if chosen >> bit & 1]
    if shuffle:
        rng.shuffle(words)
    if synonyms:
        words = [rng.choice([word, *synonyms.get(word, ())]) for word in words]
    return sentence(words, prompt)


def read_synonyms(path: Path, keep: int | None = None) -> dict[str, list[str]]:
    """`synonyms.json` ({word: [synonym, ...]}) if it is there, each list cut to its first `keep`; else {}."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {str(word).lower(): [str(s).lower() for s in others][:keep] for word, others in table.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a JSON object of word lists ({error}): mend or remove the file.") from error
