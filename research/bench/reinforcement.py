"""A step of reinforcement learning, a rollout and the update that learns from it, on made-up prompts; and what TRL is
to read of it: the same prompts, the same rewards, the same loss."""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from research.bench import measure, prepared
from research.bench.types import Record
from research.config import Config
from research.errors import InputError
from research.rollouts.engines.local import Local
from research.rollouts.spec import sizes
from research.run import resolve, rollouts
from research.sources.prompts import Prompt

_LAPS = ("generation", "reward", "scores")  # of a rollout; see collection.Clock
_DEFAULTS = {"kind": "ppo", "aggregation": "", "clip_low": 0.2, "clip_high": 0.2}  # of the loss, what TRL has too
_AGGREGATION = "seq-mean-token-mean"  # what TRL's loss_type calls grpo


class Words:
    """A tokenizer whose words are the numbers of its ids, and of which none ends an answer.

    Attributes:
      size: how many words.
    """

    stop: tuple[int, ...] = ()

    def __init__(self, size: int):
        self.size = size

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        return " ".join(map(str, ids))


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Made-up prompts of one length, in the place of sources.prompts.Prompts; after the last comes the first.

    Attributes:
      tokens: of all of them.
      tokenizer: see Words.
    """

    tokens: Int[np.ndarray, "P L"]
    tokenizer: Words

    @classmethod
    def of(cls, config: Config, vocab_size: int) -> "Prompts":
        """One rollout's, of what `seq_len` leaves beside the answers."""
        ahead = len(resolve.virtual_ids(config, vocab_size))
        length = config.seq_len - ahead - config.rollout.max_new_tokens
        count = sizes(config.rollout, config.batch_size).prompts
        tokens = np.random.default_rng(config.seed).integers(0, vocab_size, (count, length))
        return cls(tokens.astype(np.int32), Words(vocab_size))

    @property
    def longest(self) -> int:
        """Tokens of a prompt."""
        return self.tokens.shape[1]

    def read(self, first: int, count: int) -> list[Prompt]:
        """See sources.prompts.Prompts.read."""
        rows = [self.tokens[place % len(self.tokens)] for place in range(first, first + count)]
        return [Prompt(row, self.tokenizer.decode(row), {}, self.tokenizer.decode, 0) for row in rows]


class Stepper(prepared.Stepper):
    """Makes steps of a rollout with all its updates.

    Args:
      step: the update, and what it takes.
      config: of the run.
      vocab_size: of the tokenizer.
      stack: ends the processes of the rewards.

    Attributes:
      new_tokens: of the answers of a rollout, together.
      laps: of each step the seconds of its parts.
      first: the metrics of the first update.

    Raises:
      InputError: servers are to answer; or a reward can't be made.
    """

    def __init__(self, step: prepared.Prepared, config: Config, vocab_size: int, stack: contextlib.ExitStack):
        super().__init__(step)
        spec, size = config.rollout, sizes(config.rollout, config.batch_size)
        if spec.engine != "local":
            raise InputError(f"rollout.engine = {spec.engine!r}: servers aren't measured. Set it to 'local'.")
        if spec.ahead:
            raise InputError("rollout.ahead = True: a step then has no rollout of its own to be timed. Leave it out.")
        self.updates, self.new_tokens = size.updates, 0
        self.laps: list[dict[str, float]] = []
        self.first: Mapping[str, Any] = {}
        prompts, virtual = Prompts.of(config, vocab_size), resolve.virtual_ids(config, vocab_size)
        judge = rollouts.make_judge(config, stack)
        policy = step.parts.models["policy"]
        engine = Local(policy, vocab_size, prompts=size.prompts, longest=prompts.longest, slots=spec.slots)
        collector = rollouts.make_collector(config, prompts, judge, engine)
        experience = rollouts.make_experience(config, step.parts, collector, virtual)
        self._next, self._place = experience.next, experience.init()

    def step(self) -> None:
        """Makes a rollout and its updates."""
        began = time.perf_counter()
        for number in range(self.updates):
            self.batch, self._place, metrics = self._next(self.state, self.frozen, self._place)
            if not number:
                laps = {name: metrics.get(f"rollout/seconds/{name}", (0.0, 1.0))[0] for name in _LAPS}
                self.new_tokens = int(metrics["rollout/tokens"][0])
            self.update()
            self.first = self.first or self.out
        self.laps.append({**laps, "training": time.perf_counter() - began - sum(laps.values())})

    def shares(self, steps: int) -> dict[str, float]:
        """Of each part the median share in the time of the last steps."""
        laps = self.laps[-steps:]
        return {name: statistics.median(each[name] / sum(each.values()) for each in laps) for name in laps[0]}


def describe(ours: Stepper, step: prepared.Prepared, record: Record) -> Record:
    """What a step's record has otherwise or besides, of a run with rewards: tokens of answers per second, and the FLOPs
    of generation too, where prompts and answers pass the policy once."""
    seconds, rows = record["seconds"], ours.updates * math.prod(record["batch"])
    flops = step.parts.roles.flops(record["batch"][1])
    total = rows * (sum(each.total for each in flops.values()) + flops["policy"].forward)
    return {
        "tokens_per_second": ours.new_tokens / seconds["median"],
        "new_tokens": ours.new_tokens,
        "model_flops": total,
        "mfu": total / seconds["median"] / record["matmul_flops_per_second"],
        "shares": ours.shares(seconds["n"]),
        "entropy": float(np.divide(*map(float, ours.first["entropy"]))),
    }


def trl_options(config: Config) -> dict[str, Any]:
    """What TRL's GRPOConfig is to be given, and "rewards".

    Args:
      config: of a run with rewards.

    Raises:
      Failed: TRL has no such algorithm.
    """
    terms = config.objective["terms"]
    term = terms.get("policy_gradient")
    if list(terms) != ["policy_gradient"]:
        raise measure.Failed("trl knows policy_gradient alone")
    options = {**_DEFAULTS, **(term if isinstance(term, Mapping) else {})}
    spec, advantage = config.rollout, config.advantage
    same = options["kind"] == "ppo" and options["aggregation"] == _AGGREGATION
    if not same or set(options) - set(_DEFAULTS) or config.roles:
        raise measure.Failed(f"trl knows kind = ppo with aggregation = {_AGGREGATION}, and no reference")
    default = dataclasses.replace(type(advantage)(), kind="group", scale=advantage.scale)
    if advantage != default or spec.filter_rounds or spec.truncated != "train" or spec.epochs != 1:
        raise measure.Failed("trl knows advantage.kind = group, one epoch and all answers")
    if sizes(spec, config.batch_size).updates != 1:
        raise measure.Failed("trl knows one update a rollout")
    return {
        "rewards": dict(config.rewards),
        "num_generations": spec.answers,
        "max_completion_length": spec.max_new_tokens,
        "temperature": spec.temperature,
        "top_k": spec.top_k,
        "top_p": spec.top_p,
        "min_p": spec.min_p or None,
        "loss_type": "grpo",
        "epsilon": options["clip_low"],
        "epsilon_high": options["clip_high"],
        "scale_rewards": advantage.scale,
        "beta": 0.0,
    }


def write_prompts(folder: str, step: prepared.Prepared, config: Config, vocab_size: int) -> None:
    """Writes what TRL reads, if it isn't there: the policy as transformers has it, and prompts.npz.

    Raises:
      InputError: transformers has no such architecture.
    """
    if Path(folder, "prompts.npz").exists():
        return
    prepared.write_policy(folder, step, config)
    np.savez(f"{folder}/prompts.npz", prompts=Prompts.of(config, vocab_size).tokens, vocab_size=vocab_size)
