"""What is compared with what."""

import numpy as np

from research.diagnosis.examples import Example
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject


def measure(subject: Subject) -> Measured:
    """
    pairs/same: the share of comparisons whose best and worst answer are one.
    pairs/longer_chosen: of the others, the share in which the best one has more tokens; half of those with as many.
    """
    units: dict[int, list[Example]] = {}
    for each in subject.examples:
        if each.unit >= 0 and each.side >= 0:
            units.setdefault(each.unit, []).append(each)
    pairs = [(min(own, key=_side), max(own, key=_side)) for own in units.values() if len(own) > 1]
    if not pairs:
        return Measured({})
    same = [np.array_equal(best.tokens, worst.tokens) for best, worst in pairs]
    shown = tuple(best.shown() for (best, _), equal in zip(pairs, same, strict=True) if equal)[:3]
    signals = {"pairs/same": float(np.mean(same))}
    signs = [np.sign(len(a.tokens) - len(b.tokens)) for (a, b), equal in zip(pairs, same, strict=True) if not equal]
    if signs:
        signals["pairs/longer_chosen"] = float((np.mean(signs) + 1) / 2)
    return Measured(signals, {"pairs/same": shown})


def _side(example: Example) -> int:
    return example.side
