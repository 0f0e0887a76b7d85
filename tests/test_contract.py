"""One suite over all strategies and all transformations."""

import functools
import inspect
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import (
    BASE,
    FREE,
    KEEPS_DTYPE,
    SHAPES,
    STRATEGIES,
    TRANSFORMATIONS,
    WITHOUT_HYPERPARAMS,
    is_key,
    params,
    plain,
    row,
)

import meta_optax as mo

HYPERPARAMS = BASE | FREE
each_strategy = pytest.mark.parametrize("name", STRATEGIES)
each_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)
each_that_keeps_dtype = pytest.mark.parametrize("name", KEEPS_DTYPE)


def _assert_strong(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert isinstance(leaf, jax.Array), (path, leaf)
        if is_key(leaf):
            continue
        assert not leaf.weak_type, path
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_, jnp.uint8), path


def _signature(tree):
    """Shapes, dtypes and weak types; a typed key has a dtype of its own, and is never weak."""
    return jax.tree.map(lambda x: (jnp.shape(x), x.dtype, getattr(x, "weak_type", False)), tree)


def _seen(strategy, state, step, **values):
    """The metrics as a way to act would show them."""
    current = strategy.apply(state, {k: jnp.float32(v) for k, v in HYPERPARAMS.items()})
    base = {f"base_{k}": jnp.float32(v) for k, v in HYPERPARAMS.items()}
    return {**row(step), **current, **base, "step": jnp.int32(step), **values}


def _counts(state):
    return int(state.nonfinite_count)


