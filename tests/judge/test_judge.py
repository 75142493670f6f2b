"""The judge against a small HTTP server: its questions, its failures, its cache, going on after a stop."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fltac.config import load_config
from fltac.config.answers import JudgeConfig
from fltac.errors import InputError, RunError
from fltac.judge.endpoint import Endpoint, JudgeError
from fltac.judge.panel import MOST_UNREADABLE, estimate, judge
from fltac.judge.rubric import BadVerdictError, Item, Verdict, messages, read_verdict
from fltac.judge.verdicts import VerdictFile, key_of
from judge.scripted_judge import Reply, completion, serving, verdict

ITEMS = [Item("2 + 2?", "4", "four"), Item("Sky?", "blue", "green"), Item("2 + 2?", "4", "four")]
PLACES = [{"task": "sums", "row": 0}, {"task": "colours", "row": 7}, {"task": "sums", "row": 1}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLTAC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(url: str, **settings: Any) -> JudgeConfig:
    return JudgeConfig(base_url=url, model="grader", timeout_seconds=5, **settings)


def judged(url: str, file: Path, waits: list[float] | None = None, **settings: Any) -> tuple[list[Verdict], list[str]]:
    said: list[str] = []
    chosen = config(url, **settings)
    waits = [] if waits is None else waits
    endpoint = Endpoint(chosen, "sk-secret", sleep=waits.append, now=lambda: 1_000_000_000.0)
    try:
        return judge(ITEMS, PLACES, chosen, VerdictFile(file), endpoint, said.append), said
    finally:
        endpoint.close()


def by_answer(_: int, question: Mapping[str, Any]) -> Reply:
    return verdict(1.0 if "four" in question["messages"][1]["content"] else 0.25, "a reason")


def test_what_is_asked_and_what_is_kept(tmp_path: Path) -> None:
    with serving(by_answer) as server:
        verdicts, _ = judged(server.url, tmp_path / "verdicts.jsonl")
    assert [found.score for found in verdicts] == [1.0, 0.25, 1.0]
    assert len(server.questions) == 2, "the same answer is not judged twice"
    first = server.questions[0]
    assert first["path"] == "/v1/chat/completions"
    assert (first["model"], first["temperature"], first["response_format"]) == ("grader", 0, {"type": "json_object"})
    assert first["messages"] == messages(ITEMS[0])
    assert json.loads(first["messages"][1]["content"]) == {"request": "2 + 2?", "reference": "4", "answer": "four"}
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [(line["task"], line["row"], line["score"], line["reason"]) for line in lines] == [
        ("sums", 0, 1.0, "a reason"),
        ("colours", 7, 0.25, "a reason"),
        ("sums", 1, 1.0, "a reason"),
    ]
    assert "sk-secret" not in (tmp_path / "verdicts.jsonl").read_text()


def test_nothing_known_is_asked_again(tmp_path: Path, own_cache: Path) -> None:
    """By the run's own file, by the cache of all runs; another model has another opinion."""
    with serving(by_answer) as server:
        judged(server.url, tmp_path / "one.jsonl")
        again, said = judged(server.url, tmp_path / "other.jsonl")
        assert [found.score for found in again] == [1.0, 0.25, 1.0]
        assert len(server.questions) == 2
        assert said[0].startswith("judge: 0 of 2 verdicts to be asked from grader")
        for file in own_cache.rglob("*.json"):
            file.unlink()
        judged(server.url, tmp_path / "one.jsonl")
        assert len(server.questions) == 2
        assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "other.jsonl").read_text()
    assert key_of(ITEMS[0], "grader") != key_of(ITEMS[0], "another")
    assert key_of(ITEMS[0], "grader") != key_of(Item("2 + 2?", "4", "five"), "grader")


def scripted(*replies: Reply) -> Callable[[int, Mapping[str, Any]], Reply]:
    """These replies first, then verdicts."""
    return lambda number, question: replies[number] if number < len(replies) else by_answer(number, question)


