"""1 for an answer that is right, else 0: what the evaluation of the same name counts."""

import dataclasses

from research.errors import InputError, did_you_mean
from research.rollouts.rewards import texts
from research.rollouts.rewards.types import Reward, Sample
from research.sources import verification


def make(verifier: str = "task", within: str = "") -> Reward:
    """Judges by the verifiers of the evaluation exact_match.

    Args:
      verifier: "task": that of the record's task, where it has one, else as "exact"; "exact": the response, white space
        around it aside; "number": the last numbers are equal; "contains": the response is somewhere in the answer.
      within: only what stands in the last <within>...</within> of the answer counts; without that it is wrong.

    Raises:
      InputError: there is no such verifier.
    """
    if verifier not in verification.VERIFIERS:
        raise InputError(f"verifier = {verifier!r}: no such verifier.{did_you_mean(verifier, verification.VERIFIERS)}")
    texts.check_tag("within", within)
    return ExactMatch(verifier, within)


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """The attributes are the options of `make`."""

    verifier: str
    within: str

    def __call__(self, sample: Sample) -> float | None:
        """None where the record has no right answer."""
        response, answer = texts.response(sample.record), texts.between(sample.answer, self.within)
        if response is None:
            return None
        if answer is None:
            return 0.0
        if self.verifier == "task":
            texts.refuse_evaluated(sample)
        return float(verification.VERIFIERS[self.verifier]({**sample.record, "response": response}, answer))
