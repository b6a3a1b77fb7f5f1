"""What is printed is there at once where Python is told not to hold it back."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest


def test_an_unbuffered_console_stays_one():
    code = "import os; from research import console; console.steady(output=True); print('said'); os._exit(0)"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "said\n"


SAYS = """
import sys
from research import console
console.steady(output={output})
print("a\\x1b]0;title\\x07b", "\\u202ec\\x1b[1md\\x1b[0m")
print("\\r\\x1b[Ke\\x1b[2Jf\\x1b[5;5Hg", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize("output", [True, False])
def test_a_terminal_gets_no_escape_sequences_but_colours_and_those_of_a_line_of_status(output):
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    program = [sys.executable, "-c", SAYS.format(output=output)]
    subprocess.run(program, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    said = os.read(ours, 4096).decode()
    os.close(ours)
    first = "a\\x1b]0;title\\x07b \\u202ec\x1b[1md\x1b[0m\r\n"
    assert said == first + "\r\x1b[Ke\\x1b[2Jf\\x1b[5;5Hg\r\n"


def test_a_file_gets_what_is_printed_as_it_is():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    program = [sys.executable, "-c", SAYS.format(output=False)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "a\x1b]0;title\x07b \u202ec\x1b[1md\x1b[0m\n"
