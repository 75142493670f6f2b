"""Asks an OpenAI-compatible endpoint for one completion, with patience: POST <base_url>/chat/completions."""

import email.utils
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC
from typing import Any, Protocol

import httpx

from fltac.config.answers import JudgeConfig

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds between attempts: the first, doubled each time, up to the last; ``Retry-After`` may ask for more."""
LONGEST_ASKED_WAIT = 600.0
"""That ``Retry-After`` is heeded up to."""
LARGEST_REPLY = 2**20
"""Bytes of a reply that are read."""


class JudgeError(RuntimeError):
    """The endpoint gives no completion; the text is one line that holds no key."""


class UnreadableError(JudgeError):
    """The endpoint gives completions, but none that can be read."""


class _Again(Exception):
    """An attempt that may be made again, after so many seconds if the endpoint says."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Endpoint:
    """An endpoint that is asked again where it is busy, broken or silent."""

    def __init__(
        self,
        config: JudgeConfig,
        key: str | None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Connects at the first question.

        Args:
            config: Where it is, and how long and how often it is asked.
            key: Sent as a bearer token.
            sleep: Waits for so many seconds.
            clock: Seconds, for the time that a reply takes.
            now: Seconds since 1970, for a ``Retry-After`` that names a time.
        """
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # A redirect would carry the key elsewhere.
        self._client = httpx.Client(timeout=config.timeout_seconds, headers=headers, follow_redirects=False)
        self._config, self._key = config, key
        self._sleep, self._clock, self._now = sleep, clock, now
        self._url = config.base_url.rstrip("/") + "/chat/completions"

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def ask(self, messages: Sequence[Mapping[str, str]], read: "Reader") -> Any:
        """What ``read`` makes of a completion.

        Args:
            messages: The conversation.
            read: Raises a ``ValueError`` where the text is not what was asked for; it is then asked for again.

        Raises:
            UnreadableError: after the last attempt, if that was answered with a text that cannot be read.
            JudgeError: after the last attempt, or at once where another one would be no better.
        """
        config = self._config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": config.max_answer_tokens,
        }
        if config.json_mode:
            body["response_format"] = {"type": "json_object"}
        reason = ""
        kind: type[JudgeError] = JudgeError
        for attempt in range(config.attempts):
            try:
                return read(self._completion(body))
            except _Again as error:
                reason, wait, kind = str(error), error.wait, JudgeError
            except ValueError as error:
                reason, wait, kind = f"its answer cannot be used: {error}", None, UnreadableError
            if attempt + 1 < config.attempts:
                self._sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) if wait is None else wait)
        raise kind(f"{config.base_url} gives no verdict in {config.attempts} attempts; the last: {reason}")

    def _completion(self, body: Mapping[str, Any]) -> str:
        begin, limit = self._clock(), self._config.timeout_seconds
        try:
            with self._client.stream("POST", self._url, json=body) as response:
                data = b""
                for part in response.iter_bytes():
                    data += part
                    if len(data) > LARGEST_REPLY:
                        raise _Again(f"its reply has more than {LARGEST_REPLY} bytes")
                    if self._clock() - begin > limit:
                        raise _Again(f"no whole reply in {limit:g} s")
        except httpx.TimeoutException as error:
            raise _Again(f"no reply in {limit:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _Again(f"{type(error).__name__}: {self._plain(str(error))}") from error
        status = response.status_code
        if status == 429 or status >= 500:
            raise _Again(f"HTTP {status}", self._asked_wait(response.headers.get("Retry-After")))
        if status != 200:
            raise JudgeError(f"{self._config.base_url}: HTTP {status}: {self._plain(data.decode(errors='replace'))}")
        return _content(data)

    def _asked_wait(self, value: str | None) -> float | None:
        """Seconds that ``Retry-After`` asks for: a number, or a date."""
        if value is None:
            return None
        try:
            seconds = float(value)
        except ValueError:
            try:
                date = email.utils.parsedate_to_datetime(value)
            except ValueError:
                return None
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - self._now()
        return min(LONGEST_ASKED_WAIT, seconds) if seconds >= 0 else None

    def _plain(self, text: str) -> str:
        """Somebody else's text on one line, without the key if it repeats it."""
        text = text.replace(self._key, "(hidden)") if self._key else text
        plain = "".join(letter if letter.isprintable() else " " for letter in text[:400])
        return " ".join(plain.split())[:160]


class Reader(Protocol):
    """Makes something of a completion's text."""

    def __call__(self, text: str) -> Any:
        """Raises ``ValueError`` where it cannot."""
        ...


def _content(data: bytes) -> str:
    """The text of a completion. Raises ``_Again`` where the reply has none."""
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise _Again("its reply is no completion") from error
    if not isinstance(content, str):
        raise _Again("its reply holds no text")
    return content
