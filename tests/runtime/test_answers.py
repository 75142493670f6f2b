"""``fltac evaluate`` on a language model: answers, their scores, verdicts, and what is said where it fails."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fltac
from fltac.cli import main
from fltac.data.text_scores import rouge_l
from fltac.evaluation import digest
from fltac.runtime.answers import sent_adapters
from fltac.runtime.checkpoint import latest_checkpoint
from fltac.runtime.experiment import evaluate
from fltac.runtime.setup import prepare
from fltac.server.sending import Outbox
from judge.scripted_judge import Reply, completion, serving, verdict
from language import language_tree


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("answers")
    settings = ["training.steps=2", "federation.rounds=1", "output.adapters=true"]
    fltac.run(fltac.load_config(language_tree(root), settings), root / "run")
    return root / "run"


def call(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def graded(_: int, question: Any) -> Reply:
    return verdict(0.5)


def test_answers_are_written_scored_and_judged(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A judge that fails leaves everything else; the next call asks for what is missing and computes nothing anew."""
    monkeypatch.setenv("FLTAC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GRADER_KEY", "sk-secret")
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = (out / "summary.json").read_bytes(), (out / "config.yaml").read_bytes()
    settings = ["evaluation.generation.max_rows=3", "evaluation.generation.max_new_tokens=6"]
    with serving(lambda number, question: graded(number, question) if number < 4 else Reply(500)) as server:
        judge = [
            f"evaluation.judge.base_url={server.url}",
            "evaluation.judge.model=grader",
            "evaluation.judge.key_env=GRADER_KEY",
            "evaluation.judge.attempts=1",
        ]
        with pytest.raises(SystemExit) as caught:
            main(["evaluate", str(out), *settings, *judge])
        assert caught.value.code == 1
    record = json.loads((out / "evaluation.json").read_text())
    assert "judge" not in record
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert {line["task"] for line in lines} == {"colour", "number", "animal"}
    for line in lines:
        assert line["prompt"].startswith("Below is an instruction")
        assert line["prompt"].endswith("### Response:\n")
        assert f"Which {line['task']}?" in line["prompt"]
        assert line["reference"] == line["task"][0] * len(line["reference"])
        assert line["rouge_l"] == rouge_l(line["answer"], line["reference"])
        assert (out / "adapters" / line["adapter"]).is_dir()
    for name, scores in record["generation"]["tasks"].items():
        own = [line for line in lines if line["task"] == name]
        weights = [line["clients"] for line in own]
        assert scores["rouge_l"] == pytest.approx(np.average([line["rouge_l"] for line in own], weights=weights))
        assert (scores["n"], scores["prompts_cut"]) == (3, 0)
    kept = len((out / "verdicts.jsonl").read_text().splitlines())
    assert kept >= 4
    again = (out / "generations.jsonl").stat().st_mtime_ns
    with serving(graded) as server:
        judge[0] = f"evaluation.judge.base_url={server.url}"
        done = evaluate(out, overrides=[*settings, *judge])
        asked = len({(line["prompt"], line["answer"], line["reference"]) for line in lines})
        assert len(server.questions) == asked - 4
    assert done["judge"]["tasks"] == {"colour": 0.5, "number": 0.5, "animal": 0.5}
    assert done["tasks"] == record["tasks"]
    assert (out / "generations.jsonl").stat().st_mtime_ns == again
    assert len((out / "verdicts.jsonl").read_text().splitlines()) == len(lines)
    assert ((out / "summary.json").read_bytes(), (out / "config.yaml").read_bytes()) == before
    assert b"sk-secret" not in b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_answers_of_an_adapter_are_those_of_plain_peft(finished: Path, tmp_path: Path) -> None:
    """Every exported adapter generates by plain PEFT what the evaluation wrote down."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    evaluate(out, overrides=["evaluation.generation.max_rows=1", "evaluation.generation.max_new_tokens=5"])
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    folder = fltac.load_config(out / "config.yaml").backbone.name
    letters = AutoTokenizer.from_pretrained(folder)
    assert len({line["adapter"] for line in lines}) == 3
    for line in lines:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain = PeftModel.from_pretrained(base, out / "adapters" / line["adapter"]).eval()
        batch = letters(line["prompt"], return_tensors="pt", return_token_type_ids=False)
        whole = plain.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
        text = letters.decode(whole[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert line["answer"] == text.strip()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method=fedsa-lora", [f"cluster-0 for client-{number}/0" for number in range(3)]),
        ("lora.ranks={client-1: 1}", ["cluster-0", "cluster-0 for client-1/0"]),
    ],
)
def test_a_slot_is_answered_for_by_what_it_is_sent(tmp_path: Path, override: str, expected: list[str]) -> None:
    """As its scores are of that, too: its own B, or the adapter cut to its client's rank."""
    rule = ["server.aggregation.rule=hetlora"] if "ranks" in override else []
    settings = ["training.steps=1", "federation.rounds=1", override, *rule]
    fltac.run(fltac.load_config(language_tree(tmp_path), settings), tmp_path / "run")
    experiment, last = prepare(fltac.load_config(tmp_path / "run" / "config.yaml")), latest_checkpoint(tmp_path / "run")
    assert last is not None
    state = last.state
    outbox, first = Outbox(state, experiment.config.server_settings), next(iter(experiment.tasks))
    sent = sent_adapters(experiment, state, first)
    assert [re.sub("(cluster-|/)[0-9]+", r"\g<1>0", item.name) for item in sent] == expected
    assert sum(item.clients for item in sent) == 3
    received = [digest(outbox.of(holding.key)) for holding in experiment.holdings if holding.task == first]
    assert {digest(item.adapter) for item in sent} == set(received)
    evaluate(tmp_path / "run", overrides=WRITE)
    lines = [json.loads(line) for line in (tmp_path / "run" / "generations.jsonl").read_text().splitlines()]
    assert [line["adapter"] for line in lines if line["task"] == first] == [item.name for item in sent]


