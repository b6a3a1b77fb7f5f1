"""What is going on while there is nothing to show yet, such as "tokenising a.jsonl: 30,000 records".

Whoever works says so here; a run shows it (research/run/console.py), and elsewhere it is said to nobody.
"""

import logging

LOGGER = logging.getLogger("understudy.progress")
LOGGER.propagate = False


def say(doing: str) -> None:
    """Says what begins now, in a few words."""
    LOGGER.info(doing)