@pytest.mark.parametrize(
    ("replies", "waits"),
    [
        ([Reply(500), Reply(503)], [1.0, 2.0]),
        ([Reply(429, headers={"Retry-After": "7"}), Reply(429)], [7.0, 2.0]),
        ([Reply(429, headers={"Retry-After": "Sun, 09 Sep 2001 01:47:10 GMT"})], [30.0]),
        ([Reply(429, headers={"Retry-After": "soon"})], [1.0]),
        ([Reply(429, headers={"Retry-After": "1e9"})], [600.0]),
        ([Reply(200, b"<html>")], [1.0]),
        ([Reply(200, b'{"choices": []}')], [1.0]),
        ([Reply(200, b"x" * (2**20 + 1))], [1.0]),
        ([completion("a good answer"), completion('{"score": 2}')], [1.0, 2.0]),
    ],
)
def test_a_busy_or_broken_judge_is_asked_again(tmp_path: Path, replies: list[Reply], waits: list[float]) -> None:
    """On this clock now is 9 September 2001, 01:46:40 GMT."""
    waited: list[float] = []
    with serving(scripted(*replies)) as server:
        verdicts, _ = judged(server.url, tmp_path / "verdicts.jsonl", waited)
    assert [found.score for found in verdicts] == [1.0, 0.25, 1.0]
    assert waited == waits


def test_a_silent_judge_is_not_waited_for(tmp_path: Path) -> None:
    waited: list[float] = []
    quick = config("http://unused/v1").model_copy(update={"timeout_seconds": 0.1})
    with serving(scripted(Reply(wait=0.4))) as server:
        chosen = quick.model_copy(update={"base_url": server.url, "attempts": 1})
        endpoint = Endpoint(chosen, None, sleep=waited.append)
        with pytest.raises(JudgeError, match=r"no verdict in 1 attempts; the last: no reply in 0.1 s"):
            endpoint.ask(messages(ITEMS[0]), read_verdict)
        endpoint.close()
    assert waited == []
    assert "Authorization" not in server.headers[0]


def test_a_reply_that_drips_is_given_up() -> None:
    """Each part comes in time, the whole does not."""
    times = iter([0.0, 100.0])
    with serving(by_answer) as server:
        endpoint = Endpoint(config(server.url, attempts=1), None, clock=lambda: next(times))
        with pytest.raises(JudgeError, match="no whole reply in 5 s"):
            endpoint.ask(messages(ITEMS[0]), read_verdict)
        endpoint.close()


def test_a_judge_that_is_down_keeps_what_there_is_and_judging_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    with serving(lambda number, question: by_answer(0, question) if number == 0 else Reply(500)) as server:
        with pytest.raises(RunError, match=r"judge: .* gives no verdict in 2 attempts; .* HTTP 500 \(1 of 2 .* kept"):
            judged(server.url, file, attempts=2)
        assert len(server.questions) == 3
    assert len(file.read_text().splitlines()) == 1
    file.write_bytes(file.read_bytes() + b'{"torn')
    with serving(by_answer) as server:
        verdicts, said = judged(server.url, file)
        assert len(server.questions) == 1
    assert said[0].startswith("judge: 1 of 2 verdicts to be asked")
    assert [found.score for found in verdicts] == [1.0, 0.25, 1.0]
    assert len(file.read_text().splitlines()) == 3


def test_one_answer_that_the_judge_cannot_do_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    """The same answer twice is asked for once; what there is no verdict of is asked for by the next call."""
    file = tmp_path / "verdicts.jsonl"
    message = r"its answer cannot be used: no JSON: '\?' \(1 of 2 verdicts are kept"
    with (
        serving(lambda _, question: completion("?") if "four" in str(question) else verdict(0.5)) as server,
        pytest.raises(RunError, match=message),
    ):
        judged(server.url, file, attempts=1)
    assert len(server.questions) == 2
    assert [json.loads(line)["task"] for line in file.read_text().splitlines()] == ["colours"]
    with serving(by_answer) as server:
        verdicts, _ = judged(server.url, file)
        assert len(server.questions) == 1
    assert [found.score for found in verdicts] == [1.0, 0.5, 1.0]


def test_a_judge_that_cannot_do_any_is_not_asked_for_all(tmp_path: Path) -> None:
    chosen = config("http://unused/v1", attempts=2)
    items = [Item("?", "yes", f"answer {number}") for number in range(10)]
    with serving(lambda *_: completion("I like it.")) as server:
        endpoint = Endpoint(chosen.model_copy(update={"base_url": server.url}), None, sleep=lambda _: None)
        with pytest.raises(RunError, match="0 of 10 verdicts are kept"):
            judge(items, [{}] * 10, chosen, VerdictFile(tmp_path / "verdicts.jsonl"), endpoint, lambda _: None)
        endpoint.close()
    assert len(server.questions) == 2 * MOST_UNREADABLE


