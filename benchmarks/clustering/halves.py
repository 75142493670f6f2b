"""How well groups found in halves of the adapted matrices agree, beside how right the grouping is: a table for the lab.

The server asks the first when it is to decide whether slots are grouped after the first round
(``fltac.server.agreement``), and cannot know the second. Recordings of first rounds, and the first rounds of films.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from accumulate import compared_after
from film import FILMS
from kernels import cosine
from record import FOLDER
from recording import Gram, Recording
from sklearn.metrics import adjusted_rand_score

from fltac.server.agreement import DRAWS, ENOUGH, STARTS
from fltac.server.clustering import group
from fltac.server.grouping import EXTRA_OF_A, SHARPNESS_OF_A
from fltac.server.pairing import paired
from fltac.server.similarity import HEAD_OF_A
from fltac.server.spectrum import leading


@dataclass(frozen=True)
class Halves:
    """Of one first round.

    Attributes:
        name: Of the recording or film.
        agreement: Of groups found in halves of the matrices, in the mean of the server's number of draws.
        ari: Of the grouping against the tasks.
    """

    name: str
    agreement: float
    ari: float


def measured(patterns: Sequence[str], films: Sequence[str]) -> list[Halves]:
    """Of all recordings and films whose names match.

    Args:
        patterns: Of recordings.
        films: Of films; their first rounds.
    """
    paths = [path for pattern in patterns for path in sorted(FOLDER.glob(f"{pattern}.safetensors"))]
    paths += [path for pattern in films for path in sorted(FILMS.glob(f"{pattern}.safetensors"))]
    return [_of(path.stem, Recording.load(path)) for path in paths]


def _of(name: str, film: Recording) -> Halves:
    rounds = film.facts.get("rounds", 1)  # a recording is a film of one
    n = len(film.truth) // rounds
    truth, owners = film.truth[:n], film.clients[:n]
    k = len(set(truth.tolist()))

    def grouped(kernel: Gram, starts: int, seed: int) -> np.ndarray:
        return group(leading(kernel, k + EXTRA_OF_A), k, owners, starts, seed)

    matrices = np.abs([cosine(gram[:n, :n]) for gram in film.grams["a"]])
    head = HEAD_OF_A * np.abs(cosine(film.grams["head"].sum(0)[:n, :n]))
    found = []
    for number, halves in enumerate(_halves(len(matrices))):
        labels = [
            grouped(paired(matrices[half].mean(axis=0) + head, owners, SHARPNESS_OF_A), STARTS, number)
            for half in halves
        ]
        found.append(adjusted_rand_score(*labels))
    whole = grouped(compared_after(film, rounds, 1), 20, 0)
    return Halves(name, float(np.mean(found)), float(adjusted_rand_score(truth, whole)))


def _halves(count: int) -> Iterator[list[np.ndarray]]:
    draw = np.random.default_rng(0)
    for _ in range(DRAWS):
        order = draw.permutation(count)
        yield [order[: count // 2], order[count // 2 :]]


def halves_table(found: Sequence[Halves]) -> list[str]:
    """The lines of the table, and what it comes to."""
    enough = [item.ari for item in found if item.agreement >= ENOUGH]
    less = [item.ari for item in found if item.agreement < ENOUGH]
    together = np.corrcoef([item.agreement for item in found], [item.ari for item in found])[0, 1]

    def told(aris: Sequence[float]) -> str:
        return f"ARI {np.mean(aris):.2f} in the mean, the least {min(aris):.2f}" if aris else "none"

    lines = [
        f"Correlation {together:.2f}. First rounds with an agreement of at least {ENOUGH:g} ({len(enough)}): "
        f"{told(enough)}. With less ({len(less)}): {told(less)}.",
        "",
        "| first round | agreement of halves | ARI |",
        "|---|---|---|",
    ]
    return lines + [f"| {item.name} | {item.agreement:.2f} | {item.ari:.2f} |" for item in found]