def test_prompts_are_cut_so_that_an_answer_fits_and_are_counted(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each letter is a token; of 200 there are 60 for the answer. Prompts with a context are longer than 140."""
    settings = ["evaluation.generation.max_new_tokens=60", "evaluation.generation.max_rows=4"]
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert call("evaluate", str(out), *settings) == 0
    said = capsys.readouterr().err
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert {bool(line["prompt_cut"]) for line in lines} == {True, False}
    for line in lines:
        assert line["prompt_cut"] == max(0, len(line["prompt"]) - 140)
        assert len(line["answer"]) <= 60
    counts = json.loads((out / "evaluation.json").read_text())["generation"]["tasks"]
    for name, scores in counts.items():
        cut = {line["row"] for line in lines if line["task"] == name and line["prompt_cut"]}
        assert scores["prompts_cut"] == len(cut)
        assert f"{name}: answers to 4 held-out prompts, of which {len(cut)} had to be cut" in said


WRITE = ["evaluation.generation.max_rows=1", "evaluation.generation.max_new_tokens=4"]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (Reply(429), "HTTP 429"),
        (Reply(500), "HTTP 500"),
        (Reply(body=b"<html>"), "its reply is no completion"),
        (completion("Looks good to me."), "its answer cannot be used: no JSON: 'Looks good to me.'"),
        (Reply(wait=1.0), "no reply in 0.3 s"),
    ],
    ids=["busy", "broken", "malformed", "nonsense", "silent"],
)
def test_the_command_says_why_judging_stopped_and_goes_on(
    failure: Reply,
    reason: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first verdict is had, the second is not; the same command later asks for what is missing."""
    monkeypatch.setenv("FLTAC_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    broken = True
    with serving(lambda number, _: failure if broken and number else verdict(0.25)) as server:
        judge = ["base_url=" + server.url, "model=grader", "attempts=1", "timeout_seconds=0.3"]
        command = ["evaluate", str(out), *WRITE, *(f"evaluation.judge.{setting}" for setting in judge)]
        assert call(*command) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: judge: ")
        assert reason in last
        assert "(1 of 3 verdicts are kept; `fltac evaluate` with the same settings asks for the others)" in last
        record = json.loads((out / "evaluation.json").read_text())
        assert set(record["tasks"]) == set(record["generation"]["tasks"]) == {"colour", "number", "animal"}
        broken = False
        asked = len(server.questions)
        assert call(*command) == 0
        assert len(server.questions) - asked == 2
    captured = capsys.readouterr()
    assert "judge: 2 of 3 verdicts to be asked from grader, about" in captured.err
    for text in ("ROUGE-L", "token F1", "judge", "0.250"):
        assert text in captured.out
    assert call("evaluate", str(out), *WRITE, "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["generation"]["tasks"] == record["generation"]["tasks"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.lr=1"], "override 'training.lr=1': a run's settings are fixed; allowed are those of evaluation"),
        (["evaluation.generation.max_row=1"], "evaluation.generation.max_row: unknown key; did you mean"),
        (["evaluation.generation.temperature=-1"], "evaluation.generation.temperature"),
        (["evaluation.generation.max_new_tokens=199"], "max_new_tokens: 199 tokens leave no room for a prompt"),
        (["evaluation.judge.model=m"], "evaluation.judge.base_url"),
        (["evaluation.judge.base_url=http://h/v1", "evaluation.judge.model=m"], "judge needs generation"),
        ([*WRITE, "evaluation.judge.base_url=h/v1", "evaluation.judge.model=m"], "base_url has to be http"),
        (
            [
                *WRITE,
                "evaluation.judge.base_url=http://h/v1",
                "evaluation.judge.model=m",
                "evaluation.judge.key_env=NOT_SET",
            ],
            "evaluation.judge.key_env: the environment variable NOT_SET is not set",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_code_2(
    finished: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert call("evaluate", str(out), *overrides) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in captured.err
    assert captured.out == ""
