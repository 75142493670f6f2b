"""What crosses a boundary between the parties of a federation.

The server sees these types and no others. None of them has room for a task's name: a client numbers its tasks
with anonymous slots, and an adapter's head is keyed by its shape.

Adapter tensors are named
    ``<module path>.lora_A``  float32 ``[rank, in_features]``
    ``<module path>.lora_B``  float32 ``[out_features, rank]``
    ``<module path>.base_A``  float32 ``[any rank, in_features]``, only from server to client
    ``<module path>.base_B``  float32 ``[out_features, the same]``, likewise
    ``head.<key>.weight``     float32 ``[outputs, hidden]``
    ``head.<key>.bias``       float32 ``[outputs]``
A module's weight with an adapter is ``W + scaling (base_B base_A + lora_B lora_A)``: the base is what earlier rounds
have put into the frozen weight of this adapter's holders, and is not trained; without one it is zero.
``<key>`` is the number of outputs (``2``), or ``<outputs>-<group>`` where the clients were told groups.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Adapter = Mapping[str, FloatArray]
"""The named tensors trained for one slot: LoRA factors and, where the kind has one, the head."""

SlotKey = tuple[str, int]
"""(client id, slot)."""

CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a data owner may call itself; it is safe as the name of a folder."""
MOST_SLOTS = 10_000
"""Slot numbers of a data owner are below this."""

LORA_A, LORA_B = ".lora_A", ".lora_B"
BASE_A, BASE_B = ".base_A", ".base_B"
HEAD = "head."


def is_head(name: str) -> bool:
    """True for ``head.<key>.weight`` and ``head.<key>.bias``."""
    return name.startswith(HEAD)


def is_base(name: str) -> bool:
    """True for ``<module path>.base_A`` and ``<module path>.base_B``."""
    return name.endswith((BASE_A, BASE_B)) and not is_head(name)


def base_of(adapter: Adapter) -> Adapter:
    """An adapter's frozen part alone."""
    return {name: tensor for name, tensor in adapter.items() if is_base(name)}


def without_base(adapter: Adapter) -> Adapter:
    """An adapter without its frozen part; the same object where it has none."""
    if not any(map(is_base, adapter)):
        return adapter
    return {name: tensor for name, tensor in adapter.items() if not is_base(name)}


def at_rank(adapter: Adapter, rank: int) -> Adapter:
    """An adapter whose factors are cut to their first rows and columns, or filled up with zeros, to a rank.

    The product of filled-up factors is the same. The same object is returned where the rank is right already.
    """
    out = {}
    for name, tensor in adapter.items():
        axis = 0 if name.endswith(LORA_A) else 1 if name.endswith(LORA_B) else None
        if axis is None or is_head(name) or tensor.shape[axis] == rank:
            out[name] = tensor
        elif tensor.shape[axis] > rank:
            out[name] = np.ascontiguousarray(tensor[:rank] if axis == 0 else tensor[:, :rank])
        else:
            missing = rank - tensor.shape[axis]
            out[name] = np.pad(tensor, ((0, missing), (0, 0)) if axis == 0 else ((0, 0), (0, missing)))
    return adapter if all(out[name] is tensor for name, tensor in adapter.items()) else out


def lora_modules(adapter: Adapter) -> list[str]:
    """The adapted modules' paths, sorted, read from the ``.lora_A`` names."""
    return sorted(name[: -len(LORA_A)] for name in adapter if name.endswith(LORA_A) and not is_head(name))


def head_keys(adapter: Adapter) -> list[str]:
    """The keys of the heads an adapter holds, sorted."""
    return sorted(name[len(HEAD) : -len(".weight")] for name in adapter if is_head(name) and name.endswith(".weight"))


@dataclass(frozen=True)
class Presence:
    """A client that is there to be asked, as far as the server is told.

    Attributes:
        client: The client's id.
        heads: For each of its slots, the head keys it uses with their shape (outputs, hidden).
        keeps_initial: It still has v0 where it was sent it once, so that factors that are never trained need not be
            sent again.
    """

    client: str
    heads: Mapping[int, Mapping[str, tuple[int, int]]]
    keeps_initial: bool = False


@dataclass(frozen=True)
class Request:
    """What the server sends one client of the cohort.

    Attributes:
        round_number: The round, from 1.
        client: The client's id.
        slots: For each slot the server knows of this client, which of ``adapters`` it continues from: its cluster's
            id, or a number of its own where it also holds something of its own.
        adapters: The adapters that ``slots`` refers to, each once. Factors that are never trained may be left out;
            they are v0's.
        initial: The first adapter v0 with one head for every head key; None where all that the client's slots
            continue from is in ``adapters``.
        candidates: Clusters, all in ``adapters``, of which the client is to choose one for each of its slots by
            itself; empty where the server has decided.
        profile: Whether a profile of each slot is asked for, too.
        gradients: Whether those of each slot that is not in ``slots`` are, too.
    """

    round_number: int
    client: str
    slots: Mapping[int, int]
    adapters: Mapping[int, Adapter]
    initial: Adapter | None
    candidates: tuple[int, ...] = ()
    profile: bool = False
    gradients: bool = False

    def sent(self, slot: int) -> Adapter | None:
        """The cluster's adapter that a slot was sent; None where it was to begin from v0."""
        cluster = self.slots.get(slot)
        return None if cluster is None else self.adapters[cluster]

    def began(self, update: "Update") -> Adapter | None:
        """The cluster's adapter that an update began from: the one it chose, else the one sent; None for v0."""
        return self.sent(update.slot) if update.cluster is None else self.adapters[update.cluster]


