"""Whether a model's own answers to held-out prompts are right."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from research.errors import InputError
from research.evals import repeated
from research.models.generation import MakeGenerate, generate_batches, make_generate
from research.models.sampling import SamplingConfig, longest_prompt
from research.models.transformer import Model
from research.sources.formats import answer_decoder, render_prompt
from research.sources.tokenizers import Tokenizer
from research.sources.verification import utility

Record = Mapping[str, Any]
_REPEATED = re.compile(r"(<[^<>\s]+>)\1{3,}")  # a special token, as an untrained model says it for ever


class Sample(NamedTuple):
    """One prompt and what came of it.

    Attributes:
      prompt: as the model saw it, special tokens left out.
      expected: the record's answer.
      completion: the model's, special tokens left out.
      correct: whether it was accepted.
      task: the record's, or "".
      utility: the planted one of generated preferences, None of others.
      marked: prompt and completion with their special tokens, for people; None where they aren't known.
    """

    prompt: str
    expected: str
    completion: str
    correct: bool
    task: str = ""
    utility: float | None = None
    marked: tuple[str, str] | None = None

    def parts(self) -> dict[str, Any]:
        """What a report shows of it: prompt, answers and the expected one."""
        prompt, completion = self.marked or (self.prompt, self.completion)
        return {"prompt": prompt, "answers": [{"text": completion, "right": self.correct}], "expected": self.expected}

    def __str__(self) -> str:
        verdict = "right" if self.correct else f"wrong, expected {self.expected!r}"
        prompt, completion = self.marked or (self.prompt, self.completion)
        completion = _REPEATED.sub(lambda found: f"{found[1]} x {len(found[0]) // len(found[1])}", completion)
        return f"{prompt!r} -> {completion!r} ({verdict})"


def make_generation(
    model: Model,
    config: SamplingConfig,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    verify: Callable[[Record, str], bool],
    template: str | Sequence[str],
    batch_size: int,
    where: Sequence[str] = (),
    n: int = 1,
    make: MakeGenerate = make_generate,
) -> Callable[[Any, jax.Array], tuple[dict[str, float], list[Any]]]:
    """Returns evaluate(params, key) -> (metrics, a Sample for each prompt, in the order of `records`).

    The metrics are
      exact_match: the fraction of completions that `verify` accepts.
      exact_match/TASK: the same of the records whose `task` is TASK.
      utility: the mean planted utility of completions to the prompts of generated preferences, where there are some.
      skipped_too_long: how many prompts leave no room for config.max_new_tokens and are left out of all else.
    With n above 1 they are those of `repeated.measure`, and in the place of Samples there are `repeated.Answers`.

    Args:
      model: of `params`.
      config: how to sample. Stop tokens should hold the tokenizer's eos.
      tokenizer: of the model.
      records: with prompt and response, or messages, whose last turn is the expected answer; perhaps `task`.
      verify: (record, completion) -> is it right? The record has `response` in any case.
      template: how records are put to the model, see sources.formats; or one for each record.
      batch_size: answers decoded at once.
      where: where each record is from, for errors; empty where that isn't known.
      n: how many answers each prompt gets.
      make: of what writes them.

    Raises:
      InputError: no prompt fits, or a record has no prompt.
    """
    generate = make(model, config, tokenizer.size)
    longest = longest_prompt(model, config)
    templates = [template] * len(records) if isinstance(template, str) else template
    places = [f"{place}: " for place in where] or [""] * len(records)
    rendered = [
        (record, _render(place, record, tokenizer, each), answer_decoder(tokenizer, each))
        for place, record, each in zip(places, records, templates, strict=True)
    ]
    fitting = [one for one in rendered if len(one[1]) <= longest]
    if not fitting:
        raise InputError(
            f"eval: none of {len(records)} prompts fits into {longest} tokens (model.max_length = "
            f"{model.max_length} less sampling.max_new_tokens = {config.max_new_tokens}). Lower the number of "
            "new tokens, or generate nothing."
        )

    def evaluate(params: Any, key: jax.Array) -> tuple[dict[str, float], list[Any]]:
        prompts = [prompt for _, prompt, _ in fitting for _ in range(n)]
        completions = generate_batches(generate, params, prompts, key, batch_size=batch_size, longest=longest)
        samples: list[Any] = []
        for i, (record, prompt, decode) in enumerate(fitting):
            expected = record["response"] if "response" in record else record["messages"][-1]["content"]
            texts = [decode(completion.tokens) for completion in completions[i * n : (i + 1) * n]]
            correct = [bool(verify({**record, "response": expected}, text)) for text in texts]
            shown, task = tokenizer.decode(prompt), str(record.get("task") or "")
            if n > 1:
                samples.append(repeated.Answers(shown, expected, texts, correct, task))
            else:
                written = completions[i].tokens
                marked = tokenizer.decode(prompt, False), tokenizer.decode(written, False)
                planted = utility(record, texts[0])
                samples.append(Sample(shown, expected, texts[0], correct[0], task, planted, marked))
        measured = repeated.measure(samples) if n > 1 else _fractions(samples)
        return measured | {"skipped_too_long": float(len(rendered) - len(fitting))}, samples

    return evaluate


def _render(place: str, record: Record, tokenizer: Tokenizer, template: str) -> list[int]:
    try:
        return render_prompt(record, tokenizer, template)
    except InputError as error:
        raise InputError(f"{place}{error}") from error


def _fractions(samples: Sequence[Sample]) -> dict[str, float]:
    """The fraction of right samples, of all and of each task; and the mean utility of those that have one."""
    verdicts: defaultdict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        verdicts["exact_match"].append(sample.correct)
        if sample.task:
            verdicts[f"exact_match/{sample.task}"].append(sample.correct)
    utilities = [sample.utility for sample in samples if sample.utility is not None]
    mean = {"utility": sum(utilities) / len(utilities)} if utilities else {}
    return {name: sum(values) / len(values) for name, values in verdicts.items()} | mean
