"""Writes tests/data/peer_traces.json: what PyTorch's and Transformers' own schedulers do.

In an environment that has both, from the root of the repository:

    python -m venv ../peers && ../peers/bin/pip install torch==2.13.0 transformers==5.23.0
    ../peers/bin/python tests/write_peer_traces.py

Both get the same sequences of metrics, rounded to float32, with several settings each. The rates
are kept as the rows at which they changed and what they became, and `cuts` are the rows at which
the scheduler's rule asked for a cut, whether a floor let it act or not. No decision hangs on a
rounding: each comparison comes out the same if the metric is a little larger or smaller.
"""

import importlib.metadata
import json
import math
import pathlib

import numpy as np
import pytest

# The suite looks for doctests here too, where neither is installed.
torch = pytest.importorskip("torch")
ReduceLROnPlateau = pytest.importorskip("torch.optim.lr_scheduler").ReduceLROnPlateau
GreedyLR = pytest.importorskip("transformers.optimization").GreedyLR

FILE = pathlib.Path(__file__).parent / "data/peer_traces.json"
# The share of a metric by which a comparison must be clear: three roundings of float32.
MARGIN = 4e-7
CLASSES = {"torch_plateau": ReduceLROnPlateau, "greedy_lr": GreedyLR}
COMPARES = {"torch_plateau": "_is_better", "greedy_lr": "is_better"}
SETTINGS = {
    "torch_plateau": [
        {},
        {"patience": 0},
        {"patience": 2, "factor": 0.5, "cooldown": 3},
        {"patience": 3, "factor": 0.5, "min_lr": 0.01, "threshold": 0.0},
        {"patience": 1, "factor": 0.7, "threshold_mode": "abs", "threshold": 0.030537},
        {"patience": 1, "factor": 0.3, "eps": 1e-3, "cooldown": 1},
    ],
    "greedy_lr": [
        {},
        {"patience": 0},
        {"patience": 2, "factor": 0.8, "warmup": 3, "cooldown": 2},
        {"patience": 2, "smooth": True, "window_size": 5},
        {"patience": 1, "factor": 0.5, "min_lr": 0.02, "max_lr": 0.3, "reset_start": 3},
        {"patience": 0, "factor": 0.9, "threshold_mode": "rel", "threshold": 0.010337, "eps": 1e-3},
        {"patience": 0, "factor": 0.7, "smooth": True, "min_lr": 0.05, "reset_start": 5},
    ],
}
# With the defaults of GreedyLR this rate is below the floor from the start.
LOW_RATE, RATE = 1e-4, 0.1


def sequences():
    """Sixteen sequences by name, none of which has values above 2 but for the spike."""
    rng = np.random.default_rng(6)

    def noise(size, deviation):
        return deviation * rng.standard_normal(size)

    fall = 0.3 + np.exp(-np.arange(120) / 25.0)
    steps = np.repeat([1.5, 1.2, 0.8, 0.7], 30) + noise(120, 0.01)
    spiked = 0.4 + np.exp(-np.arange(100) / 20.0)
    spiked[40] = 10.0
    spiked[41:] += 0.3
    long = 0.2 + np.exp(-np.arange(300) / 40.0) + noise(300, 0.03)
    long[200:] -= 0.15
    falling = 1.4 - 0.01 * np.arange(60.0)
    found = {
        "noisy fall": fall + noise(120, 0.05),
        "equal values": np.ones(60),
        "falls and plateaus": steps,
        "rise": 0.5 + 0.02 * np.arange(60),
        "through zero": 1.0 - 0.04 * np.arange(100) + noise(100, 0.08),
        "rise below zero": -1.5 + 0.0107 * np.arange(60),
        "equal below zero": np.full(40, -1.25),
        "spike": spiked,
        "steady fall": 1.5 - 0.013 * np.arange(80),
        "noise about a level": 1.0 + noise(100, 0.1),
        "zigzag": np.tile([1.0, 1.0, 0.9, 1.1], 15) - np.repeat([0.0, 0.05, 0.05], 20),
        "long": long,
        "not finite": np.insert(falling, [7, 20, 20, 35], [math.nan, math.inf, math.nan, math.nan]),
        "not finite, dropped": falling,
        "minus infinity": np.insert(falling, 20, -math.inf),
        "long and equal": np.full(300, 0.75),
    }
    return {name: [round(float(x), 4) for x in values] for name, values in found.items()}


def be_sure(scheduler, name):
    """Makes a scheduler's comparison raise where a rounding would decide it."""
    compare = getattr(scheduler, name)

    def compare_surely(value, best):
        is_better = compare(value, best)
        if math.isfinite(value) and math.isfinite(best) and value != best:
            slack = MARGIN * max(abs(value), abs(best))
            for moved in (value - slack, value + slack):
                if compare(moved, best) != is_better:
                    raise ValueError(f"{value} against {best} hangs on a rounding.")
        return is_better

    setattr(scheduler, name, compare_surely)


def record(kind, values, arguments, initial):
    """The rates after each row as the changes of them, and the rows of cuts."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=initial)
    scheduler = CLASSES[kind](optimizer, **arguments)
    be_sure(scheduler, COMPARES[kind])
    cuts, changes, row, rate = [], [], 0, initial
    reduce = scheduler._reduce_lr
    scheduler._reduce_lr = lambda epoch: (cuts.append(row), reduce(epoch))
    optimizer.step()
    for row, value in enumerate(values):
        scheduler.step(float(np.float32(value)))
        now = optimizer.param_groups[0]["lr"]
        if now != rate:
            changes.append([row, float(f"{now:.9g}")])
            rate = now
    return {"changes": changes, "cuts": cuts}


def main():
    """Writes the file."""
    metrics = sequences()
    records = [
        {"rule": kind, "sequence": name, "initial": initial, "arguments": arguments}
        | record(kind, values, arguments, initial)
        for kind, settings in SETTINGS.items()
        for arguments in settings
        for initial in ([RATE] if arguments else [RATE, LOW_RATE])
        for name, values in metrics.items()
    ]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    # JSON has no word for what is not finite.
    plain = {
        name: [value if math.isfinite(value) else str(value) for value in values]
        for name, values in metrics.items()
    }
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in records)
    head = json.dumps({"versions": versions, "sequences": plain}, separators=(",", ":"))
    FILE.write_text(f'{head[:-1]},"records":[\n{lines}\n]}}\n')
    print(f"{FILE}: {len(records)} records, {FILE.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
