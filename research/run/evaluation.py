"""What a run measures at `eval.every`: the held-out loss, answers to held-out prompts, and `eval.tasks`."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research import params, progress
from research.config import Config
from research.devices import distributed
from research.errors import InputError
from research.evals import generation, perplexity, repeated
from research.evals import tasks as eval_tasks
from research.models.sampling import SamplingConfig
from research.models.transformer import Model
from research.objectives import Term, Terms
from research.objectives.terms import on_data
from research.run import metrics
from research.run.assemble import Parts
from research.run.resolve import Inputs
from research.sources import dataset, formats, verification
from research.sources.rows import Rows
from research.train import TrainState

ANSWERS_AT_ONCE = 64


class Measured(NamedTuple):
    """What an evaluation found.

    Attributes:
      scores: "eval/loss" and others -> its value.
      samples: (name, answer) to show, the name being that of the task, or "sample" of the held-out prompts.
    """

    scores: dict[str, float]
    samples: list[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluations of a run, ready to be called with (state, frozen, step).

    Attributes:
      config: of the run.
      writer: where scores and samples go.
      terms: of the objective, but for those about rewards.
      loss: (params, frozen, carry) -> scores of the held-out rows.
      sets: name -> the same of the rows of each of `eval.sets`.
      answers: (policy's params, key) -> scores and samples of the held-out prompts; None where there are none.
      tasks: those of `eval.tasks`.
      written: n -> answers of the last rollout, for people; see Experience.samples.
    """

    config: Config
    writer: metrics.Writer
    terms: Terms
    loss: Callable[..., dict[str, float]]
    sets: Mapping[str, Callable[..., dict[str, float]]]
    answers: Callable[..., Any] | None
    tasks: list[eval_tasks.Evaluation]
    written: Callable[[int], list[dict[str, Any]]] = lambda n: []

    def __call__(self, state: TrainState, frozen: dict[str, Any], step: int) -> dict[str, float]:
        """Measures the parameters, or their moving average where there is one; returns and writes {"eval/loss": ...}
        and shows some answers."""
        measured = self.measure(state, frozen)
        self.note(step, measured)
        return measured.scores

    def measure(self, state: TrainState, frozen: dict[str, Any]) -> Measured:
        """Measures, and writes nothing."""
        progress.say("evaluating")
        key = jax.random.PRNGKey(self.config.seed)
        trained = state.params if state.ema is None else state.ema
        models = trained, {**frozen, **state.synced}, state.carry
        scores = whole_loss(self.terms, self.loss(*models))
        for name, measure in self.sets.items():
            progress.say(f"evaluating: {name}")
            scores |= {f"{name}/{k}": value for k, value in whole_loss(self.terms, measure(*models)).items()}
        policy = params.join(trained.get("policy", {}), frozen.get("policy", {}))
        samples: list[tuple[str, Any]] = []
        if self.answers is not None:
            progress.say(f"evaluating: {self.config.eval.generate} answers")
            judged, found = self.answers(policy, key)
            scores |= judged
            samples += [("sample", sample) for sample in found[: self.config.eval.show]]
        for name, measure in self.tasks:
            progress.say(f"evaluating: {name}")
            judged, found = measure(policy, key)
            scores |= {f"{name}/{k}": value for k, value in judged.items() if not k.endswith("_stderr")}
            samples += [(name, sample) for sample in found[: self.config.eval.show]]
        return Measured({f"eval/{name}": value for name, value in scores.items()}, samples)

    def note(self, step: int, measured: Measured) -> None:
        """Shows and writes what was found at a step."""
        for name, sample in measured.samples:
            self.writer.print(f"  {sample}" if name == "sample" else f"  {name}: {sample}")
            if isinstance(sample, generation.Sample | repeated.Answers):
                self.writer.text(step, f"eval/{name}", str(sample), sample.parts())
        for sample in self.written(self.config.eval.show):
            told = [f"{each['text']!r} (reward {each['reward']})" for each in sample["answers"]]
            self.writer.text(step, "rollout", f"{sample['prompt']!r} -> {', '.join(told)}", sample)
        self.writer.write(step, measured.scores)


