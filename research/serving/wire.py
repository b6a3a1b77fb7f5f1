"""What requests and replies look like: the completions and chat completions of OpenAI's API.

docs/serving.md lists the fields. What a model here can't do is refused, and nothing that
was asked for is left out without a word; fields without a bearing on the answer (`user`, `metadata`) are read over.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research.errors import did_you_mean
from research.serving.draws import SHOWN

MOST_CHOICES = 64  # answers to one request
MOST_MESSAGES = 512
MOST_STOPS = 16
_LEAST_LOGPROB = -9999.0  # what stands for log 0, which JSON has no word for
_UNUSED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}


class BadRequest(Exception):
    """A request that can't be answered.

    Attributes:
      message: the field, its value and what it must be.
      param: the field.
      status: of HTTP.
      code: a word for programs.
    """

    def __init__(self, message: str, param: str = "", status: int = 400, code: str = ""):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      prompts: of a chat one record with `messages`; else texts, or lists of token ids.
      chat: whether it is one.
      model: the name that it gives; "" for none.
      most: how many new tokens an answer gets at most; None where it doesn't say.
      n: answers to each prompt.
      stream: they come in pieces.
      counts: a stream ends with how many tokens there were.
      stops: an answer ends before the first of these texts.
      shown: of how many of the likeliest tokens log-probabilities are wanted; None for none at all.
      seed: of the draws; None for one by chance.
      temperature, top_k, top_p, min_p: see models.sampling.SamplingConfig.
    """

    prompts: Sequence[Any]
    chat: bool
    model: str
    most: int | None
    n: int
    stream: bool
    counts: bool
    stops: tuple[str, ...]
    shown: int | None
    seed: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float


def parse(content: bytes) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
      BadRequest: it is none.
    """
    try:
        body = json.loads(content)
    except RecursionError as error:
        raise BadRequest("the body is nested too deep.") from error
    except ValueError as error:
        raise BadRequest(f"the body isn't JSON in UTF-8: {error}.") from error
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object.")
    return body


def read_chat(body: Mapping[str, Any]) -> Request:
    """A request for the route /v1/chat/completions.

    Raises:
      BadRequest: it can't be answered.
    """
    _check_names(body, {**_COMMON, **_CHAT})
    _refuse(body, {"response_format": {"type": "text"}, "tools": [], "functions": [], "modalities": ["text"]})
    _refuse(body, {"tool_choice": "none", "function_call": "none", "parallel_tool_calls": True})
    wanted = _read(body, "logprobs", False, _is(bool), "true or false")
    shown = _read(body, "top_logprobs", 0, _whole(0, SHOWN), f"a whole number from 0 to {SHOWN}")
    if shown and not wanted:
        raise BadRequest(f"top_logprobs = {shown}: is of logprobs, which must be true then.", "top_logprobs")
    most = _most(body, "max_completion_tokens")
    most = _most(body, "max_tokens") if most is None else most
    return Request([{"messages": _messages(body)}], True, most=most, shown=shown if wanted else None, **_common(body))


def read_completion(body: Mapping[str, Any]) -> Request:
    """A request for the route /v1/completions. Raises BadRequest where it can't be answered."""
    _check_names(body, {**_COMMON, **_COMPLETION})
    _refuse(body, {"echo": False, "suffix": "", "best_of": body.get("n") or 1})
    shown = _read(body, "logprobs", None, _whole(0, SHOWN), f"a whole number from 0 to {SHOWN}")
    most = _most(body, "max_tokens")
    return Request(_prompts(body), False, most=16 if most is None else most, shown=shown, **_common(body))


