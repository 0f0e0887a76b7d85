"""Hypergradient descent of the learning rate of AdamW, for the comparison alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from meta_optax import _checks
from meta_optax._checks import Scalar
from meta_optax._control import cast_like

# The additive rate is the paper's for Adam on its two smaller models.
_RATES = {"multiplicative": 0.02, "additive": 1e-7}


class HypergradientState(NamedTuple):
    """State of `adamw_with_hypergradient`; ``direction`` is the last, before the rate."""

    hyperparams: dict[str, Float[Array, ""]]
    direction: Any
    inner_state: optax.OptState
    nonfinite_count: Int[Array, ""]


def adamw_with_hypergradient(
    learning_rate: Scalar,
    weight_decay: Scalar = 1e-4,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    hypergradient_rate: Scalar | None = None,
    rule: str = "multiplicative",
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose learning rate descends the gradient of the loss with respect to it.

    With :math:`g_t` the gradients, :math:`u_t` what AdamW subtracts from the parameters but for
    the rate :math:`\alpha_t` (Adam's direction and the decoupled decay), and :math:`u_0 = 0`,

    .. math::
      \frac{\partial f}{\partial \alpha} &= -g_t \cdot u_{t-1} \\
      \alpha_t &= \alpha_{t-1} + \beta \, g_t \cdot u_{t-1} \quad \text{(additive)} \\
      \alpha_t &= \alpha_{t-1} \left(1 + \beta
        \frac{g_t \cdot u_{t-1}}{\|g_t\| \|u_{t-1}\|}\right) \quad \text{(multiplicative)} \\
      \theta_t &= \theta_{t-1} - \alpha_t u_t

    The multiplicative rule does not depend on the scale of the loss or of the parameters; it
    leaves the rate alone where a norm is zero. The additive one is kept at 0 or above, which the
    paper does not do: its rate may turn negative. With decay 0 both are the paper's for Adam.

    Where a gradient, or what the rule makes of it, is not finite, the rate stays and
    ``nonfinite_count`` counts it. The updates are still AdamW's, which such a gradient spoils as
    it spoils those of AdamW: `optax.apply_if_finite` around it is the remedy for both.

    Args:
      learning_rate: the first rate, >= 0; no schedule.
      weight_decay: the decoupled decay, >= 0.
      b1: the decay of the first moment, in [0, 1).
      b2: the decay of the second moment, in [0, 1).
      eps: what is added to the root of the second moment, >= 0.
      hypergradient_rate: :math:`\beta`, >= 0, and <= 1 for the multiplicative rule; None is 0.02
        for that, and 1e-7 for the additive.
      rule: ``"multiplicative"`` or ``"additive"``. Not traced.

    Arguments that are traced are clipped to these ranges.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its state has ``hyperparams``: the rate and the
      decay that the last update used, and :math:`\beta`, all strong float32 scalars.

    Raises:
      ValueError: for an argument outside its range.

    References:
      Baydin, Cornish, Martínez Rubio, Schmidt and Wood, "Online learning rate adaptation with
      hypergradient descent", ICLR 2018, arXiv 1703.04782.
    """
    if rule not in _RATES:
        raise ValueError(f"rule must be one of {tuple(_RATES)}, got {rule!r}.")
    is_multiplicative = rule == "multiplicative"
    beta = _RATES[rule] if hypergradient_rate is None else hypergradient_rate
    # Above 1 the multiplicative rule could turn a rate negative.
    highest = 1.0 if is_multiplicative else jnp.finfo(jnp.float32).max
    start = {
        "learning_rate": _checks.real("learning_rate", learning_rate, open_high=True),
        "weight_decay": _checks.real("weight_decay", weight_decay, open_high=True),
        "hypergradient_rate": _checks.real("hypergradient_rate", beta, high=float(highest)),
    }
    adam = optax.scale_by_adam(
        b1=_checks.real("b1", b1, high=1.0, open_high=True),
        b2=_checks.real("b2", b2, high=1.0, open_high=True),
        eps=_checks.real("eps", eps, open_high=True),
    )

    def init_fn(params: Any) -> HypergradientState:
        return HypergradientState(
            hyperparams={name: jnp.array(value, jnp.float32) for name, value in start.items()},
            direction=optax.tree.zeros_like(params),
            inner_state=adam.init(params),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, HypergradientState]:
        del extra_args
        given = state.hyperparams
        wanted = _descend(
            given["learning_rate"],
            updates,
            state.direction,
            given["hypergradient_rate"],
            is_multiplicative=is_multiplicative,
        )
        is_finite = jnp.isfinite(wanted)
        # The additive rule may ask for less than nothing.
        rate = jnp.where(is_finite, jnp.maximum(wanted, 0.0), given["learning_rate"])
        direction, inner_state = adam.update(updates, state.inner_state, params)
        decay = optax.add_decayed_weights(given["weight_decay"])
        direction, _ = decay.update(direction, decay.init(params), params)
        new_updates = jax.tree.map(lambda u: (-rate).astype(u.dtype) * u, direction)
        count = state.nonfinite_count
        return cast_like(new_updates, updates), HypergradientState(
            hyperparams={**given, "learning_rate": rate},
            direction=cast_like(direction, state.direction),
            inner_state=cast_like(inner_state, state.inner_state),
            nonfinite_count=jnp.where(is_finite, count, optax.safe_increment(count)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _descend(
    rate: Float[Array, ""],
    grads: Any,
    direction: Any,
    beta: Float[Array, ""],
    *,
    is_multiplicative: bool,
) -> Float[Array, ""]:
    """What the rule makes of the rate: not finite where the gradients are not."""
    grads = optax.tree.cast(grads, jnp.float32)
    direction = optax.tree.cast(direction, jnp.float32)
    product = optax.tree.vdot(grads, direction)
    if not is_multiplicative:
        return rate + beta * product
    norms = optax.tree.norm(grads) * optax.tree.norm(direction)
    cosine = jnp.where(norms == 0, product, product / jnp.where(norms == 0, 1.0, norms))
    # A rounding must not take a cosine out of its range; NaN stays NaN.
    return rate * (1.0 + beta * jnp.clip(cosine, -1.0, 1.0))
