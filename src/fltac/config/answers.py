"""Settings of what a language model writes after its training, and of who judges it."""

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from fltac.config.base import Positive, Section, Share

Price = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class GenerationConfig(Section):
    """Answers to held-out prompts, written by each adapter; made by ``fltac evaluate``."""

    max_rows: Positive = 32
    """Held-out prompts of each task, a fixed seeded subset."""
    max_new_tokens: Positive = 128
    """The most that an answer may have; a prompt is cut so that they fit behind it."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: always the most likely token; else tokens are drawn."""
    top_p: Share = 1.0
    """Drawn from the most likely tokens that together have this probability."""
    seed: int = 0
    """Of the draws."""
    batch_size: Positive = 16


class JudgeConfig(Section):
    """A language model behind an OpenAI-compatible endpoint that scores answers from 0 to 1."""

    base_url: str
    """``https://host/v1``; ``/chat/completions`` is added."""
    model: str
    key_env: str | None = None
    """Name of the environment variable that holds the key; without it none is sent."""
    json_mode: bool = True
    """Ask the endpoint for JSON by ``response_format``, which some do not know."""
    max_answer_tokens: Positive = 300
    """Of a verdict."""
    timeout_seconds: Seconds = 60.0
    attempts: Positive = 5
    """For one verdict, before judging stops."""
    prompt_price: Price | None = None
    """Of a million tokens read, in any currency, for the estimate."""
    answer_price: Price | None = None
    """Of a million tokens written."""

    @model_validator(mode="after")
    def _safe(self) -> "JudgeConfig":
        """Checked for the section as a whole, since the error of a single field would show what may be a key."""
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("base_url has to be http://host/... or https://host/...")
        if url.username or url.password or url.query:
            raise ValueError("base_url may hold no user name, password or query: the key is taken from key_env")
        if self.key_env is not None and not VARIABLE.fullmatch(self.key_env):
            raise ValueError("key_env has to be the name of an environment variable, not the key itself")
        return self
