"""Our models for EleutherAI's lm-evaluation-harness (package lm_eval), so that all of its tasks run on them."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tqdm

from research.errors import InputError, did_you_mean
from research.evals.scoring import (
    BATCH_TOKENS,
    Example,
    Likelihood,
    encode_context,
    encode_pair,
    keep_end,
    make_loglikelihood,
)
from research.models.generation import generate_batches, make_generate
from research.models.sampling import SamplingConfig, longest_prompt
from research.models.transformer import Model
from research.sources.chat import render_parts
from research.sources.formats import answer_decoder, render_prompt, resolve_template
from research.sources.tokenizers import Tokenizer

_DEFAULT_NEW_TOKENS = 256
_GENERATION = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", "max_gen_toks", "max_new_tokens")


def import_lm_eval() -> Any:
    """Raises InputError where the package isn't there."""
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
    except ImportError as error:
        raise InputError(
            f"--lm_eval: the package lm_eval can't be imported ({error}). pip install -e '.[lm-eval]'."
        ) from error
    return lm_eval


def make_lm(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    *,
    template: str,
    batch_tokens: int = BATCH_TOKENS,
    batch_size: int = 64,
    seed: int = 0,
) -> Any:
    """Returns an lm_eval.api.model.LM, for lm_eval.simple_evaluate. Use it under the mesh of the parameters.

    Args:
      model, params, tokenizer: what is evaluated.
      template: "plain", or the one for `apply_chat_template`. Under any but "plain", special tokens are read from the
        text of a context, where the harness has put them.
      batch_tokens: of log-likelihoods; see scoring.
      batch_size: rows that are decoded at once.
      seed: of sampling, where a task asks for it.

    Raises:
      InputError: lm_eval isn't installed.
    """
    base = import_lm_eval().api.model.LM
    methods = _Methods(
        model=model,
        params=params,
        tokenizer=tokenizer,
        template=resolve_template(template, tokenizer),
        score=make_loglikelihood(model, batch_tokens=batch_tokens),
        batch_size=batch_size,
        seed=seed,
    )
    return type("Understudy", (_Adapter, base), {})(methods)


