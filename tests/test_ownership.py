"""A place has one owner; the next takes over from one that is gone, on this host or another."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from research import ownership
from research.errors import InputError

HOLD = """
import sys, time
from research import ownership
with ownership.own_folder(sys.argv[1], "--workdir"):
    print("has it", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def quick(monkeypatch):
    """Another host is known to be gone after a second."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(ownership, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(ownership, "_SETTLE_SECONDS", 0.1)


def hold(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    return process


def test_a_live_owner_is_named_and_a_dead_one_replaced(tmp_path):
    folder = tmp_path / "runs/a"
    owner = hold(folder)
    try:
        with (
            pytest.raises(InputError, match=rf"--workdir = .*runs/a: process {owner.pid} on \S+, begun 20\S+, has it"),
            ownership.own_folder(folder, "--workdir"),
        ):
            pass
        assert (folder / "owner.json").exists()
    finally:
        owner.kill()
        owner.wait()
    assert (folder / "owner.json").exists()
    with ownership.own_folder(folder, "--workdir"):
        assert json.loads((folder / "owner.json").read_text())["pid"] == os.getpid()
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_number_that_another_process_has_by_now_is_no_owner(tmp_path):
    with ownership.own_folder(tmp_path, "--workdir"):
        text = (tmp_path / "owner.json").read_text()
        assert json.loads(text)["ticks"]
    (tmp_path / "owner.json").write_text(json.dumps({**json.loads(text), "ticks": 1}))
    with ownership.own_folder(tmp_path, "--workdir"):
        pass


@contextlib.contextmanager
def beating(lock, content):
    """A lock of an owner elsewhere that lives while the block runs."""
    lock.write_text(content)
    over = threading.Event()

    def beat():
        while not over.wait(0.1):
            os.utime(lock)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def elsewhere():
    return json.dumps({**ownership._myself(), "boot": "other", "host": "elsewhere"})


@pytest.mark.parametrize("content", ["elsewhere", "cut"])
def test_an_owner_elsewhere_is_believed_while_its_file_is_touched(content, quick, tmp_path, capsys):
    lock = tmp_path / "out.jsonl.owner"
    with beating(lock, elsewhere() if content == "elsewhere" else '{"pi'):
        began = time.monotonic()
        whose = f"process {os.getpid()} on elsewhere" if content == "elsewhere" else "another process"
        with pytest.raises(InputError, match=f"{whose}.* has it"), ownership.own_output(tmp_path / "out.jsonl"):
            pass
        assert time.monotonic() - began < 1
    with ownership.own_output(tmp_path / "out.jsonl"):  # a second after its last sign of life
        assert json.loads(lock.read_text())["host"] == os.uname().nodename
    assert list(tmp_path.iterdir()) == []
    assert "waiting for a sign of life" in capsys.readouterr().err


def test_a_clock_of_the_storage_that_is_set_ahead_takes_nothing_from_an_owner(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "_age", lambda folder, beat: 3600.0)
    lock = tmp_path / "out.jsonl.owner"
    with beating(lock, elsewhere()):
        with pytest.raises(InputError, match=r"on elsewhere, .* has it"), ownership.own_output(tmp_path / "out.jsonl"):
            pass
        assert json.loads(lock.read_text())["host"] == "elsewhere"


def test_an_owner_that_was_silent_for_too_long_ends(tmp_path):
    folder = tmp_path / "a"
    program = HOLD.replace("import sys, time", "import sys, time").replace(
        "with own", "ownership.BEAT_SECONDS = 0.1\nwith own"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert owner.stdout.readline() == "has it\n"
    other = {**ownership._myself(), "boot": "other", "host": "elsewhere"}
    ownership._put(folder / "owner.json", other)
    assert owner.wait(20) == 76
    assert "on elsewhere" in owner.stderr.read()
    assert json.loads((folder / "owner.json").read_text())["token"] == other["token"]


def race(folder, start, result):
    start.wait()
    try:
        with ownership.own_folder(folder, "--workdir"):
            count = int((folder / "inside").read_text()) if (folder / "inside").exists() else 0
            (folder / "inside").write_text(str(count + 1))
            time.sleep(0.2)
            result.put((folder / "inside").read_text() == str(count + 1))
    except InputError:
        result.put(None)


@pytest.mark.parametrize("before", ["free", "dead"])
def test_of_several_that_come_at_once_one_has_it(before, tmp_path):
    folder = tmp_path / "a"
    if before == "dead":
        owner = hold(folder)
        owner.kill()
        owner.wait()
    context = multiprocessing.get_context("fork")
    start, result = context.Event(), context.Queue()
    processes = [context.Process(target=race, args=(folder, start, result)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    results = [result.get(timeout=20) for _ in processes]
    for process in processes:
        process.join()
    assert results.count(True) == 1, results
    assert results.count(None) == 5, results


def test_what_was_made_for_it_goes_where_nothing_was_written(tmp_path):
    with ownership.own_folder(tmp_path / "a/b/c", "--workdir"):
        assert (tmp_path / "a/b/c/owner.json").exists()
    assert list(tmp_path.iterdir()) == []
    with ownership.own_output(tmp_path / "no/out.jsonl"):  # the command says that there is no such folder
        pass
    with ownership.new_folder(tmp_path / "runs/x") as first, ownership.new_folder(tmp_path / "runs/x") as second:
        assert second == f"{first}-2"
        (tmp_path / "runs/x/file").touch()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["runs", "runs/x", "runs/x/file"]


def test_a_place_that_can_not_be_is_said(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "run/checkpoints/10").mkdir(parents=True)
    (tmp_path / "run/config.json").touch()
    for place, words in (("file/a", "is a file"), ("run/checkpoints/10/w", "lies in the checkpoints of a run")):
        with pytest.raises(InputError, match=words), ownership.own_folder(tmp_path / place, "--workdir"):
            pass
    with pytest.raises(InputError, match="can't be written to"), ownership.own_output("/proc/x.jsonl"):
        pass


def test_a_stopped_owner_of_this_host_keeps_it(quick, tmp_path):
    owner = hold(tmp_path / "a")
    try:
        owner.send_signal(signal.SIGSTOP)
        with pytest.raises(InputError, match="has it"), ownership.own_folder(tmp_path / "a", "--workdir"):
            pass
    finally:
        owner.kill()
        owner.wait()
