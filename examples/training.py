"""What every example's training shares: the step under control, its one compile, and the loop."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from command_line import StopRequest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, PyTree
from meshes import current_mesh, place_rows, state_shardings
from monitor import Monitor, Recorder

LOG_EVERY = 10
# The controller is shown a mean over about fifty steps. A single batch's loss scatters by more than
# a hundred steps gain, so its "best" would be a lucky batch and patience would run out.
SMOOTHING = 0.98

Batch = Mapping[str, Any]
Metrics = dict[str, Array]
# From a model's structure, its params, a batch and the weight of the balance loss to the loss to
# descend, and what there is to say of the batch: a "loss" to show the controller, and
# `meta_optax.router_metrics`.
LossFn = Callable[
    [nnx.GraphDef, PyTree, Any, Float[Array, ""] | float], tuple[Float[Array, ""], Metrics]
]


class TrainState(NamedTuple):
    """All that a step reads and writes; its buffers are donated to the next one."""

    params: PyTree
    opt_state: optax.OptState
    smoothed_loss: Float[Array, ""]


TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
Probe = Callable[[PyTree], Metrics]


class Setup(NamedTuple):
    """What training starts from."""

    graphdef: nnx.GraphDef
    state: TrainState
    step_fn: TrainStep
    compile_seconds: float


def train_step(
    loss_fn: LossFn,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """Makes one update, and shows the controller what it did to loss and routers."""
    differentiate = jax.grad(loss_fn, argnums=1, has_aux=True)
    # A free hyperparameter: the controller set it at the step before.
    weight = optax.tree.get(state.opt_state, "aux_loss_weight")
    grads, metrics = differentiate(graphdef, state.params, batch, weight)
    smoothed = SMOOTHING * state.smoothed_loss + (1 - SMOOTHING) * metrics["loss"]
    # Each strategy takes the metrics that it knows, and leaves the others alone.
    updates, opt_state = tx.update(grads, state.opt_state, state.params, value=smoothed, **metrics)
    params = optax.apply_updates(state.params, updates)
    rates = {
        name: value
        for name, value in optax.tree.get(opt_state, "hyperparams").items()
        if name.endswith(("learning_rate", "weight_decay", "aux_loss_weight"))
    }
    return TrainState(params, opt_state, smoothed), {**metrics, **rates, "smoothed_loss": smoothed}


def train_state_shardings(
    mesh: Mesh, tx: optax.GradientTransformationExtraArgs, params: PyTree
) -> TrainState:
    """Returns where all of a state belongs on a mesh, given the params or their shapes."""
    own, moments = state_shardings(mesh, tx, params)
    return TrainState(own, moments, NamedSharding(mesh, jax.P()))  # pyright: ignore


def set_up(
    make_model: Callable[[], nnx.Module],
    loss_fn: LossFn,
    tx: optax.GradientTransformationExtraArgs,
    *,
    guesses: int,
    example: Batch,
    monitor: Monitor,
    stop: StopRequest,
) -> Setup:
    """Starts the optimizer, and compiles the step for batches like the example.

    Args:
        make_model: makes what to train; its params are. With a mesh in force, each device makes
            its own part of them.
        loss_fn: the loss, and what there is to say of a batch.
        tx: the optimizer under control.
        guesses: how many classes the model chooses from.
        example: a batch.
        monitor: shows that the step is compiled.
        stop: may ask for the end meanwhile.

    Returns:
        What training starts from.

    Raises:
        EndedEarly: if the end was asked for.
    """
    graphdef, shapes = nnx.split(nnx.eval_shape(make_model), nnx.Param)

    def init() -> TrainState:
        params = nnx.split(make_model(), nnx.Param)[1]
        # The loss of guessing is where the smoothed one starts, so it needs no correction.
        return TrainState(params, tx.init(params), jnp.log(jnp.float32(guesses)))

    mesh, shardings, whole = current_mesh(), None, None
    if mesh:
        shardings = train_state_shardings(mesh, tx, shapes)
        whole = NamedSharding(mesh, jax.P())  # What is logged, every process can read.
    state = jax.jit(init, out_shardings=shardings)() if mesh else init()
    monitor.announce("compiling the step")
    stop.check()
    begin = time.perf_counter()
    step = functools.partial(train_step, loss_fn, graphdef, tx)
    # Compiled ahead of time: another shape or dtype is an error then, not a second compile.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))
    step_fn = jitted.lower(state, place_rows(example)).compile()
    stop.check()
    return Setup(graphdef, state, step_fn, time.perf_counter() - begin)


def train(
    step_fn: TrainStep,
    state: TrainState,
    batches: Iterator[Any],
    steps: int,
    recorder: Recorder,
    stop: StopRequest,
    probe: Probe | None = None,
) -> tuple[TrainState, int]:
    """Runs the steps, or as many as there are until the end is asked for.

    Args:
        step_fn: the compiled step.
        state: where to start; its buffers are gone afterwards.
        batches: at least as many as there are steps.
        steps: how many to make.
        recorder: logs one in `LOG_EVERY` steps, and the last.
        stop: may ask for the end.
        probe: what to measure of the params at each logged step, beside the step's own metrics.

    Returns:
        The last state, and how many steps were made.
    """
    done, is_last = 0, False
    while not is_last:
        state, metrics = step_fn(state, place_rows(next(batches)))
        recorder.flush()
        is_last = done == steps - 1 or bool(stop.exit_code)
        if is_last or done % LOG_EVERY == 0:
            recorder.keep(done, {**metrics, **probe(state.params)} if probe else metrics)
        done += 1
    recorder.flush()
    return state, done


def describe_rates(record: Mapping[str, Any], *, dense: str = "dense") -> str:
    """Returns the learning rate of every group in one line; `dense` names the plain one."""
    groups = {dense: "", "gate": "gate_", "expert": "expert_"}
    rates = (f"{group} {record[f'{form}learning_rate']:.1e}" for group, form in groups.items())
    return "rates: " + "  ".join(rates)


def describe_speed(speed: float | None, unit: str) -> str:
    """Returns how many of a unit are trained on per second, a dash while that is unknown."""
    return f"{f'{speed:,.0f}' if speed else '-'} {unit}/s"
