"""The server's round against scikit-learn's K-means on the flattened uploads: seconds, memory and clusters.

``python benchmarks/bench/server.py`` draws 100, 1,000 and 10,000 uploads of 36,864 numbers and a head with planted
groups (``planted``) and times ``finish_round`` - checks, memory, clustering, silhouette, means - with the default rule
and with the paper's, in turn with ``KMeans(n_init=10)``, which only groups. Memory is what the round allocates at its
peak beside the uploads, as tracemalloc counts it, which is told of every array that NumPy makes.
"""

import resource
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from planted import BODY_SHAPES, HEAD_SHAPES, Planted, cosines, plant
from record import write_record
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_info

from fltac.config import ServerSettings, load_config
from fltac.records import Reply, Request, RoundReport, ServerState
from fltac.server.agreement import KNOWN
from fltac.server.round import finish_round, init_server, plan_round

SIZES = {100: 5, 1000: 5, 10000: 5}
"""Uploads, and how often the round is timed; the median counts. At 10,000 scikit-learn and our K-means run once."""
TASKS = ["sst2", "mrpc", "qqp", "qnli", "rte"]
METHODS = {"spectral": "fltac", "kmeans": "fltac-paper"}
STARTS = 10

TARGETS = {
    "server.seconds_10000": {"max": 3},
    "server.vs_sklearn": {"min": 20},
    "server.memory_share_10000": {"max": 0.2},
    "server.ari_minus_sklearn_10000": {"min": 0},
    "server.seconds_1000": {"max": 1},
}


def settings_of(method: str, *overrides: str) -> ServerSettings:
    """Of a method."""
    tree = {"backbone": {"name": "planted"}, "tasks": TASKS}
    return load_config(tree, [f"method={method}", *overrides]).server_settings


def answered(state: ServerState, planted: Planted, settings: ServerSettings) -> tuple[list[Request], list[Reply]]:
    """The next round's requests, and the replies, with gradients where they are asked for."""
    requests = plan_round(state, settings)
    asked = {request.client for request in requests if request.gradients}
    return requests, [
        reply
        if reply.client in asked
        else Reply(reply.client, tuple(replace(update, gradients=None) for update in reply.updates))
        for reply in planted.replies
    ]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def peak_bytes(call: Callable[[], object]) -> int:
    """What a call allocates at its peak beside what is there before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def labels_of(state: ServerState, planted: Planted) -> list[int]:
    assigned = state.assignment()
    return [assigned[update.key] for reply in planted.replies for update in reply.updates]


def measure(n: int, repeats: int) -> dict[str, Any]:
    """All numbers of one size."""
    settings = {rule: settings_of(method) for rule, method in METHODS.items()}
    initial = init_server(settings["spectral"], BODY_SHAPES, HEAD_SHAPES, []).initial
    planted = plant(n, seed=0, initial=initial)
    before = init_server(settings["spectral"], BODY_SHAPES, HEAD_SHAPES, planted.clients)
    upload_bytes = planted.factors.nbytes + planted.heads.nbytes
    exchanged = {rule: answered(before, planted, settings[rule]) for rule in METHODS}

    def round_of(rule: str) -> tuple[ServerState, RoundReport]:
        return finish_round(before, *exchanged[rule], settings[rule])

    rounds = {rule: partial(round_of, rule) for rule in METHODS}

    def baseline() -> Any:
        return KMeans(len(TASKS), n_init=STARTS, random_state=0).fit_predict(planted.factors)

    seconds: dict[str, list[float]] = {"spectral": [], "kmeans": [], "sklearn": []}
    processor: dict[str, list[float]] = {rule: [] for rule in seconds}
    slow = n == max(SIZES)
    for turn in range(repeats):
        for rule, call in {**rounds, "sklearn": baseline}.items():
            if rule == "spectral" or turn == 0 or not slow:
                KNOWN.clear()  # as in a run, where a first round's evidence is new
                start = time.process_time()
                spent, found = timed(call)
                seconds[rule].append(spent)
                processor[rule].append(time.process_time() - start)
                if rule == "sklearn":
                    expected = found
    after, report = round_of("spectral")
    assert report.updates == n
    first = {rule: labels_of(call()[0], planted) for rule, call in rounds.items()}
    again = answered(after, planted, settings["spectral"])

    def second_round() -> tuple[ServerState, RoundReport]:
        return finish_round(after, *again, settings["spectral"])

    second = [timed(second_round)[0] for _ in range(3)]
    return {
        "clients": len(planted.clients),
        "upload_bytes": upload_bytes,
        "cosines": cosines(planted, 2000, seed=1),
        "seconds": seconds,
        "processor_seconds": processor,
        "seconds_second_round": second,
        "peak_bytes": {rule: peak_bytes(call) for rule, call in rounds.items()},
        "peak_bytes_second_round": peak_bytes(second_round),
        "ari": {
            **{rule: adjusted_rand_score(planted.task, labels) for rule, labels in first.items()},
            "sklearn": adjusted_rand_score(planted.task, expected),
        },
        "kmeans_agrees_with_sklearn": adjusted_rand_score(expected, first["kmeans"]),
        "k": report.k,
        "agreement": report.agreement,
        "silhouette": report.silhouette,
    }


def main() -> None:
    samples: dict[str, Any] = {str(n): measure(n, repeats) for n, repeats in SIZES.items()}
    large = samples["10000"]
    seconds = {n: statistics.median(sample["seconds"]["spectral"]) for n, sample in samples.items()}
    measured = {
        "server.seconds_10000": seconds["10000"],
        "server.vs_sklearn": large["seconds"]["sklearn"][0] / seconds["10000"],
        "server.memory_share_10000": large["peak_bytes"]["spectral"] / large["upload_bytes"],
        "server.ari_minus_sklearn_10000": large["ari"]["spectral"] - large["ari"]["sklearn"],
        "server.seconds_1000": seconds["1000"],
    }
    samples["threads"] = sorted({pool["num_threads"] for pool in threadpool_info()})
    samples["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_record("server", TARGETS, measured, samples)


if __name__ == "__main__":
    main()
