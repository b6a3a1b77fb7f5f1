"""What TRL is to read of a step that learns from preferences: the same answers, the same reference, the same loss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research import params
from research.bench import measure, prepared
from research.config import Config
from research.models import kernels
from research.objectives.types import next_token_targets

# Kind of our objective -> TRL's loss_type; of those that have no option but beta.
LOSS_TYPES = {
    "sigmoid": "sigmoid",
    "hinge": "hinge",
    "ipo_mean": "ipo",
    "nca": "nca_pair",
    "sppo": "sppo_hard",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
}
REFERENCE = "reference"  # the role, and its folder


def trl_options(config: Config) -> dict[str, Any]:
    """What TRL's DPOConfig is to be given: {"loss_type", "beta", "precompute_ref_log_probs"}.

    Args:
      config: of a run whose objective is the term `preference` alone.

    Raises:
      Failed: TRL has no such objective, or no such reference.
    """
    if list(config.objective["terms"]) != ["preference"]:
        raise measure.Failed("trl knows preference alone")
    term = config.objective["terms"]["preference"]
    options = {
        "kind": "sigmoid",
        **(term if isinstance(term, Mapping) else {}),
        **config.objective.get("preference", {}),
    }
    others = set(options) - {"kind", "beta", "cached"}
    if options["kind"] not in LOSS_TYPES or others:
        raise measure.Failed(f"trl knows kind of {', '.join(LOSS_TYPES)}, with beta and cached alone")
    role = config.roles.get(REFERENCE)
    if role is not None and role.of:
        raise measure.Failed("trl knows a reference of its own, or a cached one")
    cached = bool(options.get("cached"))
    beta = 0.1 if options.get("beta") is None else options["beta"]
    return {"loss_type": LOSS_TYPES[options["kind"]], "beta": beta, "precompute_ref_log_probs": cached}


def write_pairs(folder: str, step: prepared.Prepared, config: Config) -> None:
    """Writes what TRL reads, if it isn't there: the policy as transformers has it, pairs.npz and, where a model is the
    reference, its files into the folder `reference`.

    Raises:
      InputError: transformers has no such architecture.
    """
    if Path(folder, "pairs.npz").exists():
        return
    prepared.write_policy(folder, step, config)
    np.savez(f"{folder}/pairs.npz", **documents(step.numpy_batch))
    if REFERENCE in step.frozen:
        target = Path(folder, REFERENCE)
        target.mkdir(exist_ok=True)
        model = step.parts.models[REFERENCE].config
        prepared.write_model(str(target), model, params.stacked(kernels.bare(step.frozen[REFERENCE])))


def documents(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The documents of a batch's pairs, padded at their ends: those with the chosen answers, then the others.

    Args:
      batch: with the fields of pairs.

    Returns:
      input_ids, attention_mask, completion_mask: [2 P, L] int64, as TRL's collator makes them.
      reference: [2 P] float32, log-prob of each answer; only where the batch has `reference_log_prob`.
    """
    pairs = [(row, pair) for row, numbers in enumerate(batch["pair"]) for pair in range(1, numbers.max() + 1)]
    counted = np.asarray(next_token_targets(batch, batch["loss_mask"])[1])
    places = [
        np.flatnonzero((batch["pair"][row] == pair) & (batch["side"][row] == side))
        for side in (0, 1)
        for row, pair in pairs
    ]
    rows = [row for row, _ in pairs] * 2
    out = {
        name: np.zeros((len(places), max(map(len, places))), np.int64)
        for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for i, (row, where) in enumerate(zip(rows, places, strict=True)):
        out["input_ids"][i, : len(where)] = batch["tokens"][row, where]
        out["attention_mask"][i, : len(where)] = 1
        out["completion_mask"][i, : len(where)] = batch["loss_mask"][row, where] > 0
    if "reference_log_prob" in batch:
        log_probs = batch["reference_log_prob"] * counted
        sums = [log_probs[row, where].sum() for row, where in zip(rows, places, strict=True)]
        out["reference"] = np.array(sums, np.float32)
    return out
