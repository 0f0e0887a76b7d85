"""Training of many runs at once: seeds and rates are lanes of one compiled computation."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import meta_optax as mo
from meta_optax._decisions import decisions_of
from meta_optax._log import DecisionLog
from meta_optax.compare._arms import AUX_LOSS_WEIGHT, Arm, Setting
from meta_optax.compare._models import balance_loss
from meta_optax.compare._tasks import Task

# Looks of those rules that are made for validation losses, and measurements, in a run.
LOOKS = 50
EVALUATIONS = 25


class Lanes(NamedTuple):
    """What differs between runs that are trained together, [lanes] each."""

    seed: Any
    learning_rate: Any
    weight_decay: Any


class Curves(NamedTuple):
    """What runs did.

    Attributes:
      held_out: the held-out loss before the run and after each part of it, [lanes, parts + 1].
      train: the mean training loss of each part, [lanes, parts].
      hyperparams: at the end of each part, [lanes, parts] each.
      decisions: of each run, the last ones that its log holds.
      decision_counts: how many each run made in all, [lanes].
      compile_seconds: what compiling took, 0 where it was done before.
      run_seconds: what running took.
    """

    held_out: np.ndarray
    train: np.ndarray
    hyperparams: dict[str, np.ndarray]
    decisions: list[list[mo.Decision]]
    decision_counts: np.ndarray
    compile_seconds: float
    run_seconds: float


class _Carry(NamedTuple):
    params: Any
    state: Any
    loss_sum: Float[Array, ""]


class Parts(NamedTuple):
    """The steps of a run, of each part that ends with a measurement, and between two looks."""

    steps: int
    part: int
    interval: int


def schedule_of(steps: int) -> Parts:
    """A run of about so many steps, a multiple of the measurements."""
    part = max(1, steps // EVALUATIONS)
    return Parts(part * EVALUATIONS, part, max(1, steps // LOOKS))


class Trainer:
    """One arm on one task, compiled at its first call for a number of lanes."""

    def __init__(self, task: Task, arm: Arm, steps: int) -> None:
        """Builds nothing yet.

        Args:
          task: what to train.
          arm: the way to.
          steps: of each run; rounded down to a multiple of the measurements.
        """
        self.task, self.arm = task, arm
        self.steps, self.part, self.interval = schedule_of(steps)
        self._compiled: dict[int, Any] = {}

    def __call__(self, lanes: Lanes, at_once: int) -> Curves:
        """Trains all lanes.

        Args:
          lanes: seeds, base rates and weight decays.
          at_once: the lanes of one batch; what is left of the last batch repeats its first lane.

        Returns:
          What they did, on the host.
        """
        count = len(lanes.seed)
        rows = [(np.arange(at_once) + first) for first in range(0, count, at_once)]
        rows = [np.where(row < count, row, row[0]) for row in rows]
        start = time.perf_counter()
        example = _take(lanes, rows[0])
        is_new = at_once not in self._compiled
        if is_new:
            self._compiled[at_once] = jax.jit(jax.vmap(self._run)).lower(example).compile()
        compiled = time.perf_counter()
        run = self._compiled[at_once]
        batches = [jax.device_get(run(_take(lanes, row))) for row in rows]
        ended = time.perf_counter()
        whole = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *batches)
        held_out, train, hyperparams, logs = whole
        runs = [jax.tree.map(lambda leaf, i=i: leaf[i], logs) for i in range(count)]
        return Curves(
            held_out=held_out,
            train=train,
            hyperparams=hyperparams,
            decisions=[decisions_of(run) for run in runs],
            decision_counts=np.array([sum(int(log.count) for log in run) for run in runs]),
            compile_seconds=compiled - start if is_new else 0.0,
            run_seconds=ended - compiled,
        )

    def _run(self, lane: Lanes) -> Any:
        init_key, data_key = jax.random.split(jax.random.key(lane.seed))
        setting = Setting(
            learning_rate=lane.learning_rate,
            weight_decay=lane.weight_decay,
            seed=lane.seed,
            steps=self.steps,
            interval=self.interval,
            has_experts=self.task.has_experts,
        )
        tx = optax.with_extra_args_support(self.arm.make(setting))
        params = self.task.init(init_key)
        first = self.task.held_out(params)
        carry = _Carry(params, tx.init(params), jnp.zeros([]))

        def step(carry: _Carry, count: Int[Array, ""]) -> tuple[_Carry, Float[Array, ""]]:
            batch = self.task.sample(jax.random.fold_in(data_key, count), count / self.steps)
            return self._step(tx, carry, batch, count)

        def part(carry: _Carry, number: Int[Array, ""]) -> tuple[_Carry, Any]:
            counts = number * self.part + jnp.arange(self.part)
            carry, losses = jax.lax.scan(step, carry, counts)
            measured = self.arm.eval_params(carry.state, carry.params)
            hyperparams = self.arm.read(carry.state, setting, counts[-1])
            return carry, (self.task.held_out(measured), losses.mean(), hyperparams)

        carry, out = jax.lax.scan(part, carry, jnp.arange(EVALUATIONS))
        held_out, train, hyperparams = out
        nodes = jax.tree.leaves(carry.state, is_leaf=_is_log)
        logs = [node for node in nodes if _is_log(node)]
        return jnp.concatenate([first[None], held_out]), train, hyperparams, logs

    def _step(
        self, tx: Any, carry: _Carry, batch: Any, count: Int[Array, ""]
    ) -> tuple[_Carry, Float[Array, ""]]:
        weight = optax.tree.get(carry.state, "aux_loss_weight", AUX_LOSS_WEIGHT)

        def loss_fn(params: Any) -> Any:
            loss, routing = self.task.loss(params, batch)
            aux = 0.0 if routing is None else weight * balance_loss(routing)
            return loss + aux, (loss, routing)

        grads, (loss, routing) = jax.grad(loss_fn, has_aux=True)(carry.params)
        metrics = {} if routing is None else mo.router_metrics(*routing)
        total = carry.loss_sum + loss
        is_look = (count + 1) % self.interval == 0
        value = (total / self.interval, is_look) if self.arm.looks == "interval" else loss
        updates, state = tx.update(grads, carry.state, carry.params, value=value, **metrics)
        params = optax.apply_updates(carry.params, updates)
        return _Carry(params, state, jnp.where(is_look, 0.0, total)), loss


def _is_log(node: Any) -> bool:
    return isinstance(node, DecisionLog)


def _take(lanes: Lanes, rows: np.ndarray) -> Lanes:
    return Lanes(
        seed=jnp.asarray(lanes.seed[rows], jnp.int32),
        learning_rate=jnp.asarray(lanes.learning_rate[rows], jnp.float32),
        weight_decay=jnp.asarray(lanes.weight_decay[rows], jnp.float32),
    )
