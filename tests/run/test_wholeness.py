"""Damage in a run's files is noticed where they are read, named, and never blamed on the config."""

import json
import shutil
import threading

import jax
import numpy as np
import pytest
import runs
from test_checkpoint import like, save, state_at

from research import digests, loading
from research.errors import InputError
from research.pretrained import wholeness
from research.run import checkpoint
from research.run.run import run


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def restore(workdir, step=None):
    saver = checkpoint.Checkpointer(workdir)
    try:
        return saver.restore(like(state_at(0)), step=step)[0]
    finally:
        saver.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The workdir of three checkpoints."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, [None, None, None], keep_last=3)
    return workdir


def test_damage_in_any_file_of_a_checkpoint_is_named(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "w")
    newest = workdir / "checkpoints/3"
    names = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    assert {"digests.json", "state/_METADATA", "run/metadata", "state/manifest.ocdbt"} <= set(names)
    for name in names:
        before = (newest / name).read_bytes()
        changes = [flip]
        if name in ("state/_METADATA", "run/metadata"):
            changes += [lambda path: path.write_bytes(b""), lambda path: path.unlink()]
        for change in changes:
            change(newest / name)
            for read in (lambda: restore(workdir, 3), lambda: parameters(workdir)):
                with pytest.raises(wholeness.Damaged, match=rf"checkpoints/3: this checkpoint is damaged: {name}"):
                    read()
            (newest / name).write_bytes(before)
    jax.tree.map(np.testing.assert_array_equal, restore(workdir), state_at(3))


def parameters(workdir, step=None):
    return checkpoint.restore_params(workdir, like(state_at(0).params), step=step)


def test_what_goes_on_is_named_and_chosen(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "w")
    flip(next((workdir / "checkpoints/3/state/ocdbt.process_0/d").iterdir()))
    with pytest.raises(wholeness.Damaged, match=r"Put it back from a copy, or .* the same command with --step=2\."):
        restore(workdir)
    assert checkpoint.choose(workdir, None) == 3
    assert checkpoint.choose(workdir, "whole") == 2
    flip(workdir / "checkpoints/2/state/_METADATA")
    assert checkpoint.choose(workdir, "whole") == 1
    with pytest.raises(wholeness.Damaged, match=r"--step=1\."):
        restore(workdir)
    flip(workdir / "checkpoints/1/run/metadata")
    with pytest.raises(wholeness.Damaged, match="There is none before it that is whole"):
        restore(workdir)
    with pytest.raises(InputError, match=r"none of the checkpoints in .* is whole"):
        checkpoint.choose(workdir, "whole")
    with pytest.raises(InputError, match=r"has no checkpoint of that step; there are 1, 2, 3"):
        checkpoint.choose(workdir, 7)
    with pytest.raises(InputError, match="has no checkpoints"):
        checkpoint.choose(tmp_path / "none", 7)


@pytest.mark.parametrize("name", ["state/_METADATA", "run/metadata", "_CHECKPOINT_METADATA"])
def test_an_older_checkpoint_has_no_digests_and_is_still_called_damaged(name, saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "w")
    (workdir / "checkpoints/3/digests.json").unlink()
    jax.tree.map(np.testing.assert_array_equal, restore(workdir, 3), state_at(3))
    (workdir / "checkpoints/3" / name).write_bytes(b"")
    with pytest.raises(wholeness.Damaged, match=rf"damaged: {name} .*--step=2"):
        restore(workdir, 3)


@pytest.mark.parametrize("missing", ["an array", "a file"])
def test_a_save_that_is_not_whole_leaves_the_one_before_it(missing, tmp_path, monkeypatch):
    save(tmp_path, [None], keep_last=1)
    if missing == "an array":
        monkeypatch.setattr(checkpoint, "path_name", lambda path: "other")
    else:
        seal = wholeness.seal

        def lose(folder, names):
            (folder / "run/metadata").unlink()
            seal(folder, names)

        monkeypatch.setattr(wholeness, "seal", lose)
    with pytest.raises((ValueError, checkpoint.SaveFailed), match=r"was not written|metadata"):
        save(tmp_path, [None], first=2, keep_last=1)
    assert checkpoint.steps(tmp_path) == [1]
    monkeypatch.undo()
    save(tmp_path, [None], first=2, keep_last=1)
    assert checkpoint.steps(tmp_path) == [2]


