"""In-process federation: all clients in one process around one frozen backbone, every payload encoded as on a wire."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fltac.client.client import Client, plan_jobs, reply_of
from fltac.client.schedule import LanePlan
from fltac.client.training import OnPass, Trained, no_report, train
from fltac.config import Config
from fltac.model.lanes import LaneModel
from fltac.records import Presence, Reply, Request
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
    """

    clients: Mapping[str, Client]
    model: LaneModel
    config: Config
    plan: LanePlan
    on_pass: OnPass = no_report

    def present(self) -> list[Presence]:
        """Everybody, always."""
        hidden = self.model.backbone.hidden
        return [
            Presence(
                client.id,
                {
                    slot: {local.head_key: (local.task.outputs, hidden) for local in own}
                    for slot, own in client.slots.items()
                },
            )
            for _, client in sorted(self.clients.items())
        ]

    def notes(self) -> Record:
        """Nothing."""
        return {}

    def exchange(self, requests: Sequence[Request]) -> Exchange:
        """Sends the requests, trains, and collects the replies."""
        start = time.perf_counter()
        received, down_bytes = self.deliver(requests)
        jobs = [
            job
            for request in received
            for job in plan_jobs(self.clients[request.client], request, request.initial or {}, self.config)
        ]
        trained = train(self.model, jobs, self.config.training, self.config.lora.dropout, self.plan, self.on_pass)
        by_client: dict[str, list[Trained]] = {request.client: [] for request in received}
        for result in trained:
            by_client[result.job.client].append(result)
        replies, up_bytes = [], 0
        for client, own in by_client.items():
            try:
                payload = encode_reply(reply_of(self.clients[client], own), self.config.wire_dtype)
            except WireError as error:
                # Diverged: its values do not fit the wire's dtype. The round goes on without it.
                payload = encode_reply(Reply(client, error=str(error)), self.config.wire_dtype)
            up_bytes += len(payload)
            replies.append(decode_reply(payload))
        loss = sum(result.loss for result in trained) / len(trained) if trained else None
        return Exchange(tuple(replies), up_bytes, down_bytes, time.perf_counter() - start, loss)

    def deliver(self, requests: Sequence[Request]) -> tuple[list[Request], int]:
        """Encodes and decodes requests; returns them as the clients see them, and their bytes."""
        received, size = [], 0
        for request in requests:
            payload = encode_request(request, self.config.wire_dtype)
            size += len(payload)
            received.append(decode_request(payload))
        return received, size
