"""The README's own code and commands."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meta_optax as mo

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _blocks(language, section):
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", README, re.M | re.S).group(1)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


# Speed in miles an hour and mean stopping distance in feet of cars of the 1920s (Ezekiel, 1930).
SPEED = [4, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22, 23, 24, 25]
DISTANCE = [6, 13, 16, 10, 26, 22.5, 21.5, 35, 50.5, 33.3, 36, 40.7, 64.5, 50, 50.4]
DISTANCE += [66, 54, 93.8, 85]


def test_the_step_runs_as_printed(capsys):
    (code,) = _blocks("python", "In your own training step")

    def loss_fn(params, batch):
        speed, distance = batch
        return jnp.mean((params["w"] * speed**2 + params["b"] - distance) ** 2)

    batch = (jnp.array(SPEED) / 25.0, jnp.array(DISTANCE) / 100.0)
    scope = {
        "loss_fn": loss_fn,
        "params": {"w": jnp.zeros([]), "b": jnp.zeros([])},
        "batches": [batch] * 600,
    }
    exec(compile(code, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "'learning_rate'" in printed
    assert "advanced_plateau: warm-up" in printed or "advanced_plateau: " in printed
    fitted = scope["params"]["w"] * batch[0] ** 2 + scope["params"]["b"]
    assert float(np.corrcoef(fitted, batch[1])[0, 1]) > 0.9
    assert mo.read_decisions(scope["state"])[-1].new < 3e-2


def test_the_mixtures_step_runs_as_printed():
    """Two experts fit the stopping distances of slow and of fast cars."""
    (code,) = _blocks("python", "A mixture of experts")

    def moe_loss_fn(params, batch, weight):
        speed, distance = batch
        inputs = jnp.stack([speed, jnp.ones_like(speed)], axis=1)
        probs = jax.nn.softmax(8.0 * inputs @ params["router"])
        index = probs.argmax(axis=1)[:, None]
        fits = inputs @ params["experts"].T
        fit = jnp.take_along_axis(fits * probs, index, axis=1)[:, 0]
        loss = jnp.mean((fit - distance) ** 2)
        share = jax.nn.one_hot(index[:, 0], 2).mean(axis=0)
        return loss + weight * 2 * jnp.sum(share * probs.mean(axis=0)), (loss, probs, index)

    batch = (jnp.array(SPEED) / 25.0, jnp.array(DISTANCE) / 100.0)
    params = {"router": jnp.array([[0.1, -0.1], [0.0, 0.0]]), "experts": jnp.zeros([2, 2])}
    scope = {"moe_loss_fn": moe_loss_fn, "params": params}
    exec(compile(code, "README.md", "exec"), scope)
    params, state, weight = scope["params"], scope["state"], jnp.float32(0.0)
    before = moe_loss_fn(params, batch, weight)[1][0]
    for _ in range(600):
        params, state = scope["step"](params, state, batch)
    after = moe_loss_fn(params, batch, weight)[1][0]
    assert float(after) < 0.2 * float(before)
    read = mo.read_hyperparams(state)
    assert {"gate_learning_rate", "expert_learning_rate", "aux_loss_weight"} <= set(read)
    assert mo.read_decisions(state)
    assert scope["step"]._cache_size() == 1


@pytest.mark.parametrize("section", ["Quick start", "Tests"])
def test_each_section_is_one_command(section):
    (block,) = _blocks("bash", section)
    assert len(block.strip().splitlines()) == 1


def test_table_names_every_strategy_and_combinator():
    plateaus = ("plateau", "advanced_plateau", "trend_plateau", "greedy")
    policies = ("reinforce", "policy_gradient", "learned")
    gates = ("expert_gate", "smart_expert_gate")
    for name in (*plateaus, *policies, *gates, "adapt_aux_loss", "guard_collapse"):
        assert f"| [`{name}`](docs/strategies/{name}.md) |" in README
    for name in ("chain", "every", "bounded", "log_only", "hold_spikes", "with_decisions"):
        assert f"| `{name}(" in README


@pytest.mark.parametrize("page", sorted((ROOT / "docs/strategies").glob("*.md")))
def test_each_strategys_page_shows_its_plot_and_links_lead_somewhere(page):
    text = page.read_text()
    assert f"]({page.stem}.png)" in text
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for name in set(re.findall(r"\bmo\.(\w+)", text)):
        assert hasattr(mo, name), name


def test_every_name_in_the_readme_exists():
    for name in set(re.findall(r"\bmo\.(\w+)", README)):
        assert hasattr(mo, name), name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_public_names_are_sorted_and_documented():
    assert list(mo.__all__) == sorted(mo.__all__)
    for name in mo.__all__:
        assert (getattr(mo, name).__doc__ or "").strip(), name


def test_changelog_names_what_is_public():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    for name in mo.__all__:
        if name.islower() and not name.startswith("scale_by_"):
            assert f"`{name}`" in changelog, name
