"""ROUGE-L and token F1 against values computed by hand."""

import pytest

from fltac.data.text_scores import common_subsequence, rouge_l, token_f1, words


def test_words_are_lower_case_runs_of_letters_and_digits() -> None:
    assert words("The cat's 2 Käfer, well-fed!") == ["the", "cat", "s", "2", "käfer", "well", "fed"]


@pytest.mark.parametrize(
    ("answer", "reference", "rouge", "f1"),
    [
        # Lin's own example: the longest common subsequence is "police the gunman", 3 of 4 words on both sides.
        ("police kill the gunman", "police killed the gunman", 3 / 4, 3 / 4),
        # "the gunman" or "police" in order, but three words in common.
        ("the gunman kill police", "police killed the gunman", 2 / 4, 3 / 4),
        # P = 2/2, R = 2/6: F = 2 * 1 * (1/3) / (4/3).
        ("on mat", "the cat sat on the mat", 1 / 2, 1 / 2),
        # A word counts as often as it is there on both sides: 1 of 3 and 1 of 2.
        ("a a a", "a b", 2 / 5, 2 / 5),
        ("", "something", 0.0, 0.0),
        ("?!", "...", 1.0, 1.0),
    ],
)
def test_scores(answer: str, reference: str, rouge: float, f1: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(rouge)
    assert token_f1(answer, reference) == pytest.approx(f1)


def test_the_longest_common_subsequence_need_not_be_contiguous() -> None:
    assert common_subsequence("abcbdab", "bdcaba") == 4, "bcba, from Cormen et al."
