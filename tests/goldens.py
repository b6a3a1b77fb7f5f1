"""Reads tests/golden (see its README)."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    name: str
    hparams: dict[str, Any]
    inputs: dict[str, Any]
    outputs: dict[str, Any]


def load(family: str) -> dict[str, Case]:
    folder = pathlib.Path(__file__).parent / "golden"
    index = json.loads((folder / f"{family}.json").read_text())
    with np.load(folder / index["npz"]) as file:
        arrays = dict(file)
    read = lambda fields: {k: arrays[v] if isinstance(v, str) else v["value"] for k, v in fields.items()}  # noqa: E731
    return {c["name"]: Case(c["name"], c["hparams"], read(c["inputs"]), read(c["outputs"])) for c in index["cases"]}
