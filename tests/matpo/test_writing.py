"""MAGRPO's writing rewards, level by level."""

from __future__ import annotations

import pytest

from matpo.rewards.writing import ARXIV, TLDR, Band, transitions, writing

FIRST = "Cats sleep long days because warm houses invite rest."  # 9 words
SECOND = (
    "Cats sleep long days because warm houses invite rest. However dogs chase balls outside, and finally"
    " tired dogs sleep too."
)  # 20 words


def words(count: int, stem: str = "w") -> str:
    return " ".join(f"{stem}{number}" for number in range(count))


@pytest.mark.parametrize(
    ("value", "score"),
    [(1.0, 0.0), (1.1, 0.0), (1.35, 0.5), (1.6, 1.0), (3.2, 1.0), (4.1, 0.5), (5.0, 0.0), (9.0, 0.0)],
)
def test_a_band_falls_to_nothing_along_straight_lines(value: float, score: float) -> None:
    assert Band(1.1, 1.6, 3.2, 5.0).score(value) == pytest.approx(score)


def test_a_text_of_the_wrong_length_ends_the_count() -> None:
    assert writing(["too short", words(20)], TLDR).score == pytest.approx(0.5 / 3)
    assert writing(["short", "too"], TLDR).score == 0.0
    assert writing([words(10), words(10)], TLDR).score == pytest.approx(1 / 3)  # both fit, their ratio does not


def test_levels_add_up_to_style() -> None:
    # Lengths 0.5 + 0.5; 20 / 9 words: 1; different words without common ones: 9 and 17, ratio 17/9 of 1.3 … 2.0.
    unique = (17 / 9 - 1.3) / 0.7
    # because, however, finally: three kinds of transition words; 9 of 17 words in common.
    style = 0.4 * 1.0 + 0.6 * 9 / 17
    assert writing([FIRST, SECOND], TLDR).score == pytest.approx((2.0 + 0.5 * unique + style) / 3)


def test_an_expanded_abstract_counts_different_words_all_or_nothing() -> None:
    # 130 and 180 words, ratio 1.38; different words 130 and 180: ratio 1.38 is outside 0.7 … 1.3, so nothing more.
    assert writing([words(130), words(180)], ARXIV).score == pytest.approx(2.0 / 3)
    # 50 repeated words make it 130 to 130; all words in common, no transition words.
    assert writing([words(130), f"{words(130)} {words(50)}"], ARXIV).score == pytest.approx((2.0 + 0.5 + 0.6) / 3)


def test_kinds_of_transition_words_count_once() -> None:
    assert transitions(["however", "but", "although"]) == pytest.approx(1 / 3)
    assert transitions(["first", "but", "because", "also", "overall"]) == 1.0


def test_the_reward_is_for_two() -> None:
    with pytest.raises(ValueError, match="for two agents, not 3"):
        writing(["a", "b", "c"], TLDR)
