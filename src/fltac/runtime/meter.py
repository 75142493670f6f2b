"""Progress within a round: passes of the backbone as the share of the round's slots that is done."""

import time
from collections.abc import Sequence

from torch import Tensor

from fltac.records import Request
from fltac.runtime.progress import Progress
from fltac.runtime.setup import Experiment

REPORT_SECONDS = 0.25
"""Time between two reports; reading a loss more often would slow a GPU."""


class Meter:
    """Turns passes into the share of a round's slots that is done, a few times a second."""

    def __init__(self, experiment: Experiment, progress: Progress) -> None:
        self._clients, self._config, self._progress = experiment.clients, experiment.config, progress
        self._done, self._steps, self._slots, self._shown = 0, 1, 0, 0.0

    def on_round(self, number: int, requests: Sequence[Request]) -> None:
        """A round begins."""
        slots = [
            (own, self._config.gradient_batches if request.gradients and slot not in request.slots else 0)
            for request in requests
            for slot, own in self._clients[request.client].slots.items()
        ]
        self._done, self._slots = 0, len(slots)
        self._steps = sum(local.steps + beside for own, beside in slots for local in own)
        self._progress.round_started(number, len(requests))

    def on_pass(self, active: int, losses: Tensor) -> None:
        """So many adapters have made a step with these losses."""
        self._done += active
        now = time.monotonic()
        if self._done < self._steps and now - self._shown < REPORT_SECONDS:
            return
        self._shown = now
        slots = self._done * self._slots // self._steps
        self._progress.slots_done(slots, float(losses.mean()), self._slots)
