"""Numbers of a config, and of what a run was made of by it, that causes compare with."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import loading
from research import params as params_lib
from research.diagnosis.probes.types import Measured
from research.diagnosis.settings import of_config
from research.diagnosis.subject import Subject
from research.objectives.terms import Terms


def measure(subject: Subject) -> Measured:
    """The signals of `of_config`, and
    setup/trained, setup/trained_share: how many parameters of the roles that learn are trained, and what part of them.
    setup/trained_bits: of the narrowest dtype of a trained parameter.
    setup/kernels: root mean square of the kernels, embeddings included, of what is trained and what isn't.
    setup/mlp_trained: 1 where a parameter of an MLP is trained.
    setup/rows, setup/rows_read: rows of the data, and how many have been trained on.
    setup/dropped: the share of records that are left out because they are too long.
    setup/ids_beyond: the share of the batches' tokens that the embedding has no row for.
    setup/teacher_weight: the weight of the terms that read other models, before the first step.
    setup/rope_theta_of_base: the base of RoPE, over that of the model that the policy begins with.
    setup/tokens_of_base: the share of the tokenizer's tokens that have the id which they have for that model.
    """
    signals = of_config(subject.config)
    signals |= _parameters(subject) | _rows(subject) | _weights(subject.terms)
    signals["setup/ids_beyond"] = _ids_beyond(subject)
    base = subject.config.model.init_from
    if base:
        source = loading.find(base)
        signals["setup/rope_theta_of_base"] = subject.models["policy"].config.rope_theta / source.config.rope_theta
        if source.has_tokenizer:
            own, there = subject.tokenizer.backend.get_vocab(), source.tokenizer().backend.get_vocab()
            signals["setup/tokens_of_base"] = sum(there.get(token) == i for token, i in own.items()) / len(own)
    return Measured(signals)


def _parameters(subject: Subject) -> dict[str, float]:
    trained = {role: tree for role, tree in subject.state.params.items() if role in subject.models}
    whole = {role: subject.params[role] for role in trained}
    leaves, everything = jax.tree.leaves(trained), jax.tree.leaves(whole)
    count, total = sum(x.size for x in leaves), sum(x.size for x in everything)
    named = [(params_lib.path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(whole)]
    kernels = [x for name, x in named if _is_kernel(name) and jnp.issubdtype(x.dtype, jnp.floating)]
    norm = _squares(kernels) / max(sum(x.size for x in kernels), 1)
    mlp = any("/mlp/" in params_lib.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained))
    return {
        "setup/trained": float(count),
        "setup/trained_share": count / max(total, 1),
        "setup/trained_bits": float(min((8 * x.dtype.itemsize for x in leaves), default=32)),
        "setup/kernels": math.sqrt(norm),
        "setup/mlp_trained": float(mlp),
    }


def _is_kernel(name: str) -> bool:
    """Whether a parameter is none of a norm and no bias: those may begin at anything."""
    return "norm" not in name and not name.endswith(("bias", "scale"))


def _squares(values: list[jax.Array]) -> float:
    return sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in jax.device_get(values))


def _rows(subject: Subject) -> dict[str, float]:
    data = subject.inputs.data
    rows = float(sum(len(each) for each, _ in data.train))
    counts = data.report["train"]
    dropped = float(counts.get("too_long_dropped", 0))
    signals = {"setup/rows": rows, "setup/rows_read": float(int(subject.state.step) * subject.config.batch_size)}
    if (records := float(counts.get("examples", 0)) + dropped) > 0:
        signals["setup/dropped"] = dropped / records
    return signals


def _weights(terms: Terms) -> dict[str, float]:
    """The weight of the terms with a teacher, as a share of all."""
    at = jnp.zeros((), jnp.int32)
    weights = {name: abs(float(term.coefficient(at))) for name, term in terms.items()}
    taught = [name for name, term in terms.items() if "teacher" in term.objective.frozen or _cached(term)]
    if not taught:
        return {}
    return {"setup/teacher_weight": sum(weights[name] for name in taught) / max(sum(weights.values()), 1e-30)}


def _cached(term: Any) -> bool:
    return "teacher_ids" in term.objective.fields


def _ids_beyond(subject: Subject) -> float:
    size = subject.models["policy"].config.vocab_size + subject.models["policy"].virtual_tokens
    real = beyond = 0
    for batch in jax.device_get(list(subject.batches)):
        there = batch["segment_ids"] > 0
        real, beyond = real + int(there.sum()), beyond + int(((batch["tokens"] >= size) & there).sum())
    return beyond / max(real, 1)
