"""Runs a command: `understudy NAME ...` and `python -m research NAME ...` are the same."""

import sys

from research.cli import console

if __name__ == "__main__":
    sys.exit(console())
