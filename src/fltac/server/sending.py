"""What a slot is sent, and an upload made whole again: ranks that differ, factors never trained, factors of its own."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from fltac.config import ServerSettings
from fltac.records import LORA_A, LORA_B, Adapter, ServerState, SlotKey, Update, at_rank, is_head, lora_modules
from fltac.server.gradients import compared


class Outbox:
    """The adapters that slots are sent after a round; equal ones are the same object."""

    def __init__(self, state: ServerState, settings: ServerSettings) -> None:
        """Looks at a state; copies nothing."""
        self._state, self._settings = state, settings
        self._assignment = state.assignment()
        together = settings.clustering.rule in ("single", "spectral") and len(state.clusters) == 1
        together = together and state.round_number >= settings.aggregation.from_round  # else no means are sent yet
        together = together and compared(state.initial, settings) != "gradients"  # which all slots make at v0
        self._only = state.clusters[0].id if together else None
        self._adapters: dict[int | None, Adapter] = {cluster.id: cluster.adapter for cluster in state.clusters}
        self._adapters[None] = state.initial
        self._cut: dict[tuple[int | None, int | None], Adapter] = {}
        self._own: dict[SlotKey, Adapter] = {}

    def cluster(self, key: SlotKey) -> int | None:
        """The slot's cluster, if it has one; as long as all are in one cluster, a new slot is in it, too."""
        return self._assignment.get(key, self._only)

    def shared(self, cluster: int | None, client: str) -> Adapter:
        """A cluster's adapter (None: v0) at the rank of a client."""
        adapter, rank = self._adapters[cluster], self._settings.ranks.get(client)
        if rank is None:
            return adapter
        if (cluster, rank) not in self._cut:
            self._cut[cluster, rank] = at_rank(adapter, rank)
        return self._cut[cluster, rank]

    def of(self, key: SlotKey) -> Adapter:
        """What a slot is sent: its cluster's adapter, or v0, with the tensors that are its own."""
        shared = self.shared(self.cluster(key), key[0])
        if key not in self._state.own:
            return shared
        if key not in self._own:
            self._own[key] = {**shared, **self._state.own[key]}
        return self._own[key]

    def began(self, update: Update, slots: Collection[int]) -> Adapter:
        """What an update began from: the cluster that its client chose, what its slot was sent, or v0.

        Args:
            update: Of a round that has just ended.
            slots: Those that the request had an adapter for.
        """
        if update.cluster is None and update.slot in slots:
            return self.of(update.key)
        return self.shared(update.cluster, update.client)


def without_constant(adapter: Adapter, settings: ServerSettings) -> Adapter:
    """Without the factors that no round trains, for a client that keeps v0."""
    always = settings.aggregation.frozen(1)
    if always is None or always != settings.aggregation.frozen(2):
        return adapter
    return {name: tensor for name, tensor in adapter.items() if is_head(name) or not name.endswith(always)}


def own_part(update: Update, settings: ServerSettings, number: int) -> Adapter:
    """What of a round's upload the slot goes on from: B with ``fedsa``, all before means are sent, else nothing."""
    if number < settings.aggregation.from_round:
        return update.adapter
    if settings.aggregation.rule != "fedsa":
        return {}
    return {name: tensor for name, tensor in update.adapter.items() if name.endswith(LORA_B) and not is_head(name)}


class Completion:
    """Fills updates up to what all others have: the common rank, and factors that were not uploaded."""

    def __init__(self, initial: Adapter) -> None:
        """Args:
        initial: v0, for the rank, and for factors that were not even sent.
        """
        self._initial = initial
        self._rank = next((len(initial[name + LORA_A]) for name in lora_modules(initial)), 0)
        # Of each factor the axis that is as long as the rank: looked for once, and not anew for each update.
        self._factors = {
            name + part: axis for name in lora_modules(initial) for axis, part in enumerate((LORA_A, LORA_B))
        }
        self._full: dict[int, tuple[Adapter, Adapter]] = {}

    def began(self, sent: Adapter) -> Adapter:
        """What a slot began from, at the common rank; the same object for the same one."""
        if id(sent) not in self._full:
            missing = {name: self._initial[name] for name in self._factors if name not in sent}
            whole = {**sent, **missing} if missing else sent
            # The key is the object's identity, so the object is kept as long as the key.
            self._full[id(sent)] = sent, at_rank(whole, self._rank)
        return self._full[id(sent)][1]

    def whole(self, update: Update, began: Mapping[SlotKey, Adapter]) -> Update:
        """The update with the factors that it did not bring, at the common rank; the same one if nothing is missing."""
        adapter, held = update.adapter, began[update.key]
        missing = {name: held[name] for name in self._factors if name not in adapter}
        if not missing and all(adapter[name].shape[axis] == self._rank for name, axis in self._factors.items()):
            return update
        return replace(update, adapter=at_rank({**adapter, **missing}, self._rank))
