"""Data: tokenising, from the text and from the cache; batches; packing."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from research import config as config_lib
from research.bench import measure
from research.bench.types import Bench, Result, in_ms
from research.sources import dataset, packing


def data(bench: Bench) -> Iterator[Result]:
    """The config's data with bytes and with a BPE: tokenising its texts, preparing it from the text and from the cache;
    batches; packing."""
    for kind in ("byte", "bpe"):
        yield _prepare(bench.config, kind)
    length = bench.config.seq_len
    lengths = np.random.default_rng(0).integers(1, length + 1, 1_000_000)
    seconds = measure.spread(measure.timed(lambda: packing.best_fit_decreasing(lengths, length), 3))
    record = {"case": "packing", "examples": len(lengths), "seconds": seconds}
    yield record, f"packing a million examples: {in_ms(seconds)}"


def _prepare(config: config_lib.Config, kind: str) -> Result:
    """What the data takes with a kind of tokenizer."""
    tokenizer = dataclasses.replace(config.tokenizer, kind=kind)
    with tempfile.TemporaryDirectory() as folder:
        spec = dataclasses.replace(config_lib.data_spec(config), cache_dir=folder)
        began = time.perf_counter()
        corpus = dataset.load(spec, tokenizer, seed=config.seed)
        first = time.perf_counter() - began
        texts = _texts(corpus)
        began, cpu = time.perf_counter(), time.process_time()
        tokens = sum(len(ids) for ids in corpus.tokenizer.encode_batch(texts))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        warm = measure.spread(measure.timed(lambda: dataset.load(spec, tokenizer, seed=config.seed), 5))
        batches = measure.spread(_batch_seconds(config, corpus))
    record = {
        "case": kind,
        "tokens": tokens,
        "tokenize_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu,
        "first_seconds": first,
        "cached_seconds": warm,
        "packing_efficiency": corpus.report["train"]["packing_efficiency"],
        "batch_seconds": batches,
        "batches_per_second": 1 / batches["median"],
    }
    text = (
        f"{kind}: {record['tokens_per_second'] / 1e6:.3g} M tokens/s, "
        f"{record['tokens_per_cpu_second'] / 1e6:.3g} M a core; all is ready after {first:.3g} s the first time, "
        f"from the cache {in_ms(warm)}; {record['batches_per_second']:.4g} batches/s"
    )
    return record, text


def _batch_seconds(config: config_lib.Config, corpus: Any, n: int = 50) -> list[float]:
    """Seconds of each of n batches, after one."""
    source = dataset.make_source(corpus.train, batch_size=config.batch_size, seed=config.seed)
    state, seconds = source.init(), []
    for _ in range(n + 1):
        began = time.perf_counter()
        _, state = source.next(state)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _texts(corpus: Any, most: int = 2_000_000) -> list[str]:
    """Texts of the training data, of at most so many tokens: the pieces that were packed."""
    texts, tokens = [], 0
    for rows, _ in corpus.train:
        for row in range(len(rows)):
            if tokens >= most:
                break
            batch = rows.batch(np.array([row]))
            ids, segments = batch["tokens"][0], batch["segment_ids"][0]
            texts += [corpus.tokenizer.decode(ids[segments == n].tolist()) for n in range(1, segments.max() + 1)]
            tokens += int((segments > 0).sum())
    return texts
