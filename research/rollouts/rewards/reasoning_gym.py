"""The scorers of reasoning-gym (an extra), with their partial credit, from 0 to 1.

Their records are `data.path = "reasoning_gym:NAME"`; see sources/reasoning.py.
"""

from research.rollouts.rewards import texts
from research.rollouts.rewards.types import Reward, Sample
from research.sources import reasoning


def make(within: str = "") -> Reward:
    """Scores the answers to records of reasoning-gym.

    Args:
      within: only what stands in the last <within>...</within> of the answer counts; without that it gets 0.
    """
    texts.check_tag("within", within)

    def judge(sample: Sample) -> float | None:
        """None of a record from elsewhere. Raises InputError where the scorer would run the answer as code."""
        task, answer = str(sample.record.get("task")), texts.between(sample.answer, within)
        if not task.startswith(reasoning.PREFIX):
            return None
        texts.refuse_evaluated(sample)
        return 0.0 if answer is None else reasoning.score(task, sample.record.get("entry"), answer)

    return judge
