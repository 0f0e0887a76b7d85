"""The words and tables of a report, from the tree of ``results.json``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from meta_optax.compare._arms import ARMS, BASELINE
from meta_optax.compare._results import (
    GROUPS,
    MOST_MIS_SET,
    MOST_ON_A_TASK,
    MOST_TUNED,
    SLACK,
    Json,
)

_TITLES = {"well_tuned": "well tuned", "mis_set": "mis-set"}
LEGEND = (
    "Ratios are of final held-out losses, run by run with the same seed and multiple: "
    "interquartile mean, and in brackets its 95 % bootstrap interval, clustered by seed. "
    "P(better) is the chance that a run of the arm ends below one of the baseline; p is Wilcoxon's "
    "signed-rank test over tasks and seeds after Holm's correction. A run that diverged ranks "
    "behind all that did not, and enters no average. Arms marked * ran on the tasks with experts "
    "alone: their ratios are over those."
)


def number(value: float | None, digits: int = 3) -> str:
    """A number for people; what is infinite stands for a divergence."""
    return "diverges" if value is None else f"{value:.{digits}g}"


def interval(found: Mapping[str, Any]) -> str:
    """A value with its interval, if it has one."""
    if found["low"] is None and found["high"] is None:
        return number(found["value"])
    return f"{number(found['value'])} [{number(found['low'])}, {number(found['high'])}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    """A table in Markdown; the columns that are text are set to the left, numbers to the right."""
    marks = ["---" if column in text else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def label(found: Json, arm: str) -> str:
    """An arm's name, ours in bold, with a star where it lacks tasks."""
    star = "" if is_whole(found, arm) else " \\*"
    return f"**{arm}**{star}" if ARMS[arm].kind == "ours" else f"{arm}{star}"


def is_whole(found: Json, arm: str) -> bool:
    """Whether an arm ran on all tasks."""
    return len(found["arms"][arm]["tasks"]) == len(found["tasks"])


def answer(found: Json) -> str:
    """What a reader wants to know first: whether the claims hold, for each of our strategies."""
    ours = [arm for arm in found["arms"] if ARMS[arm].kind == "ours"]
    if not ours:
        return "No strategy of meta_optax took part."
    best = found["mis_set"]["best_peer"]
    rows = []
    for arm in ours:
        mis_set, tuned = (found[group]["arms"][arm] for group in ("mis_set", "well_tuned"))
        rows.append(
            [
                label(found, arm),
                _verdict(mis_set["ratio_to_best_peer"], MOST_MIS_SET),
                _verdict(tuned["ratio_to_baseline"], MOST_TUNED),
                f"{_verdict(tuned['worst_task'], MOST_ON_A_TASK)}, {tuned['worst_task']['task']}",
            ]
        )
    head = [
        "at its defaults",
        f"mis-set rates, over {best}: <= {MOST_MIS_SET}",
        f"well tuned, over {BASELINE}: <= {MOST_TUNED}",
        f"its worst task, well tuned: <= {MOST_ON_A_TASK}",
    ]
    return f"{_sentence(found, ours)}\n\n{table(head, rows)}"


def _holds(ratio: Mapping[str, Any], most: float) -> bool:
    return ratio["value"] is not None and ratio["value"] <= most


def _verdict(ratio: Mapping[str, Any], most: float) -> str:
    return f"{interval(ratio)} {'holds' if _holds(ratio, most) else 'fails'}"


def _sentence(found: Json, ours: Sequence[str]) -> str:
    """The claims in words: which strategies meet all three, and what of the rest."""
    tables = found["mis_set"]["arms"], found["well_tuned"]["arms"]

    def met(arm: str) -> tuple[bool, bool, bool]:
        mis_set, tuned = (table[arm] for table in tables)
        return (
            _holds(mis_set["ratio_to_best_peer"], MOST_MIS_SET),
            _holds(tuned["ratio_to_baseline"], MOST_TUNED),
            _holds(tuned["worst_task"], MOST_ON_A_TASK),
        )

    def names(kept: Sequence[str]) -> str:
        return ", ".join(label(found, arm) for arm in kept) or "none"

    best = found["mis_set"]["best_peer"]
    return (
        f"**All three claims hold for: {names([arm for arm in ours if all(met(arm))])}.** "
        f"With a mis-set rate, better than the best peer ({best}) by a tenth: "
        f"{names([arm for arm in ours if met(arm)[0]])}. "
        f"With a tuned rate, no more than {MOST_TUNED} of the linear schedule's loss: "
        f"{names([arm for arm in ours if met(arm)[1]])}."
    )


