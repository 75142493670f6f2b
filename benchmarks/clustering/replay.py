"""Replays clustering rules on recordings and prints ARI, mean and spread over training seeds.

python benchmarks/clustering/replay.py --recordings 'I-rank1-*-tau50' --rules paper default
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from record import FOLDER
from recording import Recording, load_all
from rules import RULES
from sklearn.metrics import adjusted_rand_score


def setting_of(recording: Recording) -> str:
    """A recording's name without its seed."""
    facts = recording.facts
    loss = "" if facts["loss"] == "plain" else f" {facts['loss']}"
    rank = "" if facts["rank"] in (1, 2) else f" rank {facts['rank']}"
    return f"{facts['regime']}{rank}{loss} τ={facts['tau']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", default="*", help="pattern of their names")
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--starts", type=int, default=20, help="draws of each rule on each recording")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    print("\n".join(table(load_all(args.folder, args.recordings), args.rules, args.starts)))


def table(recordings: Sequence[Recording], rules: Sequence[str], starts: int) -> list[str]:
    """Lines of a Markdown table: ARI of each rule on each setting, mean and spread over the settings' seeds."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    settings: dict[str, int] = defaultdict(int)
    for recording in recordings:
        setting = setting_of(recording)
        settings[setting] += 1
        k = len(set(recording.truth.tolist()))
        for name in rules:
            draws = [adjusted_rand_score(recording.truth, RULES[name](recording, k, start)) for start in range(starts)]
            found[name][setting].append(float(np.mean(draws)))
    lines = ["| rule | " + " | ".join(f"{setting} ({count})" for setting, count in settings.items()) + " |"]
    lines.append("|---" * (len(settings) + 1) + "|")
    for name, by_setting in found.items():
        cells = [f"{np.mean(values):.2f} ± {np.std(values):.2f}" for values in by_setting.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
