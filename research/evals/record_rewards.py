"""Rewards of the answers in records, by one reward model or by an ensemble of several; or a policy's implicit ones."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from research import files, params
from research.devices import distributed, sharding
from research.errors import InputError, located
from research.evals.record_scores import Item, read_chunks
from research.evals.scoring import BATCH_TOKENS, Example, compute_windows, constrain, make_token_scorer
from research.loading import LoadedModel
from research.models import virtual
from research.models.config import ModelConfig
from research.models.transformer import Model
from research.sources import comparisons, entries, formats, records
from research.sources.records import Turn
from research.sources.tokenizers import Tokenizer

ADDED = ("reward", "rewards", "reward_std", "rewards_std")
_TOGETHER = 1024  # records: scored together, and written together
_REASONS = {
    "data": "--data holds other records",
    "tokens": "--template, --on_long or the tokenizer gives other tokens",
    "weights": "--model or --reference has other weights",
    "beta": "--beta was {}",
}


def check_reward_model(config: ModelConfig, name: str) -> None:
    """Raises InputError, calling the model `name`, where its head predicts tokens."""
    if not config.num_labels:
        raise InputError(
            f"{name}: is {config.kind}, and no reward model. Name a run of the objective reward, or a "
            "...ForSequenceClassification of transformers."
        )


class Answers(NamedTuple):
    """The answers of one record, in its own order.

    Attributes:
      turns: the whole conversation, or text, of each.
      several: whether the record has several, and gets a list of rewards.
    """

    turns: list[list[Turn]]
    several: bool


def read_answers(record: Mapping[str, Any]) -> Answers:
    """What of a record gets a reward: what `understudy generate` has written, its `completion` or each of its
    `completions`; of `chosen` and `rejected` both, in this order; of `responses` each; else the record's text, its
    prompt and response, or its conversation.

    Raises:
      InputError: the record is at fault.
    """
    if {"tokens", "logprob"} <= record.keys() and {"completion", "completions"} & record.keys():
        return _generated(record)
    format = comparisons.detect(record, {})
    if not format:
        return Answers([records.check(dict(record), records.detect_format(record, {}), {})], False)
    comparison = comparisons.read(record if format == "unpaired" else _unsorted(record), format, {})
    return Answers([[*comparison.prompt, *answer] for answer in comparison.answers], format != "unpaired")


def _generated(record: Mapping[str, Any]) -> Answers:
    """The answers of a model to the record's prompt, which may be empty."""
    several = "completions" in record
    texts = record["completions"] if several else [record["completion"]]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError("completions: must be a list of texts. Give what `understudy generate` has written.")
    if "messages" in record or "prompt" in record:
        messages = record.get("messages") or [{"role": "user", "content": record.get("prompt")}]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise InputError("messages: must be a list of objects. Give what `understudy generate` has written.")
        messages = messages[:-1] if messages[-1].get("role") == "assistant" else messages
        conversation = {**record, "messages": [*messages, {"role": "assistant", "content": "-"}]}
        prompt = records.check(conversation, "messages", {})[:-1]
        return Answers([[*prompt, Turn("assistant", text)] for text in texts], several)
    beginning = records.check(dict(record), "text", {})[0].text
    return Answers([[Turn("text", beginning + text)] for text in texts], several)


