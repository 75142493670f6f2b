"""Writes the lab's tables from the committed replays, films and profiles: ``results/clustering/lab.md``.

    python benchmarks/clustering/report.py

Rules on first-round uploads as ``replay.py`` has replayed them, what a supervised classifier reaches there, how many
clusters are chosen, and ARI over the rounds of the filmed runs. Takes minutes on one core; trains nothing.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from operator import itemgetter

import numpy as np
from halves import halves_table, measured
from profiles import FILMED, WEIGHT, WEIGHTS
from profiles import OUT as PROFILES
from record import FOLDER
from replay import DRAWS, Found, load
from report_films import film_tables
from rules import RULES
from uploads import CLEAR

from fltac.runtime.atomic import write_atomic

OUT = FOLDER.parent / "lab.md"
QUICKSTART = OUT.parents[1] / "quickstart-20"
CHOSEN_IN, CHOSEN_AT = ("I", "II", "III"), (20, 50)
"""Regimes and steps whose recordings a rule may be chosen by."""
KEPT_SEEDS, KEPT_REGIMES = (3, 4, 5), ("IV", "VI", "VII")
"""Kept for the end: no rule was chosen by these seeds of I, II and III, nor by these regimes."""
REGIME_RANK = {"V": 2}
"""Of regimes whose config has another rank than 1."""


def name_of(item: Found) -> str:
    """A recording's setting without its seed."""
    loss = "" if item["loss"] == "plain" else f" {item['loss']}"
    rank = "" if item["rank"] == REGIME_RANK.get(item["regime"], 1) else f" rank {item['rank']}"
    return f"{item['regime']}{loss}{rank} τ={item['tau']}"


def rule_tables(found: Sequence[Found]) -> list[str]:
    """A table for each regime and loss: each rule at each number of steps, on the seeds that may be chosen by."""
    lines = []
    groups: dict[str, list[Found]] = defaultdict(list)
    for item in found:
        loss = "" if item["loss"] == "plain" else f", {item['loss']} loss"
        groups[f"{item['regime']}{loss}"].append(item)
    for title, own in groups.items():
        lines += ["", f"### {title}", "", *rules_by_setting(own)]
    return lines


def rules_by_setting(found: Sequence[Found]) -> list[str]:
    """Rules as rows, settings as columns: ARI, mean and spread over the seeds; the share of slots in their group."""
    settings: dict[str, list[Found]] = defaultdict(list)
    for item in sorted(found, key=lambda item: (item["regime"], item["loss"], item["rank"], item["tau"])):
        settings[name_of(item)].append(item)
    lines = [f"| rule | {' | '.join(f'{name} ({len(own)})' for name, own in settings.items())} |"]
    lines.append("|---" * (len(settings) + 1) + "|")
    for rule in RULES:
        cells = []
        for own in settings.values():
            aris = [item["rules"][rule]["ari"] for item in own if rule in item["rules"]]
            accuracies = [item["rules"][rule]["accuracy"] for item in own if rule in item["rules"]]
            of = f" ({len(aris)})" if len(aris) < len(own) else ""
            cells.append(f"{np.mean(aris):.2f} ± {np.std(aris):.2f}, {np.mean(accuracies):.2f}{of}" if aris else "")
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return lines


def choice_table(found: Sequence[Found]) -> list[str]:
    """How each rule differs from `features: a`, recording by recording, where a rule may be chosen."""
    own = [item for item in found if item["regime"] in CHOSEN_IN and item["tau"] in CHOSEN_AT]
    own = [item for item in own if item["loss"] == "plain" and item["rank"] == 1]
    lines = [f"| rule | {' | '.join(CHOSEN_IN)} | all, less changes of A | better, worse |", "|---" * 6 + "|"]
    rows = []
    for rule in RULES:
        by_regime: dict[str, list[float]] = defaultdict(list)
        for item in own:
            by_regime[item["regime"]].append(item["rules"][rule]["ari"])
        less = np.array([item["rules"][rule]["ari"] - item["rules"]["changes of A"]["ari"] for item in own])
        error = less.std(ddof=1) / np.sqrt(len(less))
        cells = [f"{np.mean(by_regime[regime]):.2f}" for regime in CHOSEN_IN]
        counts = f"{(less > 1e-9).sum()}, {(less < -1e-9).sum()}"
        rows.append((less.mean(), f"| {rule} | {' | '.join(cells)} | {less.mean():+.3f} ± {error:.3f} | {counts} |"))
    return lines + [line for _, line in sorted(rows, key=itemgetter(0), reverse=True)]


