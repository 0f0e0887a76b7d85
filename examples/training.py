"""What every example's training shares: the step under control, its one compile, and the loop."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from checkpoints import Checkpoints, Position
from command_line import NEWEST, Arguments, StopRequest, UserError
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jaxtyping import Array, Float, PyTree
from meshes import current_mesh, param_shardings, place_rows
from monitor import JsonLines, Monitor, Recorder

import meta_optax as mo

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


class Batches(Protocol):
    """An iterator over batches that knows where it is, in terms that are fit for JSON."""

    def __next__(self) -> Any:
        """Returns the next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Returns the position."""
        ...

    def set_state(self, state: Any, /) -> None:
        """Goes to a position."""
        ...


class Setup(NamedTuple):
    """What training starts from; `template` is what a state is restored into."""

    graphdef: nnx.GraphDef
    state: TrainState
    template: TrainState
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


def abstract_state(
    tx: optax.GradientTransformationExtraArgs, params: PyTree, mesh: Mesh | None
) -> TrainState:
    """Returns shapes, dtypes and places of a state: what it is made like, and restored into.

    Args:
        tx: the optimizer.
        params: the params' shapes.
        mesh: where it is to be; None for one device.

    Returns:
        The tree of `jax.ShapeDtypeStruct`.
    """
    if mesh:
        places = param_shardings(mesh, params)
        whole = NamedSharding(mesh, jax.P())
    else:
        whole = SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: whole, params)
    own = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        params,
        places,
    )
    loss: Any = jax.ShapeDtypeStruct([], jnp.float32, sharding=whole)
    return TrainState(own, mo.checkpoint_template(tx, own), loss)


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

    template = abstract_state(tx, shapes, current_mesh())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    whole = template.smoothed_loss.sharding  # What is logged, every process can read.
    # One device starts as ever: compiled, the first weights would differ in the last digit.
    state = jax.jit(init, out_shardings=shardings)() if current_mesh() else init()
    monitor.announce("compiling the step")
    stop.check()
    begin = time.perf_counter()
    step = functools.partial(train_step, loss_fn, graphdef, tx)
    # Compiled ahead of time: another shape or dtype is an error then, not a second compile.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))
    step_fn = jitted.lower(state, place_rows(example)).compile()
    stop.check()
    return Setup(graphdef, state, template, step_fn, time.perf_counter() - begin)


def go_on(
    setup: Setup,
    arguments: Arguments,
    checkpoints: Checkpoints | None,
    batches: Batches,
    log: JsonLines,
    stop: StopRequest,
) -> tuple[TrainState, int]:
    """Takes up a run where its checkpoint left it: the state, the data and the log.

    Args:
        setup: what training starts from, else; its state is gone afterwards.
        arguments: what was asked for.
        checkpoints: where to look; None for no checkpoints.
        batches: set to the position behind the last step's batch.
        log: cut to what the run had logged.
        stop: says where the run goes on.

    Returns:
        The state, and the steps made.

    Raises:
        UserError: if no checkpoint is whole, or if they are of a run with other options.
    """
    if checkpoints is None or arguments.resume is None:
        return setup.state, 0

    def template(position: Position) -> TrainState:
        for option, asked in _identity(arguments).items():
            if position["run"][option] != asked:
                raise UserError(
                    f"the run in {arguments.checkpoint_dir} has {option} "
                    f"{position['run'][option]}, and {asked} is asked for"
                )
        return setup.template

    step = None if arguments.resume == NEWEST else arguments.resume
    found = checkpoints.restore(template, step)
    if found is None:
        stop.say(f"no checkpoint in {arguments.checkpoint_dir}: starting with step 0")
        log.go_on_from(0)
        return setup.state, 0
    checkpoints.leave_later(found.step)
    batches.set_state(found.position["data"])
    # A run that ended here on its own has logged its last step; a longer one would not have.
    size = found.position["log_size" if found.step >= arguments.steps else "log_lasting"]
    if not log.go_on_from(size):
        stop.say(f"{log.path} is not the whole log of that run: what is missing stays missing")
    stop.say(f"resumed after step {found.step} from {checkpoints.folder / str(found.step)}")
    return found.state, found.step


def _identity(arguments: Arguments) -> dict[str, Any]:
    """What must be the same for a run to go on as if it had never stopped."""
    return {"seed": arguments.seed, "switches": sorted(arguments.switches)}


def train(
    setup: Setup,
    arguments: Arguments,
    batches: Batches,
    recorder: Recorder,
    stop: StopRequest,
    *,
    start: tuple[TrainState, int],
    checkpoints: Checkpoints | None = None,
    probe: Probe | None = None,
) -> tuple[TrainState, int]:
    """Runs the steps, or as many as there are until the end is asked for.

    Args:
        setup: has the compiled step.
        arguments: say how many steps there are in all.
        batches: at least as many as there are steps.
        recorder: logs one in `LOG_EVERY` steps, and the last.
        stop: may ask for the end.
        start: the state, whose buffers are gone afterwards, and the steps made before.
        checkpoints: where the state is saved, when it is due and at the end.
        probe: what to measure of the params at each logged step, beside the step's own metrics.

    Returns:
        The last state, and how many steps were made in all.
    """
    (state, done), steps = start, arguments.steps
    is_last = done >= steps
    while not is_last:
        state, metrics = setup.step_fn(state, place_rows(next(batches)))
        recorder.flush()
        is_last = done == steps - 1 or bool(stop.exit_code)
        lasting = done % LOG_EVERY == 0
        if is_last or lasting:
            metrics = {**metrics, **probe(state.params)} if probe else metrics
            recorder.keep(done, metrics, lasting=lasting)
        done += 1
        if checkpoints and (is_last or checkpoints.is_due(done)):
            # Whoever resumes finds in the log what was said up to here.
            recorder.flush()
            recorder.log.sync()
            log = {"log_size": recorder.log.size, "log_lasting": recorder.log.lasting}
            run = {"run": _identity(arguments), "data": batches.get_state()}
            checkpoints.save(done, state, {**run, **log})
    recorder.flush()
    return state, done


def open_checkpoints(
    arguments: Arguments, stop: StopRequest
) -> contextlib.AbstractContextManager[Checkpoints | None]:
    """Returns the run's checkpoints, None where nobody asked for any."""
    if arguments.checkpoint_dir is None:
        return contextlib.nullcontext()
    return Checkpoints(arguments.checkpoint_dir, arguments.save_every, stop.say)


def describe_rates(record: Mapping[str, Any], *, dense: str = "dense") -> str:
    """Returns the learning rate of every group in one line; `dense` names the plain one."""
    groups = {dense: "", "gate": "gate_", "expert": "expert_"}
    rates = (f"{group} {record[f'{form}learning_rate']:.1e}" for group, form in groups.items())
    return "rates: " + "  ".join(rates)


def describe_speed(speed: float | None, unit: str) -> str:
    """Returns how many of a unit are trained on per second, a dash while that is unknown."""
    return f"{f'{speed:,.0f}' if speed else '-'} {unit}/s"
