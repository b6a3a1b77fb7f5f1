"""Greedy decoding of prompts of equal length, and of many that begin and end at different lengths."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from research import config as config_lib
from research import params
from research.bench import machine, measure, peers, prepared
from research.bench.types import Bench, Record, Result, in_ms
from research.devices import sharding
from research.models import generation, transformer
from research.models.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The policy with random parameters.

    Attributes:
      model, values: it, and its parameters in the compute dtype.
      vocab_size: of the tokenizer.
      prompt: tokens of each prompt.
      new: tokens to decode.
      unit: batch sizes are a multiple of it, so that every device has rows.
    """

    model: transformer.Model
    values: Any
    vocab_size: int
    prompt: int
    new: int
    unit: int

    def whole(self, size: int) -> int:
        """The next batch size that the mesh can divide."""
        return -(-size // self.unit) * self.unit

    def generate(self, prompts: Int[np.ndarray, "B T"], new: int) -> Callable[[], Any]:
        """A function that decodes `new` tokens of each prompt."""
        program = generation.make_generate(self.model, SamplingConfig(max_new_tokens=new), self.vocab_size)
        lengths, key = np.full(len(prompts), self.prompt, np.int32), jax.random.PRNGKey(0)
        return lambda: program(self.values, prompts, lengths, key)

    def bytes_per_token(self, size: int) -> float:
        """Bytes that a step of decoding reads: weights but for the look-up, and the cache as it is half-way."""
        c = self.model.config
        look_up = 0 if c.tie_embeddings else self.values["embed"].nbytes
        weights = sum(x.nbytes for x in jax.tree.leaves(self.values)) - look_up
        cached = 2 * c.num_layers * c.num_kv_heads * c.dim_per_head * size * (self.prompt + self.new / 2)
        return weights + cached * jax.numpy.dtype(c.dtype).itemsize


def decode(bench: Bench) -> Iterator[Result]:
    """Greedy decoding of prompts of equal length; then of many that begin and end at different lengths."""
    decoder, rng = _decoder(bench), np.random.default_rng(0)
    move = machine.copy(bench.mesh)
    with tempfile.TemporaryDirectory() as folder:
        if bench.against:
            prepared.write_model(folder, decoder.model.config, decoder.values)
        for size in sorted({decoder.whole(size) for size in bench.decode}):
            prompts = rng.integers(0, bench.vocab_size, (size, decoder.prompt)).astype(np.int32)
            yield _decode_batch(bench, decoder, prompts, folder, move)
    yield _decode_queue(bench, decoder, decoder.whole(max(bench.decode)))


def _decoder(bench: Bench) -> Decoder:
    rules = sharding.make_rules(bench.config.rules)
    model = transformer.make_model(config_lib.model_config(bench.config, bench.vocab_size), rules)
    specs, longest = transformer.in_compute_dtype(model), model.config.max_length
    placed = params.shardings(specs, bench.mesh, rules)
    values = jax.jit(lambda key: params.init(specs, key), out_shardings=placed)(jax.random.PRNGKey(0))
    unit = sharding.num_parts(rules["batch"], bench.mesh)
    return Decoder(model, values, bench.vocab_size, min(32, longest // 2), min(128, longest // 2), unit)


def _decode_batch(
    bench: Bench, decoder: Decoder, prompts: np.ndarray, folder: str, move: tuple[machine.Runner, float]
) -> Result:
    """Decodes a batch, in turn with a copy of memory (`move`: a runner, and its bytes) and with peers."""
    size, new, dtype = len(prompts), decoder.new, decoder.model.config.dtype
    whole = decoder.generate(prompts, new)
    runners = {"": machine.ready(whole), " first": machine.ready(decoder.generate(prompts, 1)), " copy": move[0]}
    np.savez(f"{folder}/batch.npz", prompts=prompts)
    with peers.Others(bench.mkl) as others:
        for peer in bench.against:
            others.start(peer, "decode", {"folder": folder, "new_tokens": new, "dtype": dtype})
        tokens = np.asarray(whole().tokens)
        measure.forget_peak()
        runners |= others.runners()
        seconds = measure.in_turn(runners, bench.count(runners[""](1)[0], 15))
        times, first = measure.spread(seconds[""]), measure.spread(seconds[" first"])
        per_token = (times["median"] - first["median"]) / max(new - 1, 1)
        read, bandwidth = decoder.bytes_per_token(size), move[1] / measure.spread(seconds[" copy"])["median"]
        record = {
            "case": f"batch {size}",
            "seconds": times,
            "tokens_per_second": size * new / times["median"],
            "prefill_seconds": first,
            "seconds_per_token": per_token,
            "prompt": decoder.prompt,
            "new_tokens": new,
            "dtype": dtype,
            "bytes_per_token": read,
            "bytes_per_second": bandwidth,
            "of_bandwidth": read / bandwidth / per_token,
            "resident_peak": measure.peak_resident(),
        }
        record |= others.compare(
            seconds,
            lambda them: {"tokens_per_second": size * new / them["median"], "ratio": them["median"] / times["median"]},
        )
    for answer in (a for a in record.get("against", {}).values() if "tokens" in a):
        answer["same_tokens"] = float(np.mean(np.asarray(answer.pop("tokens")) == tokens))
    text = (
        f"batch {size}: {record['tokens_per_second']:.5g} tokens/s, prompt {in_ms(first)}, then "
        f"{1e3 * per_token:.4g} ms a token, {record['of_bandwidth']:.0%} of {bandwidth / 1e9:.3g} GB/s"
    )
    return record, text + peers.describe(record)


@dataclasses.dataclass
class Queue:
    """Many prompts of unequal lengths, whose answers end at unequal lengths too.

    Attributes:
      generate: the program, for `size` rows at once.
      values: the model's parameters.
      prompts: sorted by length.
      new_tokens: of the last run, in all.
    """

    generate: Any
    values: Any
    prompts: list[list[int]]
    size: int
    new_tokens: int = 0

    def answer(self, at_once: int) -> None:
        """Answers all prompts, so many in one queue: `size` are padded batches, all are places that are refilled."""
        self.new_tokens = 0
        for first in range(0, len(self.prompts), at_once):
            prompts = self.prompts[first : first + at_once]
            completions = generation.generate_batches(
                self.generate,
                self.values,
                prompts,
                jax.random.PRNGKey(0),
                batch_size=self.size,
                bucket=32,
                numbers=range(first, first + len(prompts)),
            )
            self.new_tokens += sum(len(completion.tokens) for completion in completions)


def _decode_queue(bench: Bench, decoder: Decoder, size: int) -> Result:
    """generate_batches, which gives the place of a row that has ended to the next prompt, against one padded batch
    after the other."""
    rng, longest = np.random.default_rng(0), min(256, decoder.model.config.max_length // 4)
    new, count = min(256, decoder.model.config.max_length // 2), 8 * size
    lengths = np.sort(np.exp(rng.uniform(np.log(max(1, longest // 32)), np.log(longest), count)).astype(int))
    prompts = [rng.integers(0, bench.vocab_size, n).tolist() for n in lengths]
    # Of random weights every token is about as likely: one that ends a row comes after 64 tokens, on average.
    stop = tuple(range(max(1, bench.vocab_size // 64)))
    config = SamplingConfig(max_new_tokens=new, temperature=1.0, stop_tokens=stop)
    generate = generation.make_generate(decoder.model, config, bench.vocab_size)
    queues = {name: Queue(generate, decoder.values, prompts, size) for name in ("padded", "refilled")}
    runners = {
        "padded": machine.ready(lambda: queues["padded"].answer(size)),
        "refilled": machine.ready(lambda: queues["refilled"].answer(count)),
    }
    seconds = measure.in_turn(runners, bench.count(runners["padded"](1)[0], 8))
    new_tokens = {name: queue.new_tokens for name, queue in queues.items()}
    record: Record = {"case": f"{count} prompts, {size} at once", "new_tokens": new_tokens}
    for name, each in seconds.items():
        times = measure.spread(each)
        record[name] = {"seconds": times, "tokens_per_second": new_tokens[name] / times["median"]}
    record["ratio"] = record["refilled"]["tokens_per_second"] / record["padded"]["tokens_per_second"]
    text = (
        f"{record['case']}, places refilled: {record['refilled']['tokens_per_second']:.5g} tokens/s, "
        f"{record['ratio']:.2f} times padded batches ({record['padded']['tokens_per_second']:.5g})"
    )
    return record, text
