"""Answers requests: tokens of their prompts, places in line, and replies as they come, whole or in pieces."""

import contextlib
import dataclasses
import functools
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from research.errors import InputError
from research.evals.completions import TextStream
from research.serving import ids, wire
from research.serving.rows import Ask, Token
from research.serving.scheduler import Closed, Full, Scheduler
from research.serving.wire import BadRequest, Reply, Request, Shown
from research.sources.formats import answer_decoder, render_prompt
from research.sources.tokenizers import Tokenizer

_LOOK_SECONDS = 0.25  # between two looks at whether a client is still there


class Connection(Protocol):
    """Who asks: what came from them, and what goes to them."""

    def gone(self) -> bool: ...
    def reply(self, body: Mapping[str, Any]) -> None: ...
    def event(self, body: Mapping[str, Any] | str) -> None: ...


class Gone(Exception):
    """The client has left."""


class Failed(Exception):
    """What the server couldn't do; `status` is of HTTP."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.message, self.status = message, status


class Piece(NamedTuple):
    """What is new of one answer.

    Attributes:
      choice: which.
      text: of it.
      tokens: of it; those that are held back for their text are here too.
      finish: how it ended; None where it goes on.
    """

    choice: int
    text: str
    tokens: Sequence[Token]
    finish: str | None


class Exchange(NamedTuple):
    """A request, what writes its reply, how many answers it gets, the tokens of its prompts, and who asks."""

    request: Request
    reply: Reply
    answers: int
    prompt_tokens: int
    connection: Connection


@dataclasses.dataclass(frozen=True, eq=False)
class Service:
    """A model that answers.

    Attributes:
      name: what requests call it.
      tokenizer: of the model.
      template: how conversations are put to it (sources.formats).
      scheduler: gives out rows.
      max_length: the most tokens of a prompt with its answer.
      max_new_tokens: of a chat's answer, where the request doesn't say.
      seconds: the most that a request may take.
    """

    name: str
    tokenizer: Tokenizer
    template: str
    scheduler: Scheduler
    max_length: int
    max_new_tokens: int
    seconds: float
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _encoding: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def models(self) -> dict[str, Any]:
        """The reply of /v1/models."""
        return {"object": "list", "data": [self.model()]}

    def model(self) -> dict[str, Any]:
        said = {"id": self.name, "object": "model", "created": self.created, "owned_by": "understudy"}
        return {**said, "max_model_len": self.max_length}

    def health(self) -> dict[str, Any]:
        running, waiting = self.scheduler.counts()
        return {"status": "ok", "running": running, "waiting": waiting}

    def chat(self, body: Mapping[str, Any], connection: Connection) -> str:
        """Answers a request of /v1/chat/completions; returns what the log says of it.

        Raises:
          BadRequest: it can't be answered.
          Failed: the server can't.
          Gone: nobody is there to be answered.
        """
        return self._answer(wire.read_chat(body), connection)

    def complete(self, body: Mapping[str, Any], connection: Connection) -> str:
        """Answers a request of /v1/completions, as `chat` does."""
        return self._answer(wire.read_completion(body), connection)

    def generate(self, body: Mapping[str, Any], connection: Connection) -> str:
        """Answers a request of token ids; see ids.py."""
        name, ask, shown = ids.read(body, self.tokenizer)
        self._check_model(name)
        self._room(len(ask.prompt), ask.most)
        tokens: list[Token] = []
        finish = None
        with contextlib.closing(self._pieces([ask], lambda tokens: "", (), connection)) as pieces:
            for piece in pieces:
                tokens += piece.tokens
                finish = piece.finish
        connection.reply(ids.reply(tokens, finish, shown))
        return f"{len(ask.prompt)} + {len(tokens)} tokens"

    def _answer(self, request: Request, connection: Connection) -> str:
        self._check_model(request.model)
        prompts = [self._encode(prompt, request.chat) for prompt in request.prompts]
        asks = self._asks(request, prompts)
        name = f"{'chatcmpl' if request.chat else 'cmpl'}-{secrets.token_hex(12)}"
        reply = Reply(name, int(time.time()), self.name, request.chat)
        template = self.template if request.chat else "plain"
        decode = answer_decoder(self.tokenizer, template)
        exchange = Exchange(request, reply, len(asks), sum(map(len, prompts)), connection)
        send = self._stream if request.stream else self._whole
        with contextlib.closing(self._pieces(asks, decode, request.stops, connection)) as pieces:
            count = send(exchange, pieces)
        return f"{exchange.prompt_tokens} + {count} tokens"

    def _whole(self, exchange: Exchange, pieces: Iterator[Piece]) -> int:
        """Answers with all at once; returns how many tokens there were."""
        request, reply, n, prompt_tokens, connection = exchange
        texts, tokens = [""] * n, [[] for _ in range(n)]
        finish: list[str | None] = [None] * n
        for piece in pieces:
            texts[piece.choice] += piece.text
            tokens[piece.choice] += piece.tokens
            finish[piece.choice] = piece.finish
        choices = [reply.choice(i, texts[i], self._shown(request, tokens[i]), finish[i], whole=True) for i in range(n)]
        count = sum(map(len, tokens))
        connection.reply(reply.whole(choices, prompt_tokens, count))
        return count

    def _stream(self, exchange: Exchange, pieces: Iterator[Piece]) -> int:
        """Answers piece by piece; returns how many tokens there were."""
        request, reply, n, prompt_tokens, connection = exchange
        count, offsets, opened = 0, [0] * n, set()
        for choice, text, tokens, finish in pieces:
            if request.chat and choice not in opened:
                opened.add(choice)
                connection.event(reply.piece([reply.opening(choice)]))
            shown = self._shown(request, tokens)
            if text or shown or finish:
                said = reply.choice(choice, text, shown, None, whole=False, offset=offsets[choice])
                if text or shown:
                    connection.event(reply.piece([said]))
                if finish:
                    connection.event(reply.piece([reply.choice(choice, "", None, finish, whole=False)]))
            offsets[choice] += len(text)
            count += len(tokens)
        if request.counts:
            connection.event({**reply.piece([]), "usage": wire.usage(prompt_tokens, count)})
        connection.event("[DONE]")
        return count

    def _pieces(
        self, asks: Sequence[Ask], decode: Callable[[list[int]], str], stops: tuple[str, ...], connection: Connection
    ) -> Iterator[Piece]:
        """What comes for a request, until its answers have ended. Its rows are free afterwards, come what may."""
        end = time.monotonic() + self.seconds
        try:
            tickets = self.scheduler.submit(asks)
        except Full as error:
            raise Failed("too many requests wait already. Try again later.", 429) from error
        except Closed as error:
            raise Failed("the server ends.", 503) from error
        texts, left = [TextStream(decode, stops) for _ in tickets], len(tickets)
        try:
            while left:
                try:
                    choice, tokens, finish = tickets[0].news.get(timeout=_LOOK_SECONDS)
                except queue.Empty:
                    choice, tokens, finish = -1, (), ""
                if finish == "error":
                    raise Failed("the model failed; the server's log says why.", 500)
                if time.monotonic() > end:
                    raise Failed(f"no answer within {self.seconds:g} s (--seconds). Ask for fewer tokens.", 504)
                if connection.gone():
                    raise Gone
                if choice < 0 or tickets[choice].cancelled:
                    continue
                piece = _piece(choice, texts[choice], tokens, finish, one_by_one=bool(stops))
                if piece.finish:
                    tickets[choice].cancelled = True
                    left -= 1
                yield piece
        finally:
            for ticket in tickets:
                ticket.cancelled = True

    def _check_model(self, name: str) -> None:
        if name not in ("", self.name):
            raise BadRequest(
                f"model = {name[:80]!r}: isn't served here; {self.name!r} is.", "model", 404, "model_not_found"
            )

    def _encode(self, prompt: Any, chat: bool) -> tuple[int, ...]:
        """Token ids of a prompt: a conversation, a text to be gone on with, or ids."""
        if isinstance(prompt, list):
            worst = max(prompt)
            if worst >= self.tokenizer.size:
                raise BadRequest(f"prompt: has the id {worst}, and the model has {self.tokenizer.size}.", "prompt")
            return tuple(prompt)
        record = prompt if chat else {"text": prompt}
        try:
            with self._encoding:  # tokenizers change their state as they encode
                return tuple(render_prompt(record, self.tokenizer, self.template if chat else "plain"))
        except InputError as error:
            field = "messages" if chat else "prompt"
            raise BadRequest(f"{field}: {error}", field) from error

    def _asks(self, request: Request, prompts: Sequence[tuple[int, ...]]) -> list[Ask]:
        if len(prompts) * request.n > wire.MOST_CHOICES:
            raise BadRequest(
                f"n = {request.n}: of {len(prompts)} prompts is more than {wire.MOST_CHOICES} answers.", "n"
            )
        seed = secrets.randbits(64) if request.seed is None else request.seed
        return [
            Ask(
                prompt,
                self._room(len(prompt), request.most),
                seed,
                i * request.n + j,
                request.temperature,
                request.top_k,
                request.top_p,
                request.min_p,
                shows=bool(request.shown),
            )
            for i, prompt in enumerate(prompts)
            for j in range(request.n)
        ]

    def _room(self, length: int, most: int | None) -> int:
        """How many new tokens an answer gets at most.

        Raises:
          BadRequest: there is no room for so many.
        """
        room = self.max_length - length
        if room < 1 or (most or 0) > room:
            asked = "" if most is None else f" and {most} new ones"
            raise BadRequest(
                f"the prompt has {length} tokens{asked}, and there is room for {self.max_length} together. Shorten it, "
                "or ask for fewer.",
                code="context_length_exceeded",
            )
        return min(room, self.max_new_tokens) if most is None else most

    def _shown(self, request: Request, tokens: Sequence[Token]) -> list[Shown] | None:
        """Tokens with their texts, where log-probabilities are wanted."""
        if request.shown is None:
            return None
        text = functools.partial(self.tokenizer.decode, skip_special=False)
        return [
            Shown(text([token.id]), token.logprob, [(text([i]), p) for i, p in token.likeliest[: request.shown]])
            for token in tokens
        ]


def _piece(choice: int, text: TextStream, tokens: Sequence[Token], end: str, one_by_one: bool) -> Piece:
    """What tokens add to an answer; with texts that end it the tokens after such a text are left out."""
    said, used = "", 0
    steps = [[token] for token in tokens] if one_by_one else [tokens]
    for step in steps:
        said += text.add([token.id for token in step])
        used += len(step)
        if text.stopped:
            return Piece(choice, said, tokens[:used], "stop")
    return Piece(choice, said + (text.end() if end else ""), tokens, end or None)
