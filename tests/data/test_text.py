"""Captions -> sentences."""

import copy
import json
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvl_align.data.text import (
    Sentence,
    adjectives,
    caption_key,
    decoded,
    evaluation_text,
    is_absent,
    read_synonyms,
    sentence,
    training_text,
)
from tvl_align.system.console import UserError

words = st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=1, max_size=20)


def test_sentences_have_the_form_of_tvl() -> None:
    prompt = "This image gives tactile feelings of "
    assert evaluation_text("Soft.", prompt) == prompt + "soft."
    assert evaluation_text("soft, smooth", "") == "soft and smooth."
    assert evaluation_text("soft, patterned, lined, fabric.", "") == "soft, patterned, lined, and fabric."


def test_words_after_the_sixth_are_ignored() -> None:
    assert adjectives("a, b, c, d, e, f, g, h") == list("abcdef")


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "N/A", "null", "-", "<NA>", "#N/A", " NA ", ""])
def test_words_for_no_value_are_no_adjectives(word: str) -> None:
    assert is_absent(word)
    assert adjectives(word) == adjectives(f"{word}.") == []
    assert adjectives(f"soft, {word}, hard") == ["soft", "hard"]
    assert not any(map(is_absent, ("soft", "nano", "nonelastic", "0", "a-b")))


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("['furrowed', 'ordinary']", ["furrowed", "ordinary"]),
        ("['furrowed' \"wolf's fur\"].", ["furrowed", "wolf's fur"]),
        ("[furrowed, Ordinary]", ["furrowed", "ordinary"]),
        ("[None]", []),
        ("[]", []),
        ("\u5149\u6ed1\uff0c\u67d4\u8f6f\u3002", ["\u5149\u6ed1", "\u67d4\u8f6f"]),
        ("furrowed; ordinary", ["furrowed", "ordinary"]),
    ],
)
def test_lists_and_other_commas_are_read(caption: str, words: list[str]) -> None:
    assert adjectives(caption) == words


def test_bytes_are_utf8() -> None:
    assert decoded("gr\u00f6\u00dfe".encode(), "names") == decoded("gr\u00f6\u00dfe", "names") == "gr\u00f6\u00dfe"
    with pytest.raises(UserError, match=r"names has the bytes b'\\xff', which are not UTF-8; decode them"):
        decoded(b"\xff", "names")


def test_a_sentence_without_words_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        sentence([], "")


@given(words, st.integers(0, 1000), st.booleans())
def test_training_uses_a_non_empty_subset(caption: list[str], seed: int, shuffle: bool) -> None:
    text = training_text(", ".join(caption), "", random.Random(seed), shuffle)
    chosen = text.removesuffix(".").replace(", and ", ", ").replace(" and ", ", ").split(", ")
    known = adjectives(", ".join(caption))
    assert chosen
    assert all(chosen.count(word) <= known.count(word) for word in chosen)
    if not shuffle:
        remaining = iter(known)
        assert all(word in remaining for word in chosen)


def test_all_subsets_are_equally_likely() -> None:
    counts: dict[str, int] = {}
    rng = random.Random(0)
    for _ in range(7000):
        text = training_text("a, b, c", "", rng)
        counts[text] = counts.get(text, 0) + 1
    assert len(counts) == 7
    assert all(900 < n < 1100 for n in counts.values())


def test_synonyms_replace_words() -> None:
    found = {training_text("soft", "", random.Random(s), synonyms={"soft": ["squishy", "plush"]}) for s in range(50)}
    assert found == {"soft.", "squishy.", "plush."}


def test_caption_keys_do_not_depend_on_the_order_of_words() -> None:
    assert caption_key("Soft, smooth.") == caption_key("smooth,soft")
    assert caption_key("soft") != caption_key("soft, smooth")


def test_synonym_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "synonyms.json"
    path.write_text(json.dumps({"Soft": ["Plush", "downy"]}))
    assert read_synonyms(path) == {"soft": ["plush", "downy"]}
    assert read_synonyms(path, keep=1) == {"soft": ["plush"]}
    assert not caplog.records
    path.write_text("[1, 2")
    with pytest.raises(UserError, match=r"synonyms\.json is not a JSON object"):
        read_synonyms(path)


def test_a_synonym_file_that_replaces_nothing_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "synonyms.json"
    assert read_synonyms(path) == {}
    path.write_text(json.dumps({"soft": []}))
    assert read_synonyms(path) == {"soft": []}
    expected = [f"--replace_synonyms replaces no word: {path} {why}" for why in ("is missing", "has no synonyms")]
    assert [record.getMessage() for record in caplog.records] == expected


def test_a_sentence_is_used_as_it_is_everywhere() -> None:
    """No prompt, no subset, no order, no synonym; pickled and copied it stays one."""
    text = "Soft, warm, and A Bit woolly"
    for free in (Sentence(text), pickle.loads(pickle.dumps(Sentence(text))), copy.deepcopy(Sentence(text))):
        assert evaluation_text(free, "prompt ") == text
        for seed in range(5):
            assert training_text(free, "prompt ", random.Random(seed), True, {"soft": ["hard"]}) == text
        assert caption_key(free) == caption_key(Sentence("soft, warm,  and a bit Woolly")) != caption_key(text)
        assert repr(free) == f"Sentence({text!r})"  # the identity of a store tells it from adjectives
    assert evaluation_text(text, "") != text
