"""`label_moe_params` and `explain_labels`: every code base's names, and live models."""

import jax
import jax.numpy as jnp
import optax
import pytest
from moe_trees import TREES, build, build_expected_labels

import meta_optax as mo

each_tree = pytest.mark.parametrize("name", TREES)


def _built(name):
    if TREES[name].style == "nnx":
        pytest.importorskip("flax.nnx", exc_type=Exception)
    return build(TREES[name])


@each_tree
def test_every_code_base_is_labelled_right(name):
    params = _built(name)
    labels = mo.label_moe_params(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    expected = build_expected_labels(TREES[name])
    assert jax.tree.leaves(labels) == jax.tree.leaves(expected)


@each_tree
def test_gradients_masked_in_any_way_get_the_labels_of_the_params(name):
    params = _built(name)
    labels = jax.tree.leaves(mo.label_moe_params(params))
    for group in ("gate", "expert", "dense"):
        mask = jax.tree.map(lambda label, g=group: label == g, mo.label_moe_params(params))
        masked = jax.tree.map(lambda m, x: x if m else optax.MaskedNode(), mask, params)
        assert jax.tree.leaves(mo.label_moe_params(masked)) == labels


@pytest.mark.parametrize(
    "trap", ["gate_proj", "shared_expert_gate", "attn_gate", "gated_norm", "residual_gate_theta"]
)
def test_no_false_gate(trap):
    moe = {"gate": {"kernel": 0}, "experts": {"gate_proj": 0, "up_proj": 0}, trap: {"kernel": 0}}
    labels = mo.label_moe_params({"layer": {"attn": {trap: 0}, "moe": moe, "mlp": {trap: 0}}})
    assert labels["layer"]["moe"]["gate"]["kernel"] == "gate"
    assert labels["layer"]["moe"][trap]["kernel"] != "gate"
    assert labels["layer"]["attn"][trap] != "gate"
    assert labels["layer"]["mlp"][trap] != "gate"


def test_the_gate_of_a_gated_perceptron_is_no_router():
    dense = {"gate": {"kernel": 0}, "up": {"kernel": 0}, "down": {"kernel": 0}}
    with pytest.raises(ValueError, match=r"no gate among the paths \['mlp/down/kernel'"):
        mo.label_moe_params({"mlp": dense})
    moe = {"mlp": dense, "moe": {"router": 0, **dense}}
    labels = mo.label_moe_params(moe)
    assert set(jax.tree.leaves(labels["mlp"])) == {"dense"}
    assert labels["moe"]["router"] == "gate"
    assert labels["moe"]["gate"]["kernel"] == labels["moe"]["down"]["kernel"] == "expert"


MOE = {"router": {"kernel": 0}, "experts": {"w1": 0}}


@pytest.mark.parametrize(
    "dense",
    [
        {"lstm": {"gate_bias": 0}},
        {"attn": {"gate_bias": 0, "gate_weight": 0, "gate": 0, "gate_proj": 0}},
        {"mlp": {"gate": 0, "w1": 0, "w2": 0}},
        {"mlp": {"gate": 0, "wi": 0, "wo": 0}},
        {"shared": {"embedding": 0}},
    ],
)
def test_what_is_dense_beside_a_mixture(dense):
    labels = mo.label_moe_params({"moe": MOE, **dense})
    assert set(jax.tree.leaves({k: labels[k] for k in dense})) == {"dense"}


def test_a_perceptron_beside_a_module_of_experts_is_dense():
    params = {**MOE, "mlp": {"wi": 0}, "linear": {"kernel": 0}}
    labels = mo.label_moe_params(params)
    assert labels["experts"]["w1"] == "expert"
    assert labels["mlp"]["wi"] == labels["linear"]["kernel"] == "dense"


def test_experts_that_are_counted():
    params = {"moe": {"router": {"w": 0}, "expert_0": {"w": 0}, "expert_1": {"w": 0}}}
    assert mo.label_moe_params(params)["moe"]["expert_1"]["w"] == "expert"


@pytest.mark.parametrize("rules", ["router", ("router", "gate"), [("(", "gate")], {1: "gate"}])
def test_rules_that_are_none(rules):
    with pytest.raises(ValueError, match="rules must be pairs of a regular expression and a label"):
        mo.label_moe_params({"moe": MOE}, rules=rules)


def test_rules_go_first_and_the_first_that_is_found_wins():
    params = {"switch": {"w": 0}, "bank": {"w": 0}, "shared": {"embedding": 0}}
    labels = mo.label_moe_params(params, rules={"^switch": "gate", "switch|bank": "expert"})
    expected = {"switch": {"w": "gate"}, "bank": {"w": "expert"}, "shared": {"embedding": "dense"}}
    assert labels == expected
    assert mo.label_moe_params(params, rules=[("^switch", "gate"), ("bank", "expert")]) == expected


def test_what_cannot_be_labelled_is_an_error_with_the_paths():
    with pytest.raises(ValueError, match=r"no gate among the paths.*'mlp/wi/kernel'.*rules="):
        mo.label_moe_params({"mlp": {"wi": {"kernel": 0}}})
    with pytest.raises(ValueError, match=r"no expert among the paths.*'block/router'"):
        mo.label_moe_params({"block": {"router": 0, "attention": 0}})
    with pytest.raises(
        ValueError, match=r"what 'shared_experts/router/kernel' is.*'shared_expert'.*'gate'"
    ):
        mo.label_moe_params({"shared_experts": {"router": {"kernel": 0}}, "experts": 0})
    with pytest.raises(ValueError, match=r"'attention', which no optimizer serves, to \['block/q'"):
        mo.label_moe_params({"block": {"q": 0}}, rules={"q$": "attention"})


def test_an_error_shows_no_thousand_paths():
    with pytest.raises(ValueError, match="and 988 more"):
        mo.label_moe_params([0] * 1000)


def test_a_tree_without_leaves_has_no_labels():
    assert mo.label_moe_params({}) == {}


def test_explanation_counts_and_sizes(capsys):
    layer = {"router": {"kernel": jnp.ones([8, 4])}, "experts": {"w1": jnp.ones([4, 8, 9])}}
    params = {f"layer_{i}": layer for i in range(3)} | {"norm": jnp.ones([8])}
    text = mo.explain_labels(params, rules={"norm": "dense", "nothing": "gate"})
    assert capsys.readouterr().out == text + "\n"
    lines = [line.split() for line in text.splitlines()]
    assert ["gate", "3", "96", "router", "layer_*/router/kernel"] in lines
    assert ["expert", "3", "864", "experts", "layer_*/experts/w1"] in lines
    assert ["dense", "1", "8", "'norm'", "norm"] in lines
    assert "the rule 'nothing' matched no path" in text


def _assert_live(params, counts):
    labels = mo.label_moe_params(params)
    leaves = jax.tree.leaves(labels)
    assert {label: leaves.count(label) for label in set(leaves)} == counts
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    return labels


class TestLiveModels:
    @pytest.mark.parametrize("scanned", [False, True])
    def test_flax_linen(self, scanned):
        nn = pytest.importorskip("flax.linen", exc_type=Exception)

        class Moe(nn.Module):
            @nn.compact
            def __call__(self, x, _=None):
                probs = nn.softmax(nn.Dense(4, name="router")(x))
                self.sow("intermediates", "router_probs", probs)
                kernel = self.param("experts", nn.initializers.lecun_normal(), (4, 6, 6))
                x = x + jnp.einsum("te,td,edf->tf", probs, nn.LayerNorm()(x), kernel)
                return x, None

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                if scanned:
                    axes = {"params": 1, "intermediates": 0}
                    return nn.scan(Moe, axes, split_rngs={"params": True}, length=3)()(x)[0]
                for i in range(3):
                    x, _ = Moe(name=f"block_{i}")(x)
                return x

        params = Model().init(jax.random.key(0), jnp.ones([2, 6]))["params"]
        layers = 1 if scanned else 3
        _assert_live(
            params,
            {"gate": layers, "gate_bias": layers, "expert": layers, "dense": 2 * layers},
        )

    @pytest.mark.parametrize("stacked", [False, True])
    def test_flax_nnx(self, stacked):
        nnx = pytest.importorskip("flax.nnx", exc_type=Exception)

        class Moe(nnx.Module):
            def __init__(self, rngs):
                self.norm = nnx.LayerNorm(6, rngs=rngs)
                self.gate = nnx.Linear(6, 4, use_bias=False, rngs=rngs)
                self.experts = nnx.Param(jnp.ones([4, 6, 6]))

        class Model(nnx.Module):
            def __init__(self, rngs):
                if stacked:
                    self.layers = nnx.vmap(Moe)(rngs.split(3))
                else:
                    self.layers = nnx.List([Moe(rngs) for _ in range(3)])

        model = Model(nnx.Rngs(0))
        state = nnx.state(model, nnx.Param)
        layers = 1 if stacked else 3
        counts = {"gate": layers, "expert": layers, "dense": 2 * layers}
        labels = _assert_live(state, counts)
        pure = mo.label_moe_params(nnx.as_pure(state))
        assert jax.tree.leaves(pure) == jax.tree.leaves(labels)

    def test_nnx_optimizer_in_whose_updates_paths_are_shorter(self):
        nnx = pytest.importorskip("flax.nnx", exc_type=Exception)

        class Moe(nnx.Module):
            def __init__(self, rngs):
                self.router = nnx.Linear(2, 2, use_bias=False, rngs=rngs)
                self.experts = nnx.Param(jnp.ones([2, 2, 2]))

        model = Moe(nnx.Rngs(0))
        factory = mo.moe_partition(optax.sgd, mo.label_moe_params)
        tx = mo.inject_meta_hyperparams(factory, mo.expert_gate())(learning_rate=1.0)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        before = nnx.state(model, nnx.Param)
        before = jax.tree.map(jnp.copy, nnx.as_pure(before))
        grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        optimizer.update(model, grads, gate_entropy=1.2)
        after = nnx.as_pure(nnx.state(model, nnx.Param))
        moved = jax.tree.map(lambda a, b: float((a - b).max()), before, after)
        assert moved["router"]["kernel"] == pytest.approx(0.1)
        assert moved["experts"] == pytest.approx(1.0)

    @pytest.mark.parametrize("stacked", [False, True])
    def test_equinox(self, stacked):
        eqx = pytest.importorskip("equinox")

        class Moe(eqx.Module):
            router: eqx.nn.Linear
            experts: jax.Array
            norm: eqx.nn.LayerNorm

            def __init__(self, key):
                self.router = eqx.nn.Linear(6, 4, key=key)
                self.experts = jax.random.normal(key, (4, 6, 6))
                self.norm = eqx.nn.LayerNorm(6)

            def __call__(self, x):
                raise AssertionError("labels are made without calling the model")

        keys = jax.random.split(jax.random.key(0), 3)
        model = {"blocks": jax.vmap(Moe)(keys) if stacked else [Moe(key) for key in keys]}
        params = eqx.filter(model, eqx.is_array)
        layers = 1 if stacked else 3
        counts = {"gate": layers, "gate_bias": layers, "expert": layers, "dense": 2 * layers}
        labels = _assert_live(params, counts)
        tx = mo.moe_partition(optax.sgd, mo.label_moe_params)(1.0, gate_learning_rate=0.5)
        updates, _ = tx.update(params, tx.init(params))
        for label, update, leaf in zip(
            *map(jax.tree.leaves, (labels, updates, params)), strict=True
        ):
            rate = 0.5 if label.startswith("gate") else 1.0
            assert jnp.allclose(update, -rate * leaf)
