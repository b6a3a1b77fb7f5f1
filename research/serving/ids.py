"""vLLM's route of token ids, /inference/v1/generate, by which runs and `--servers` ask: what it is asked, and says.

Of its sampling parameters those are taken that research.rollouts.engines.wire writes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from research.serving import wire
from research.serving.rows import Ask, Token
from research.serving.wire import BadRequest
from research.sources.tokenizers import Tokenizer

ROUTE = "/inference/v1/generate"


def read(body: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[str, Ask, int]:
    """The model that a request names, what it asks for, and of how many of the likeliest tokens it wants to hear.

    Raises:
      BadRequest: it can't be answered.
    """
    prompt, given = body.get("token_ids"), body.get("sampling_params")
    if not isinstance(given, dict):
        raise BadRequest("sampling_params: must be an object.", "sampling_params")
    if not _are_ids(prompt) or not prompt or not all(0 <= i < tokenizer.size for i in prompt):
        raise BadRequest(f"token_ids: must be ids from 0 to {tokenizer.size - 1}.", "token_ids")
    ours = {"stop_token_ids": sorted(tokenizer.stop), "ignore_eos": True, "n": 1, "detokenize": False}
    for name, value in ours.items():
        said = given.get(name)
        if (sorted(said) if _are_ids(said) else said) != value:
            raise BadRequest(f"sampling_params.{name}: must be {value} here.", name)
    bias = given.get("logit_bias") or {}
    if not isinstance(bias, dict) or not all(i.isdecimal() and len(i) < 10 and int(i) >= tokenizer.size for i in bias):
        raise BadRequest("sampling_params.logit_bias: must be of ids that no token has.", "logit_bias")
    shared = {name: given.get(name) for name in ("max_tokens", "seed", "temperature", "top_k", "top_p", "min_p")}
    named = {"prompt": prompt, "model": body.get("model"), "logprobs": given.get("logprobs")}
    asked = wire.read_completion({**named, **shared})
    ask = Ask(
        tuple(prompt),
        asked.most or 1,
        asked.seed or 0,
        0,
        asked.temperature,
        asked.top_k,
        asked.top_p,
        asked.min_p,
        of_draws=True,
        shows=bool(asked.shown),
    )
    return asked.model, ask, asked.shown or 0


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


def reply(tokens: Sequence[Token], finish: str | None, shown: int) -> dict[str, Any]:
    """The reply with an answer; `shown` of the likeliest tokens are in it."""
    content = [
        {
            **_entry(token.id, token.logprob),
            "top_logprobs": [_entry(i, logprob) for i, logprob in token.likeliest[:shown]],
        }
        for token in tokens
    ]
    choice = {"index": 0, "token_ids": [token.id for token in tokens], "logprobs": {"content": content}}
    return {"choices": [{**choice, "finish_reason": finish}]}


def _entry(token: int, logprob: float) -> dict[str, Any]:
    return {"token_id": token, "logprob": wire.finite(logprob)}