def uploads_table(found: Sequence[Found]) -> list[str]:
    """What each recording's adapters have learned, and how those that learned something are grouped."""
    columns = ("recording", "slots", "tasks", "ceiling", "K", "K without cannot-link", "ARI", "above majority",
               "their ARI", f"above by {CLEAR}", "their ARI")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for item in found:
        facts = item["uploads"]
        cells = [f"{name_of(item)}, seed {item['seed']}", facts["slots"], facts["tasks"], f"{facts['ceiling']:.2f}"]
        cells += [facts["k"], facts["k_no_link"], f"{item['rules']['changes of A']['ari']:.2f}"]
        for own in facts["learned"] or [None, None]:
            ari = "" if own is None or own["ari"] is None else f"{own['ari']:.2f}"
            cells += ["" if own is None else f"{own['slots']} of {own['tasks']} tasks", ari]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def k_table(found: Sequence[Found]) -> list[str]:
    """How far the K that is chosen lies from the number of tasks, by setting."""
    lines = ["| setting | recordings | right | within one | K chosen | of tasks |", "|---" * 6 + "|"]
    settings: dict[str, list[Found]] = defaultdict(list)
    for item in found:
        settings[name_of(item)].append(item["uploads"])
    for name, own in settings.items():
        off = [abs(facts["k"] - facts["tasks"]) for facts in own]
        chosen, tasks = (" ".join(str(facts[which]) for facts in own) for which in ("k", "tasks"))
        lines.append(f"| {name} | {len(own)} | {off.count(0)} | {sum(gap <= 1 for gap in off)} | {chosen} | {tasks} |")
    return lines


def profile_tables() -> list[str]:
    """Profiles alone by regime, rows and noise, and beside the adapters of each recording."""
    if not PROFILES.exists():
        return []
    found = json.loads(PROFILES.read_text(encoding="utf-8"))["results"]
    settings = sorted({(item["rows"], item["noise"]) for item in found})
    header = " | ".join(f"{rows} rows, noise {noise:g}" for rows, noise in settings)
    lines = ["", "## Profiles alone: ARI, mean and least over the seeds", ""]
    lines += [f"| regime (seeds) | {header} |", "|---" * (len(settings) + 1) + "|"]
    for regime in sorted({item["regime"] for item in found}):
        own = [item for item in found if item["regime"] == regime]
        cells = []
        for setting in settings:
            aris = [item["ari"] for item in own if (item["rows"], item["noise"]) == setting]
            cells.append(f"{np.mean(aris):.2f} ({min(aris):.2f})")
        lines.append(f"| {regime} ({len({item['seed'] for item in own})}) | {' | '.join(cells)} |")
    lines += ["", f"## Profiles beside adapters, with weight {WEIGHT:g}: ARI in the first round", ""]
    lines += [f"| recording | {header} |", "|---" * (len(settings) + 1) + "|"]
    for name in sorted({name for item in found for name in item["beside"]}):
        by_setting = {(i["rows"], i["noise"]): i["beside"][name] for i in found if name in i["beside"]}
        lines.append(f"| {name} | {' | '.join(f'{by_setting[setting]:.2f}' for setting in settings)} |")
    rows, noise = FILMED
    lines += ["", f"## Profiles of {rows} rows, noise {noise:g}, beside the films: ARI by round, for each weight", ""]
    lines += [f"| film | {' | '.join(f'{weight:g}' for weight in WEIGHTS)} |", "|---" * (len(WEIGHTS) + 1) + "|"]
    for name, by_weight in sorted((name, own) for item in found for name, own in item.get("films", {}).items()):
        cells = [" ".join(f"{ari:.2f}" for ari in by_weight[f"{weight:g}"]) for weight in WEIGHTS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def halves_tables() -> list[str]:
    """Whether halves of the adapted matrices agree, where that was chosen by and where it was not."""
    chosen = [f"{regime}-rank1-seed?-tau{tau}" for regime in CHOSEN_IN for tau in CHOSEN_AT]
    found = measured(chosen, ["II-fltac-single-*"])
    kept = {f"{regime}-rank1-seed{seed}-tau{tau}" for regime in CHOSEN_IN for seed in KEPT_SEEDS for tau in CHOSEN_AT}
    lines = ["", "## Do halves of the adapted matrices agree?", ""]
    lines += halves_table([item for item in found if item.name not in kept])
    held = [item for item in found if item.name in kept] + measured(["IV-rank1-*-tau50"], [])
    return [*lines, "", "Kept for the end:", "", *halves_table(held)]


def quickstart_table() -> list[str]:
    """The quickstart's runs on many seeds: how many have each task in a cluster of its own after the last round."""
    lines = ["", "## Quickstart on many seeds", "", "| runs | seeds | ARI 1.00 | least ARI | K found | mean score |"]
    lines.append("|---" * 6 + "|")
    for folder in sorted(path for path in QUICKSTART.iterdir() if path.is_dir()):
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("seed-*/summary.json"))]
        aris = [run["clustering"]["ari"] for run in runs]
        found = " ".join(
            f"{k}: {count}" for k, count in sorted(Counter(run["clustering"]["k"] for run in runs).items())
        )
        scores = [run["mean_score"] for run in runs]
        right = sum(ari > 1 - 1e-9 for ari in aris)
        spread = f"{np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}"
        lines.append(f"| {folder.name} | {len(runs)} | {right} | {min(aris):.2f} | {found} | {spread} |")
    return lines