@pytest.mark.usefixtures("strict_numerics")
class TestStrategies:
    """What holds for every `MetaOptimizer`."""

    @each_strategy
    def test_is_built_from_keywords_only(self, name):
        arguments = inspect.signature(STRATEGIES[name].make).parameters.values()
        assert all(a.kind is inspect.Parameter.KEYWORD_ONLY for a in arguments)

    @each_strategy
    def test_state_is_strong_and_keeps_its_shape(self, name):
        for strategy in (STRATEGIES[name].make(), STRATEGIES[name].eager()):
            state = strategy.init()
            _assert_strong(state)
            for step in range(4):
                new = jax.jit(strategy.observe)(state, _seen(strategy, state, step))
                assert _signature(new) == _signature(state)
                state = new

    @each_strategy
    def test_state_has_the_dtypes_of_its_annotations(self, name):
        """The jaxtyping hook does not look into NamedTuples, so this does."""

        def check(node):
            for field, annotation in getattr(type(node), "__annotations__", {}).items():
                value = getattr(node, field)
                if inspect.isclass(annotation) and hasattr(annotation, "dtypes"):
                    assert isinstance(value, annotation), (type(node), field)
                elif isinstance(value, tuple):
                    for child in value if not hasattr(value, "_fields") else (value,):
                        check(child)

        check(STRATEGIES[name].make().init())

    @each_strategy
    def test_eager_jit_scan_and_vmap_agree(self, name):
        strategy = STRATEGIES[name].eager()
        base = {k: jnp.float32(v) for k, v in HYPERPARAMS.items()}
        rows = [row(step, value=v) for step, v in enumerate([1.0, 1.0, 0.5, 0.6, 0.7, 0.7])]
        start = strategy.init()
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

        def advance(state, step_and_row):
            step, metrics = step_and_row
            seen = {**metrics, **strategy.apply(state, base), "step": step}
            state = strategy.observe(state, seen)
            return state, strategy.apply(state, base)

        eager, out = start, []
        for step, metrics in enumerate(rows):
            eager, used = advance(eager, (jnp.int32(step), metrics))
            out.append(used)
        steps = (jnp.arange(len(rows), dtype=jnp.int32), stacked)
        scanned, used = jax.jit(lambda s: jax.lax.scan(advance, s, steps))(start)
        chex.assert_trees_all_close(plain(scanned), plain(eager), rtol=1e-6)
        chex.assert_trees_all_close(
            used, jax.tree.map(lambda *leaves: jnp.stack(leaves), *out), rtol=1e-6
        )
        batched = jax.tree.map(lambda x: jnp.stack([x, x]), start)
        twice, _ = jax.vmap(lambda s: jax.lax.scan(advance, s, steps))(batched)
        for i in range(2):
            one = jax.tree.map(lambda x, i=i: x[i], twice)
            chex.assert_trees_all_close(plain(one), plain(eager), rtol=1e-6)

    @each_strategy
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_nonfinite_needed_metric_is_held_and_counted(self, name, bad):
        strategy = STRATEGIES[name].eager()
        base = {k: jnp.float32(v) for k, v in HYPERPARAMS.items()}
        state = strategy.init()
        for step in range(3):
            state = strategy.observe(state, _seen(strategy, state, step))
        everything = {metric: jnp.full(SHAPES[metric], bad) for metric in strategy.metrics}
        held = strategy.observe(state, _seen(strategy, state, 6, **everything))
        assert _counts(held) > _counts(state)
        chex.assert_trees_all_equal(strategy.apply(held, base), strategy.apply(state, base))
        without_count = [
            (a, b)
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(plain(held)),
                jax.tree.leaves(plain(state)),
                strict=True,
            )
            if "nonfinite_count" not in str(path[-1])
        ]
        for new, old in without_count:
            np.testing.assert_array_equal(new, old)

    @each_strategy
    def test_each_needed_metric_alone_is_enough_to_hold(self, name):
        strategy = STRATEGIES[name].eager()
        for metric in strategy.metrics:
            state = strategy.init()
            bad = jnp.full(SHAPES[metric], jnp.nan)
            held = strategy.observe(state, _seen(strategy, state, 0, **{metric: bad}))
            assert _counts(held) >= 1, metric

    @each_strategy
    def test_missing_metric_is_a_type_error_that_says_what_to_write(self, name):
        strategy = STRATEGIES[name].make()
        for metric in strategy.metrics:
            seen = _seen(strategy, strategy.init(), 0)
            del seen[metric]
            with pytest.raises(TypeError, match=rf"'{metric}'.*tx\.update\(.*{metric}="):
                jax.eval_shape(strategy.observe, strategy.init(), seen)

    @each_strategy
    def test_metric_of_the_wrong_shape_is_an_error_that_names_it(self, name):
        if name == "custom":
            pytest.skip("only the strategy itself knows what shapes it takes")
        strategy = STRATEGIES[name].make()
        for metric in strategy.metrics:
            wrong = jnp.ones([3, 2], jnp.float32)
            seen = _seen(strategy, strategy.init(), 0, **{metric: wrong})
            with pytest.raises(ValueError, match=rf"'{metric}'.*\(3, 2\)"):
                strategy.observe(strategy.init(), seen)

    @each_strategy
    @pytest.mark.parametrize("given", [None, "high", object()])
    def test_metric_that_is_no_array_is_an_error_that_names_it(self, name, given):
        strategy = STRATEGIES[name].make()
        metric = strategy.metrics[0]
        with pytest.raises(TypeError, match=f"'{metric}'"):
            strategy.observe(
                strategy.init(), _seen(strategy, strategy.init(), 0, **{metric: given})
            )

    @each_strategy
    def test_metrics_of_any_dtype_leave_the_state_in_its_own(self, name):
        strategy = STRATEGIES[name].make()
        state = strategy.init()
        with jax.enable_x64(True):
            for dtype in (jnp.bfloat16, jnp.float16, jnp.float64, jnp.int32):
                values = {k: jnp.ones(SHAPES[k], dtype) for k in strategy.metrics}
                new = strategy.observe(state, _seen(strategy, state, 0, **values))
                assert _signature(new) == _signature(state)

    @each_strategy
    def test_unknown_metrics_are_left_alone(self, name):
        strategy = STRATEGIES[name].make()
        state = strategy.init()
        seen = _seen(strategy, state, 0)
        chex.assert_trees_all_equal(
            plain(strategy.observe(state, {**seen, "unheard_of": object()})),
            plain(strategy.observe(state, seen)),
        )

    @each_strategy
    def test_apply_is_pure_and_keeps_what_it_does_not_control(self, name):
        strategy = STRATEGIES[name].make()
        base = {**{k: jnp.float32(v) for k, v in HYPERPARAMS.items()}, "b1": jnp.float32(0.9)}
        before = dict(base)
        out = strategy.apply(strategy.init(), base)
        assert base == before
        assert out["b1"] is base["b1"]
        assert set(out) >= set(base)


