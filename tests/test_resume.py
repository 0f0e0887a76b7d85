"""Checkpoints of the examples: what is damaged is never read, and what is whole comes back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from as_run import read_log, run_example
from command_line import UserError

checkpoints = pytest.importorskip("checkpoints", exc_type=ImportError)

EXAMPLE = "expert_graph.py"
OPTIONS = ["--steps", 60, "--plain", "--save-every", 20]


def _state(step):
    """Arrays of several dtypes and sizes, another at each step."""
    random = np.random.default_rng(step)
    return {
        "weights": jnp.asarray(random.normal(size=(64, 32)), jnp.float32),
        "half": jnp.asarray(random.normal(size=300), jnp.bfloat16),
        "count": jnp.int32(step),
        "key": jax.random.key(step),
    }


def _template(position):
    del position
    on_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_one), _state(0)
    )


def _bits(tree):
    leaves = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(tree)
    ]
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


@pytest.fixture
def said():
    return []


@pytest.fixture
def saved(tmp_path, said):
    """Checkpoints of the steps 1, 2 and 3."""
    with checkpoints.Checkpoints(tmp_path / "saved", 1, said.append) as own:
        for step in (1, 2, 3):
            own.save(step, _state(step), {"data": {"drawn": 7 * step}})
    return own


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path):
    path.write_bytes(b"")


def _flip(path):
    data = bytearray(path.read_bytes())
    place = np.random.default_rng(len(data)).integers(len(data))
    data[place] ^= 1 << (len(data) % 8)
    path.write_bytes(bytes(data))


DAMAGE = {"truncated": _truncate, "emptied": _empty, "flipped": _flip, "gone": lambda p: p.unlink()}


class TestSeal:
    @pytest.mark.parametrize("kind", DAMAGE)
    def test_damage_to_any_file_is_found_and_named(self, saved, tmp_path, kind):
        files = [p for p in (saved.folder / "2").rglob("*") if p.is_file()]
        assert len(files) > 5
        for number, file in enumerate(files):
            if file.stat().st_size == 0 and kind != "gone":
                continue
            copy = tmp_path / str(number) / "2"
            shutil.copytree(saved.folder / "2", copy)
            damaged = copy / file.relative_to(saved.folder / "2")
            checkpoints.read_seal(copy, 2)
            DAMAGE[kind](damaged)
            with pytest.raises(checkpoints.Damaged, match="step 2") as error:
                checkpoints.read_seal(copy, 2)
            assert str(damaged) in str(error.value)

    def test_emptied_folder(self, saved):
        shutil.rmtree(saved.folder / "3")
        (saved.folder / "3").mkdir()
        with pytest.raises(checkpoints.Damaged, match=r"step 3: .*seal\.json is missing"):
            checkpoints.read_seal(saved.folder / "3", 3)

    def test_seal_of_another_step(self, saved):
        shutil.copy(saved.folder / "1" / "seal.json", saved.folder / "2" / "seal.json")
        with pytest.raises(checkpoints.Damaged, match="step 2"):
            checkpoints.read_seal(saved.folder / "2", 2)

    @pytest.mark.parametrize("text", ["[]", "{}", "null", '{"sha256": 1}', "\x00"])
    def test_seal_that_is_something_else(self, saved, text):
        (saved.folder / "2" / "seal.json").write_text(text)
        with pytest.raises(checkpoints.Damaged, match=r"step 2: .*seal\.json"):
            checkpoints.read_seal(saved.folder / "2", 2)


class TestRestore:
    def test_the_newest_comes_back_bit_for_bit(self, saved, said):
        found = saved.restore(_template)
        assert found.step == 3
        assert found.position == {"data": {"drawn": 21}}
        assert _bits(found.state) == _bits(_state(3))
        assert said == []

    def test_one_that_is_asked_for(self, saved):
        assert _bits(saved.restore(_template, 1).state) == _bits(_state(1))

    @pytest.mark.parametrize("kind", DAMAGE)
    def test_falls_back_past_what_is_damaged_and_keeps_it(self, saved, said, kind):
        victim = next((saved.folder / "3" / "state" / "d").iterdir())
        DAMAGE[kind](victim)
        (saved.folder / "2" / "seal.json").unlink()
        found = saved.restore(_template)
        assert found.step == 1
        assert _bits(found.state) == _bits(_state(1))
        assert len(said) == 2
        assert "step 3" in said[0]
        assert str(victim) in said[0]
        assert "3.damaged" in said[0]
        assert "step 2" in said[1]
        assert saved.steps() == [1]
        assert (saved.folder / "3.damaged" / "seal.json").exists()

    def test_damaged_one_that_was_asked_for_is_an_error(self, saved, said):
        (saved.folder / "2" / "_CHECKPOINT_METADATA").write_bytes(b"")
        with pytest.raises(UserError, match=r"step 2: .*_CHECKPOINT_METADATA has 0 bytes"):
            saved.restore(_template, 2)
        assert said == []
        assert saved.steps() == [1, 2, 3]

    def test_a_run_killed_before_its_first_seal_starts_anew(self, saved, said):
        """Nothing was said to be there; an explicit step is an error all the same."""
        for step in (1, 2, 3):
            (saved.folder / str(step) / "seal.json").unlink()
        with pytest.raises(UserError, match=r"step 3: .*was never finished"):
            saved.restore(_template, 3)
        assert saved.restore(_template) is None
        assert saved.steps() == []
        assert len(said) == 3
        assert (saved.folder / "3.damaged").is_dir()

    def test_going_back_leaves_what_was_later(self, saved, said):
        assert saved.restore(_template, 2).step == 2
        saved.leave_later(2)
        assert saved.steps() == [1, 2]
        assert (saved.folder / "3.left" / "seal.json").exists()
        assert len(said) == 1
        assert "3.left" in said[0]

    def test_all_damaged_is_an_error_that_names_each(self, saved):
        for step in (1, 2, 3):
            _empty(saved.folder / str(step) / "seal.json")
        with pytest.raises(UserError, match=r"step 3: .*step 2: .*step 1: "):
            saved.restore(_template)
        assert saved.steps() == [1, 2, 3]

    def test_step_that_is_not_there(self, saved):
        with pytest.raises(UserError, match=r"step 7.*those of 1, 2, 3"):
            saved.restore(_template, 7)

    def test_none_in_an_empty_folder(self, tmp_path, said):
        own = checkpoints.Checkpoints(tmp_path, 1, said.append)
        (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
        (tmp_path / "notes.txt").touch()
        assert own.restore(_template) is None

    def test_state_of_another_program(self, saved):
        with pytest.raises(UserError, match=r"step 3 .*does not fit this program"):
            saved.restore(lambda position: {"other": _template(position)["half"]})
        assert saved.steps() == [1, 2, 3]


class TestSave:
    def test_what_is_saved_is_not_what_its_buffers_become(self, tmp_path, said):
        """The next steps overwrite the donated buffers while the checkpoint is being written."""
        step = jax.jit(lambda x: x + 1.0, donate_argnums=0)
        big = jnp.zeros([4_000_000], jnp.float32)
        with checkpoints.Checkpoints(tmp_path, 1, said.append) as own:
            for number in range(1, 4):
                big = step(big)
                own.save(number, {"big": big}, {})
                for _ in range(20):
                    big = step(big)
            big.block_until_ready()
        on_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = {"big": jax.ShapeDtypeStruct(big.shape, big.dtype, sharding=on_one)}
        for number in range(1, 4):
            kept = own.restore(lambda _: template, number).state["big"]
            np.testing.assert_array_equal(kept, 21.0 * (number - 1) + 1.0)

    def test_few_are_kept_and_the_same_step_is_written_once(self, tmp_path, said):
        with checkpoints.Checkpoints(tmp_path, 1, said.append) as own:
            for step in (1, 2, 3, 4, 5, 5):
                own.save(step, _state(step), {})
        assert own.steps() == [3, 4, 5]

    def test_an_older_line_of_steps_is_written_over(self, saved, said):
        """After going on from step 1 on request, steps 2 and 3 come again."""
        with checkpoints.Checkpoints(saved.folder, 1, said.append) as own:
            own.restore(_template, 1)
            own.save(2, _state(20), {})
        assert _bits(own.restore(_template, 2).state) == _bits(_state(20))

    def test_folder_that_goes_away_is_an_error(self, tmp_path, said):
        folder = tmp_path / "saved"
        with checkpoints.Checkpoints(folder, 1, said.append) as own:
            own.save(1, _state(1), {})
            own.wait()
            shutil.rmtree(folder)
            folder.touch()
            with pytest.raises(UserError, match="saved: cannot write there"):
                own.save(2, _state(2), {})

    def test_error_in_the_background_comes_up_at_the_end(self, tmp_path, said):
        own = checkpoints.Checkpoints(tmp_path, 1, said.append)
        own.save(1, _state(1), {"not": object})
        with pytest.raises(UserError, match=r"step 1 .*not JSON serializable"):
            own.__exit__(None, None, None)

    def test_error_of_the_run_goes_before_one_of_the_checkpoint(self, tmp_path, said):
        own = checkpoints.Checkpoints(tmp_path, 1, said.append)
        own.save(1, _state(1), {"not": object})
        own.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
        assert own.steps() == [1]
        with pytest.raises(UserError, match=r"seal\.json is missing"):
            own.restore(_template, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 60 steps with three checkpoints; tests work on copies."""
    folder = tmp_path_factory.mktemp("run")
    done = run_example(
        EXAMPLE, *OPTIONS, "--out", folder / "out", "--checkpoint-dir", folder / "saved"
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def options(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run"
    return [*OPTIONS, "--out", folder / "out", "--checkpoint-dir", folder / "saved"]


def test_example_says_what_was_damaged_and_which_step_it_took(options, run):
    saved = options[-1]
    victim = next((saved / "60" / "state" / "d").iterdir())
    _flip(victim)
    again = run_example(EXAMPLE, *options, "--resume")
    assert again.returncode == 0, again.stderr
    assert f"step 60: {victim} is not what was written; set aside as 60.damaged" in again.stdout
    assert f"resumed after step 40 from {saved / '40'}" in again.stdout
    assert (saved.parent / "out" / "log.jsonl").read_bytes() == (
        run / "out" / "log.jsonl"
    ).read_bytes()
    checkpoints.read_seal(saved / "60", 60)


def test_a_longer_run_has_the_log_of_one_that_was_longer_from_the_start(options, tmp_path):
    """The last step of the shorter one is in its own log alone."""
    longer = ["--steps", 80, *options[2:]]
    assert read_log(tmp_path / "run" / "out")[-1]["step"] == 59
    again = run_example(EXAMPLE, *longer, "--resume")
    assert again.returncode == 0, again.stderr
    whole = tmp_path / "whole"
    run_example(EXAMPLE, "--steps", 80, "--plain", "--out", whole)
    assert (tmp_path / "run" / "out" / "log.jsonl").read_bytes() == (
        whole / "log.jsonl"
    ).read_bytes()
    summary = json.loads((tmp_path / "run" / "out" / "summary.json").read_text())
    assert (summary["steps"], summary["resumed_after"]) == (80, 60)


def test_what_was_gone_back_behind_does_not_come_back(options, run):
    """From step 20 on there is another run, however far the first one was."""
    back = run_example(EXAMPLE, *["--steps", 30, *options[2:]], "--resume", 20)
    assert back.returncode == 0, back.stderr
    assert "40.left" in back.stdout
    again = run_example(EXAMPLE, *options, "--resume")
    assert again.returncode == 0, again.stderr
    assert "resumed after step 30 " in again.stdout
    log = options[-1].parent / "out" / "log.jsonl"
    assert log.read_bytes() == (run / "out" / "log.jsonl").read_bytes()


def test_a_broken_log_is_named(options):
    log = options[-1].parent / "out" / "log.jsonl"
    data = bytearray(log.read_bytes())
    data[100:103] = bytes(3)
    log.write_bytes(bytes(data))
    again = run_example(EXAMPLE, *options, "--resume", 40)
    assert again.returncode == 2
    assert "log.jsonl has no record in line 1" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


def test_log_that_was_lost_is_said_to_be(options, tmp_path):
    moved = [*options[:-3], tmp_path / "elsewhere", *options[-2:]]
    again = run_example(EXAMPLE, *moved, "--resume", 40)
    assert again.returncode == 0, again.stderr
    assert "log.jsonl is not the whole log of that run" in again.stdout
    assert [record["step"] for record in read_log(tmp_path / "elsewhere")] == [40, 50, 59]


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ([], "go on with --resume, or name another folder"),
        (["--resume", 30], "no checkpoint of step 30"),
        (["--resume", "--seed", 3], "seed"),
        (["--resume", "--messages"], "switches"),
        (["--resume", 0], "--resume"),
        (["--resume", "--save-every", 0], "--save-every"),
    ],
)
def test_bad_input_ends_with_one_clear_line_and_harms_nothing(options, own, named):
    log = options[-1].parent / "out" / "log.jsonl"
    before = sorted(options[-1].rglob("*")), log.read_bytes()
    again = run_example(EXAMPLE, *options, *own)
    assert again.returncode == 2
    assert len(again.stderr.strip().splitlines()) == 1
    assert named in again.stderr
    assert "Traceback" not in again.stderr + again.stdout
    assert sorted(options[-1].rglob("*")) == before[0]
    assert log.read_bytes() == before[1]


