"""The order of things in the loop."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from research.rollouts.experience import Experience, Place
from research.run import loop, window


@pytest.fixture
def quiet(monkeypatch):
    """A window and a saver that do nothing."""
    monkeypatch.setattr(window.Window, "add", lambda self, step, out: None)
    monkeypatch.setattr(loop.Loop, "_save", lambda *_: None)
    sections = {"eval": SimpleNamespace(every=0), "checkpoint": SimpleNamespace(every=0)}
    saver = SimpleNamespace(save=lambda *_: None, prepare=lambda: None, wait=lambda: None)
    return SimpleNamespace(steps=3, **sections), saver


def test_a_rollout_counts_as_progress_of_its_own(quiet):
    """So that stall_seconds, which no step may take, is not of an update and the rollout after it together."""
    config, saver = quiet
    order = []

    def draw(state, frozen, place):
        order.append("rollout")
        return {}, place, {}

    loop.Loop(
        config=config,
        workdir="",
        record={},
        step=lambda state, frozen, batch, rates: order.append("update") or (state, {}),
        rates={},
        experience=Experience({}, (), lambda: Place({}), draw),
        evaluate=None,
        saver=saver,
        window=window.Window(SimpleNamespace(steps=3), SimpleNamespace(write=lambda *_: None), 0.0),
        progress=order.append,
        stop=threading.Event(),
        started=0.0,
    ).run(SimpleNamespace(step=0), {}, Place({}))
    assert order == [0, "rollout", 1, "update", 1, "rollout", 2, "update", 2, "rollout", 3, "update"]


def add_steps(kinds, steps):
    """A window takes in updates: "made", "empty" or "nonfinite"."""
    config = SimpleNamespace(steps=steps, max_bad_steps=99, log=SimpleNamespace(every=1))
    writer = SimpleNamespace(write=lambda *_: None, print=lambda _: None, advance=lambda _: None)
    kept = window.Window(config, writer, 0.0)
    for step, kind in enumerate(kinds, start=1):
        names = {"empty_batch": kind == "empty", "nonfinite": kind == "nonfinite", "nonfinite_in_a_row": 1}
        names |= {"tokens": 4, "loss": 1, "grad_norm": 1, "batch_hash": step}
        kept.add(step, {name: (np.float32(value), np.float32(1)) for name, value in names.items()})


@pytest.mark.parametrize("kinds", [["empty"] * 2, ["nonfinite"] * 3, ["nonfinite", "empty"], ["empty"]])
def test_a_run_that_skipped_every_update_does_not_end_well(kinds):
    with pytest.raises(window.Diverged, match=f"all {len(kinds)} updates were skipped"):
        add_steps(kinds, len(kinds))


@pytest.mark.parametrize("kinds", [["empty", "made"], ["made", "nonfinite"], ["made"]])
def test_a_run_that_made_one_update_ends(kinds):
    add_steps(kinds, len(kinds))
    add_steps(["empty"], 2)  # it isn't the last step
