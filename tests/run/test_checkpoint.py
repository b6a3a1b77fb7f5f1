"""What is kept, what comes back, and what a reader is told about a folder that holds nothing or something else."""

import dataclasses
import errno
import json
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from research import train
from research.errors import InputError
from research.pretrained import wholeness
from research.pretrained.checkpoints import metadata
from research.rollouts.experience import Place
from research.run import checkpoint

# A state as it was saved before objectives had carries.
Older = jax.tree_util.register_dataclass(
    dataclasses.make_dataclass("Older", [f.name for f in dataclasses.fields(train.TrainState) if f.name != "carry"])
)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def state_at(step):
    values = {"policy": {"w": jnp.full((8, 4), float(step))}}
    state = train.init_state(values, OPTIMIZER, jax.random.PRNGKey(step), ema=True)
    return state.replace(step=jnp.asarray(step, jnp.int32))


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(workdir, scores, first=1, **options):
    saver = checkpoint.Checkpointer(workdir, **options)
    for step, score in enumerate(scores, start=first):
        saver.save(state_at(step), Place({"row": 8 * step}), {"seed": 0}, {} if score is None else {"eval/loss": score})
    saver.wait()
    saver.close()


@pytest.mark.parametrize(("mode", "kept"), [("min", [2, 5, 6]), ("max", [1, 5, 6])])
def test_the_last_and_the_best_are_kept(mode, kept, tmp_path):
    save(tmp_path, [3.0, 1.0, 2.0, None, 2.5, None], keep_last=2, best_metric="eval/loss", best_mode=mode)
    assert checkpoint.steps(tmp_path) == kept


def test_a_score_that_is_no_number_is_no_best(tmp_path):
    save(tmp_path, [float("nan"), 2.0, None], keep_last=1, best_metric="eval/loss")
    assert checkpoint.steps(tmp_path) == [2, 3]


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 1)])
def test_the_best_is_known_and_kept_when_the_run_goes_on(mode, best, tmp_path):
    options = {"keep_last": 1, "best_metric": "eval/loss", "best_mode": mode}
    save(tmp_path, [3.0, 1.0, 2.0], **options)
    save(tmp_path, [2.5, 2.2], first=4, **options)
    assert checkpoint.steps(tmp_path) == [best, 5]
    (tmp_path / "config.json").write_text(json.dumps({"config": {"checkpoint": options}}))
    assert checkpoint.best_step(tmp_path) == best
    save(tmp_path / "without", [None])
    (tmp_path / "without/config.json").write_text(json.dumps({"config": {"checkpoint": options}}))
    with pytest.raises(InputError, match="has no best checkpoint"):
        checkpoint.best_step(tmp_path / "without")


def test_state_and_source_come_back(tmp_path):
    save(tmp_path, [None, None])
    saver = checkpoint.Checkpointer(tmp_path)
    state, place = saver.restore(like(state_at(0)))
    saver.close()
    assert place.source == {"row": 16}
    jax.tree.map(np.testing.assert_array_equal, state, state_at(2))


def test_what_a_checkpoint_holds_is_asked_where_it_is_not_what_is_wanted(tmp_path, monkeypatch):
    """That takes Orbax a sixth of a restore, and is for errors."""
    save(tmp_path, [None])
    saver, asked = checkpoint.Checkpointer(tmp_path), []
    monkeypatch.setattr(checkpoint.checkpoints, "metadata", lambda folder: asked.append(folder) or metadata(folder))
    saver.restore(like(state_at(1)))
    assert asked == []
    wanted = like(state_at(1))
    wide = wanted.replace(params={"policy": {"w": jax.ShapeDtypeStruct((8, 5), jnp.float32)}})
    for other in (wide, wanted.replace(ema=None)):
        with pytest.raises(InputError, match=r"has shape \(8, 4\) in the checkpoint|another optimizer.*it has ema"):
            saver.restore(other)
    assert len(asked) == 2
    saver.close()


@pytest.mark.parametrize(
    ("there", "wanted", "message"),
    [
        (("a",), ("a", "old_log_prob"), "its answers don't have the field 'old_log_prob', and .* they would have it"),
        (("a", "value"), ("a",), "its answers have the field 'value', and .* they would not have it"),
    ],
)
def test_answers_that_lack_what_the_run_reads_are_named(there, wanted, message, tmp_path):
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(state_at(1), Place({"row": 0}, {name: jnp.zeros(2) for name in there}), {}, {})
    saver.wait()
    with pytest.raises(InputError, match=message):
        saver.restore(like(state_at(0)), like({name: jnp.zeros(2) for name in wanted}))
    saver.close()


def hold_writes(monkeypatch, until):
    """Every write ends only when `until()` has returned."""

    class Held:
        def __init__(self, future):
            self.future = future

        def result(self, timeout=None):
            until()
            return self.future.result(timeout)

    async_save = ocp.PyTreeCheckpointHandler.async_save

    async def held(self, *args, **kwargs):
        return [Held(future) for future in await async_save(self, *args, **kwargs)]

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", held)


