"""What a run with rewards says of them, once, where they seem to teach nothing."""

from collections.abc import Mapping
from typing import Any

_ROLLOUTS = 5  # so many in a row that a reward doesn't tell apart are told of


class Constant:
    """Tells of rewards that give all answers of several rollouts in a row one number.

    Args:
      rewards: of the config. Those of weight 0, which only report, aren't told of.
    """

    def __init__(self, rewards: Mapping[str, Any]):
        weight = lambda each: each.get("weight", 1.0) if isinstance(each, Mapping) else each  # noqa: E731
        self._names = [name for name, each in rewards.items() if weight(each)]
        self._last: dict[str, float] = {}
        self._in_a_row: dict[str, int] = {}

    def __call__(self, values: Mapping[str, float]) -> list[str]:
        """Lines for the log.

        Args:
          values: the metrics of a step, perhaps with those of a rollout; see collection.metrics.
        """
        return [line for name in self._names if f"reward/{name}" in values and (line := self._line(name, values))]

    def _line(self, name: str, values: Mapping[str, float]) -> str:
        value, deviation = values[f"reward/{name}"], values[f"reward/{name}/deviation"]
        same = deviation == 0 and value == self._last.get(name, value)
        before = self._in_a_row.get(name, 0)
        self._last[name], self._in_a_row[name] = value, before + 1 if same else int(deviation == 0)
        if self._in_a_row[name] != _ROLLOUTS:
            return ""
        self._names = [other for other in self._names if other != name]  # told once
        return (
            f"rewards.{name}: gives {value:.3g} to every answer of {_ROLLOUTS} rollouts, and so teaches nothing. Are "
            "the prompts too hard, too easy, or learned by now? Does it read the answer as it is written?"
        )
