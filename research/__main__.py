"""Runs a command: `understudy NAME ...` and `python -m research NAME ...` are the same."""

import sys

from research.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