def main() -> int:
    found = list(load().values())
    held = [i for i in found if i["regime"] in KEPT_REGIMES or (i["regime"] in CHOSEN_IN and i["seed"] in KEPT_SEEDS)]
    rest = [item for item in found if item not in held]
    lines = [
        "# The clustering lab",
        "",
        "Written by `benchmarks/clustering/report.py` from the files beside it; do not edit.",
        "",
        f"First-round uploads, K given, {DRAWS} draws of each rule (a draw of K-means is the best of 20 starts, of the "
        "paper's of 10). A cell: ARI, mean and spread over the training seeds (how many), and the share of slots in "
        "their task's group under the best matching.",
        "",
        "## Rules, where they may be chosen",
        *rule_tables(rest),
        "",
        "## Against changes of A",
        "",
        f"ARI in {', '.join(CHOSEN_IN)} at {' and '.join(map(str, CHOSEN_AT))} steps with rank 1, and the mean of the "
        "differences recording by recording with its standard error.",
        "",
        *choice_table(rest),
        "",
        "## Kept for the end",
        "",
        f"No rule was chosen by seeds {', '.join(map(str, KEPT_SEEDS))} of I, II and III (those that were recorded "
        "are here), nor by these regimes.",
        "",
        *rules_by_setting(held),
        "",
        "## K chosen by the server",
        "",
        "As `k: auto` chooses it in the first round, with cannot-link.",
        "",
        *k_table(rest),
        "",
        "Kept for the end:",
        "",
        *k_table(held),
        "",
        "## What is in the uploads",
        "",
        "Ceiling: ARI of a classifier that is told the tasks of all other clients. K: as `k: auto` chooses it, with "
        "cannot-link and without. ARI: of changes of A, K given. Above majority: the slots whose upload scores "
        "above its task's most frequent class, where scores were taken, and of how many tasks they are; their ARI: of "
        "these slots alone, in the same grouping of all.",
        "",
        *uploads_table(found),
    ]
    lines += film_tables()
    lines += halves_tables()
    lines += profile_tables()
    lines += quickstart_table()
    write_atomic(OUT, ("\n".join(lines) + "\n").encode())
    print(OUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
