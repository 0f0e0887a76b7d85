r"""Evolution strategies: antithetic perturbations of the weights, each judged by whole runs.

An iteration draws a horizon T, log-uniform, and for each pair i and each family f of tasks a few
runs. Both weights :math:`\theta \pm \sigma \epsilon_i` train on them from the first step to the
last. With :math:`\ell` the log of the final held-out loss, and :math:`\ell_0` that of the same run
on the linear schedule alone,

.. math::
  r = \ell - \ell_0, \; s = \frac{r}{0.2 + |r|}, \; u = s + \kappa \max(s, 0), \qquad
  d_{fi} = \tfrac12 \operatorname{mean}(u_{fi+} - u_{fi-}), \qquad
  g = \sum_f \operatorname{mean}_i \frac{d_{fi} \epsilon_i}{\operatorname{rms}_i d_{fi}}

so that a fifth counts almost as much as a tenfold change, harm more than help, and no family
rules. Adam goes down g. As unrolls are whole,
there is no truncation whose perturbations would have to persist (Vicol et al., arXiv 2112.13835).
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from meta_optax._learned import FEATURES
from meta_optax._policy import Policy
from meta_optax.compare._statistics import interquartile_mean
from meta_optax.metatrain._runs import FAMILIES, MULTIPLES, Family, Trouble, draw_trouble, run

HIDDEN = 8
# Seeds of the runs that the learning curve is measured on, which training never sees.
_EVALUATION_SEED, _EVALUATED, EVALUATION_STEPS = 2**20, 32, 400
# The log ratio of half the utility.
_HALF_RATIO = 0.2


class Settings(NamedTuple):
    """What a training is.

    Attributes:
      iterations: steps of Adam.
      pairs: antithetic pairs of weights in an iteration.
      runs: runs of each family that a pair is judged by: near the tuned rate, too low, too high,
        near it again, and so on.
      shortest: the shortest horizon, in steps.
      longest: the longest.
      seed: of everything.
      spread: the standard deviation of perturbations.
      rate: Adam's first rate, which falls to 0 along a cosine.
      harm: how much more harm weighs than help.
    """

    iterations: int = 300
    pairs: int = 16
    runs: int = 4
    shortest: int = 100
    longest: int = 1000
    seed: int = 0
    spread: float = 0.1
    rate: float = 0.03
    harm: float = 2.0


class Progress(NamedTuple):
    """A training so far: the weights in one row, Adam's state, and the learning curve's rows."""

    weights: Float[Array, " weights"]
    opt_state: Any
    iteration: int
    curve: list[Mapping[str, Any]]


class Trainer:
    """A training, compiled at its first iteration."""

    def __init__(self, settings: Settings) -> None:
        """Loads the data."""
        self.settings = settings
        self._key = jax.random.key(settings.seed)
        start = _first_policy(jax.random.fold_in(self._key, 2**30))
        weights, self._shape = ravel_pytree(start)
        self._first = weights
        schedule = optax.cosine_decay_schedule(settings.rate, settings.iterations)
        self._adam = optax.adam(schedule)
        self._families = {name: make() for name, make in FAMILIES.items()}
        self._losses = {
            name: jax.jit(functools.partial(self._all_losses, family))
            for name, family in self._families.items()
        }

    def start(self) -> Progress:
        """The training before its first iteration: a policy that never moves the rate."""
        return Progress(self._first, self._adam.init(self._first), 0, [])

    def policy(self, progress: Progress) -> Policy:
        """The weights as they are saved."""
        return self._shape(progress.weights)

    def step(self, progress: Progress) -> Progress:
        """One iteration."""
        settings = self.settings
        keys = jax.random.split(jax.random.fold_in(self._key, progress.iteration), 3)
        noise = jax.random.normal(keys[0], (settings.pairs, len(progress.weights)))
        moved = settings.spread * jnp.stack([noise, -noise], axis=1)
        horizon = _draw_horizon(keys[1], settings)
        gradient = jnp.zeros_like(progress.weights)
        for number, name in enumerate(self._families):
            key = jax.random.fold_in(keys[2], number)
            troubles = _draw_troubles(key, settings.pairs, settings.runs)
            ratios = self._ratios(name, progress.weights + moved, troubles, horizon)
            judged = ratios / (_HALF_RATIO + jnp.abs(ratios))
            judged = (judged + settings.harm * jnp.maximum(judged, 0.0)).mean(axis=2)
            better = (judged[:, 0] - judged[:, 1]) / 2.0
            size = jnp.sqrt(jnp.square(better).mean())
            gradient += (better / jnp.maximum(size, 1e-6)) @ noise / settings.pairs
        updates, opt_state = self._adam.update(gradient, progress.opt_state)
        weights = optax.apply_updates(progress.weights, updates)
        return Progress(jnp.asarray(weights), opt_state, progress.iteration + 1, progress.curve)

    def evaluate(self, progress: Progress) -> Mapping[str, Any]:
        """Geometric mean ratios to the linear schedule, on runs that training never sees."""
        row: dict[str, Any] = {"iteration": progress.iteration}
        for number, name in enumerate(self._families):
            key = jax.random.fold_in(jax.random.key(_EVALUATION_SEED), number)
            troubles = _draw_troubles(key, _EVALUATED, len(MULTIPLES))
            horizon = jnp.asarray(EVALUATION_STEPS, jnp.int32)
            weights = jnp.broadcast_to(progress.weights, (_EVALUATED, 1, len(progress.weights)))
            ratios = np.asarray(self._ratios(name, weights, troubles, horizon))[:, 0]
            for kind, column in zip(MULTIPLES, ratios.T, strict=True):
                row[f"{name}, {kind}"] = math.exp(interquartile_mean(column))
        return row

    def _ratios(self, name: str, weights: Any, troubles: Trouble, horizon: Any) -> Array:
        """Log ratios of final losses to the linear schedule's, [groups, weights, runs]."""
        still = jnp.zeros_like(weights[:, :1])
        both = jnp.concatenate([weights, still], axis=1)
        # Each device takes its share of the groups.
        mesh = jax.make_mesh((_devices(len(both)),), ("groups",), axis_types=(AxisType.Auto,))
        shared, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["groups"], []))
        both, troubles, horizon = jax.device_put((both, troubles, horizon), (shared, shared, whole))
        losses = self._losses[name](both, troubles, horizon)
        return losses[:, :-1] - losses[:, -1:]

    def _all_losses(
        self,
        family: Family,
        weights: Float[Array, "groups weights size"],
        troubles: Trouble,
        horizon: Int[Array, ""],
    ) -> Float[Array, "groups weights runs"]:
        """Each group's weights on each of the group's runs."""

        def one(weights: Array, trouble: Trouble) -> Array:
            return run(family, self._shape(weights), trouble, horizon)

        return jax.vmap(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(weights, troubles)


def _devices(groups: int) -> int:
    """How many devices share the groups evenly."""
    most = len(jax.devices())
    return next(n for n in range(most, 0, -1) if groups % n == 0)


def _draw_horizon(key: Key[Array, ""], settings: Settings) -> Int[Array, ""]:
    low, high = np.log([settings.shortest, settings.longest])
    return jnp.exp(jax.random.uniform(key, minval=low, maxval=high)).round().astype(jnp.int32)


def _draw_troubles(key: Key[Array, ""], groups: int, runs: int) -> Trouble:
    """Circumstances of runs, [groups, runs], each kind of rate in turn."""
    kinds = jnp.broadcast_to(jnp.arange(runs) % len(MULTIPLES), (groups, runs))
    keys = jax.random.split(key, (groups, runs))
    return jax.vmap(jax.vmap(draw_trouble))(keys, kinds)


def _first_policy(key: Key[Array, ""]) -> Policy:
    """Hidden units at random, and an output of zeros."""
    kernel = jax.random.normal(key, (len(FEATURES), HIDDEN)) / np.sqrt(len(FEATURES) / 4)
    return Policy(
        hidden_kernel=kernel,
        hidden_bias=jnp.zeros(HIDDEN),
        kernel=jnp.zeros((HIDDEN, 1)),
        bias=jnp.zeros(1),
    )


def problem_of(settings: Settings) -> str | None:
    """What is wrong with the settings, naming the argument; None if nothing is."""
    for name in ("iterations", "pairs", "runs", "shortest"):
        if getattr(settings, name) < 1:
            return f"--{name} must be an integer >= 1, got {getattr(settings, name)}"
    if settings.longest < settings.shortest:
        return f"--longest must be at least --shortest, {settings.shortest}: {settings.longest}"
    if not 0 <= settings.seed < 2**20:
        return f"--seed must be from 0 to {2**20 - 1}, got {settings.seed}"
    return None
