"""How good a model is where each prompt is answered several times: avg@n, and pass@k for k up to n."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from research.evals.scoring import ratio_of_sums


class Answers(NamedTuple):
    """One prompt and the n answers to it. `prompt` is as the model saw it, special tokens left out; `correct` says of
    each answer whether it is; `task` is the record's, or ""."""

    prompt: str
    expected: str
    completions: list[str]
    correct: list[bool]
    task: str = ""

    def parts(self) -> dict[str, Any]:
        """What a report shows of it: prompt, answers and the expected one."""
        answers = [{"text": c, "right": right} for c, right in zip(self.completions, self.correct, strict=True)]
        return {"prompt": self.prompt, "answers": answers, "expected": self.expected}

    def __str__(self) -> str:
        right = f"{sum(self.correct)} of {len(self.correct)} right, expected {self.expected!r}"
        return f"{self.prompt!r} -> {self.completions[0]!r} ({right})"


def pass_at(k: int, n: int, right: int) -> float:
    """The chance that one of k answers is right, estimated without bias from n answers of which `right` are:
    1 - C(n - right, k) / C(n, k) (arXiv:2107.03374, equation 1).

    Raises ValueError where k isn't in 1 to n, or `right` in 0 to n.
    """
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"k = {k}, n = {n}, right = {right}: no such numbers of answers")
    return float(1.0 - np.prod(1.0 - k / np.arange(n - right + 1, n + 1))) if n - right >= k else 1.0


def measure(answers: Sequence[Answers]) -> dict[str, float]:
    """avg@n, the mean share of right answers, and pass@k for k = 2, 4, 8, ... and n; of each task avg@n and pass@n. A
    prompt counts as one: NAME_stderr, the standard error of NAME, is that of a mean over prompts.

    Args:
      answers: of each prompt, all with the same n, at least 2.
    """
    n = len(answers[0].correct)
    counts: defaultdict[str, list[int]] = defaultdict(list)
    for each in answers:
        counts[""].append(sum(each.correct))
        if each.task:
            counts[f"/{each.task}"].append(sum(each.correct))
    metrics = {}
    for task, right in counts.items():
        values = {f"avg@{n}{task}": [count / n for count in right]}
        for k in [n] if task else _sizes(n):
            values[f"pass@{k}{task}"] = [pass_at(k, n, count) for count in right]
        for name, each in values.items():
            metrics[name], error = ratio_of_sums(np.array(each), np.ones(len(each)))
            if error is not None:
                metrics[f"{name}_stderr"] = error
    return metrics


def _sizes(n: int) -> list[int]:
    """2, 4, 8, ... below n, and n."""
    return [2**i for i in range(1, n.bit_length()) if 2**i < n] + [n]
