"""How near a text is to a reference: ROUGE-L and token F1.

Words are the runs of letters, digits and underscores of the text in lower case; nothing is stemmed, no word is left
out. ROUGE-L is the F-measure of precision and recall of the longest common subsequence (Lin, 2004), with equal weights;
token F1 that of the words in common, however they are ordered (arXiv 1606.05250).
"""

import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """A text's words, as both scores see them."""
    return WORD.findall(text.lower())


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L, from 0 to 1; 1 where both texts have no words."""
    given, wanted = words(answer), words(reference)
    return _f_measure(common_subsequence(given, wanted), len(given), len(wanted))


def token_f1(answer: str, reference: str) -> float:
    """Token F1, from 0 to 1; 1 where both texts have no words."""
    given, wanted = words(answer), words(reference)
    return _f_measure((Counter(given) & Counter(wanted)).total(), len(given), len(wanted))


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for item in one:
        before = 0
        for place, against in enumerate(other, 1):
            above = row[place]
            row[place] = before + 1 if item == against else max(above, row[place - 1])
            before = above
    return row[-1]


def _f_measure(common: int, given: int, wanted: int) -> float:
    """2 P R / (P + R), with P = common / given and R = common / wanted."""
    return 2 * common / (given + wanted) if given + wanted else 1.0
