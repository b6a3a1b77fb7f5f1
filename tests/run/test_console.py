"""What a run shows while there are no metrics, and at its end."""

import io

import pytest

from research import config, progress
from research.run import console, summary


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


def test_each_thing_is_said_once_where_there_is_no_terminal(capsys):
    with console.shown(True):
        for n in range(3):
            progress.say(f"tokenising a.jsonl: {n} records")
        progress.say("compiling the train step")
        console.line("a line")
    progress.say("nobody hears")
    assert capsys.readouterr().err.splitlines() == [
        "...      tokenising a.jsonl: 0 records",
        "...      compiling the train step",
        "a line",
    ]


def test_how_far_it_has_come_is_said_again_after_a_while(monkeypatch, capsys):
    clock = iter([0.0, 5.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.shown(True):
        for n in range(4):
            progress.say(f"tokenising: {n}")
        progress.say("tokenising")  # without how far
    assert capsys.readouterr().err.splitlines() == ["...      tokenising: 0", "...      tokenising: 2"]


def test_a_status_line_gives_way_on_a_terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(console.os, "get_terminal_size", lambda fd: console.os.terminal_size((20, 5)))
    monkeypatch.setattr(console.sys, "stderr", stream)
    with console.shown(True):
        progress.say("compiling the train step, which takes a while")
        console.line("done")
    assert stream.getvalue() == "\r\x1b[Kcompiling the train\r\x1b[Kdone\n"


def test_other_processes_say_nothing(capsys):
    with console.shown(False):
        progress.say("reading")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("best", "mode", "course"),
    [
        ("", "min", "eval/loss 4 -> 1 (best, step 20) -> 2"),
        ("eval/accuracy", "max", "eval/accuracy 0.1 -> 0.9"),
        ("eval/other", "max", "eval/loss 4 -> 1 (best, step 20) -> 2"),
    ],
)
def test_the_last_lines(best, mode, course):
    records = [
        {"step": 0, "eval/loss": 4.0, "eval/accuracy": 0.1},
        {"step": 10, "train/loss": 3.0, "train/tokens": 50.0},
        {"step": 20, "eval/loss": 1.0, "eval/accuracy": 0.5},
        {"step": 30, "train/loss": 2.0, "train/tokens": 100.0},
        {"step": 30, "eval/loss": 2.0, "eval/accuracy": 0.9},
    ]
    checkpoint = {"best_metric": best, "best_mode": mode}
    run = config.parse({"steps": 30, "checkpoint": checkpoint})
    done, *following = summary.lines(run, "runs/a b", records, (0, 30), 83.0)
    assert done == f"done     30 steps in 1:23, 2.5 k tokens; {course}"
    assert following == [
        "next     understudy report --workdir='runs/a b'",
        "next     understudy generate --model='runs/a b'",
    ]
    went_on = summary.lines(run, "r", records, (10, 30), 3723.0)[0]
    assert went_on.startswith("done     20 steps in 1:02:03, from step 10 on, 2 k tokens;")