class TestTransformations:
    """What holds for every `optax.GradientTransformation`."""

    @each_transformation
    def test_unknown_extra_args_are_accepted(self, name):
        tx = TRANSFORMATIONS[name]()
        p = params()
        tx.update(p, tx.init(p), p, **row(), unheard_of=jnp.ones(3))

    @each_transformation
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_second_call_compiles_nothing_and_buffers_are_donated(self, name, dtype):
        if name == "as_schedule" and dtype != "float32":
            pytest.skip("optax.inject_hyperparams itself changes Adam's moments to float32")
        tx = TRANSFORMATIONS[name]()
        p = params(dtype)
        if name == "moe_partition":
            tx = optax.with_extra_args_support(tx)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        @chex.assert_max_traces(n=1)
        def step(p, state, metrics):
            updates, state = tx.update(p, state, p, **metrics)
            return optax.apply_updates(p, updates), state

        state = tx.init(p)
        first = jax.tree.leaves((p, state))
        for i, value in enumerate([1.0, 1.0, 3.0, np.nan, 0.5]):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # "some donated buffers were not usable"
                p, state = step(p, state, row(i, value=value))
        assert step._cache_size() == 1
        # Optax does not read the rate that it kept, nor what was skipped, so they are not given.
        if name not in ("as_schedule", "multi_steps[skip]"):
            assert all(leaf.is_deleted() for leaf in first)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(p))

    @each_that_keeps_dtype
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
    def test_updates_leave_in_the_dtype_they_came_in(self, name, dtype):
        with jax.enable_x64(dtype == "float64"):
            tx = TRANSFORMATIONS[name]()
            p = params(dtype)
            state = tx.init(p)
            updates, new = tx.update(p, state, p, **row())
            assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {dtype}
            assert _signature(new) == _signature(state)

    @each_that_keeps_dtype
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_structure_is_stable_under_cond(self, name, dtype):
        tx = TRANSFORMATIONS[name]()
        p = params(dtype)
        state = tx.init(p)

        def skip(p, state):
            return optax.tree.zeros_like(p), state

        jax.jit(
            lambda go: jax.lax.cond(go, lambda p, s: tx.update(p, s, p, **row()), skip, p, state)
        )(True)

    @each_that_keeps_dtype
    def test_apply_if_finite_and_masked_carry_it(self, name):
        p = params(jnp.bfloat16)
        for tx in (
            optax.apply_if_finite(TRANSFORMATIONS[name](), 3),
            optax.masked(TRANSFORMATIONS[name](), dict.fromkeys(p, True)),
            optax.chain(optax.clip(1.0), TRANSFORMATIONS[name]()),
        ):
            updates, state = tx.init(p), None
            updates, state = jax.jit(tx.update)(p, tx.init(p), p, **row())
            assert _signature(state) == _signature(tx.init(p))
            assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}

    @each_transformation
    def test_multi_steps_carries_it(self, name):
        p = params()
        multi = optax.MultiSteps(TRANSFORMATIONS[name](), every_k_schedule=2)
        state = multi.init(p)
        step = jax.jit(multi.update)
        period = 4 if name == "multi_steps" else 2  # which counts to two itself
        for i in range(4):
            updates, new = step(p, state, p, **row(i))
            assert _signature(new) == _signature(state)
            state = new
            is_zero = all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))
            assert is_zero == (i % period != period - 1)
        assert step._cache_size() == 1

    @each_transformation
    def test_vmap_over_seeds(self, name):
        tx = TRANSFORMATIONS[name]()
        batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params())
        states = jax.vmap(tx.init)(batch)
        updates, states = jax.vmap(lambda g, s: tx.update(g, s, g, **row()))(batch, states)
        alone = jax.tree.map(lambda x: x[1], batch)
        expected, _ = tx.update(alone, tx.init(alone), alone, **row())
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], updates), expected, rtol=1e-5)

    @each_transformation
    def test_init_by_shapes(self, name):
        tx = TRANSFORMATIONS[name]()
        p = params()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p)
        expected = jax.tree.map(lambda x: (x.shape, x.dtype), tx.init(p))
        by_shape = [lambda s: jax.eval_shape(tx.init, s)]
        if name != "as_schedule":  # optax.inject_hyperparams takes no shapes
            by_shape.append(tx.init)
        for init in by_shape:
            assert jax.tree.map(lambda x: (x.shape, x.dtype), init(shapes)) == expected

    @each_transformation
    def test_map_params_finds_the_moments(self, name):
        tx = TRANSFORMATIONS[name]()
        state = tx.init(params())
        mapped = optax.tree.map_params(
            tx,
            lambda leaf: "moment",
            state,
            transform_non_params=lambda leaf: "other",
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
        moments = [leaf for leaf in jax.tree.leaves(mapped) if leaf == "moment"]
        assert len(moments) >= 6

    @each_transformation
    def test_long_scan_keeps_structure_and_bounds(self, name):
        tx = TRANSFORMATIONS[name]()
        # A balance bias has as many entries as the load.
        p = {k: v if name == "balance_router_bias" else v[:1] for k, v in params().items()}

        def step(carry, i):
            p, state = carry
            loss = 1.0 + jnp.sin(0.01 * i.astype(jnp.float32)) / 2
            updates, state = tx.update(p, state, p, **{**row(), "value": loss})
            return (optax.apply_updates(p, updates), state), None

        def run(p):
            return jax.lax.scan(step, (p, tx.init(p)), jnp.arange(30_000, dtype=jnp.int32))[0]

        p, state = jax.jit(run)(p)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(p))
        if name not in WITHOUT_HYPERPARAMS:
            assert all(np.isfinite(v) and v >= 0 for v in mo.read_hyperparams(state).values())
