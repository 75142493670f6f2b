"""Judges many answers: what is known is not asked again, what it will cost is said before it begins."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from fltac.config.answers import JudgeConfig
from fltac.errors import RunError
from fltac.judge.endpoint import JudgeError, Reader, UnreadableError
from fltac.judge.rubric import Item, Verdict, messages, read_verdict
from fltac.judge.verdicts import VerdictFile, cached, keep, key_of

LETTERS_PER_TOKEN = 4
"""Of English, as a rule of thumb: the judge's own tokenizer is not known here."""
MOST_UNREADABLE = 3
"""Verdicts in a row that cannot be read, after which judging stops: one answer may be odd, three are an unfit judge."""
VERDICT_TOKENS = 40
"""Of a verdict, as a guess."""


class Asks(Protocol):
    """Whoever can be asked for a completion."""

    def ask(self, messages: Sequence[Mapping[str, str]], read: Reader) -> Verdict:
        """Raises ``JudgeError`` where there is none."""
        ...


def judge(
    items: Sequence[Item],
    places: Sequence[Mapping[str, object]],
    config: JudgeConfig,
    file: VerdictFile,
    endpoint: Asks,
    say: Callable[[str], None],
) -> list[Verdict]:
    """Has answers judged, one after the other, each once.

    Args:
        items: The answers.
        places: What to write beside each verdict.
        config: Names the judge, and its prices.
        file: Keeps every verdict.
        endpoint: The judge.
        say: Told in one line what it will cost.

    Returns:
        One verdict for each answer.

    Raises:
        RunError: the judge cannot be had or writes nonsense; the verdicts that there are are kept.
    """
    keys = [key_of(item, config.model) for item in items]
    known: dict[str, Verdict] = {}
    for key in dict.fromkeys(keys):
        found = file.verdict(key) or cached(key)
        if found is not None:
            known[key] = found
    open_ = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
    say(estimate(list(open_.values()), len(set(keys)), config))
    failure: JudgeError | None = None
    given_up: set[str] = set()
    in_a_row = 0
    for key, where in zip(keys, places, strict=True):
        if key in given_up:
            continue
        if key not in known:
            try:
                verdict = endpoint.ask(messages(open_[key]), read_verdict)
            except JudgeError as error:
                failure, in_a_row = error, in_a_row + 1
                given_up.add(key)
                if isinstance(error, UnreadableError) and in_a_row < MOST_UNREADABLE:
                    continue
                break
            in_a_row = 0
            known[key] = verdict
            keep(key, verdict)
        file.add(key, known[key], where)
    if failure is not None:
        raise RunError(
            f"judge: {failure} ({len(known)} of {len(set(keys))} verdicts are kept; "
            "`fltac evaluate` with the same settings asks for the others)"
        ) from failure
    return [known[key] for key in keys]


def estimate(items: Sequence[Item], total: int, config: JudgeConfig) -> str:
    """What asking for these verdicts will take, in one line."""
    letters = sum(len(message["content"]) for item in items for message in messages(item))
    read, written = letters // LETTERS_PER_TOKEN, VERDICT_TOKENS * len(items)
    text = (
        f"judge: {len(items)} of {total} verdicts to be asked from {config.model}, "
        f"about {read} tokens to read and {written} to write"
    )
    if config.prompt_price is None and config.answer_price is None:
        return text
    money = (read * (config.prompt_price or 0.0) + written * (config.answer_price or 0.0)) / 1e6
    return f"{text}, about {money:.4f} at the prices given"
