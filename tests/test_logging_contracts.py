"""What Levanter and Tunix read of an optimizer's state, and the code of docs/logging.md."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from table import params

import meta_optax as mo

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs/logging.md").read_text()


def _as_levanter(state):
    """All hyperparameters at the top, or one level down in that of MultiSteps; else nothing."""
    from optax._src.wrappers import MultiStepsState

    top = state.inner_opt_state if isinstance(state, MultiStepsState) else state
    return {k: v.item() for k, v in top.hyperparams.items()} if hasattr(top, "hyperparams") else {}


def _as_tunix(opt_state):
    """The rate at the top, or in a part of the state before the first empty one; else None.

    Of an `nnx.Optimizer`, in which each leaf is a variable. A part with hyperparameters and
    without a rate is a KeyError, which nothing catches.
    """
    if hasattr(opt_state, "hyperparams"):
        return opt_state.hyperparams["learning_rate"].get_value()
    for part in opt_state:
        if isinstance(part, optax.EmptyState):
            return None
        if hasattr(part, "hyperparams"):
            return part.hyperparams["learning_rate"].get_value()
    return None


def _inject(inner=optax.adamw):
    return mo.inject_meta_hyperparams(inner, mo.plateau(patience=1))(learning_rate=0.5)


def _clipped(learning_rate):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))


def _clip_in_front():
    return optax.chain(optax.clip_by_global_norm(1.0), _inject())


def _partitioned():
    groups = {"a": _inject(), "b": optax.adam(0.5)}
    return optax.partition(groups, lambda p: jax.tree.map(lambda x: "a", p))


# The optimizer, and whether Levanter and Tunix find its rate.
CASES = {
    "alone": (_inject, True, True),
    "clip inside": (lambda: _inject(_clipped), True, True),
    "chain behind": (lambda: optax.chain(_inject(), optax.clip(1.0)), False, True),
    "clip in front": (_clip_in_front, False, False),
    "skip_spikes": (lambda: mo.skip_spikes(_inject()), True, True),
    "skip_spikes of a chain": (lambda: mo.skip_spikes(_clip_in_front()), False, False),
    "MultiSteps": (lambda: optax.MultiSteps(_inject(), 1), True, True),
    "MultiSteps of skip_spikes": (
        lambda: optax.MultiSteps(mo.skip_spikes(_inject()), 1),
        True,
        True,
    ),
    "apply_if_finite": (lambda: optax.apply_if_finite(_inject(), 2), False, True),
    "masked": (lambda: optax.masked(_inject(), True), False, True),
    "partition": (_partitioned, False, False),
    "a rate beside a factor": (
        lambda: optax.chain(
            optax.inject_hyperparams(optax.adam)(0.25), mo.scale_by_plateau(patience=1)
        ),
        False,
        True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_levanter_and_optax_read_the_rate_of_the_last_update(name):
    make, by_levanter, _ = CASES[name]
    tx, p = make(), params()
    state = tx.init(p)
    assert _as_levanter(state).get("learning_rate") == (0.5 if by_levanter else None)
    for _ in range(2):
        _, state = tx.update(p, state, p, value=jnp.float32(1.0))
    assert _as_levanter(state).get("learning_rate") == (0.25 if by_levanter else None)
    # Neither Optax's own way nor ours minds what stands around it.
    assert float(optax.tree.get(state, "learning_rate")) == 0.25
    assert mo.read_hyperparams(state)["learning_rate"] == 0.25


@pytest.mark.parametrize("name", CASES)
def test_tunix_reads_the_rate_of_the_last_update(name):
    nnx = pytest.importorskip("flax.nnx", exc_type=Exception)
    make, _, by_tunix = CASES[name]
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, nnx.state(model, nnx.Param), value=jnp.float32(1.0))
    assert _as_tunix(optimizer.opt_state) == (0.25 if by_tunix else None)
    assert float(optax.tree.get(nnx.as_pure(optimizer.opt_state), "learning_rate")) == 0.25
    assert mo.read_hyperparams(optimizer.opt_state)["learning_rate"] == 0.25


def test_a_factor_alone_stops_tunix():
    """Its state has hyperparameters and no rate; the page says what to do."""
    nnx = pytest.importorskip("flax.nnx", exc_type=Exception)
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.adam(0.5), mo.scale_by_plateau())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with pytest.raises(KeyError, match="learning_rate"):
        _as_tunix(optimizer.opt_state)


def test_writer_takes_the_state_of_an_nnx_optimizer(tmp_path):
    nnx = pytest.importorskip("flax.nnx", exc_type=Exception)
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    strategy = mo.with_decisions(mo.plateau(patience=1))
    tx = mo.inject_meta_hyperparams(optax.sgd, strategy)(learning_rate=0.5)
    optimizer = nnx.Optimizer(model, mo.skip_spikes(tx), wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, nnx.state(model, nnx.Param), value=jnp.float32(1.0))
    with mo.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0}, optimizer.opt_state)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["hyperparams/learning_rate"] == 0.25
    assert row["skipped_count"] == row["nonfinite_count"] == 0
    assert [d["reason"] for d in row["decisions"]] == ["plateau: patience"]


def test_the_page_runs_as_printed(tmp_path, monkeypatch):
    """Its blocks one after the other, as of one script, on stopping distances (Ezekiel, 1930)."""
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    speed = jnp.array([4, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22, 23, 24, 25]) / 25
    distance = jnp.array([6, 13, 16, 10, 26, 22.5, 21.5, 35, 50.5, 33.3, 36, 40.7, 64.5, 50, 50.4])
    distance = jnp.concatenate([distance, jnp.array([66, 54, 93.8, 85])]) / 100

    def loss_fn(params, batch):
        return jnp.mean((params["w"] * batch[0] ** 2 + params["b"] - batch[1]) ** 2)

    start = {"w": jnp.float32(2.0), "b": jnp.float32(0.0)}
    scope = {"loss_fn": loss_fn, "params": start, "batches": [(speed, distance)] * 55}
    loop, read, resume, processes, clipped = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    for code in (loop, read):
        exec(compile(code, "logging.md", "exec"), scope)
    rows = scope["rows"]
    assert [row["step"] for row in rows] == [0, 10, 20, 30, 40, 50]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert scope["step"]._cache_size() == 1
    assert {"hyperparams/learning_rate", "nonfinite_count"} <= rows[0].keys()
    for code in (resume, read):
        exec(compile(code, "logging.md", "exec"), scope)
    assert [row["step"] for row in scope["rows"]] == [0, 10, 20, 30, 40]
    for code in (processes, clipped):
        exec(compile(code, "logging.md", "exec"), scope)
    scope["writer"].close()
    state = scope["tx"].init(scope["params"])
    assert _as_levanter(state)["learning_rate"] == pytest.approx(3e-3)
    assert len(list((tmp_path / "runs/first").glob("events.*"))) == 2


def test_every_name_of_the_page_exists_and_links_lead_somewhere():
    for name in set(re.findall(r"\bmo\.(\w+)", PAGE)):
        assert hasattr(mo, name), name
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
