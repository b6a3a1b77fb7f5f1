"""Runs one experiment: python -m research.main --config=experiments/sft.py [--workdir=DIR] [--config.FIELD=VALUE ...].

This is `understudy train`, whose flags and work are in research/commands/train.py; research/run/ is what a run does.
"""

import signal

if __name__ == "__main__":  # before anything else is imported; research.signals says what becomes of them
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))

from research import console, signals
from research.devices import startup

if __name__ == "__main__":
    startup.leave_loops()
    startup.use_huge_pages()
    signals.begin()
    console.steady(output=True)

import sys

from research.commands.train import main

if __name__ == "__main__":
    status = main(sys.argv[1:])
    signals.end()
    sys.exit(status)