@pytest.mark.parametrize("own", [["--resume"], ["--save-every", 5]])
def test_options_that_need_a_folder(tmp_path, own):
    again = run_example(EXAMPLE, "--out", tmp_path, *own)
    assert again.returncode == 2
    assert "needs --checkpoint-dir" in again.stderr


def test_folder_that_cannot_be_written(tmp_path):
    again = run_example(EXAMPLE, "--out", tmp_path, "--checkpoint-dir", "/proc/no/such")
    assert again.returncode == 2
    assert "--checkpoint-dir /proc/no/such: cannot write there" in again.stderr


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_devices(tmp_path):
    """Eight devices, then one, then four: the losses are those of one device throughout."""
    pytest.importorskip("grain")
    options = ["--plain", "--out", tmp_path / "out", "--save-every", 10]
    options += ["--checkpoint-dir", tmp_path / "saved", "--resume"]
    for steps, mesh in ((10, ["--mesh", "data=2,expert=4"]), (20, []), (30, ["--mesh", "fsdp=2"])):
        done = run_example("train_moe.py", "--steps", steps, *options, *mesh)
        assert done.returncode == 0, done.stderr
        assert (f"resumed after step {steps - 10} " in done.stdout) == (steps > 10)
    run_example("train_moe.py", "--steps", 30, "--plain", "--out", tmp_path / "one")
    log, expected = read_log(tmp_path / "out"), read_log(tmp_path / "one")
    assert [record["step"] for record in log] == [record["step"] for record in expected]
    for record, other in zip(log, expected, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert record["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-6)
