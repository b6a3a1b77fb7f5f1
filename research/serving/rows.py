"""The rows that are decoded together, on the device: requests get a row, and a token at each step until they end.

Axes: A rows, P longest prompt, S entries of the cache, N new tokens, T tokens that are read at once, K tokens shown.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt

from research.models import virtual
from research.models.sampling import SamplingConfig
from research.models.slots import Slots, cache_size
from research.models.transformer import Model
from research.serving.draws import DrawQueue, Draws, RowDecoder

STEPS = 4  # tokens between two looks at what has come, and at who waits
_LEAST = 256  # tokens, the smallest room of a row; it doubles as requests need
_PIECE = 64  # prompts are read in pieces of this size
_SLACK = 32  # the least number of tokens between two shifts of the cache


@dataclasses.dataclass(frozen=True)
class Ask:
    """What one row is to be continued with.

    Attributes:
      prompt: token ids.
      most: how many new tokens it gets at most.
      seed: of its draws; `choice` is its number among the answers to one prompt. Both are as in `understudy generate`,
        whose answer n to its first prompt is the same.
      temperature, top_k, top_p, min_p: see models.sampling.SamplingConfig.
      of_draws, shows: see draws.Draws.
    """

    prompt: tuple[int, ...]
    most: int
    seed: int = 0
    choice: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    of_draws: bool = False
    shows: bool = False

    @property
    def key(self) -> UInt[np.ndarray, "2"]:
        low, high = self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF
        key = jax.random.key(np.uint32(low))
        key = jax.random.fold_in(key, np.uint32(high)) if high else key
        return np.asarray(jax.random.key_data(jax.random.fold_in(key, self.choice)))


class Token(NamedTuple):
    """A new token, its log-probability, and those of the likeliest where they were asked for: (id, log-probability)."""

    id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


class Programs(NamedTuple):
    """What is compiled for one room; each takes the state and gives it back."""

    start: Callable[[], Slots]
    admit: Callable[..., Slots]
    advance: Callable[..., tuple[Slots, Any]]
    shift: Callable[..., Slots]


class Rows:
    """See above. All of a row's cache lies before one index, which all rows share (models.slots).

    Args:
      model, params: what decodes.
      vocab_size: ids from here on are never chosen.
      stop_tokens: ids that end a row.
      count: A.
      longest: the most tokens of a prompt and its answer.
    """

    def __init__(
        self, model: Model, params: Any, vocab_size: int, stop_tokens: tuple[int, ...], count: int, longest: int
    ):
        self.model, self.vocab_size, self.stop_tokens = model, vocab_size, stop_tokens
        self.count, self.longest = count, longest
        self._params = jax.jit(model.unstack, static_argnums=1)(params, count)
        self._programs = functools.cache(self._make_programs)
        self.clear()

    def clear(self) -> None:
        """Forgets all rows."""
        self._asks: dict[int, Ask] = {}
        self._cancelled: set[int] = set()
        self._sent = np.zeros(self.count, np.int32)
        self._room = 0  # tokens of a prompt and its answer that a row has room for now
        self._state: Slots | None = None
        self._queue: DrawQueue | None = None

    @property
    def used(self) -> int:
        """How many rows are being decoded, or were cancelled since the last step."""
        return len(self._asks)

    @property
    def free(self) -> int:
        """How many more rows can be admitted."""
        return self.count - self.used

    def cache_bytes(self) -> int:
        """Bytes of the cache once there is a request of the greatest length."""
        state = jax.eval_shape(self._programs(self._room_for(self.longest)).start)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache))

    def warm_up(self) -> None:
        """Compiles for the smallest room, so that the first request needn't wait for it."""
        self.admit(Ask((0,), 1 + 2 * STEPS))
        self.step()
        self._state = self._programs(self._room).shift(self._state)
        self.clear()

    def admit(self, ask: Ask) -> int:
        """Reads a prompt into a free row, and returns its number."""
        room = self._room_for(len(ask.prompt) + ask.most)
        if room > self._room or not self._asks:
            self._make_room(room)
        row = next(i for i in range(self.count) if i not in self._asks)
        queue = self._queue
        queue.prompts[row, -len(ask.prompt) :] = ask.prompt
        queue.lengths[row], queue.limits[row], queue.keys[row] = len(ask.prompt), ask.most, ask.key
        for name, values in queue.draws._asdict().items():
            values[row] = getattr(ask, name)
        self._asks[row], self._sent[row] = ask, 0
        self._state = self._programs(self._room).admit(self._params, self._sendable(), self._state, np.int32(row))
        return row

    def cancel(self, row: int) -> None:
        """Ends a row. It is free after the next step."""
        self._queue.limits[row] = 0
        self._cancelled.add(row)

    def step(self) -> dict[int, tuple[list[Token], str]]:
        """Up to STEPS tokens more for every row: row -> what is new, and how it ended: "stop" by a stop token, "length"
        at its limit, "" where it goes on. Rows that have ended are free."""
        programs = self._programs(self._room)
        if int(self._state.index) + STEPS > cache_size(self._state.cache):
            self._state = programs.shift(self._state)
        self._state, news = programs.advance(self._params, self._sendable(), self._state, self._sent.copy())
        lengths, tokens, chances = jax.device_get(news)
        for row in self._cancelled:
            del self._asks[row]
        self._cancelled.clear()
        out = {}
        for row, ask in list(self._asks.items()):
            new = [
                Token(int(tokens[row, i]), float(chances.chosen[row, i]), _pairs(chances, row, i) if ask.shows else ())
                for i in range(lengths[row] - self._sent[row])
            ]
            self._sent[row] = lengths[row]
            end = "length" if lengths[row] >= ask.most else ""
            end = "stop" if new and new[-1].id in self.stop_tokens else end
            if end:
                del self._asks[row]
            out[row] = (new, end)
        return out

    def _sendable(self) -> DrawQueue:
        """A copy of the queue: a device may read its arrays after the call that gets them has returned."""
        return jax.tree.map(np.copy, self._queue)

    def _room_for(self, tokens: int) -> int:
        room = min(_LEAST, self.longest)
        while room < tokens:
            room = min(2 * room, self.longest)
        return room

    def _make_room(self, room: int) -> None:
        """Lays rows out for longer requests; where there are no rows, for requests of this length."""
        if room == self._room:
            return
        old, state, asks = self._queue, self._state, self._asks
        self._room, width = room, self._width(room) - self.model.virtual_tokens
        none = np.zeros(self.count, np.int32)
        self._queue = DrawQueue(
            prompts=np.zeros((self.count, width), np.int32),
            lengths=none.copy(),
            limits=none.copy(),
            keys=np.zeros((self.count, *jax.random.key_data(jax.random.key(0)).shape), np.uint32),
            draws=Draws(
                *(np.zeros(self.count, np.float32), none.copy(), np.ones(self.count, np.float32)),
                *(np.zeros(self.count, np.float32), np.zeros(self.count, bool), np.zeros(self.count, bool)),
            ),
        )
        self._state = self._programs(room).start() if not asks else _widened(state, self._programs(room).start)
        if asks:
            self._queue = old._replace(prompts=self._queue.prompts)  # prompts are in the cache already

    def _width(self, room: int) -> int:
        """P: entries before the first that a row may write to, whole pieces."""
        return -(-(room + self.model.virtual_tokens) // _PIECE) * _PIECE

    def _make_programs(self, room: int) -> Programs:
        config = SamplingConfig(max_new_tokens=room - 1, stop_tokens=self.stop_tokens)
        decoder = RowDecoder(self.model, config, self.vocab_size)
        width = self._width(room)

        def start() -> Slots:
            cache = self.model.init_cache(self.count, width + max(_SLACK, width // 8))
            none = jnp.zeros(self.count, jnp.int32)
            done = jnp.ones(self.count, bool)
            return Slots(jnp.int32(width), none, none + width, none, none, done, cache, decoder.empty(self.count))

        def admit(params: Any, queue: DrawQueue, slots: Slots, row: Int[Array, ""]) -> Slots:
            queue = self._ready(queue)
            return decoder.refill(params, queue, _released(queue, slots), row[None], jnp.int32(1))

        def advance(params: Any, queue: DrawQueue, slots: Slots, sent: Int[Array, " A"]) -> tuple[Slots, Any]:
            queue = self._ready(queue)
            slots = decoder.extend(params, queue, _released(queue, slots), tokens=STEPS)
            return slots, _news(slots, sent)

        def shift(slots: Slots) -> Slots:
            return decoder.shift(DrawQueue(jnp.zeros((self.count, width), jnp.int32), *(None,) * 4), slots)

        return Programs(jax.jit(start), *(jax.jit(f, donate_argnames="slots") for f in (admit, advance, shift)))

    def _ready(self, queue: DrawQueue) -> DrawQueue:
        """The queue with typed keys, and with the model's virtual tokens before each prompt."""
        prompts, lengths = virtual.ahead(self.model, jnp.asarray(queue.prompts), queue.lengths)
        return queue._replace(prompts=prompts, lengths=lengths, keys=jax.random.wrap_key_data(queue.keys))


def _released(queue: DrawQueue, slots: Slots) -> Slots:
    """Slots of rows that may have no token more are done."""
    return slots._replace(done=slots.done | (queue.limits[slots.row] == 0))


def _news(slots: Slots, sent: Int[Array, " A"]) -> tuple[Array, Array, Any]:
    """How many tokens each row has, and those after the first `sent`, [A, T], with their log-probabilities."""
    out = slots.out
    places = jnp.minimum(sent[:, None] + jnp.arange(STEPS + 1)[None], out.tokens.shape[1] - 1)
    rows = jnp.arange(len(sent))[:, None]
    tokens, chances = jax.tree.map(lambda x: x[rows, places], (out.tokens, out.logprobs))
    return out.lengths, tokens, chances


def _widened(state: Slots, start: Callable[[], Slots]) -> Slots:
    """The state in a larger room: its cache lies before the index as before."""
    fresh = jax.eval_shape(start)
    before = cache_size(fresh.cache) - cache_size(state.cache)
    more = lambda x, like: [b - a for a, b in zip(x.shape, like.shape, strict=True)]  # noqa: E731
    cache = jax.tree.map(lambda x, like: jnp.pad(x, [(n, 0) for n in more(x, like)]), state.cache, fresh.cache)
    out = jax.tree.map(lambda x, like: jnp.pad(x, [(0, n) for n in more(x, like)]), state.out, fresh.out)
    return state._replace(index=state.index + before, first=state.first + before, cache=cache, out=out)


def _pairs(chances: Any, row: int, place: int) -> tuple[tuple[int, float], ...]:
    ids, values = chances.ids[row, place].tolist(), chances.likeliest[row, place].tolist()
    return tuple(zip(ids, values, strict=True))
