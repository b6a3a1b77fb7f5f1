"""What a run's data is made of, in a few numbers: equal where a run that goes on sees the same rows in one order."""

import hashlib
from typing import Any

import numpy as np

from research.sources import annotations
from research.sources.cache import digest
from research.sources.dataset import Data
from research.sources.rows import Rows
from research.sources.spec import DataSpec


def identity(data: Data, spec: DataSpec) -> dict[str, Any]:
    """Of JSON types.

    Returns:
      "sources" and "evaluated": a list of {"name", "records", "content"}, content being a hash of the tokens; "rows"
      and "held_out_rows"; "order": a hash of which tokens each row holds, and of how parts are weighed; "annotations":
      a hash of what they were made with, None without any; of a stream "streamed", its buffer, and of all else what its
      first blocks have: what follows is compared where the run goes on (sources.streaming).
    """
    known = [{name: source[name] for name in ("name", "records", "content")} for source in data.report["sources"]]
    trained = ["share" in source for source in data.report["sources"]]
    order = hashlib.blake2b(digest_size=16)
    for rows, weight in data.train:
        order.update(repr(float(weight)).encode())
        _update(order, rows)
    _update(order, data.held_out)
    order.update(str(spec.shuffle).encode())
    streamed = {"streamed": spec.buffer} if data.streams else {}
    return streamed | {
        "sources": [source for source, train in zip(known, trained, strict=True) if train],
        "evaluated": [source for source, train in zip(known, trained, strict=True) if not train],
        "rows": sum(len(rows) for rows, _ in data.train),
        "held_out_rows": len(data.held_out),
        "order": order.hexdigest(),
        "annotations": digest([repr(annotations.read_meta(spec.annotations))]) if spec.annotations else None,
    }


def _update(order: Any, rows: Rows) -> None:
    """Adds which tokens each row holds, the labels, and what is said of answers to a hash."""
    for array in (rows.start, rows.length, rows.splits, rows.labels, rows.answers):
        if array is not None:
            order.update(np.ascontiguousarray(array).tobytes())
    if rows.teacher is not None:
        _update(order, rows.teacher)
