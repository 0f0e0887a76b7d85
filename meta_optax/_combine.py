"""Combinators: strategies made of strategies."""

import keyword
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from meta_optax import _checks
from meta_optax._checks import Scalar
from meta_optax._core import (
    BASE_PREFIX,
    Hyperparams,
    MetaOptimizer,
    Metrics,
    State,
    group_name,
    observe_every,
    observe_where,
    protect,
)
from meta_optax._counts import add_counts


class ChainState(NamedTuple):
    """The states of the chained strategies, in order."""

    states: tuple[State, ...]

    @property
    def nonfinite_count(self) -> Int[Array, ""]:
        """How often a needed metric was not finite, summed over the strategies."""
        return add_counts(*(state.nonfinite_count for state in self.states))


def chain(*meta_optimizers: MetaOptimizer) -> MetaOptimizer:
    r"""Applies strategies one after the other, left to right.

    .. math:: \text{apply} = \text{apply}_n \circ \dots \circ \text{apply}_1

    Each observes every step's metrics; each holds its own state when a metric that *it* needs is
    not finite.

    Args:
      *meta_optimizers: the strategies; each ``apply`` sees the previous one's output.

    Returns:
      A `MetaOptimizer` that needs what any of them needs.

    Raises:
      ValueError: if no strategy is given.
      TypeError: if something else than a `MetaOptimizer` is given.

    Example:
      >>> import meta_optax as mo
      >>> both = mo.chain(mo.plateau(), mo.expert_gate())
      >>> both.name, both.metrics
      ('chain(plateau, expert_gate)', ('value', 'grad_norm', 'gate_entropy'))
    """
    if not meta_optimizers:
        raise ValueError("chain needs at least one MetaOptimizer, got none.")
    metas = [protect(meta, "chain") for meta in meta_optimizers]

    def init() -> ChainState:
        return ChainState(states=tuple(meta.init() for meta in metas))

    def observe(state: ChainState, metrics: Metrics) -> ChainState:
        states = []
        for meta, old in zip(metas, state.states, strict=True):
            states.append(meta.observe(old, metrics))
            # The next strategy's base is what this one makes of its own.
            base = {k: v for k, v in metrics.items() if k.startswith(BASE_PREFIX)}
            if base:
                stripped = {k.removeprefix(BASE_PREFIX): v for k, v in base.items()}
                out = meta.apply(states[-1], stripped)
                metrics = {**metrics, **{BASE_PREFIX + k: v for k, v in out.items()}}
        return ChainState(states=tuple(states))

    def apply(state: ChainState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        out = dict(hyperparams)
        for meta, inner in zip(metas, state.states, strict=True):
            out = meta.apply(inner, out)
        return out

    name = f"chain({', '.join(meta.name for meta in metas)})"
    needed = tuple(dict.fromkeys(metric for meta in metas for metric in meta.metrics))
    return MetaOptimizer(name, init, observe, apply, needed)


def every(n: Scalar | str, meta_optimizer: MetaOptimizer) -> MetaOptimizer:
    r"""Shows a strategy the metrics of every n-th step only, or of the steps that a signal names.

    .. math:: s_{t+1} = \text{observe}(s_t, m_t) \text{ if } t \bmod n = 0 \text{ else } s_t

    In between, the state stays and nothing non-finite is seen or counted. A warm-up inside then
    moves in strides of n; the strategy's own ``update_frequency`` keeps it smooth.

    With ``every("is_validation", m)`` the steps are those at which the extra argument
    ``is_validation`` is true, a boolean scalar: ``tx.update(grads, state, params,
    value=validation_loss, is_validation=is_new)``. Elsewhere the metrics may be anything. All
    strategies of a chain read the same ``value``; the documentation of loops shows how one of them
    reads a metric of another name.

    Args:
      n: the period in steps, an integer of at least 1; clipped to that where traced. Or the name of
        a boolean extra argument.
      meta_optimizer: the strategy.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: if ``n`` is below 1, or a string that no argument can be called.
      TypeError: from ``observe``, while tracing, if the signal was not passed, or is no boolean
        scalar.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> meta = mo.every(10, mo.expert_gate())
      >>> seen = {"step": jnp.int32(3), "gate_entropy": 0.0}  # low, but on a step in between
      >>> state = meta.observe(meta.init(), seen)
      >>> print(meta.apply(state, {"learning_rate": 1.0})["gate_learning_rate"])
      0.1
    """
    meta = protect(meta_optimizer, "every")
    name = f"every({n!r}, {meta.name})"
    if isinstance(n, str):
        if not n.isidentifier() or keyword.iskeyword(n):
            raise ValueError(f"n must be an integer >= 1, or the name of a signal; got {n!r}.")
        return meta._replace(name=name, observe=observe_where(name, n, meta.observe))
    period = _checks.integer("n", n, low=1)
    return meta._replace(name=name, observe=observe_every(meta.name, period, meta.observe))


def log_only(meta_optimizer: MetaOptimizer) -> MetaOptimizer:
    """Lets a strategy observe and record, but never act.

    ``apply`` gives the hyperparameters as they are; the state moves as it would. For a dry run of
    a strategy on a training run that must not be touched.

    Args:
      meta_optimizer: the strategy.

    Returns:
      A `MetaOptimizer` whose ``apply`` is the identity.

    Example:
      >>> import meta_optax as mo
      >>> meta = mo.log_only(mo.expert_gate())
      >>> meta.apply(meta.init(), {"learning_rate": 1.0})
      {'learning_rate': 1.0}
    """
    meta = protect(meta_optimizer, "log_only")

    def apply(state: State, hyperparams: Mapping[str, Any]) -> Hyperparams:
        del state
        return dict(hyperparams)

    return meta._replace(name=f"log_only({meta.name})", apply=apply)


def bounded(meta_optimizer: MetaOptimizer, **bounds: Any) -> MetaOptimizer:
    r"""Keeps what a strategy makes of a hyperparameter within absolute bounds.

    .. math:: h \leftarrow \min(\max(h, \text{lo}), \text{hi})

    The bounds hold for the base values too: a schedule that leaves them is clipped.

    Args:
      meta_optimizer: the strategy.
      **bounds: for each hyperparameter a pair (lo, hi) with 0 <= lo <= hi; ``math.inf`` is no
        upper bound. A group's form has a bound of its own (``gate_learning_rate=(0.0, 1e-3)``),
        which holds for each layer's part of it, where layers have rates of their own.

    Returns:
      A `MetaOptimizer` with the same state.

    Raises:
      ValueError: if a pair is not one, is in the wrong order, negative or NaN; or, when applied,
        if there is no hyperparameter of that name.

    Example:
      >>> import meta_optax as mo
      >>> meta = mo.bounded(mo.expert_gate(), gate_learning_rate=(1e-3, 1.0))
      >>> print(meta.apply(meta.init(), {"learning_rate": 1e-4})["gate_learning_rate"])
      0.001
    """
    meta = protect(meta_optimizer, "bounded")
    limits = {name: _checked_bounds(name, pair) for name, pair in bounds.items()}

    def apply(state: State, hyperparams: Mapping[str, Any]) -> Hyperparams:
        out = meta.apply(state, hyperparams)
        for name, (low, high) in limits.items():
            # The bounds of a layer's own form go before those of the group's.
            of_layers = [k for k in out if group_name(k) == name and k not in limits]
            keys = [name] * (name in out) + of_layers
            if not keys:
                raise ValueError(
                    f"bounded has bounds for {name!r}, but {meta.name} leaves the hyperparameters "
                    f"{sorted(out)}: bound one of those."
                )
            for key in keys:
                out[key] = jnp.clip(jnp.asarray(out[key], jnp.float32), low, high)
        return out

    return meta._replace(name=f"bounded({meta.name})", apply=apply)


def _checked_bounds(name: str, pair: Any) -> tuple[ArrayLike, ArrayLike]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"bounded needs a pair (lo, hi) for {name!r}, got {pair!r}.")
    low = _checks.real(f"the lower bound of {name!r}", pair[0], open_high=True)
    high = _checks.real(f"the upper bound of {name!r}", pair[1])
    if _checks.is_known(low, high) and low > high:
        raise ValueError(f"bounded needs lo <= hi for {name!r}, got {pair!r}.")
    return low, high
