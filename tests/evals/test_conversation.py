"""Conversations on the terminal: turns, commands, and what a user types and pastes."""

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from research.errors import InputError
from research.evals import conversation
from research.evals.conversation import Talk
from research.evals.prompts import TooLong


class Model:
    """Answers "answer N", N being the turn's number, unless it is told otherwise.

    Attributes:
      asked: the messages' contents, the system's with its role, and the temperature, of each time that it was asked.
      room: how many messages it can be shown.
    """

    def __init__(self, room=99, cut=False):
        self.asked, self.room, self.cut = [], room, cut

    def __call__(self, messages, turn, temperature):
        if len(messages) > self.room:
            raise TooLong("the conversation: is too long.")
        said = [m["content"] if m["role"] != "system" else f"system: {m['content']}" for m in messages]
        self.asked.append((said, temperature))
        last = messages[-1]["content"]
        if last == "fail":
            raise InputError("the conversation: can't be rendered.")
        if last == "stop":
            yield "half an "
            raise KeyboardInterrupt
        yield from ("an", f"swer {turn}") if last != "nothing" else ()
        return self.cut


def talk_with(model, *lines, **options):
    left = iter(lines)

    def read():
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    conversation.chat(model, read, **options)
    return [said for said, _ in model.asked]


def test_a_conversation_goes_on(capsys):
    lines = [
        "hello",
        "",
        "/rest",
        "again",
        "fail",
        "nothing",
        "stop",
        "two\nlines",
        "/reset",
        " /anew ",
        "/quit",
        "never",
    ]
    first = ["hello", "answer 0", "again", "answer 1"]
    stopped = [*first, "stop", "half an "]
    asked = talk_with(Model(), *lines)
    others = [[*first, said] for said in ("fail", "nothing", "stop")]
    assert asked == [first[:1], first[:3], *others, [*stopped, "two\nlines"], ["/anew"]]
    out, err = capsys.readouterr()
    assert out == "answer 0\nanswer 1\n\nhalf an \nanswer 4\nanswer 5\n"
    assert "error: /rest: no such command. Did you mean '/reset'? A space before the slash makes it a message." in err
    assert "error: the conversation: can't be rendered." in err
    assert "(an empty answer: the question is forgotten)" in err


def test_the_system_message_and_the_temperature_can_be_changed(capsys):
    model = Model()
    lines = ["one", "/system Be brief.", "/temperature 0.5", "two", "/temperature hot", "/temperature nan", "/system"]
    talk_with(model, *lines, "three", talk=Talk(system="Old.", temperature=0.1))
    assert [(said[0], temperature) for said, temperature in model.asked] == [
        ("system: Old.", 0.1),
        ("system: Be brief.", 0.5),
        ("one", 0.5),
    ]
    err = capsys.readouterr().err
    assert "error: /temperature hot: must be a number from 0 to 100; it is 0.5." in err
    assert "error: /temperature nan: must be" in err
    assert "no system message" in err


def test_a_question_is_answered_anew(capsys):
    model = Model()
    assert talk_with(model, "/retry", "a", "/retry", "fail", "/temperature 1", "b", "/retry", "c") == [
        ["a"],
        ["a"],
        ["a", "answer 1", "fail"],
        ["a", "answer 1", "b"],
        ["a", "answer 1", "b"],
        ["a", "answer 1", "b", "answer 3", "c"],
    ]
    err = capsys.readouterr().err
    assert "error: /retry: nothing was asked yet." in err
    assert err.count("nothing is drawn at temperature 0") == 1


def test_what_there_is_no_room_for_is_forgotten_and_said(capsys):
    model = Model(room=4)  # the system's message, an answered question, and one
    asked = talk_with(model, "a", "b", "c", "d", talk=Talk(system="S"))
    assert asked[2] == ["system: S", "b", "answer 1", "c"]
    assert asked[3] == ["system: S", "c", "answer 2", "d"]
    err = capsys.readouterr().err
    assert "(there is no room for all: the first 2 messages are forgotten)" in err
    assert "the first 4 messages are forgotten" in err
    talk_with(Model(room=0), "x")
    assert "error: the conversation: is too long." in capsys.readouterr().err


def test_an_answer_that_was_cut_says_so(capsys):
    talk_with(Model(cut=True), "x", most=7)
    assert "(cut at 7 tokens: --max_new_tokens)" in capsys.readouterr().err
    talk_with(Model(), "x", most=7)
    assert "cut" not in capsys.readouterr().err


def test_a_conversation_is_saved_and_gone_on_with(tmp_path, capsys):
    file = tmp_path / "talk \x1b[2J.jsonl"
    talk_with(
        Model(), "a é", f"/save {file}", f"/save {file}", "/save", f"/save {tmp_path}/no/x", talk=Talk(system="S")
    )
    err = capsys.readouterr().err
    assert "3 messages: " in err
    assert "is there already. Name another file." in err
    assert "error: /save: names no file. Write /save FILE." in err
    assert "no/x: can't be written (No such file or directory)." in err
    assert "\x1b" not in err
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "a é"}]
    assert json.loads(file.read_text()) == {"messages": [*messages, {"role": "assistant", "content": "answer 0"}]}
    model = Model()
    assert talk_with(model, "lost", f"/load {file}", "b", "/retry")[1:] == [["system: S", "a é", "answer 0", "b"]] * 2
    assert "> a é\nanswer 0\n" in capsys.readouterr().err
    for content in (
        '{"messages": [{"role": "assistant", "content": "x"}]}',
        '{"messages": 3}',
        '{"messages": [3]}',
        "{",
    ):
        (tmp_path / "bad").write_text(content)
        talk_with(Model(), f"/load {tmp_path / 'bad'}")
        assert f"error: /load {tmp_path / 'bad'}" in capsys.readouterr().err
    talk_with(Model(), f"/load {tmp_path / 'none'}")
    assert "error: /load" in capsys.readouterr().err


SCRIPT = """
import time
from research.evals.line_reader import SignOfLife, make_reader
read = make_reader()
while (line := read()) != "end":
    print("GOT", repr(line), flush=True)
    if line == "wait":
        with SignOfLife("compiling"):
            time.sleep(1.3)
"""


@pytest.fixture
def terminal():
    """A process on a terminal of its own: (write, read until a text comes)."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    said = [""]

    def until(text):
        stop = time.monotonic() + 20
        while text not in said[0]:
            assert time.monotonic() < stop, said[0]
            said[0] += os.read(ours, 1000).decode(errors="replace")
        before, _, said[0] = said[0].partition(text)
        return before

    until("> ")
    yield lambda text: os.write(ours, text.encode()), until
    process.kill()
    process.wait()
    os.close(ours)


def test_arrow_keys_and_pasted_lines_on_a_terminal(terminal):
    pytest.importorskip("readline")
    write, until = terminal
    write("helo\x1b[D\x1b[Dl\x1b[C\x1b[C!\n")  # two to the left, a letter, two to the right, a mark
    until("GOT 'hello!'")
    until("> ")
    write("\x1b[A\n")  # the line before
    until("GOT 'hello!'")
    until("> ")
    write("\x1b[200~one\n\n  two\x1b[201~ three\n")  # pasted, as terminals mark it, and typed on
    until(r"GOT 'one\n\n  two three'")
    until("> ")
    write("first\nsecond\nthird\n")  # pasted, by a terminal that doesn't
    until(r"GOT 'first\nsecond\nthird'")
    until("> ")
    write("wait\n")
    until("compiling 1 s")
    until("\r\x1b[K")
    until("> ")
    write("end\n")
