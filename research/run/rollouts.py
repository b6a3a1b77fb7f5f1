"""What a run with rewards is made of: which fields its batches have, its prompts, and its experience."""

import concurrent.futures
import contextlib
import functools

from research.config import Config
from research.devices import distributed
from research.errors import InputError
from research.objectives import Terms
from research.rollouts import buffer, model_rewards, pairs, rewards
from research.rollouts import spec as rollout_spec
from research.rollouts.ahead import UnderWay
from research.rollouts.collection import Collector, Judge
from research.rollouts.credit import Credit
from research.rollouts.engines.types import Engine
from research.rollouts.experience import Experience
from research.rollouts.model_rewards import ModelRewards
from research.rollouts.reinforcement import Reinforcement
from research.rollouts.rewards import judging
from research.run.assemble import Parts
from research.sources import dataset, fields
from research.sources import prompts as prompts_lib
from research.sources.prompts import Prompts

Pool = concurrent.futures.Executor

_OF_DATA = ("source", "virtual")  # groups of fields that answers have as their prompts have them
_OF_ROLLOUTS = ("rollout", "old", "reference", "critic")


def batch_spec(config: Config, terms: Terms, rows: fields.Spec) -> fields.Spec:
    """The fields of a batch that a run trains on.

    Args:
      config: of the run.
      terms: of its objective.
      rows: the fields of the data's rows: without rewards these are a batch.

    Raises:
      InputError: no term reads what rewards are for.
    """
    if not config.rewards:
        return rows
    read = {name for term in terms.values() for name in term.objective.fields}
    if config.rollout.pairs:
        return _pair_spec(config, read, rows)
    if "pair" in read and "advantage" not in read:
        raise InputError(
            f"rewards = {dict(config.rewards)}: a term of the objective reads pairs of answers. Set rollout.pairs = "
            "True, which makes them of the policy's own; or leave rewards out, to learn from pairs of the data."
        )
    if "advantage" not in read:
        raise InputError(
            f"rewards = {dict(config.rewards)}: no term of the objective reads 'advantage', so nothing would be "
            "learned from them. For example: objective.terms = {'policy_gradient': 1.0}."
        )
    critic = config.advantage.kind == "critic"
    if critic != ("returns" in read):
        raise InputError(
            f"advantage.kind = {config.advantage.kind!r}: "
            + (
                "nothing trains the critic. Add the term: objective.terms = {'policy_gradient': 1.0, 'value': 0.5}."
                if critic
                else "makes no returns, which a term of the objective reads. Set it to 'critic', or leave the term out."
            )
        )
    read.update(config.advantage.fields)
    names = [name for group in ("text", *_OF_DATA) for name in fields.group(group) if name in rows]
    names += [name for name in fields.read_with(read) if fields.find(name).group in _OF_ROLLOUTS]
    return fields.spec(names, config.batch_size, {"time": config.seq_len})


def _pair_spec(config: Config, read: set[str], rows: fields.Spec) -> fields.Spec:
    """The same where a batch has pairs of answers."""
    if not {"pair", "side"} <= read:
        raise InputError(
            "rollout.pairs = True: no term of the objective reads pairs, so nothing would be learned from them. For "
            "example: objective.terms = {'preference': 1.0}."
        )
    names = [name for group in ("text", *_OF_DATA) for name in fields.group(group) if name in rows]
    return fields.spec((*names, *pairs.FIELDS), config.batch_size, {"time": config.seq_len})


def make_prompts(config: Config, data: dataset.Data, virtual: range) -> Prompts | None:
    """The prompts of a run with rewards; None without.

    Args:
      config: of the run.
      data: that it reads.
      virtual: ids of the tokens in front of each document.

    Raises:
      InputError: see sources.prompts.make_prompts.
    """
    if not config.rewards:
        return None
    documents = 2 if config.rollout.pairs else 1  # of a row
    room = config.seq_len // documents - len(virtual) - config.rollout.max_new_tokens
    return prompts_lib.make_prompts(
        data.train, data.tokenizer, room=room, seed=config.seed, shuffle=config.data.shuffle
    )


def make_judge(config: Config, stack: contextlib.ExitStack) -> Judge:
    """The rewards of a run, in processes that are ended with `stack`.

    Raises:
      InputError: one can't be made.
    """
    judge = stack.enter_context(judging.Judge(rewards.load(config.rewards)))
    judge.start()
    return Judge(judge)


def make_pool(config: Config, parts: Parts, stack: contextlib.ExitStack) -> Pool | None:
    """The thread that draws rollouts ahead, which `stack` ends; None where they are drawn in turn. The programs of
    several devices would be in each other's way, since each device might begin with another."""
    if not config.rollout.ahead or parts.batch["tokens"].sharding.mesh.size > 1:
        return None
    return stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, "rollout"))


def _model_rewards(parts: Parts, judge: Judge) -> ModelRewards | None:
    """The rewards that models of the run give; None where there are none."""
    if parts.reward_members is None:
        return None
    models = tuple(entry.make() if entry.by_model else None for entry in judge.rewards.entries)
    like = {name: parts.batch[name] for name in model_rewards.FIELDS}
    return ModelRewards(distributed.one_at_a_time(parts.reward_members), models, like)


def make_collector(config: Config, prompts: Prompts, judge: Judge, engine: Engine) -> Collector:
    """What collects the groups of a run's rollouts.

    Args:
      config: of the run.
      prompts: what the policy answers.
      judge: the rewards.
      engine: what writes the answers.
    """
    spec, sizes = config.rollout, rollout_spec.sizes(config.rollout, config.batch_size)
    return Collector(
        prompts=prompts,
        engine=engine,
        judge=judge,
        sampling=spec.sampling(prompts.tokenizer.stop),
        advantage=config.advantage,
        count=sizes.prompts,
        answers=sizes.answers,
        rounds=spec.filter_rounds,
        truncated=spec.truncated,
    )


def make_experience(
    config: Config, parts: Parts, collector: Collector, virtual: range, pool: Pool | None = None
) -> Experience:
    """The experience of a run with rewards.

    Args:
      config: of the run.
      parts: of the run.
      collector: of its groups.
      virtual: ids of the tokens in front of each document.
      pool: see make_pool.
    """
    spec, judge = config.rollout, collector.judge
    pairing = pairs.Pairing(config.seq_len, virtual, judge.weights, spec.truncated)
    rows = functools.partial(buffer.lay_out, seq_len=config.seq_len, virtual=virtual, truncated=spec.truncated)
    order = buffer.minibatch
    if spec.shared_prompts:
        rows = functools.partial(rows, prompts_end=config.seq_len - spec.max_new_tokens)
        order = functools.partial(order, together=spec.answers, microbatches=config.microbatches)
    return Reinforcement(
        collector=collector,
        lay_out=pairing.lay_out if spec.pairs else rows,
        credit=pairs.NoCredit() if spec.pairs else Credit(config.advantage, judge.weights, spec.truncated),
        scores=parts.scores and distributed.one_at_a_time(parts.scores),
        model_rewards=_model_rewards(parts, judge),
        sizes=rollout_spec.sizes(spec, config.batch_size),
        spec=parts.batch,
        seed=config.seed,
        ahead=UnderWay(pool) if spec.ahead else None,
        order=order,
    ).experience()