def caveats(found: Json) -> str:
    """What these numbers do not say."""
    protocol = found["protocol"]
    lines = [
        f"The models are small and the runs short: {len(found['tasks'])} tasks, "
        f"{protocol['seeds']} seeds. What holds here need not hold at scale.",
        "The best peer is the best in these very runs, which favours it. Our arms are shown all, "
        "whatever came of them; whoever picks the best of them afterwards is too hopeful.",
        "Multiples are of each arm's own best rate, which was chosen for all tasks together: "
        "well tuned does not mean best for each task.",
        "An arm's interval is that of new seeds on these tasks, and says nothing of other tasks.",
    ]
    if protocol["budget"] == "quick":
        lines.append(
            "This is the quick budget: a third of the steps, few tasks and few trials. It shows "
            "that the tool works; the full budget is the one to quote."
        )
    lost = sum(row["diverged"]["count"] for g in GROUPS for row in found[g]["arms"].values())
    total = sum(row["diverged"]["total"] for g in GROUPS for row in found[g]["arms"].values())
    lines.append(f"{lost} of {total} runs diverged. They are counted, and in no average.")
    return "\n".join(f"- {line}" for line in lines)


def against_baseline(found: Json, group: str) -> str:
    """Each arm against the baseline, the best first."""
    arms = found[group]["arms"]
    order = sorted(
        arms,
        key=lambda name: (
            arms[name]["ratio_to_baseline"]["value"] is None,
            arms[name]["ratio_to_baseline"]["value"],
        ),
    )
    rows = []
    for name in order:
        row = arms[name]
        pvalue = row["p_value"]
        rows.append(
            [
                label(found, name),
                interval(row["ratio_to_baseline"]),
                interval(row["ratio_to_best_peer"]),
                interval(row["probability_of_improvement"]),
                f"{interval(row['worst_task'])}, {row['worst_task']['task']}",
                f"{row['diverged']['count']} of {row['diverged']['total']}",
                "" if pvalue is None else number(pvalue["adjusted"], 2),
            ]
        )
    best = found[group]["best_peer"]
    head = ["arm", f"over {BASELINE}", f"over {best}", "P(better)", "worst task", "diverged", "p"]
    return table(head, rows)


def tasks(found: Json) -> str:
    """What was trained."""
    rows = [
        [name, task["about"], str(task["steps"]), task["loss"], number(task["target"], 4)]
        for name, task in found["tasks"].items()
    ]
    return (
        table(["task", "what", "steps", "loss", "target"], rows, text=(0, 1, 3))
        + f"\n\nA target is {SLACK} times the median of the tuned linear schedule on tuning seeds."
    )


def _median(values: Any, columns: Sequence[int]) -> float | None:
    """The median over seeds and some multiples, null where half of the runs diverged."""
    chosen = np.array(values, float)[:, list(columns)]
    median = np.median(np.where(np.isfinite(chosen), chosen, np.inf))
    return float(median) if np.isfinite(median) else None


def final_losses(found: Json) -> str:
    """Median final losses, well tuned, by task."""
    rows = []
    for arm, entry in found["arms"].items():
        cells = [
            number(_median(entry["tasks"][task]["final_losses"], GROUPS["well_tuned"]), 4)
            if task in entry["tasks"]
            else ""
            for task in found["tasks"]
        ]
        rows.append([label(found, arm), *cells])
    return "Final held-out losses at the best rate, medians over seeds:\n\n" + table(
        ["arm", *found["tasks"]], rows
    )


