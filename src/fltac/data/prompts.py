"""How an instruction and its context become a prompt."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fltac.data.tasks import ResolvedTask
from fltac.errors import InputError

INTRODUCTION = "Below is an instruction. Write a response that does what it asks."
INTRODUCTION_WITH_INPUT = "Below is an instruction, and an input it refers to. Write a response that does what it asks."

FIXED_DATE = "01 Jan 2025"
"""For chat templates that tell the model today's date: the same rows are to give the same tokens every day."""


@dataclass(frozen=True)
class Prompt:
    """What a model reads before it answers.

    Attributes:
        text: All of it.
        start: Where the row's own text begins; before it and after ``stop`` stands the template's.
        stop: Where it ends.
    """

    text: str
    start: int
    stop: int


def prompt_of(row: Mapping[str, str], task: ResolvedTask, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt of a row.

    Args:
        row: ``instruction`` and ``context``, which may be empty.
        task: Says which template.
        tokenizer: Has the chat template.

    Raises:
        InputError: the task asks for a chat template and the tokenizer has none that can be used.
    """
    if task.prompting.template == "chat":
        return _chat(row, task, tokenizer)
    return alpaca(row["instruction"], row["context"])


def alpaca(instruction: str, context: str) -> Prompt:
    """Headed sections for instruction, input (where there is any) and response, as Alpaca has them."""
    introduction = INTRODUCTION_WITH_INPUT if context else INTRODUCTION
    before = f"{introduction}\n\n### Instruction:\n"
    body = f"{instruction}\n\n### Input:\n{context}" if context else instruction
    return Prompt(f"{before}{body}\n\n### Response:\n", len(before), len(before) + len(body))


def _chat(row: Mapping[str, str], task: ResolvedTask, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    key = task.key("template")
    if not tokenizer.chat_template:
        raise InputError(f"{key}: 'chat', but the backbone's tokenizer has no chat template; allowed is alpaca")
    content = f"{row['instruction']}\n\n{row['context']}" if row["context"] else row["instruction"]
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            date_string=FIXED_DATE,
        )
    except Exception as error:  # a template is a program of its own, with errors of its own
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{key}: the tokenizer's chat template cannot be used ({reason}); allowed is alpaca"
        ) from error
    start = text.find(content)
    if start < 0:
        raise InputError(f"{key}: the tokenizer's chat template changes the text it is given; allowed is alpaca")
    return Prompt(text, start, start + len(content))
