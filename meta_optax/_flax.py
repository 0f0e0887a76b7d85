"""Flax Linen's train state, with metrics for the optimizer. Imported on demand: it needs Flax."""

import dataclasses
import functools
from typing import Any, TypeVar

import optax
from flax import struct
from flax.training import train_state

_State = TypeVar("_State", bound="TrainState")


class TrainState(train_state.TrainState):
    """Flax Linen's ``TrainState``, which hands the metrics of a step to the optimizer.

    Flax's own ``apply_gradients`` takes every keyword for a field to replace, and calls
    ``tx.update`` without any, so that a strategy can see no loss. Here a keyword that is no field
    is a metric. All else is as in Flax: ``create``, subclasses with fields of their own
    (``batch_stats``), what it does with ``_overwrite_with_gradient``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, meta_optax as mo, optax
      >>> tx = mo.inject_meta_hyperparams(optax.sgd, mo.plateau(patience=1))(learning_rate=0.5)
      >>> model = nn.Dense(1)
      >>> params = model.init(jax.random.key(0), jnp.ones([1, 2]))["params"]
      >>> state = mo.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> for loss in (1.0, 1.0):
      ...     state = state.apply_gradients(grads=params, value=loss)
      >>> print(state.step, state.opt_state.hyperparams["learning_rate"])
      2 0.25

    References:
      ``flax.training.train_state.TrainState``.
    """

    # Flax says `FrozenDict` and `GradientTransformation`; any tree, and `optax.MultiSteps`, do.
    params: Any = struct.field(pytree_node=True)
    tx: Any = struct.field(pytree_node=False)

    def apply_gradients(self: _State, *, grads: Any, **kwargs: Any) -> _State:
        """The state after an update, with one more ``step``.

        Args:
          grads: the gradients, with the structure of ``params``.
          **kwargs: fields to replace, as in Flax, by their names; everything else goes to
            ``tx.update`` as a metric. An optimizer that takes no extra arguments gets none.

        Returns:
          A state with ``params`` and ``opt_state`` updated.

        Raises:
          TypeError: while tracing, if a metric that a strategy needs is not among them.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        replaced = {name: value for name, value in kwargs.items() if name in fields}
        metrics = {name: value for name, value in kwargs.items() if name not in fields}
        tx: Any = self.tx
        if isinstance(tx, optax.GradientTransformation):
            tx = optax.with_extra_args_support(tx)
        # Flax makes the update, by an optimizer that knows the metrics already.
        informed = optax.GradientTransformation(tx.init, functools.partial(tx.update, **metrics))
        state = self.replace(tx=informed)
        return super(TrainState, state).apply_gradients(grads=grads, **{"tx": self.tx, **replaced})
