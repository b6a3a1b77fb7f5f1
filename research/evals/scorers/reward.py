"""What a reward model says of a record's answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from research import params
from research.errors import InputError
from research.evals.record_rewards import HeadRewarder, RecordRewarder, check_reward_model
from research.evals.scorers.inputs import Inputs
from research.evals.scorers.types import Chunk, Scorer


def make(inputs: Inputs, model: str) -> Scorer:
    """Columns `reward`, of the record's text, answer or conversation, and `reward_std`, how far the members of an
    ensemble are apart, 0 for one. (`understudy score --reward` writes rewards of several answers beside the records.)

    Args:
      inputs: of the command.
      model: a reward model: a run of the objective reward, or a ...ForSequenceClassification.
    """
    loaded = inputs.load(model, False, check_reward_model).with_adapter()
    rewarder = RecordRewarder(
        [HeadRewarder(loaded, inputs.batch_tokens)], inputs.template, inputs.on_long == "truncate"
    )
    return RecordReward(rewarder, params.checksum(loaded.params), inputs.on_long)


class RecordReward(Scorer):
    """See `make`."""

    columns = ("reward", "reward_std")

    def __init__(self, rewarder: RecordRewarder, weights: str, on_long: str):
        if on_long == "split":
            raise InputError(
                "--on_long = split: a reward is of a whole answer. Use error or truncate, or leave the scorer reward "
                "out."
            )
        self._rewarder, self._weights, self._on_long = rewarder, weights, on_long

    @property
    def identity(self) -> Any:
        return [self._weights, self._on_long]

    def observe(self, chunk: Chunk) -> None:
        for item, answers in zip(chunk.items, self._rewarder.check(chunk.items), strict=True):
            if answers.several:
                raise InputError(
                    f"{item.where}: has several answers, and a row of scores has one reward. Use understudy score "
                    "--reward, or leave the scorer reward out."
                )

    def score(self, chunk: Chunk) -> Mapping[str, Sequence[Any]]:
        rewards = [part[0] for _, part in self._rewarder.rewards(chunk.items)]
        return {"reward": [each.mean() for each in rewards], "reward_std": [each.std() for each in rewards]}
