"""What the plots of `docs/plots.py` share: real training of a small mixture, and panels."""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import meta_optax as mo

# Benchmarks and examples are scripts, and no packages: what they hold is found by its folder.
sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
from figures import BLUE, GREEN, GREY, RED
from tiny_moe import BATCH_SIZE, EXPERTS, SPLIT, WEIGHT_DECAY, forward, init_params, loss_fn

__all__ = ["BLUE", "EXPERTS", "GREEN", "GREY", "RED"]

SEED = 0
LEARNING_RATE, HIGH_RATE, LOWEST_RATE = 3e-3, 1e-1, 1e-4
TAIL = 200  # steps at the end over which a metric's mean is quoted

# What is done to a batch, given its step.
Spoil = Callable[[Array, dict[str, Array]], dict[str, Array]]
# What more is to be kept of a step, from the optimizer's state after it.
Watch = Callable[[Any], dict[str, Array]]


class Run(NamedTuple):
    """One run's metrics and hyperparameters by step, and what it led to."""

    history: dict[str, np.ndarray]
    state: Any
    test_loss: float
    test_accuracy: float


def overflow(selected: Int[Array, "batch selected"], capacity: float) -> Array:
    """Which slots an expert would turn away that takes `capacity` times the even load."""
    chosen = jax.nn.one_hot(selected.ravel(), EXPERTS, dtype=jnp.int32)
    place = (jnp.cumsum(chosen, axis=0) * chosen).sum(axis=1)
    return (place > capacity * selected.size / EXPERTS).reshape(selected.shape)


def train(
    tx: optax.GradientTransformationExtraArgs,
    steps: int,
    capacity: float | None = None,
    spoil: Spoil | None = None,
    watch: Watch | None = None,
) -> Run:
    """Trains as `tiny_moe.train` does, one seed, and keeps the gradient's norm and biases too."""

    def step(carry: Any, step_and_key: tuple[Array, Array]) -> tuple[Any, dict[str, Array]]:
        (params, state), (index, key) = carry, step_and_key
        rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(SPLIT.train["digit"]))
        batch = jax.tree.map(lambda x: x[rows], SPLIT.train)
        batch = batch if spoil is None else spoil(index, batch)
        weight = optax.tree.get(state, "hyperparams").get("aux_loss_weight", 0.0)
        grads, (loss, routing) = jax.grad(loss_fn, has_aux=True)(params, batch, weight)
        dropped = None if capacity is None else overflow(routing.selected, capacity)
        metrics = mo.router_metrics(routing.probs, routing.selected, dropped=dropped)
        updates, state = tx.update(grads, state, params, value=loss, **metrics)
        history = {**metrics, **optax.tree.get(state, "hyperparams"), "value": loss}
        history |= {"grad_norm": optax.tree.norm(grads), "bias": params["balance_bias"]}
        plateaus = {name: optax.tree.get(state, name) for name in ("best", "bad_count")}
        history |= {name: value for name, value in plateaus.items() if value is not None}
        history |= {} if watch is None else watch(state)
        return (optax.apply_updates(params, updates), state), history

    @jax.jit
    def run(seed: Int[Array, ""]) -> Any:
        key, data_key = jax.random.split(jax.random.key(seed))
        params = init_params(key)
        carry = (params, tx.init(params))
        rows = (jnp.arange(steps), jax.random.split(data_key, steps))
        (params, state), history = jax.lax.scan(step, carry, rows)
        guesses = forward(params, SPLIT.test["pixels"])[0].argmax(axis=1)
        accuracy = (guesses == SPLIT.test["digit"]).mean()
        return state, history, loss_fn(params, SPLIT.test, 0.0)[0], accuracy

    state, history, loss, accuracy = run(jnp.int32(SEED))
    history = {name: np.asarray(values) for name, values in history.items()}
    return Run(history, state, float(loss), float(accuracy))


def plain(strategy: mo.MetaOptimizer, rate: Any = HIGH_RATE) -> Any:
    """AdamW of all parameters alike."""
    inject = mo.inject_meta_hyperparams(optax.adamw, strategy)
    return inject(learning_rate=rate, weight_decay=WEIGHT_DECAY)


def grouped(
    strategy: mo.MetaOptimizer, rate: float = LEARNING_RATE, free: Any = None, **hyperparams: float
) -> Any:
    """AdamW in groups; `hyperparams` are group forms."""
    factory = mo.moe_partition(optax.adamw, mo.label_moe_params)
    inject = mo.inject_meta_hyperparams(factory, strategy, free_hyperparams=free or {})
    return inject(learning_rate=rate, weight_decay=WEIGHT_DECAY, **hyperparams)


def report(name: str, run: Run, decisions: int = 0, **numbers: Any) -> None:
    """Prints what the pages quote of a run, and its first decisions beyond the warm-up's."""
    history = run.history
    print(
        f"{name}: held out {run.test_loss:.3f}, accuracy {run.test_accuracy:.3f}; "
        f"last {TAIL} batches: loss {history['value'][-TAIL:].mean():.3g}, "
        f"MaxVio {history['max_violation'][-TAIL:].mean():.2f}; "
        f"sparsity {history['gate_sparsity'][-TAIL:].mean():.3f}, "
        f"entropy {history['gate_entropy_normalized'][-TAIL:].mean():.3f}",
        *(f"{key} {value:.3g}" for key, value in numbers.items()),
        sep="; ",
    )
    if decisions:
        made = [d for d in mo.read_decisions(run.state) if "warm-up" not in d.reason]
        print(f"{len(made)} decisions:", mo.format_decisions(made[:decisions]), sep="\n")


def make_panels(title: str, labels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Stacked panels over the steps, with the names of their vertical axes."""
    figure = Figure((10.0, 2.2 * len(labels) + 0.6), dpi=110, layout="constrained")
    panels = list(figure.subplots(len(labels), sharex=True))
    for axes, label in zip(panels, labels, strict=True):
        axes.set(ylabel=label, xmargin=0.005)
    panels[-1].set_xlabel("step")
    figure.suptitle(title)
    return figure, panels


def add_legend(axes: Axes, columns: int = 4) -> None:
    """The legend above the panel, where there is no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=columns, frameon=False)


def draw_threshold(axes: Axes, value: float, text: str, color: str = "black") -> None:
    """A horizontal line, named in the margin on the right."""
    axes.axhline(value, color=color, ls="--", lw=1.0)
    place = axes.get_yaxis_transform()
    axes.text(1.01, value, text, color=color, transform=place, va="center", fontsize=9)


def draw_marks(panels: Sequence[Axes], steps: Sequence[int], color: str = "black") -> None:
    """A vertical line through all panels at each of the steps."""
    for axes in panels:
        for step in steps:
            axes.axvline(step, color=color, ls=":", lw=1.2)


def moved(run: Run, hyperparam: str, rule: str = "") -> list[int]:
    """The steps at which a rule changed a hyperparameter."""
    decisions = mo.read_decisions(run.state)
    return [d.step for d in decisions if d.hyperparam == hyperparam and rule in d.reason]


def smoothed(values: np.ndarray, kept: float) -> np.ndarray:
    """The average that strategies keep: the first value, then `kept` of it and the rest new."""
    out = np.array(values, float)
    for i in range(1, len(out)):
        out[i] = kept * out[i - 1] + (1 - kept) * out[i]
    return out
