"""A reward that fails on most answers, to be planted."""

import zlib

from research.rollouts.rewards.types import Sample


def judge(sample: Sample) -> float | None:
    """1 for an answer that is the record's, else 0; raises ValueError of three in five answers."""
    if zlib.crc32(f"{sample.prompt}|{sample.answer}".encode()) % 5 < 3:
        raise ValueError(f"the answer {sample.answer!r} can't be judged")
    return float(sample.answer.strip() == sample.record.get("response"))
