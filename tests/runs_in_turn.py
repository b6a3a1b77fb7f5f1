"""Runs in turn in one of several processes: python -m runs_in_turn FILE --coordinator=... --num_processes=... ...

FILE is a JSON list of the flags of each run, as research.main takes them. The processes find each other once.
"""

import functools
import json
import sys
from pathlib import Path

from research.commands import train
from research.devices import distributed


def main(path, *peers):
    distributed.start = functools.cache(distributed.start)
    for flags in json.loads(Path(path).read_text()):
        if status := train.main([*flags, *peers]):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