def _unsorted(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what would put its answers into another order, or say that they are in a wrong one."""
    kept = {name: value for name, value in record.items() if not name.startswith("score")}
    for name, value in kept.items():
        if (
            isinstance(value, list)
            and name != "messages"
            and all(isinstance(x, dict) and "role" not in x for x in value)
        ):
            kept[name] = [{k: v for k, v in x.items() if k not in ("score", "overall_score", "rank")} for x in value]
    return kept


def encode(
    answers: Sequence[Answers], tokenizer: Tokenizer, template: str, where: Sequence[str]
) -> list[list[Example]]:
    """Each answer of each record, as training on preferences has it: what a policy learns of it is scored.

    Raises:
      InputError: an answer is at fault; it is named.
    """
    flat = [(i, turns) for i, each in enumerate(answers) for turns in each.turns]
    examples: list[list[Example]] = [[] for _ in answers]
    kinds = ([pair for pair in flat if (pair[1][0].role == "text") == text] for text in (False, True))
    for kind in filter(None, kinds):  # apart: the model's own chat template is for conversations alone
        places = [where[i] for i, _ in kind]
        ids, mask, lengths = formats.encode([turns for _, turns in kind], tokenizer, template, places)
        ends = np.cumsum(lengths)
        for (i, _), start, end in zip(kind, ends - lengths, ends, strict=True):
            examples[i].append(Example(ids[start:end], mask[start:end].astype(bool)))
    return examples


def make_rewarder(model: Model, *, batch_tokens: int = BATCH_TOKENS) -> Callable[..., np.ndarray]:
    """Returns rewards(params, documents, progress=nothing) -> [N, M] float32, the logits of M members at the last token
    of each document (tokens [n] int32, n at most model.max_length). Call it under the mesh of the parameters.

    Args:
      model: of `params`.
      batch_tokens: see scoring.
    """
    compute = distributed.one_at_a_time(jax.jit(functools.partial(_last_logits, model)))

    def rewards(
        params: Any, documents: Sequence[np.ndarray], progress: Callable[[int], None] = lambda tokens: None
    ) -> np.ndarray:
        # A token that is to be predicted after a document's last one: the weights of a batch then name that one.
        examples = [Example(np.append(x, 0).astype(np.int32), np.arange(len(x) + 1) == len(x)) for x in documents]
        values = np.zeros((len(documents), model.config.num_labels), np.float32)
        for windows, out in compute_windows(compute, model, params, examples, batch_tokens, progress):
            values[[window.example for window in windows]] = out[: len(windows)]
        return values

    return rewards


def _last_logits(model: Model, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The logits of each row where its weight is 1, [B, M] float32 on every device."""
    batch = constrain(batch, model.rules)
    logits = model.unembed(params).logits(virtual.hidden(model, params, batch))
    return sharding.replicate(jnp.sum(logits * batch["weights"][..., None], axis=1))


class Rewarder(Protocol):
    """What gives answers rewards.

    Attributes:
      models: what it is made of, the one whose tokenizer and template are used first, all under one mesh.
    """

    @property
    def models(self) -> Sequence[LoadedModel]: ...

    def rewards(self, examples: Sequence[Example]) -> np.ndarray:
        """[N, M] float32, of M members. Call it under the mesh."""


@dataclasses.dataclass(frozen=True, eq=False)
class HeadRewarder:
    """A reward model, with a member for each number of its head. `batch_tokens`: see scoring."""

    loaded: LoadedModel
    batch_tokens: int = BATCH_TOKENS

    @property
    def models(self) -> Sequence[LoadedModel]:
        return (self.loaded,)

    def rewards(self, examples: Sequence[Example]) -> np.ndarray:
        return self._compute(self.loaded.params, [example.tokens for example in examples])

    @functools.cached_property
    def _compute(self) -> Callable[..., np.ndarray]:
        return make_rewarder(self.loaded.model, batch_tokens=self.batch_tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyRewarder:
    """The implicit reward of a policy, beta (log p(answer) - log p_ref(answer)): that of which it is the best policy
    that stays near its reference (Rafailov et al. 2023, arXiv:2305.18290, equation 5, but for what depends on the
    prompt alone).

    Attributes:
      policy, reference: language models, of one tokenizer.
      beta: of its training.
      batch_tokens: see scoring.
    """

    policy: LoadedModel
    reference: LoadedModel
    beta: float
    batch_tokens: int = BATCH_TOKENS

    @property
    def models(self) -> Sequence[LoadedModel]:
        return self.policy, self.reference

    def rewards(self, examples: Sequence[Example]) -> np.ndarray:
        log_probs = [
            np.array([np.sum(each, dtype=np.float64) for each in compute(loaded.params, examples)])
            for compute, loaded in zip(self._compute, self.models, strict=True)
        ]
        return (self.beta * (log_probs[0] - log_probs[1])[:, None]).astype(np.float32)

    @functools.cached_property
    def _compute(self) -> list[Callable[..., list[np.ndarray]]]:
        return [make_token_scorer(each.model, batch_tokens=self.batch_tokens) for each in self.models]


@dataclasses.dataclass(frozen=True)
class RecordRewarder:
    """What gives records rewards, and how it reads them.

    Attributes:
      rewarders: the members of all of them are one ensemble.
      template: how records are put to each; None for its own.
      truncate: an answer longer than a model takes loses its end; else it is an error.
      beta: of policies; None of reward models.
    """

    rewarders: Sequence[Rewarder]
    template: str | None
    truncate: bool
    beta: float | None = None

    def write(self, origin: entries.Origin, output: Path) -> int:
        """Writes the records with the rewards of their answers into `output`, and returns how many there are.

        All is read and checked before anything is computed. A killed run leaves OUTPUT.partial, and the same call goes
        on from there.

        Raises:
          InputError: a record is at fault or there is none, a reward is no number, or OUTPUT.partial is the work of
            another command.
        """
        total, identity = self._identity(origin)
        models = itertools.chain.from_iterable(rewarder.models for rewarder in self.rewarders)
        identity |= {"weights": " ".join(params.checksum(model.params) for model in models), "beta": self.beta}
        with files.ResumableLines(output, identity, _REASONS) as lines, tqdm.tqdm(total=total, disable=None) as bar:
            number = 0
            for items in read_chunks(origin, ADDED, _TOGETHER):
                if number + len(items) > lines.done:
                    rows = self._rewarded(items)
                    lines.append(rows[max(0, lines.done - number) :])
                number += len(items)
                bar.update(len(items))
            lines.finish()
        return total

    def _identity(self, origin: entries.Origin) -> tuple[int, dict[str, Any]]:
        """How many records there are, and hashes of what decides the result; all of them are checked."""
        hashes = {name: hashlib.blake2b(digest_size=16) for name in ("data", "tokens")}
        total = 0
        for items in read_chunks(origin, ADDED, _TOGETHER):
            total += len(items)
            for item in items:
                hashes["data"].update(files.json_line(item.record, default=str))
            answers = _answers(items)
            for rewarder in self.rewarders:
                for example in itertools.chain.from_iterable(self._examples(rewarder, items, answers)):
                    hashes["tokens"].update(example.tokens.tobytes() + example.mask.tobytes() + b"\n")
        if not total:
            raise InputError("--data: holds no record. Write one JSON object a line.")
        return total, {name: value.hexdigest() for name, value in hashes.items()}

    def _examples(self, rewarder: Rewarder, items: Sequence[Item], answers: Sequence[Answers]) -> list[list[Example]]:
        where, first = [item.where for item in items], rewarder.models[0]
        examples = encode(answers, first.tokenizer, self.template or first.template, where)
        longest = min(each.model.max_length for each in rewarder.models)
        for place, example in ((w, x) for w, each in zip(where, examples, strict=True) for x in each):
            if len(example.tokens) > longest and not self.truncate:
                raise InputError(
                    f"{place}: has {len(example.tokens)} tokens, and the model takes {longest}. Shorten it, or use "
                    "--on_long=truncate."
                )
        return [[Example(x.tokens[:longest], x.mask[:longest]) for x in each] for each in examples]

    def rewards(self, items: Sequence[Item]) -> list[tuple[Answers, np.ndarray]]:
        """The answers of each record, and their rewards by each member, [answers, members] float64.

        Raises:
          InputError: a record is at fault, or a reward is no number.
        """
        values, answers = [], _answers(items)
        for rewarder in self.rewarders:
            examples = self._examples(rewarder, items, answers)
            with jax.set_mesh(rewarder.models[0].mesh):
                values.append(rewarder.rewards(list(itertools.chain.from_iterable(examples))))
        rewards = np.concatenate(values, axis=1, dtype=np.float64)
        if not np.isfinite(rewards).all():
            raise InputError("--model: gives rewards that are no numbers. Look at the model's weights.")
        parts = np.split(rewards, np.cumsum([len(each.turns) for each in answers])[:-1])
        return list(zip(answers, parts, strict=True))

    def check(self, items: Sequence[Item]) -> list[Answers]:
        """The answers of each record. Raises InputError where a record is at fault."""
        answers = _answers(items)
        for rewarder in self.rewarders:
            self._examples(rewarder, items, answers)
        return answers

    def _rewarded(self, items: Sequence[Item]) -> list[bytes]:
        """The lines of records with their rewards."""
        rows = zip(items, self.rewards(items), strict=True)
        return [_line(item.record, each.several, part) for item, (each, part) in rows]


def _answers(items: Sequence[Item]) -> list[Answers]:
    answers = []
    for item in items:
        with located(item.where):
            answers.append(read_answers(item.record))
    return answers


def _line(record: Mapping[str, Any], several: bool, rewards: np.ndarray) -> bytes:
    """A record with its rewards [answers, members] after its last field: lists where it has several answers."""
    added = {"reward": rewards.mean(axis=1)}
    if rewards.shape[1] > 1:
        added["reward_std"] = rewards.std(axis=1)
    values = {name: [round(float(x), 6) for x in value] for name, value in added.items()}
    if several:
        values = {name.replace("reward", "rewards"): value for name, value in values.items()}
    else:
        values = {name: value[0] for name, value in values.items()}
    return files.json_line({**record, **values}, default=str)
