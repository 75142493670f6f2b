"""In-process federation: all clients in one process around one frozen backbone, every payload encoded as on a wire."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fltac.client.assignment import choose
from fltac.client.client import Client, head_shapes, plan_jobs, reply_of
from fltac.client.gradients import gradients, plan_gradients
from fltac.client.profile import profiles_of
from fltac.client.schedule import LanePlan
from fltac.client.training import OnPass, Trained, no_report, train_each
from fltac.config import Config
from fltac.model.lanes import LaneModel
from fltac.records import Adapter, FloatArray, Presence, Reply, Request
from fltac.runtime.loop import Exchange, Record
from fltac.wire.blob import WireError
from fltac.wire.codec import decode_reply, decode_request, encode_reply, encode_request


@dataclass
class Simulation:
    """Answers requests in this process.

    Attributes:
        clients: By id.
        model: The backbone with its lanes.
        config: The run's configuration.
        plan: How large a pass may be; its adapters may belong to different clients.
        on_pass: Called after each pass.
        initial: v0, which clients keep once they were sent it.
    """

    clients: Mapping[str, Client]
    model: LaneModel
    config: Config
    plan: LanePlan
    on_pass: OnPass = no_report
    initial: Adapter = field(default_factory=dict)

    def present(self) -> list[Presence]:
        """Everybody, always."""
        hidden = self.model.backbone.hidden
        return [
            Presence(
                client.id, {slot: head_shapes(own, hidden) for slot, own in client.slots.items()}, keeps_initial=True
            )
            for _, client in sorted(self.clients.items())
        ]

    def notes(self) -> Record:
        """Nothing."""
        return {}

    def exchange(self, requests: Sequence[Request]) -> Exchange:
        """Sends the requests, lets clients choose where they are to, trains, and collects the replies."""
        start = time.perf_counter()
        delivered, down_bytes = self.deliver(requests)
        received = [
            choose(self.model, self.clients[request.client], request, request.initial or self.initial, self.config)
            for request in delivered
        ]
        answered = {request.client: request for request in received}
        seed = self.config.federation.seed
        profiles = {
            client: profiles_of(self.model, self.clients[client], self.config, seed)
            for client, request in answered.items()
            if request.profile
        }
        seen: dict[str, dict[int, Adapter]] = {client: {} for client in answered}
        asked_first = [
            job
            for request in received
            for job in plan_gradients(
                self.clients[request.client], request, request.initial or self.initial, self.config
            )
        ]
        for found in gradients(self.model, asked_first, self.config.training, self.plan, self.on_pass):
            seen[found.client][found.slot] = found.directions
        jobs = [
            job
            for request in received
            for job in plan_jobs(self.clients[request.client], request, request.initial or self.initial, self.config)
        ]
        asked = Counter(job.client for job in jobs)
        done: dict[str, list[Trained]] = {client: [] for client in asked}
        replies: dict[str, Reply] = {}
        up_bytes, losses = 0, [0.0]
        for result in train_each(
            self.model, jobs, self.config.training, self.config.lora.dropout, self.plan, self.on_pass
        ):
            client = result.job.client
            losses.append(result.loss)
            done[client].append(result)
            if len(done[client]) == asked[client]:
                # At once, so that no adapter is held twice for longer than its client's turn.
                payload = self._payload(answered[client], done.pop(client), profiles.get(client), seen.pop(client))
                up_bytes += len(payload)
                replies[client] = decode_reply(payload)
        ordered = tuple(replies[request.client] for request in received if request.client in replies)
        loss = math.fsum(losses) / (len(losses) - 1) if jobs else None
        return Exchange(ordered, up_bytes, down_bytes, time.perf_counter() - start, loss)

    def deliver(self, requests: Sequence[Request]) -> tuple[list[Request], int]:
        """Encodes and decodes requests; returns them as the clients see them, and their bytes.

        Clients that are sent the same adapter share one copy of it, as they do with the backbone.
        """
        received, size = [], 0
        shared: dict[int | None, Adapter] = {}
        for request in requests:
            payload = encode_request(request, self.config.wire_dtype)
            size += len(payload)
            got = decode_request(payload)
            adapters = {number: _one_copy(shared, number, adapter) for number, adapter in got.adapters.items()}
            initial = None if got.initial is None else _one_copy(shared, None, got.initial)
            received.append(replace(got, adapters=adapters, initial=initial))
        return received, size

    def _payload(
        self,
        request: Request,
        own: Sequence[Trained],
        profiles: Mapping[int, FloatArray] | None,
        seen: Mapping[int, Adapter],
    ) -> bytes:
        """A client's encoded reply."""
        client = request.client
        try:
            trained = sorted(own, key=lambda result: result.job.slot)
            reply = reply_of(self.clients[client], trained, request, profiles, seen)
            return encode_reply(reply, self.config.wire_dtype)
        except WireError as error:
            # Diverged: its values do not fit the wire's dtype. The round goes on without it.
            return encode_reply(Reply(client, error=str(error)), self.config.wire_dtype)


def _one_copy(shared: dict[int | None, Adapter], number: int | None, adapter: Adapter) -> Adapter:
    """The copy that is held already, if it is equal."""
    first = shared.setdefault(number, adapter)
    same = first.keys() == adapter.keys() and all(np.array_equal(first[name], adapter[name]) for name in first)
    return first if same else adapter