def by_multiple(found: Json) -> str:
    """Each arm's losses over the targets' reference, by multiple."""
    multiples = found["protocol"]["multiples"]
    rows = []
    for arm, entry in found["arms"].items():
        cells = []
        for column in range(len(multiples)):
            ratios = [
                _median(cell["final_losses"], [column]) for task, cell in entry["tasks"].items()
            ]
            scaled = [
                np.inf if value is None else value / found["tasks"][task]["reference"]
                for value, task in zip(ratios, entry["tasks"], strict=True)
            ]
            middle = float(np.median(scaled))
            cells.append(number(middle if np.isfinite(middle) else None))
        rows.append([label(found, arm), *cells, number(entry["chosen"]["learning_rate"])])
    head = ["arm", *(f"x {m:g}" for m in multiples), "best rate"]
    return (
        "Median over tasks of the median final loss, over what the tuned linear schedule reached "
        "on its tuning seeds:\n\n" + table(head, rows)
    )


def steps(found: Json) -> str:
    """How many runs reached the target, and the profiles' scores."""
    rows = []
    for arm, entry in found["arms"].items():
        cells = []
        for group, columns in GROUPS.items():
            taken = np.concatenate(
                [
                    np.array(cell["steps_to_target"], float)[:, list(columns)].ravel()
                    for cell in entry["tasks"].values()
                ]
            )
            cells.append(f"{np.isfinite(taken).sum()} of {taken.size}")
            score = found["profile"][group].get(arm)
            cells.append("" if score is None else number(score["score"]))
        rows.append([label(found, arm), *cells])
    head = ["arm"]
    for title in (_TITLES[group] for group in GROUPS):
        head += [f"reached, {title}", f"score, {title}"]
    return table(head, rows)


def decisions(found: Json) -> str:
    """How many decisions a run made, and why."""
    rows = []
    for arm, entry in found["arms"].items():
        if ARMS[arm].kind != "ours":
            continue
        counts = np.mean(
            [cell["decisions"]["mean_by_multiple"] for cell in entry["tasks"].values()], axis=0
        )
        reasons: dict[str, int] = {}
        for cell in entry["tasks"].values():
            for reason, count in cell["decisions"]["reasons"].items():
                reasons[reason] = reasons.get(reason, 0) + count
        most = sorted(reasons, key=lambda reason: -reasons[reason])[:4]
        why = ", ".join(f"{reason} ({reasons[reason]})" for reason in most)
        rows.append([label(found, arm), *(f"{count:.1f}" for count in counts), why])
    if not rows:
        return ""
    head = ["arm", *(f"x {m:g}" for m in found["protocol"]["multiples"]), "most frequent reasons"]
    return "Decisions a run, means over tasks and seeds (reasons of the last 64 of each):\n\n" + (
        table(head, rows, text=(0, len(head) - 1))
    )


def overhead(costs: Mapping[str, Any]) -> str:
    """Costs beside plain AdamW."""
    rows = [
        [
            name,
            f"{cost.step_milliseconds:.2f}",
            f"{cost.step_ratio:.2f}",
            f"{cost.compile_seconds:.2f}",
            f"{cost.state_bytes_added:+,}",
        ]
        for name, cost in costs.items()
    ]
    head = ["arm", "update, ms", "over AdamW", "compile, s", "state, bytes more"]
    return (
        "The update alone, without the gradients' computation, of 1.05 million weights in 3 "
        "arrays; one of each in turn, medians. Our arms keep a log of 64 decisions here.\n\n"
        + table(head, rows)
    )


def protocol(found: Json) -> str:
    """How it was done, and with what."""
    about = found["protocol"]
    device = about["platform"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n".join(
        [
            f"- Budget {about['budget']}, protocol {about['protocol_version']}: each arm had "
            f"{about['trials']} quasi-random trials of base rate and weight decay, on "
            f"{about['tuning_seeds']} seeds that are not used again; the one of the least mean "
            "rank over the tasks was run for all of them.",
            f"- {about['seeds']} seeds, the same initial weights and batches for all arms; base "
            f"rates times {', '.join(f'{m:g}' for m in about['multiples'])}.",
            "- A run has diverged if its final held-out loss is not finite, or above where it "
            "began.",
            f"- {device['device']} ({device['backend']}), {device['system']} {device['machine']}; "
            f"{versions}.",
            "- Every number is in results.json, times are in timings.json, and the curves of all "
            "runs are in cells/.",
        ]
    )
