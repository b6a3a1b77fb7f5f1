"""Runs one experiment: python -m research.main --config=experiments/sft.py [--workdir=DIR] [--config.FIELD=VALUE ...].

This is `understudy train`, whose flags and work are in research/commands/train.py; research/run/ is what a run does.
"""

from research.devices import startup

if __name__ == "__main__":
    startup.leave_loops()
    startup.use_huge_pages()

import sys

from research.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