class _Adapter:
    """What lm_eval.api.model.LM asks for; see there for what each method is to do. LM itself is imported late."""

    def __init__(self, methods: "_Methods"):
        super().__init__()
        self._methods = methods

    @property
    def tokenizer_name(self) -> str:
        return f"{self._methods.tokenizer.fingerprint()}-{self._methods.template}"

    @property
    def max_length(self) -> int:
        return self._methods.model.max_length

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self._methods.template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._methods.render(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(out.logprob, out.greedy) for out in self._methods.score_pairs(_args(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        return [out.logprob for out in self._methods.score_texts([text for (text,) in _args(requests)])]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return self._methods.generate(_args(requests))


@dataclasses.dataclass(frozen=True)
class _Methods:
    """A model with its parameters, tokenizer and template, and what the harness has it do.

    Attributes:
      score: (params, examples, progress) -> likelihoods.
      batch_size: rows that are decoded at once.
      seed: of sampling.
    """

    model: Model
    params: Any
    tokenizer: Tokenizer
    template: str
    score: Callable[..., list[Likelihood]]
    batch_size: int
    seed: int

    @property
    def special(self) -> bool:
        """Whether special tokens are read from the text of a context, where the harness has put them."""
        return self.template != "plain"

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """A conversation as text; without `add_generation_prompt` its last message is the beginning of the answer."""
        prompt = messages if add_generation_prompt else messages[:-1]
        beginning = "" if add_generation_prompt else messages[-1]["content"]
        if self.template == "model":
            parts = render_parts(self.tokenizer.chat, prompt, add_generation_prompt=True)
            return "".join(part.text for part in parts) + beginning
        ids = render_prompt({"messages": prompt}, self.tokenizer, self.template)
        return self.tokenizer.decode(ids, skip_special=False) + beginning

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Likelihoods of continuations after their contexts, which lose their beginning where both are too long."""
        examples = [encode_pair(self.tokenizer, *pair, special=self.special) for pair in pairs]
        return self._score([keep_end(example, self.model.max_length) for example in examples])

    def score_texts(self, texts: Sequence[str]) -> list[Likelihood]:
        """Likelihoods of whole texts, however long."""
        return self._score([encode_pair(self.tokenizer, "", text) for text in texts])

    def _score(self, examples: Sequence[Example]) -> list[Likelihood]:
        total = sum(len(example.tokens) - 1 for example in examples)
        with tqdm.tqdm(total=total, unit=" tokens", unit_scale=True, disable=None) as bar:
            return self.score(self.params, examples, bar.update)

    def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Answers to (context, the harness's generation arguments), in order; those with equal arguments together."""
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for i, (_, options) in enumerate(requests):
            groups[json.dumps(options, sort_keys=True)].append(i)
        texts: dict[int, str] = {}
        with tqdm.tqdm(total=len(requests), unit=" prompts", disable=None) as bar:
            for options, members in groups.items():
                answers = self._answers([requests[i][0] for i in members], json.loads(options), bar)
                texts.update(zip(members, answers, strict=True))
        return [texts[i] for i in range(len(requests))]

    def _answers(self, contexts: Sequence[str], options: Mapping[str, Any], bar: tqdm.tqdm) -> list[str]:
        config, until = _sampling(options, self.tokenizer, self.model.max_length)
        longest = longest_prompt(self.model, config)
        before = bar.n
        completions = generate_batches(
            make_generate(self.model, config, self.tokenizer.size),
            self.params,
            [ids[-longest:] for ids in encode_context(self.tokenizer, contexts, special=self.special)],
            jax.random.key(self.seed),
            batch_size=min(self.batch_size, len(contexts)),
            longest=longest,
            progress=lambda done: bar.update(before + done - bar.n),
        )
        decode = answer_decoder(self.tokenizer, self.template)
        texts = [decode(completion.tokens) for completion in completions]
        return [text[: min((text.find(end) for end in until if end in text), default=None)] for text in texts]


def evaluate(
    lm: Any,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int = 0,
    chat: bool = False,
) -> dict[str, Any]:
    """Runs tasks of the harness; returns what lm_eval.simple_evaluate returns.

    Args:
      lm: of `make_lm`.
      tasks: names of tasks, groups or tags.
      include_path: a folder with more task files (.yaml).
      num_fewshot: examples before each question; None leaves it to the task.
      limit: the first so many documents of each task; 0 for all.
      chat: put prompts into the chat template.

    Raises:
      InputError: a task isn't known.
    """
    lm_eval = import_lm_eval()
    manager = lm_eval.tasks.TaskManager(include_path=include_path)
    for name in tasks:
        if not manager.match_tasks([name]):
            raise InputError(f"--lm_eval: there is no task {name!r}.{did_you_mean(name, manager.all_tasks)[:500]}")
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=manager.match_tasks(list(tasks)),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit or None,
        apply_chat_template=chat,
    )


def _args(requests: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [request.args for request in requests]


def _sampling(options: Mapping[str, Any], tokenizer: Tokenizer, max_length: int) -> tuple[SamplingConfig, list[str]]:
    """The harness's generation arguments -> how to sample, and the texts that end an answer."""
    for name, value in options.items():
        neutral = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
        if name not in _GENERATION and neutral.get(name) != value:
            raise InputError(f"--lm_eval: a task asks for {name} = {value!r} in generation, which can't be done here.")
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    # An answer ends at a text; decoding ends at tokens. Those of one token save what comes after.
    encoded = tokenizer.encode_stretches(until, special=False, first=False)
    single = [ids[0] for ids in encoded if len(ids) == 1]
    most = options.get("max_gen_toks") or options.get("max_new_tokens") or _DEFAULT_NEW_TOKENS
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample"):
        temperature = float(options.get("temperature", 1.0))
    elif options.get("do_sample") is False:
        temperature = 0.0
    config = SamplingConfig(
        max_new_tokens=min(int(most), max_length - 1),
        temperature=temperature,
        top_k=int(options.get("top_k") or 0),
        top_p=float(options.get("top_p") or 1.0),
        min_p=float(options.get("min_p") or 0.0),
        stop_tokens=tuple(dict.fromkeys((*tokenizer.stop, *single))),
    )
    return config, [text for text in until if text]


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """{"acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1} -> {"acc": 0.5, "acc_stderr": 0.1, "em/strict": 1}."""
    plain = {}
    for key, value in metrics.items():
        name, comma, how = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        base, is_error = name.removesuffix("_stderr"), name.endswith("_stderr")
        base = base if how == "none" else f"{base}/{how}"
        plain[f"{base}_stderr" if is_error else base] = float(value)
    return plain