def test_a_judge_that_is_not_there_at_all(tmp_path: Path) -> None:
    with serving(by_answer) as server:
        url = server.url
    with pytest.raises(RunError, match="ConnectError"):
        judged(url, tmp_path / "verdicts.jsonl", attempts=2)


def test_what_the_endpoint_refuses_is_not_asked_again_and_the_key_is_not_shown(tmp_path: Path) -> None:
    with serving(scripted(Reply(401, b'{"error": "bad key sk-secret"}'))) as server:
        with pytest.raises(RunError, match=r"HTTP 401: .*bad key \(hidden\)") as caught:
            judged(server.url, tmp_path / "verdicts.jsonl")
        assert len(server.questions) == 1
    assert "sk-secret" not in str(caught.value)


def test_a_redirect_is_not_followed_with_the_key(tmp_path: Path) -> None:
    with serving(by_answer) as other, serving(scripted(Reply(307, headers={"Location": other.url}))) as server:
        with pytest.raises(RunError, match="HTTP 307"):
            judged(server.url, tmp_path / "verdicts.jsonl")
        assert other.questions == []


def test_a_damaged_file_of_verdicts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    file.write_text('{"score": 3, "reason": "", "key": "k"}\n')
    with pytest.raises(InputError, match=r"line 1 is no verdict; move the file away"):
        VerdictFile(file)


@pytest.mark.parametrize(
    "text",
    ["", "1", "[]", '{"score": "1"}', '{"score": true}', '{"score": NaN}', '{"score": 1.01}', '{"score": -0.1}',
     '{"score": 1, "reason": 3}', '{"score": 1} yes', '```json\n{"score": 1}\n``` yes'],
)  # fmt: skip
def test_what_is_no_verdict(text: str) -> None:
    with pytest.raises(BadVerdictError):
        read_verdict(text)


@pytest.mark.parametrize(
    "text", ['{"score": 1}', ' {"score": 1}\n', '```json\n{"score": 1}\n```', '```\n{"score": 1}\n```\n']
)
def test_a_verdict_may_be_fenced(text: str) -> None:
    assert read_verdict(text) == Verdict(1.0, "")


def test_the_cost_is_estimated_before_it_begins() -> None:
    """Four letters a token, 40 tokens a verdict."""
    letters = sum(len(message["content"]) for item in ITEMS[:2] for message in messages(item))
    text = estimate(ITEMS[:2], 3, config("http://h/v1", prompt_price=2.0, answer_price=10.0))
    money = (letters // 4 * 2.0 + 80 * 10.0) / 1e6
    assert text == (
        f"judge: 2 of 3 verdicts to be asked from grader, about {letters // 4} tokens to read and 80 to write, "
        f"about {money:.4f} at the prices given"
    )
    assert "prices" not in estimate(ITEMS, 3, config("http://h/v1"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "ftp://h"}, "base_url has to be http"),
        ({"base_url": "https://me:sk-1@h/v1"}, "base_url may hold no user name"),
        ({"key_env": "sk-123"}, "key_env has to be the name of an environment variable, not the key itself"),
    ],
)
def test_a_key_in_the_settings_is_refused_and_not_shown(settings: dict[str, str], message: str) -> None:
    tree = {"base_url": "https://h/v1", "model": "m", **settings}
    whole = {"backbone": {"name": "x"}, "tasks": ["dolly-open-qa"], "evaluation": {"generation": {}, "judge": tree}}
    with pytest.raises(InputError, match=rf"evaluation.judge: {message}") as caught:
        load_config(whole)
    assert "sk-1" not in str(caught.value)


def test_unknown_keys_get_the_nearest_name_inside_optional_sections() -> None:
    whole = {"backbone": {"name": "x"}, "tasks": ["dolly-open-qa"], "evaluation": {"generation": {"max_row": 3}}}
    with pytest.raises(InputError, match=r"evaluation.generation.max_row: unknown key; did you mean .*max_rows"):
        load_config(whole)