def test_a_reader_beside_a_run_takes_the_newest_that_is_there(tmp_path):
    save(tmp_path, [None], keep_last=1)
    thread = threading.Thread(target=save, args=(tmp_path, [None] * 15), kwargs={"first": 2, "keep_last": 1})
    thread.start()
    found = []
    while thread.is_alive() or not found:
        values, step = parameters(tmp_path)
        np.testing.assert_array_equal(values["policy"]["w"], np.full((8, 4), step))
        found.append(step)
    thread.join()
    assert parameters(tmp_path)[1] == 16
    assert found == sorted(found)
    assert len(set(found)) > 1


def test_a_name_that_is_a_pattern_is_refused(tmp_path):
    for name in ("br[1]", "a*", "b?/c"):
        with pytest.raises(InputError, match=r"which checkpoints can't have\. Name another"):
            run(runs.small(), str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    run(runs.small(), str(workdir), devices=jax.devices()[:1])
    return workdir


def go_on(workdir, **options):
    return run(runs.small(), str(workdir), devices=jax.devices()[:1], **options)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(finished, tmp_path, capfd):
    workdir = shutil.copytree(finished, tmp_path / "w")
    (workdir / "checkpoints/4").rename(workdir / "checkpoints/3")  # a run that was killed after it
    (workdir / "done.json").unlink()
    flip(max((workdir / "checkpoints/3").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()))
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(wholeness.Damaged, match=r"checkpoints/3: this checkpoint is damaged: state/.*--step=2"):
        go_on(workdir)
    assert (workdir / "config.json").read_bytes() == before
    go_on(workdir, step=wholeness.WHOLE)
    runs.assert_same(finished, workdir)
    assert checkpoint.steps(workdir) == [2, 4]
    assert (workdir / "checkpoints_aside/3").is_dir()
    assert "moved    the checkpoint of step 3 to" in capfd.readouterr().err


def test_a_lost_config_is_taken_from_the_checkpoint_and_a_damaged_one_named(finished, tmp_path, capfd):
    workdir = shutil.copytree(finished, tmp_path / "w")
    record = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").unlink()
    assert wholeness.read_record(workdir) == record
    assert "is gone; taken from the checkpoint of step 4" in capfd.readouterr().err
    assert loading.find(str(workdir)).config.d_model == record["config"]["model"]["d_model"]
    text = json.dumps(record)
    changed = json.dumps({**record, "config": {**record["config"], "seq_len": 33}})
    for content in ("", text[:100], "[]", "{}", changed):
        (workdir / "config.json").write_text(content)
        for read in (lambda: loading.find(str(workdir)), lambda: go_on(workdir)):
            with pytest.raises(InputError, match=r"config\.json.* move it away: the checkpoint of step 4 has what it"):
                read()
    edited = json.loads(changed)
    del edited[digests.SEAL]  # by who means it
    (workdir / "config.json").write_text(json.dumps(edited))
    assert wholeness.read_record(workdir)["config"]["seq_len"] == 33


def test_a_tokenizer_that_changed_is_named(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "w")
    shutil.rmtree(workdir / "checkpoints/4")
    (workdir / "done.json").unlink()
    for name in json.loads((workdir / "config.json").read_text())["files"]:
        before = (workdir / name).read_bytes()
        (workdir / name).unlink()
        for read in (lambda: loading.find(str(workdir)), lambda: go_on(workdir)):
            with pytest.raises(InputError, match=rf"{name} can't be read .* Put the file back from a copy"):
                read()
        (workdir / name).write_bytes(before)
        flip(workdir / name)
        with pytest.raises(InputError, match=rf"{name} has other bytes than were written"):
            loading.find(str(workdir))
        (workdir / name).write_bytes(before)
    assert not (workdir / "done.json").exists()