def whole_loss(terms: Terms, scores: dict[str, float]) -> dict[str, float]:
    """The scores with the weighted sum of the terms' losses over all batches as `loss`.

    A mean of the batches' own sums would take a term's loss for 0 where a batch has no tokens of it.
    """
    if len(terms) < 2:
        return scores
    step = jnp.zeros((), jnp.int32)
    losses = (float(term.coefficient(step)) * scores.get(f"{name}/loss", 0.0) for name, term in terms.items())
    return {**scores, "loss": sum(losses)}


def load_tasks(config: Config, model: Model, data: dataset.Data) -> list[eval_tasks.Evaluation]:
    """The evaluations that `eval.tasks` names, of a model that learns from `data`.

    Raises:
      InputError: one can't be read, or two have one name.
    """
    template = formats.own_template(config.data.template, dataset.has_plain_texts(data))
    loaded = [eval_tasks.load(spec, model, data.tokenizer, template) for spec in config.eval.tasks]
    clash = sorted({name for name, _ in loaded} & config.eval.sets.keys())
    if clash:
        raise InputError(f"eval.sets.{clash[0]}: eval.tasks has one of this name. Give one of them another.")
    twice = [name for name, n in Counter(name for name, _ in loaded).items() if n > 1]
    if twice:
        raise InputError(f"eval.tasks: {twice[0]!r} is there twice. Give one of them another name: KIND,name=...:DATA.")
    return loaded


def _counted(term: Term, sources: Sequence[str], prefix: bool, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch in which only what a term counts is no padding; without the prefixes where no model reads them."""
    batch = term.view(batch, sources)
    return batch if prefix else {name: value for name, value in batch.items() if name != "prefix"}


def make_evaluation(
    inputs: Inputs,
    parts: Parts,
    loaded: list[eval_tasks.Evaluation],
    writer: metrics.Writer,
    written: Callable[[int], list[dict[str, Any]]] = lambda n: [],
) -> Evaluation | None:
    """The evaluation of a run, None where `eval.every` is 0; `loaded` comes from `load_tasks`, `written` is that of
    Evaluation."""
    if not inputs.config.eval.every:
        return None
    config, data, tokenizer = inputs.config, inputs.data, inputs.data.tokenizer
    records = data.held_out_records[: config.eval.generate]
    answers = None
    if records:
        answers = generation.make_generation(
            parts.models["policy"],
            SamplingConfig(max_new_tokens=config.eval.max_new_tokens, stop_tokens=tokenizer.stop),
            tokenizer,
            records,
            verify=verification.verify_record,
            template=data.held_out_templates[: config.eval.generate],
            batch_size=min(len(records), ANSWERS_AT_ONCE),
        )
    terms = on_data(parts.terms, config.rollout.pairs)
    loss = _make_loss(inputs, parts, terms, data.held_out) if terms else _no_loss
    sets = {name: _make_loss(inputs, parts, terms, rows) for name, rows in inputs.sets.items() if terms}
    return Evaluation(config, writer, terms, loss, sets, answers, loaded, written)


def _no_loss(*_: Any) -> dict[str, float]:
    """The scores of held-out rows where all terms are about rewards of the policy's own answers."""
    return {}


def _make_loss(inputs: Inputs, parts: Parts, terms: Terms, rows: Rows) -> Callable[..., dict[str, float]]:
    """(params, frozen, carry) -> what terms say of rows."""
    config, data = inputs.config, inputs.data
    batches = list(dataset.eval_batches(rows, config.batch_size, config.eval.batches or None, mine=inputs.rows))
    first = next(iter(terms.values()))
    return perplexity.make_perplexity(
        distributed.one_at_a_time(parts.evaluate),
        batches,
        data.tokenizer.token_bytes(),
        use_loss_mask=any("loss_mask" in term.objective.fields for term in terms.values()),
        view=functools.partial(
            _counted, first, sorted(config.data.sources), any(model.config.prefix for model in parts.models.values())
        ),
        put=inputs.put,
        with_bytes=first.objective.bits_per_byte,
    )
