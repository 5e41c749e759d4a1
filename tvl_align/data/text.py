"""Captions -> sentences for the text encoder, as in TVL (Fu et al. 2024, arXiv:2402.13232).

A caption is a comma-separated list of adjectives. Validation and test use all of them in their order. Training uses a random
non-empty subset, optionally in random order and with words replaced by synonyms.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from tvl_align.system.console import UserError

PROMPT = "This image gives tactile feelings of "
MAX_WORDS = 6  # later words of a caption are ignored, in every split


def adjectives(caption: str) -> list[str]:
    """The first `MAX_WORDS` adjectives of a caption, in lower case: 'Soft, smooth.' -> ['soft', 'smooth']."""
    words = caption.replace(".", "").replace("\n", " ").lower().split(",")
    return [" ".join(word.split()) for word in words if word.strip()][:MAX_WORDS]


def caption_key(caption: str) -> str:
    """The sorted distinct adjectives. Rows with equal keys are positives of each other in the contrastive loss."""
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

    Returns {} if there is no such file. Raises UserError if it is not a JSON object of word lists.
    """
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {str(word).lower(): [str(s).lower() for s in others][:keep] for word, others in table.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a JSON object of word lists ({error}); fix or remove the file.") from error
