"""What is printed is there at once where Python is told not to hold it back."""

import os
import subprocess
import sys
from pathlib import Path


def test_an_unbuffered_console_stays_one():
    code = "import os; from research import console; console.steady(output=True); print('said'); os._exit(0)"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "said\n"