def _common(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of both routes."""
    _refuse(body, {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}})
    stream = _read(body, "stream", False, _is(bool), "true or false")
    options = _read(body, "stream_options", {}, _is(dict), "an object")
    if options and not stream:
        raise BadRequest("stream_options: is of stream, which must be true then.", "stream_options")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise BadRequest(f"stream_options.{name}: no such field.", "stream_options")
    return {
        "model": _read(body, "model", "", _is(str), "a text"),
        "n": _read(body, "n", 1, _whole(1, MOST_CHOICES), f"a whole number from 1 to {MOST_CHOICES}"),
        "stream": stream,
        "counts": options.get("include_usage") is True,
        "stops": _stops(body),
        "seed": _read(body, "seed", None, _whole(-(2**63), 2**64 - 1), "a whole number of 64 bits"),
        "temperature": float(_read(body, "temperature", 1, _temperature, "0, or a number from 0.01 to 100")),
        "top_k": max(0, _read(body, "top_k", 0, _whole(-1, 2**31 - 1), "a whole number; 0 and -1 keep all tokens")),
        "top_p": float(_read(body, "top_p", 1, lambda x: _is_number(x) and 0 < x <= 1, "a number in (0, 1]")),
        "min_p": float(_read(body, "min_p", 0, lambda x: _is_number(x) and 0 <= x <= 1, "a number in [0, 1]")),
    }


def _read(body: Mapping[str, Any], name: str, default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
    """The value of a field; its default where it is null or missing.

    Raises:
      BadRequest: the value doesn't fit.
    """
    value = body.get(name)
    if value is None:
        return default
    if not fits(value):
        raise BadRequest(f"{name} = {_shown(value)}: must be {wanted}.", name)
    return value


def _refuse(body: Mapping[str, Any], off: Mapping[str, Any]) -> None:
    """Raises BadRequest where fields ask for what isn't done here; `off` has the values that ask for nothing."""
    for name, value in off.items():
        given = body.get(name)
        if given is not None and given != value and not (name == "suffix" and not given):
            raise BadRequest(f"{name} = {_shown(given)}: isn't supported here. Leave it out.", name, code="unsupported")


def _check_names(body: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in body:
        if name not in known:
            raise BadRequest(f"{_shown(name)}: no such field.{did_you_mean(name, known)}", name[:64])


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**64 and math.isfinite(value)


def _temperature(value: Any) -> bool:
    return _is_number(value) and (value == 0 or 0.01 <= value <= 100)


def _most(body: Mapping[str, Any], name: str) -> int | None:
    return _read(body, name, None, _whole(1, 2**31 - 1), "a whole number, at least 1")


def _is_text(value: Any) -> bool:
    """Whether it is a text that UTF-8 can write: JSON's escapes may spell half a character."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(_is_text(stop) and stop for stop in stops):
        raise BadRequest(
            f"stop = {_shown(value)}: must be a text, or a list of at most {MOST_STOPS}, none empty.", "stop"
        )
    return tuple(stops)


def _prompts(body: Mapping[str, Any]) -> list[Any]:
    """Texts, or lists of token ids."""
    value = body.get("prompt")
    several = isinstance(value, list) and bool(value) and not _is_token(value[0])
    prompts = value if several else [value]
    if len(prompts) > MOST_CHOICES:
        raise BadRequest(f"prompt: has {len(prompts)} prompts, and may have {MOST_CHOICES}.", "prompt")
    for prompt in prompts:
        ids = isinstance(prompt, list) and bool(prompt) and all(map(_is_token, prompt))
        if not ids and not (_is_text(prompt) and prompt):
            raise BadRequest("prompt: must be a text, a list of token ids, or a list of either, none empty.", "prompt")
    return prompts


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The conversation, whose contents are texts."""
    value = body.get("messages")
    if not isinstance(value, list) or not value:
        raise BadRequest("messages: must be a list of objects with role and content.", "messages")
    if len(value) > MOST_MESSAGES:
        raise BadRequest(f"messages: are {len(value)}, and may be {MOST_MESSAGES}.", "messages")
    messages = [_message(f"messages[{i}]", message) for i, message in enumerate(value)]
    if messages[-1]["role"] == "assistant":
        raise BadRequest("messages: end with the assistant's. The last must be the one to answer.", "messages")
    return messages


def _message(where: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRequest(f"{where} = {_shown(message)}: must be an object with role and content.", "messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRequest(f"{where}.role = {_shown(role)}: must be system, developer, user or assistant.", "messages")
    for name, given in message.items():
        if name not in ("role", "content") and given not in (None, [], ""):
            raise BadRequest(
                f"{where}.{name[:64]}: isn't supported here. Leave it out.", "messages", code="unsupported"
            )
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(map(_is_text, texts)) else None
    if not _is_text(content):
        raise BadRequest(f"{where}.content: must be a text, or a list of parts of the type text.", "messages")
    return {"role": _ROLES[role], "content": content}


def _shown(value: Any) -> str:
    """A value in an error, in short."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "a number of very many digits"
    return text if len(text) <= 80 else f"{text[:80]} ..."


_COMMON = dict.fromkeys(
    (
        *("model", "n", "stream", "stream_options", "stop", "seed", "temperature", "top_k", "top_p", "min_p"),
        *("frequency_penalty", "presence_penalty", "logit_bias", "max_tokens", "logprobs", *_UNUSED),
    )
)
_CHAT = dict.fromkeys(
    (
        *("messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice"),
        *("parallel_tool_calls", "functions", "function_call", "modalities"),
    )
)
_COMPLETION = dict.fromkeys(("prompt", "echo", "suffix", "best_of"))


# Replies.


@dataclasses.dataclass(frozen=True)
class Shown:
    """A token in a reply: its text, log-probability, and (text, log-probability) of the likeliest in its place."""

    text: str
    logprob: float
    likeliest: Sequence[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Reply:
    """Writes the replies to one request, or the pieces of one.

    Attributes:
      id, created, model: of the request.
      chat: which route's.
    """

    id: str
    created: int
    model: str
    chat: bool

    def whole(self, choices: Sequence[Mapping[str, Any]], prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """The reply that holds all."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": list(choices), "usage": usage(prompt_tokens, new_tokens)}

    def piece(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A piece of a stream."""
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": list(choices)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def choice(
        self, index: int, text: str, tokens: Sequence[Shown] | None, finish: str | None, *, whole: bool, offset: int = 0
    ) -> dict[str, Any]:
        """An answer, or a piece of one.

        Args:
          index: of the answer.
          text: of it.
          tokens: with their log-probabilities; None where they aren't wanted.
          finish: how it ended; None where it goes on.
          whole: whether it is all of the answer.
          offset: of the text in the answer.
        """
        if not self.chat:
            logprobs = None if tokens is None else _completion_logprobs(tokens, offset)
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        logprobs = None if tokens is None else {"content": [_chat_logprob(token) for token in tokens], "refusal": None}
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if whole else {}
        said = said or {"delta": {"content": text} if text or finish is None else {}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any]:
        """What begins an answer of a chat's stream."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def error(message: str, status: int, param: str = "", code: str = "") -> dict[str, Any]:
    """The body of a reply that says what went wrong."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param or None, "code": code or None}}


def finite(logprob: float) -> float:
    return logprob if logprob > _LEAST_LOGPROB else _LEAST_LOGPROB


def _chat_logprob(token: Shown) -> dict[str, Any]:
    likeliest = [_entry(text, logprob) for text, logprob in token.likeliest]
    return {**_entry(token.text, token.logprob), "top_logprobs": likeliest}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    whole = "\ufffd" not in text  # a part of a character has no text of its own
    return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode()) if whole else None}


def _completion_logprobs(tokens: Sequence[Shown], offset: int) -> dict[str, Any]:
    offsets = [offset + sum(len(each.text) for each in tokens[:i]) for i in range(len(tokens))]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [{text: finite(logprob) for text, logprob in token.likeliest} for token in tokens],
        "text_offset": offsets,
    }