@dataclass(frozen=True)
class Update:
    """One slot's trained adapter, as uploaded.

    ``cluster``: the candidate that the client chose and began from, where it was to choose. ``profile``: float32
    ``[hidden]``, the mean feature of some of its rows. ``gradients``: by A's name float32 ``[directions, in]``, the
    leading directions of its gradients at the bare backbone. Both only where asked for.
    """

    client: str
    slot: int
    adapter: Adapter
    examples: int
    cluster: int | None = None
    profile: FloatArray | None = None
    gradients: Adapter | None = None

    @property
    def key(self) -> SlotKey:
        return (self.client, self.slot)


@dataclass(frozen=True)
class Reply:
    """All uploads of one client in one round, or the reason why there are none."""

    client: str
    updates: tuple[Update, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class LateReply:
    """A reply that came after the deadline of its round, and the request that it answers."""

    request: Request
    reply: Reply


@dataclass(frozen=True)
class Cluster:
    """A group of slots with an identity that persists over rounds.

    Attributes:
        id: Persistent number, from 0, never used again for another cluster.
        adapter: The current mean of the members' adapters.
        members: Slots assigned to it, sorted; empty for a cluster that kept its adapter without members.
    """

    id: int
    adapter: Adapter
    members: tuple[SlotKey, ...]


@dataclass(frozen=True)
class ServerState:
    """All that the server knows between two rounds; a checkpoint is exactly this.

    Attributes:
        round_number: The last finished round; 0 before the first.
        initial: v0: the LoRA factors (A random, B zero) and one head for each head key.
        clients: Ids of all clients, sorted.
        clusters: In order of their ids.
        memory: What the clustering rule keeps of each slot: what it has learned since each of its rounds began
            (the layout belongs to ``server.changes``), or what ``server.bisection`` says; empty for rules
            that keep nothing.
        next_cluster_id: The id that the next new cluster gets.
        own: For each slot the tensors that it goes on from alone (``server.sending.own_part``); empty where the means
            are all that is sent.
        optimizer: For each cluster the server optimizer's moments (the layout belongs to
            ``server.aggregation.optimizer``); empty without one.
    """

    round_number: int
    initial: Adapter
    clients: tuple[str, ...]
    clusters: tuple[Cluster, ...] = ()
    memory: Mapping[SlotKey, Adapter] = field(default_factory=dict)
    next_cluster_id: int = 0
    own: Mapping[SlotKey, Adapter] = field(default_factory=dict)
    optimizer: Mapping[int, Adapter] = field(default_factory=dict)

    def assignment(self) -> dict[SlotKey, int]:
        """The cluster id of every slot that has one."""
        return {key: cluster.id for cluster in self.clusters for key in cluster.members}

    def received(self, key: SlotKey) -> Adapter:
        """The adapter that a slot continues from: its cluster's, or v0 if it has none yet.

        What it is sent may be cut to its client's rank, have factors of its own, or be the only cluster's where it was
        never heard of (``server.sending``).
        """
        for cluster in self.clusters:
            if key in cluster.members:
                return cluster.adapter
        return self.initial


@dataclass(frozen=True)
class Rejection:
    """An update (or a client's whole reply, slot None) that the server did not use, and why."""

    client: str
    slot: int | None
    reason: str


@dataclass(frozen=True)
class RoundReport:
    """What the server can say about a round.

    Attributes:
        round_number: The round, from 1.
        cohort: Ids of the clients asked, sorted.
        updates: The number of updates used, stale ones included.
        stale: How many of them began from an adapter of an earlier round.
        rejections: Updates and replies not used.
        k: The number of clusters with members; None where nothing is clustered.
        silhouette: Mean silhouette in the space that was clustered; None where it is not defined (fewer than two
            clusters, or as many as there are slots) or nothing is clustered.
        confidence: How sure each slot's cluster is, where a space was clustered: 1 - its distance from its own cluster
            over that from the next one.
        residuals: Where the server chose K: for each K that it tried, how badly the means of groups predict their
            members.
        profiled: Whether the clients' profiles counted; None where there are none.
        agreement: Of groups found in halves of each kind of evidence, where that decided by which slots are grouped.
        product_error: How far the clusters' products are from the exact means of their members' products, relative
            (``server.aggregation.error``); None where nothing was averaged or the products are zero.
    """

    round_number: int
    cohort: tuple[str, ...]
    updates: int
    rejections: tuple[Rejection, ...]
    k: int | None
    silhouette: float | None
    stale: int = 0
    product_error: float | None = None
    confidence: Mapping[SlotKey, float] = field(default_factory=dict)
    residuals: Mapping[int, float] | None = None
    profiled: bool | None = None
    agreement: Mapping[str, float] | None = None

    def evidence(self) -> dict[str, object]:
        """For a round's record: how sure the grouping is, the five least sure slots, and the errors of each K."""
        out: dict[str, object] = {}
        if self.confidence:
            least = sorted(self.confidence.items(), key=lambda item: (item[1], item[0]))[:5]
            out["confidence"] = {
                "mean": sum(self.confidence.values()) / len(self.confidence),
                "least": {f"{client}/{slot}": value for (client, slot), value in least},
            }
        if self.residuals is not None:
            out["residuals"] = {str(k): value for k, value in self.residuals.items()}
        return out if self.profiled is None else {**out, "profiled": self.profiled}