def test_a_save_waits_for_no_write_and_holds_what_was_then(tmp_path, monkeypatch):
    go = threading.Event()
    hold_writes(monkeypatch, lambda: go.wait(20))
    next_step = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones_like(x), s), donate_argnums=0)
    state = jax.jit(lambda: state_at(1))()
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(state, Place({}), {}, {})
    for _ in range(3):  # the loop goes on, over the memory of what is being written
        state = next_step(state)
    assert int(state.step) == 4
    assert checkpoint.steps(tmp_path) == []
    go.set()
    saver.wait()
    jax.tree.map(np.testing.assert_array_equal, saver.restore(like(state_at(1)))[0], state_at(1))
    saver.close()


def test_a_clock_that_is_set_ahead_in_a_save_changes_nothing(tmp_path, monkeypatch):
    """Orbax takes times by the clock, and ended a save by its limit when a machine's clock was set right meanwhile."""
    held, go, real, ahead = threading.Event(), threading.Event(), time.time, [0.0]
    hold_writes(monkeypatch, lambda: held.set() or go.wait(20))
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(state_at(1), Place({"row": 8}), {}, {})
    assert held.wait(20)
    ahead[0] = 56 * 365 * 86400.0  # from 1970, where a board without a battery begins
    go.set()
    saver.wait()
    jax.tree.map(np.testing.assert_array_equal, saver.restore(like(state_at(1)))[0], state_at(1))
    ahead[0] = -3600.0
    saver.save(state_at(2), Place({"row": 16}), {}, {})
    saver.wait()
    assert checkpoint.steps(tmp_path) == [1, 2]
    saver.close()


def test_a_write_that_fails_is_told_at_the_end(tmp_path, monkeypatch):
    def fail():
        raise OSError("no space left")

    hold_writes(monkeypatch, fail)
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(state_at(1), Place({}), {}, {})
    with pytest.raises(OSError, match="no space left"):
        saver.wait()
    assert checkpoint.steps(tmp_path) == []


def test_a_full_disk_is_said_and_a_later_save_is_tried(tmp_path, monkeypatch):
    full, said = [], []
    seal = wholeness.seal

    def fill(folder, names):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / "x"))
        seal(folder, names)

    monkeypatch.setattr(wholeness, "seal", fill)
    saver = checkpoint.Checkpointer(tmp_path, keep_last=1, say=said.append)
    for step in range(1, 6):
        full[:] = [1] if step in (2, 3, 5) else []
        saver.save(state_at(step), Place({"row": step}), {}, {})
        saver._settle()
        assert checkpoint.steps(tmp_path) == [{2: 1, 3: 1, 5: 4}.get(step, step)]
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(checkpoint.steps(tmp_path)[-1])]
    assert [re.sub(r"/\S*/", "", line) for line in said] == [
        f"{step}: couldn't be saved (x: No space left on device); the checkpoint of step {whole} is whole"
        for step, whole in ((2, 1), (3, 1), (5, 4))
    ]
    with pytest.raises(checkpoint.SaveFailed, match=r"of step 4 is whole. The same command goes on from there\."):
        saver.wait()
    jax.tree.map(np.testing.assert_array_equal, saver.restore(like(state_at(0)))[0], state_at(4))
    saver.close()


def test_what_fails_in_the_background_is_told_by_the_first_use(tmp_path):
    (tmp_path / "file").touch()
    saver = checkpoint.Checkpointer(tmp_path / "file")
    saver.prepare()
    saver.save(state_at(1), Place({}), {}, {})
    with pytest.raises(checkpoint.SaveFailed, match=r"file.*Not a directory.*there is no checkpoint yet"):
        saver.wait()
    saver.close()


def test_a_carry_comes_back_and_one_that_is_not_there_is_an_error(tmp_path):
    plain, carrying = state_at(1), state_at(1).replace(carry={"term": {"threshold": jnp.asarray([0.25, 0.75])}})
    older = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain) if f.name != "carry"}
    for name, saved in (("plain", plain), ("carrying", carrying), ("older", Older(**older))):
        saver = checkpoint.Checkpointer(tmp_path / name)
        saver.save(saved, Place({}), {}, {})
        saver.wait()
        for wanted in (plain, carrying):
            if bool(wanted.carry) != (name == "carrying"):
                with pytest.raises(InputError, match="another optimizer, objective, ema_decay or trainable"):
                    saver.restore(like(wanted))
            else:
                jax.tree.map(np.testing.assert_array_equal, saver.restore(like(wanted))[0], wanted)
        saver.close()


def test_parameters_alone_of_any_step_or_the_average(tmp_path):
    save(tmp_path, [None, None])
    wanted = like(state_at(0).params)
    for step, ema in ((None, False), (1, False), (1, True)):
        values, found = checkpoint.restore_params(tmp_path, wanted, step=step, ema=ema)
        assert found == (step or 2)
        np.testing.assert_array_equal(values["policy"]["w"], np.full((8, 4), found))


def test_a_reader_is_told_what_is_there(tmp_path):
    wanted = like(state_at(0).params)
    with pytest.raises(InputError, match="has no checkpoints/STEP"):
        checkpoint.restore_params(tmp_path, wanted)
    save(tmp_path, [None, None])
    with pytest.raises(InputError, match="no checkpoint of step 7; there are 1, 2"):
        checkpoint.restore_params(tmp_path, wanted, step=7)
    other = {"policy": {"w": jax.ShapeDtypeStruct((8, 5), jnp.float32), "b": jax.ShapeDtypeStruct((5,), jnp.float32)}}
    with pytest.raises(InputError, match=r"\['policy'\]\['b'\] has shape missing"):
        checkpoint.restore_params(tmp_path, other)
