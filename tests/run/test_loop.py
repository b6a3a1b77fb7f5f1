"""The order of things in the loop."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from research import config as config_lib
from research.rollouts.experience import Experience, Place
from research.run import loop, window


@pytest.fixture
def quiet(monkeypatch):
    """A window and a saver that do nothing."""
    monkeypatch.setattr(window.Window, "add", lambda self, step, out: None)
    monkeypatch.setattr(window.Window, "show_first", lambda *_: None)
    monkeypatch.setattr(loop.Loop, "_save", lambda *_: None)
    sections = {"eval": SimpleNamespace(every=0), "checkpoint": SimpleNamespace(every=0, best_metric="", patience=0)}
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
    config = SimpleNamespace(steps=steps, max_bad_steps=99, batch_size=1, log=SimpleNamespace(every=1))
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


@pytest.mark.parametrize(
    ("patience", "mode", "values", "over"),
    [
        (0, "min", [1.0, 2.0, 3.0], False),
        (2, "min", [1.0, 2.0], False),
        (2, "min", [1.0, 2.0, 1.5], True),
        (2, "min", [1.0, 2.0, 0.5, 0.75], False),
        (2, "max", [1.0, 2.0, 1.5, 2.0], True),  # as good is no better
        (2, "min", [float("nan"), float("nan"), 1.0], False),
    ],
)
def test_patience(patience, mode, values, over):
    checkpoint = config_lib.CheckpointConfig(best_metric="eval/loss", best_mode=mode, patience=patience)
    assert loop.out_of_patience(checkpoint, {10 * i: value for i, value in enumerate(values)}) == over
