"""A policy of one hidden layer over a few actions, and the loss that teaches it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# The hidden layer's weights and biases are drawn from -n/64 to n/64: with less, its units are near
# 0 and learn slowly. Of whole 64ths no way to compile rounds anything.
_KERNEL_SPREAD, _BIAS_SPREAD = 80, 224
# What logits are multiplied by: Adam's steps are of one size, and hundreds of them have to do.
_OUTPUT_GAIN = 5.0


class Policy(NamedTuple):
    """A perceptron of one hidden layer, from features to one logit an action."""

    hidden_kernel: Float[Array, "features hidden"]
    hidden_bias: Float[Array, " hidden"]
    kernel: Float[Array, "hidden actions"]
    bias: Float[Array, " actions"]


class Samples(NamedTuple):
    """Decisions whose rewards are known, and how many there are."""

    features: Float[Array, "batch features"]
    actions: Int[Array, " batch"]
    advantages: Float[Array, " batch"]
    count: Int[Array, ""]


def new_policy(key: Key[Array, ""], features: int, hidden: int, actions: int) -> Policy:
    """Hidden units well spread, and no action more likely than another."""
    kernel_key, bias_key = jax.random.split(key)

    def draw(key: Key[Array, ""], shape: list[int], spread: int) -> Array:
        whole = jax.random.randint(key, shape, -spread, spread + 1, jnp.int32)
        return whole.astype(jnp.float32) / 64.0

    return Policy(
        hidden_kernel=draw(kernel_key, [features, hidden], _KERNEL_SPREAD),
        hidden_bias=draw(bias_key, [hidden], _BIAS_SPREAD),
        kernel=jnp.zeros([hidden, actions], jnp.float32),
        bias=jnp.zeros([actions], jnp.float32),
    )


def logits_of(policy: Policy, features: Float[Array, " features"]) -> Float[Array, " actions"]:
    """The logits of all actions."""
    hidden = jnp.tanh(features @ policy.hidden_kernel + policy.hidden_bias)
    return _OUTPUT_GAIN * (hidden @ policy.kernel + policy.bias)


def policy_loss(policy: Policy, samples: Samples, entropy_weight: Any) -> Float[Array, ""]:
    """What REINFORCE descends: through the log-probability of what was chosen."""
    logits = jax.vmap(logits_of, in_axes=(None, 0))(policy, samples.features)
    log_probs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probs, samples.actions[:, None], axis=1)[:, 0]
    entropy = -(jnp.exp(log_probs) * log_probs).sum(axis=1)
    return -(samples.advantages * chosen).mean() - entropy_weight * entropy.mean()
