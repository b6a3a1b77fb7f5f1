"""What a server is asked for an answer, and what it says: vLLM's route of token ids, /inference/v1/generate."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt

from research.errors import InputError
from research.models.sampling import SamplingConfig
from research.rollouts.engines.pool import Dropped
from research.rollouts.engines.weights import ServerError

ROUTE = "/inference/v1/generate"
_COLDEST = 0.01  # vLLM raises temperatures below this to it
_NEVER = -100.0  # added to the logits of ids that no token has; the most that a request may


class Question(NamedTuple):
    """What one answer is asked for: a prompt, and the seed of the draws."""

    prompt: Sequence[int]
    seed: int


class Answer(NamedTuple):
    """One answer.

    Attributes:
      tokens: up to and including the one that ends it.
      log_probs: of each token under what it was drawn from.
      stopped: whether one of the stop tokens ended it; else it was cut off.
      stamps: the versions of the weights that it was written with, as the server calls them; empty where it says none.
    """

    tokens: list[int]
    log_probs: list[float]
    stopped: bool
    stamps: tuple[str, ...]


def check(sampling: SamplingConfig, section: str) -> None:
    """Checks that servers can draw as a run is to.

    Args:
      sampling: of the answers.
      section: of the config or the flags, for errors: "rollout." or "--".

    Raises:
      InputError: naming what they can't.
    """
    if sampling.min_p and sampling.top_p < 1:
        raise InputError(
            f"{section}min_p = {sampling.min_p} with {section}top_p = {sampling.top_p}: vLLM applies them in another "
            "order, and draws from other tokens. Leave one of them out."
        )
    if 0 < sampling.temperature < _COLDEST:
        raise InputError(f"{section}temperature = {sampling.temperature}: vLLM has none between 0 and {_COLDEST}.")


def seed(key: UInt[np.ndarray, "2"], number: int) -> int:
    """Of answer `number` of a rollout with a key: the same whichever server answers."""
    words = np.random.SeedSequence([*map(int, np.asarray(key).reshape(-1)), number]).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1


def request(question: Question, sampling: SamplingConfig, model: str, padding: range, shown: int = 0) -> dict[str, Any]:
    """The body of a request.

    Args:
      question: what is asked.
      sampling: how tokens are chosen.
      model: what the server calls the model.
      padding: ids of the model that no token has; they are never drawn.
      shown: of so many of the likeliest tokens log-probabilities are asked for, too.
    """
    params: dict[str, Any] = {
        "n": 1,
        "seed": question.seed,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "stop_token_ids": list(sampling.stop_tokens),
        "ignore_eos": True,  # what ends an answer is said here alone
        "logprobs": shown,
        "detokenize": False,
    }
    if padding:
        params["logit_bias"] = {str(token): _NEVER for token in padding}
    return {"model": model, "token_ids": [int(token) for token in question.prompt], "sampling_params": params}


def request_among(question: Question, tokens: Sequence[int], model: str) -> dict[str, Any]:
    """The body of a request for one token that is one of these, and for the log-probabilities of all of them."""
    body = request(question, SamplingConfig(1, temperature=1.0), model, range(0), len(tokens))
    body["sampling_params"]["allowed_token_ids"] = [int(token) for token in tokens]
    return body


def read_among(reply: Any, tokens: Sequence[int]) -> list[float]:
    """The log-probabilities in a reply to `request_among`.

    Raises:
      Dropped: one is missing, or none is of a token that could come next.
    """
    values = shown(reply)
    if missing := [token for token in tokens if token not in values]:
        raise Dropped("malformed", f"{ROUTE} shows no log-probability of the token {missing[0]}")
    found = [values[token] for token in tokens]
    if not all(x < 1e-3 for x in found) or not max(found) > -1000.0:
        raise Dropped("malformed", f"{ROUTE} shows log-probabilities that are none: {found}")
    return found


def read(reply: Any, sampling: SamplingConfig, vocab_size: int) -> Answer:
    """The answer in a reply.

    Args:
      reply: to `request`.
      sampling: that was asked for.
      vocab_size: of the tokenizer.

    Raises:
      Dropped: it isn't one.
      ServerError: the server broke the answer off.
    """
    try:
        (choice,) = reply["choices"]
        finish = choice["finish_reason"]
        if finish not in ("stop", "length"):
            raise ServerError(f"broke an answer off: {finish}")
        tokens = choice["token_ids"]
        content = choice["logprobs"]["content"]
        log_probs = [float(each["logprob"]) for each in content]
        drawn = [each["token_id"] for each in content]
        stamps = tuple(dict.fromkeys(str(span["version"]) for span in choice.get("weight_versions") or ()))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Dropped(
            "malformed", f"{ROUTE} answered with what is no answer ({type(error).__name__}: {error})"
        ) from error
    fault = _fault(tokens, log_probs, sampling, vocab_size)
    if not fault and drawn != tokens:
        fault = "log-probabilities of other tokens"
    if not fault and finish == "stop" and tokens[-1] not in sampling.stop_tokens:
        fault = f"it ended with token {tokens[-1]}, which ends none here"
    if fault:
        raise Dropped("malformed", f"{ROUTE} answered with what is no answer: {fault}")
    return Answer(tokens, [min(x, 0.0) for x in log_probs], tokens[-1] in sampling.stop_tokens, stamps)


def _fault(tokens: Any, log_probs: list[float], sampling: SamplingConfig, vocab_size: int) -> str:
    """What is wrong with an answer; "" for nothing."""
    most = sampling.max_new_tokens
    if not isinstance(tokens, list) or not 1 <= len(tokens) <= most:
        return f"{len(tokens) if isinstance(tokens, list) else 'no'} tokens"
    if not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        return f"a token that isn't in 0 to {vocab_size - 1}"
    if not all(math.isfinite(x) and -1000.0 < x < 1e-3 for x in log_probs):
        return "a log-probability that is none of a token that was drawn"
    if tokens[-1] not in sampling.stop_tokens and len(tokens) < most:
        return f"cut off after {len(tokens)} of {most} tokens"
    return ""


def shown(reply: Mapping[str, Any]) -> dict[int, float]:
    """Token id -> log-probability, of the first token of a reply and of the likeliest ones in its place.

    Raises:
      Dropped: there are none.
    """
    try:
        first = reply["choices"][0]["logprobs"]["content"][0]
        return {int(each["token_id"]): float(each["logprob"]) for each in [first, *first["top_logprobs"]]}
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise Dropped("malformed", f"{ROUTE} shows no log-probabilities ({type(error).__name__}: {error})") from error
