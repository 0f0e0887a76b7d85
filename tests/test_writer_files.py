"""The files of a `MetricsWriter` and what can be wrong with them."""

import pathlib
import resource
import sys

import pytest
from log_files import lines_of, make_writer, scalars_of

import meta_optax as mo

pytest.importorskip("tensorboardX")


class TestFiles:
    def test_nothing_to_write(self, tmp_path):
        with pytest.raises(ValueError, match="nothing to write"):
            make_writer(tmp_path, json_lines=False)

    @pytest.mark.parametrize(
        ("name", "value"), [("max_layers", 0), ("max_layers", 1.5), ("resume_step", -1)]
    )
    def test_arguments_out_of_range(self, name, value, tmp_path):
        with pytest.raises(ValueError, match=name):
            make_writer(tmp_path / "new", **{name: value})
        assert not (tmp_path / "new").exists()

    def test_event_files_alone_are_not_mixed_either(self, tmp_path):
        only_events = {"json_lines": False, "tensorboard": True}
        make_writer(tmp_path, **only_events).close()
        with pytest.raises(FileExistsError, match=r"events\.out.*resume_step"):
            make_writer(tmp_path, **only_events)
        make_writer(tmp_path, **only_events, resume_step=1).close()

    def test_a_link_stays_one_and_an_error_leaves_no_copy(self, tmp_path):
        (tmp_path / "run").mkdir()
        target, link = tmp_path / "elsewhere.jsonl", tmp_path / "run" / "metrics.jsonl"
        target.write_text('{"step": 0}\n{"step": 1}\n')
        link.symlink_to(target)
        make_writer(tmp_path / "run", resume_step=1).close()
        assert link.is_symlink()
        assert target.read_text() == '{"step": 0}\n'
        target.write_text('no row\n{"step": 1}\n')
        with pytest.raises(ValueError, match="line 1"):
            make_writer(tmp_path / "run", resume_step=1)
        assert sorted(path.name for path in tmp_path.rglob("*.tmp")) == []

    def test_cloud_paths_are_refused(self):
        with pytest.raises(ValueError, match="gs://bucket/run"):
            make_writer("gs://bucket/run")

    def test_without_tensorboardx(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
        with pytest.raises(ImportError, match=r'pip install "meta-optax\[logging\]"'):
            mo.MetricsWriter(tmp_path / "new")
        assert not (tmp_path / "new").exists()
        with make_writer(tmp_path / "new") as writer:
            writer.write(0, {"a": 1.0})
        assert len(lines_of(tmp_path / "new")) == 1

    def test_closed(self, tmp_path):
        writer = make_writer(tmp_path, tensorboard=True)
        writer.close()
        writer.close()
        with pytest.raises(ValueError, match="closed"):
            writer.write(0, {})

    @pytest.mark.parametrize("tensorboard", [False, True])
    def test_a_file_in_the_folders_place(self, tensorboard, tmp_path):
        (tmp_path / "run").write_text("mine")
        with pytest.raises(FileExistsError, match="run"):
            make_writer(tmp_path / "run", tensorboard=tensorboard, json_lines=not tensorboard)
        assert (tmp_path / "run").read_text() == "mine"

    @pytest.mark.parametrize("tensorboard", [False, True])
    def test_a_folder_that_cannot_be_written(self, tensorboard):
        # Even root makes no file there.
        if not pathlib.Path("/proc/self").exists():
            pytest.skip("needs Linux")
        with pytest.raises(OSError, match="/proc/self"):
            make_writer("/proc/self/run", tensorboard=tensorboard, json_lines=not tensorboard)

    @pytest.mark.parametrize("tensorboard", [False, True])
    def test_full_disk(self, tensorboard, tmp_path):
        """A line that does not fit leaves nothing, and can be written once there is room."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with make_writer(tmp_path, tensorboard=tensorboard, json_lines=not tensorboard) as writer:
            writer.write(0, {"a": 1.0})
            (path,) = tmp_path.iterdir()
            before = path.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (before + 10, limits[1]))
            try:
                with pytest.raises(OSError, match=path.name):
                    writer.write(1, {"a": 2.0})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            if not tensorboard:
                assert path.stat().st_size == before
            writer.write(1, {"a": 2.0})
        if tensorboard:
            assert scalars_of(tmp_path) == {(0, "a"): 1.0, (1, "a"): 2.0}
        else:
            assert [line["step"] for line in lines_of(tmp_path)] == [0, 1]
