"""Runs one experiment: trains, evaluates, saves; or does the stages of its study."""

from collections.abc import Sequence

from research import main as experiments


def main(argv: Sequence[str]) -> int:
    return experiments.main(["understudy train", *argv])
