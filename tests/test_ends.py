"""How processes end: by signals from their first moment on, with a console that is closed, full or absent, and on a
disk that is full. Real processes, which import no jax."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from research import files
from research.errors import Exit, InputError, disk_fault

WAITS = {
    "sleeping": "import time; time.sleep(30)",
    "in another language": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)",
    "waiting for a thread": "import threading; threading.Event().wait(30)",
}
BEGIN = "from research import signals; signals.hold(); signals.begin(); print('begun', flush=True); "


def start(program, **options):
    """A program that ignores no signal: a shell's job in the background would hand on that SIGINT is ignored."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    heard = "import signal; [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGHUP)]; "
    heard += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    return subprocess.Popen([sys.executable, "-c", heard + program], **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("wait", WAITS)
def test_before_the_loop_a_signal_ends_a_run_at_once(wait, number):
    process = start(BEGIN + WAITS[wait])
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    process.send_signal(number)
    try:
        assert process.wait(30) == Exit.PREEMPTED
    finally:
        process.kill()
    assert process.stderr.read() == f"{number.name}: stopped. The same command goes on.\n"


def test_a_signal_between_two_beginnings_is_not_lost():
    again = "import sys; from research import signals; signals.hold(); signals.begin(); sys.exit(0)"
    program = (
        "import os, signal, sys; from research import signals; signals.hold(); os.kill(os.getpid(), signal.SIGTERM); "
        f"os.execv(sys.executable, [sys.executable, '-c', {again!r}])"
    )
    assert start(program).wait(10) == Exit.PREEMPTED


def test_what_is_ignored_stays_so_and_after_the_end_nothing_counts():
    end = "signals.end(); [os.kill(os.getpid(), number) for number in signals.STOPS]; sys.exit(3)"
    assert start("import os, sys; " + BEGIN + end).wait(10) == 3
    program = BEGIN + "import os, signal, sys; os.kill(os.getpid(), signal.SIGHUP); sys.exit(4)"
    ignoring = f"import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv({sys.executable!r}, "
    assert start(ignoring + f"[{sys.executable!r}, '-c', {program!r}])").wait(10) == 4


SPEAKS = """
import contextlib, os, sys
from research import console
console.steady(output=True)
first = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
for i in range(1000):
    print("out", i, "x" * 100)
    print("err", i, "x" * 100, file=sys.stderr)
with contextlib.suppress(OSError):
    os.write(2, b"of another language")
sys.exit(5)
"""


@pytest.mark.parametrize("redirection", ["1>&- 2>&-", "0<&- 1>&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | head -n 1"])
def test_a_console_that_is_not_there_changes_nothing(redirection, tmp_path):
    (tmp_path / "speaks.py").write_text(SPEAKS)
    line = f"{{ {sys.executable} speaks.py file; echo $? >status; }} {redirection}"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=30)
    assert (tmp_path / "status").read_text() == "5\n"
    assert (tmp_path / "file").read_bytes() == b""


PRINTS = """
import sys
from research import cli, console
console.steady(output=False)
command = cli.Command("x", "Prints.", flags=(), examples=("x",))
sys.exit(command.run([], lambda _: [print("y" * 100) for _ in range(5000)] and None))
"""


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        ("| head -n 1", Exit.UNREAD, ""),
        (">/dev/full", Exit.FAILED, "error: No space left on device.\n"),
        (">&-", Exit.DONE, ""),
    ],
)
def test_a_command_whose_output_nobody_takes_ends_quietly(redirection, status, said, tmp_path):
    (tmp_path / "prints.py").write_text(PRINTS)
    line = f"{{ {sys.executable} prints.py 2>said; echo $? >status; }} {redirection}"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=30)
    assert (tmp_path / "said").read_text() == said
    assert int((tmp_path / "status").read_text()) == status


LIMITED = """
import resource, signal, sys
from research import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = files.SteadyFile(sys.argv[1], print)
lines = [f"{i:09d}\\n".encode() for i in range(9)]
for i, line in enumerate(lines):
    limit = 25 if 2 <= i < 6 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    file.write(line)
    if i == 4:
        assert open(sys.argv[1], "rb").read() == b"".join(lines[:2])
assert open(sys.argv[1], "rb").read() == b"".join(lines)
file.close()
"""


def test_what_a_full_disk_has_no_room_for_is_written_later(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "x")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (
        result.stdout == f"{tmp_path}/x: can't be written (File too large); what is to be there is kept until it can\n"
    )


def test_faults_of_disks_are_told_from_others():
    full = OSError(errno.ENOSPC, "No space left on device", "/w/x")
    assert disk_fault(full) == "/w/x: No space left on device"
    of_library = ValueError("of a library")
    of_library.__cause__ = full
    assert disk_fault(of_library) == "/w/x: No space left on device"
    assert disk_fault(RuntimeError("IoError(Os { code: 28, kind: StorageFull })")) == os.strerror(errno.ENOSPC)
    assert disk_fault(ValueError("x [OS error 28: ENOSPC No space left on device]")) == os.strerror(errno.ENOSPC)
    for error in (KeyError("x"), ConnectionResetError(errno.ECONNRESET, "reset"), ValueError("code: 281")):
        assert disk_fault(error) == ""


def test_an_output_in_the_checkpoints_of_a_run_is_refused(tmp_path):
    (tmp_path / "checkpoints/10").mkdir(parents=True)
    (tmp_path / "config.json").touch()
    with pytest.raises(InputError, match="lies in the checkpoints of a run, which removes them"):
        files.check_output(tmp_path / "checkpoints/10/x.jsonl")
