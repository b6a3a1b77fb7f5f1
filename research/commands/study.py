"""Stands for research.studies.study."""

from collections.abc import Sequence

from research.studies import study


def main(argv: Sequence[str]) -> int:
    return study.main(["study", *argv])
