"""How the policy answers prompts, and the checks of that which need no data."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from research import ranges
from research.errors import InputError, did_you_mean
from research.models.sampling import SamplingConfig
from research.ranges import Count, NotNegative, Part, Positive, Share, Size
from research.rollouts.advantages import AdvantageSpec
from research.rollouts.engines import wire
from research.rollouts.engines.client import check_url

TRUNCATED = ("train", "mask", "leave_out")
ENGINES = ("local", "vllm")
TRANSFERS = ("folder", "nccl")
_OF_SERVERS = ("servers", "in_flight", "answer_seconds", "outage_seconds", "staleness", "transfer")


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """How the policy answers.

    Attributes:
      share: of the rows, by chance anew at each step; the others keep the data's answer. 0: none. GKD's lambda
        (arXiv:2306.13649, algorithm 1) is this share. With `rewards`, all answers are the policy's, and it stays 0.
      prompts: with `rewards`: how many prompts are answered in one rollout; 0: as many as fill one batch.
      answers: with `rewards`: G, how many answers each prompt gets.
      epochs: with `rewards`: how many times the answers of a rollout are trained on, batch by batch, in another order
        each time.
      filter_rounds: with `rewards`: prompts whose answers all get one reward teach nothing, and are replaced by others
        in at most so many further rounds (DAPO's dynamic sampling, arXiv:2503.14476, section 3.2); 0 keeps them all.
        What is still missing then is filled up with the first of those that agree.
      truncated: with `rewards`: what becomes of an answer that was cut off at max_new_tokens. "train": it is as any
        other. "mask": nothing of it is learned, and its reward counts in baselines (DAPO, section 3.4). "leave_out":
        it has no reward either.
      pairs: with `rewards`: the best and the worst answer of each prompt become a comparison, which the term preference
        learns from (online DPO, arXiv:2402.04792), in the place of advantages. `batch_size` counts comparisons then.
      shared_prompts: with `rewards`: the trained policy computes each prompt once for all of its answers in an update,
        which holds them together. Prompts then end at one place of all rows, padding before them.
      ahead: with `rewards`: the next rollout is answered by the policy as it is now, while this one is trained on. A
        ratio to the sampler corrects for that.
      max_new_tokens: the longest answer. A row whose prompt leaves less room keeps the data's answer; with `rewards`
        the prompt is left out.
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only this many of the likeliest tokens are sampled; 0 is all.
      top_p: only the fewest of the likeliest tokens whose probabilities add up to this (arXiv:1904.09751).
      min_p: only tokens at least this times as probable as the likeliest (arXiv:2407.01082); 0 is all.
      slots: how many rows are decoded at once, for less memory; others follow as these end. 0: all.
      engine: with `rewards`: what writes the answers: "local", the run's own devices, or "vllm", servers.
      servers: of "vllm": their URLs, such as "http://127.0.0.1:8000". The environment variable VLLM_API_KEY has the key
        that they may ask for.
      in_flight: of "vllm": the most answers that one server is asked for at a time.
      answer_seconds: of "vllm": how long a server may take for one answer. One that takes longer counts as lost.
      outage_seconds: of "vllm": how long the run waits where no server is there, before it saves and ends.
      staleness: of "vllm": by how many updates the weights of a server may be older than the policy where it can't
        take newer ones; 0: answers of older weights are never learned from.
      transfer: of "vllm": how whole weights come to servers: by a "folder" that they see too, or by "nccl", from GPU to
        GPU, which has not been tried. A LoRA comes by a folder.
    """

    share: Share = 0.0
    prompts: Count = 0
    answers: Size = 8
    epochs: Size = 1
    filter_rounds: Count = 0
    truncated: str = "train"
    pairs: bool = False
    shared_prompts: bool = False
    ahead: bool = False
    max_new_tokens: Size = 64
    temperature: NotNegative = 1.0
    top_k: Count = 0
    top_p: Part = 1.0
    min_p: Share = 0.0
    slots: Count = 0
    engine: str = "local"
    servers: tuple[str, ...] = ()
    in_flight: Size = 64
    answer_seconds: Positive = 300.0
    outage_seconds: Positive = 600.0
    staleness: Count = 0
    transfer: str = "folder"

    def __post_init__(self) -> None:
        ranges.check(self, "rollout")
        if self.truncated not in TRUNCATED:
            known = did_you_mean(self.truncated, TRUNCATED)
            raise InputError(f"rollout.truncated = {self.truncated!r}: must be one of {', '.join(TRUNCATED)}.{known}")
        if self.engine not in ENGINES:
            known = did_you_mean(self.engine, ENGINES)
            raise InputError(f"rollout.engine = {self.engine!r}: must be one of {', '.join(ENGINES)}.{known}")
        if self.transfer not in TRANSFERS:
            known = did_you_mean(self.transfer, TRANSFERS)
            raise InputError(f"rollout.transfer = {self.transfer!r}: must be one of {', '.join(TRANSFERS)}.{known}")
        for number, url in enumerate(self.servers):
            check_url("rollout.servers", url)
            if url.rstrip("/") in [other.rstrip("/") for other in self.servers[:number]]:
                raise InputError(f"rollout.servers: {url} is there twice. Leave one out.")

    def sampling(self, stop_tokens: tuple[int, ...]) -> SamplingConfig:
        """How the tokens of an answer are chosen."""
        return SamplingConfig(
            self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.min_p, stop_tokens=stop_tokens
        )

    @property
    def cut_short(self) -> str:
        """What leaves some tokens out, as the config spells it; "" where nothing does."""
        names = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) != getattr(RolloutSpec, name)]
        return ", ".join(f"rollout.{name} = {getattr(self, name)}" for name in names)


class Sizes(NamedTuple):
    """How many of what a rollout has.

    Attributes:
      prompts, answers: P prompts with G answers each.
      batch_size: rows in one update.
      epochs: times that each answer is trained on.
      pairs: whether a row has the best and the worst answer of a prompt, and not one answer.
    """

    prompts: int
    answers: int
    batch_size: int
    epochs: int
    pairs: bool = False

    @property
    def rows(self) -> int:
        """N, all answers, or all pairs of them."""
        return self.prompts * (1 if self.pairs else self.answers)

    @property
    def minibatches(self) -> int:
        """M, the updates of an epoch."""
        return self.rows // self.batch_size

    @property
    def updates(self) -> int:
        """Those that a rollout serves."""
        return self.epochs * self.minibatches


def sizes(spec: RolloutSpec, batch_size: int) -> Sizes:
    """How many of what a rollout has.

    Args:
      spec: of the run.
      batch_size: answers in one update, or pairs of them.

    Raises:
      InputError: the answers don't fill whole batches.
    """
    if spec.pairs:
        prompts = spec.prompts or batch_size
        if prompts % batch_size:
            raise InputError(
                f"rollout.prompts = {prompts}: with rollout.pairs = True each gives one row, and it isn't a multiple "
                f"of batch_size = {batch_size}. Change either."
            )
        return Sizes(prompts, spec.answers, batch_size, spec.epochs, True)
    if not spec.prompts and batch_size % spec.answers:
        raise InputError(
            f"batch_size = {batch_size}: counts answers, and isn't a multiple of rollout.answers = {spec.answers}. "
            "Change either, or set rollout.prompts."
        )
    prompts = spec.prompts or batch_size // spec.answers
    if prompts * spec.answers % batch_size:
        raise InputError(
            f"rollout.prompts x rollout.answers = {prompts} x {spec.answers} = {prompts * spec.answers}: isn't a "
            f"multiple of batch_size = {batch_size}, the answers in one update. Change any of them."
        )
    return Sizes(prompts, spec.answers, batch_size, spec.epochs)


_OF_REWARDS = (
    *("prompts", "answers", "epochs", "filter_rounds", "truncated", "pairs", "shared_prompts", "ahead", "engine"),
    *_OF_SERVERS,
)


def check(spec: RolloutSpec, rewards: Mapping[str, Any], advantage: AdvantageSpec, batch_size: int, pack: bool) -> None:
    """Checks the settings of a run's answers against each other.

    Args:
      spec, rewards, advantage, batch_size: of the config.
      pack: whether rows hold several documents.

    Raises:
      InputError: something can't be done, or would have no effect.
    """
    if spec.share and pack:
        raise InputError(f"rollout.share = {spec.share}: the policy answers one prompt a row. Set data.pack = False.")
    if not rewards:
        unread = [f"rollout.{name} = {getattr(spec, name)!r}" for name in _OF_REWARDS if _is_set(spec, name)]
        unread += _set_fields(advantage)
        if unread:
            raise InputError(
                f"{unread[0]}: has no effect without rewards, which judge the policy's answers. Name some, such as "
                'rewards = {"exact_match": 1.0}, or leave it out.'
            )
        return
    if spec.share:
        raise InputError(
            f"rollout.share = {spec.share}: with rewards all answers are the policy's, none the data's. Leave it out."
        )
    if pack:
        raise InputError("data.pack = True: with rewards the policy answers one prompt a row. Set data.pack = False.")
    _check_engine(spec)
    if spec.temperature == 0:
        raise InputError(
            "rollout.temperature = 0.0: gives one answer again and again, and rewards compare answers. Raise it."
        )
    if spec.pairs:
        _check_pairs(spec, advantage)
    weights = [value.get("weight", 1.0) if isinstance(value, Mapping) else value for value in rewards.values()]
    if not advantage.kl.weight and all(weight == 0 for weight in weights):
        raise InputError(
            f"rewards = {dict(rewards)}: all have the weight 0, which only reports them, so that nothing would be "
            "learned. Give one a weight."
        )
    rows = sizes(spec, batch_size).rows
    if not spec.pairs:
        advantage.check(spec.answers, rows)


def _check_pairs(spec: RolloutSpec, advantage: AdvantageSpec) -> None:
    """Raises InputError where something doesn't go with pairs of answers."""
    if spec.shared_prompts:
        raise InputError(
            "rollout.shared_prompts = True: with rollout.pairs = True a row has a prompt twice. Leave one of them out."
        )
    if spec.answers < 2:
        raise InputError(
            f"rollout.answers = {spec.answers}: rollout.pairs = True compares the answers to a prompt. Raise it to 2 "
            "or more."
        )
    if spec.truncated == "mask":
        raise InputError(
            "rollout.truncated = 'mask': keeps the rewards of answers that were cut off for baselines, and pairs have "
            "none. Take 'leave_out', which makes no pairs of them."
        )
    if unread := _set_fields(advantage):
        raise InputError(
            f"{unread[0]}: has no effect with rollout.pairs = True, which makes no advantages. Leave it out."
        )


def _set_fields(advantage: AdvantageSpec) -> list[str]:
    """What is set of it, as the config spells it."""
    names = [field.name for field in dataclasses.fields(advantage)]
    return [f"advantage.{name} = {getattr(advantage, name)!r}" for name in names if _is_set(advantage, name)]


def _check_engine(spec: RolloutSpec) -> None:
    """Raises InputError where an engine can't do what it is to, or a setting is of another one."""
    if spec.engine == "local":
        unread = [f"rollout.{name} = {getattr(spec, name)!r}" for name in _OF_SERVERS if _is_set(spec, name)]
        if unread:
            raise InputError(f"{unread[0]}: is of servers. Set rollout.engine = 'vllm', or leave it out.")
        return
    if not spec.servers:
        raise InputError("rollout.servers = (): engine = 'vllm' asks servers. Name them: ('http://127.0.0.1:8000',).")
    if spec.slots:
        raise InputError(
            f"rollout.slots = {spec.slots}: has no effect on servers, which decide that by themselves. Leave it out; "
            "rollout.in_flight bounds what they are asked at once."
        )
    wire.check(spec.sampling(()), "rollout.")


def _is_set(section: Any, name: str) -> bool:
    return getattr(section, name) != getattr(type(section), name)
