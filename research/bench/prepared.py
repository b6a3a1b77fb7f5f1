"""A train step on made-up data, compiled and ready to run."""

import dataclasses
import json
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research import objectives, params
from research.bench import measure
from research.config import Config, RoleSection
from research.models import kernels
from research.planning.abstract import Described
from research.pretrained import peft, save
from research.run import assemble
from research.sources import fields


class Prepared(NamedTuple):
    """A compiled train step, and what it takes. `state` is given away by the first call."""

    parts: Any  # the run's
    compiled: Any
    state: Any
    frozen: Any
    batch: Any
    rates: Any
    numpy_batch: Mapping[str, np.ndarray]
    compile_seconds: float

    def away_from_zero(self) -> "Prepared":
        """The same with random numbers for trained parameters that begin as 0: an adapter that changes nothing would
        hide what others make of it."""
        keys = jax.random.PRNGKey(1)

        def one(path: tuple, x: jax.Array) -> jax.Array:
            key = jax.random.fold_in(keys, zlib.crc32(params.path_name(path).encode()))
            return jnp.where(jnp.any(x), x, jax.random.normal(key, x.shape, x.dtype) / 50)

        move = jax.jit(
            lambda tree: jax.tree_util.tree_map_with_path(one, tree),
            out_shardings=jax.tree.map(lambda x: x.sharding, self.state.params),
        )
        return self._replace(state=self.state.replace(params=move(self.state.params)))


def prepare(run: Described, *, packed: bool = True) -> Prepared:
    """Assembles a run's step as research.run does; to be called under jax.set_mesh.

    Args:
      run: the run, whose parameters are made at random and whose batch is made up.
      packed: rows of the batch hold several documents.
    """
    parts, seed = run.assemble(), run.config.seed
    batch = fields.fake(parts.batch, run.vocab_size, packed=packed, seed=seed)
    specs = {role: specs for role, specs in parts.roles.frozen.items() if role not in parts.roles.partial}
    placed = {role: jax.tree.map(lambda x: x.sharding, parts.frozen[role]) for role in specs}
    began = time.perf_counter()
    compiled = parts.step.lower(parts.state, parts.frozen, parts.batch, parts.rates).compile()
    state, frozen = parts.begin(np.uint32(seed & 0xFFFFFFFF))
    return Prepared(
        parts,
        compiled,
        state,
        frozen | jax.jit(lambda key: params.init(specs, key), out_shardings=placed)(jax.random.PRNGKey(seed)),
        {name: jax.device_put(x, parts.batch[name].sharding) for name, x in batch.items()},
        assemble.learning_rates(run.config, parts),
        batch,
        time.perf_counter() - began,
    )


class Stepper:
    """Runs a prepared step. Its calls are runners for `in_turn`; `out` holds the last metrics, and `program` is what is
    called, at first `compiled`."""

    def __init__(self, step: Prepared):
        self.compiled, self.state, self.frozen, self.batch = step.compiled, step.state, step.frozen, step.batch
        self.rates, self.program = step.rates, step.compiled

    def __call__(self, n: int) -> list[float]:
        return measure.timed(self.step, n)

    def step(self) -> None:
        """Makes a step."""
        self.update()

    def update(self) -> None:
        """Makes an update."""
        self.state, self.out = self.program(self.state, self.frozen, self.batch, self.rates)
        jax.block_until_ready((self.state, self.out))


def with_objective(config: Config, name: str) -> Config:
    """The config with one objective on the same model; what it wants of other roles is of the policy's architecture."""
    spec = {"terms": {name: 1.0}, **{k: v for k, v in config.objective.items() if k == name}}
    term = objectives.load(spec)[name].objective
    described = RoleSection(**{**vars(config.model), "init_from": ""})
    roles = {role: config.roles.get(role, described) for role in (*term.frozen, *term.trainable) if role != "policy"}
    model = config.model
    classes = (config.data.num_classes or len(config.data.labels) or 2) if "label_probs" in term.fields else term.labels
    if classes and not model.num_labels:
        model = dataclasses.replace(model, num_labels=classes)
    quiet = dataclasses.replace(config.eval, generate=0)  # nothing is evaluated, and a classifier can't answer
    return dataclasses.replace(config, objective=spec, roles=roles, model=model, eval=quiet)


def write_policy(folder: str, step: Prepared, config: Config) -> None:
    """Writes the policy as transformers does, and its adapter as PEFT does.

    Args:
      folder: for config.json, safetensors, and adapter/.
      step: its parameters.
      config: of the run.

    Raises:
      InputError: transformers has no such architecture, or PEFT no such adapter.
    """
    model, own = step.parts.models["policy"], step.state.params["policy"]
    whole = params.join(own, step.frozen.get("policy", {}))
    write_model(folder, model.config, params.stacked(kernels.bare(whole)))
    if config.adapter:
        _, added = params.split(whole, params.like(kernels.bare(whole), whole))
        leaves = peft.leaves_of(added, model.specs) | peft.leaves_of(own, model.specs)
        options = config.adapter
        trained = peft.Trained(options["kind"], bool(options.get("rslora")), leaves, {}, folder, {})
        peft.write(Path(folder, "adapter"), save.choose(model.config, {})[0], model.config, trained)


def write_model(folder: str, model: Any, values: Any) -> int:
    """Writes a model as transformers does, in float32.

    Args:
      folder: for config.json and safetensors.
      model: its ModelConfig.
      values: its parameters.

    Returns:
      Bytes of the parameters.

    Raises:
      InputError: transformers has no such architecture.
    """
    family, described = save.choose(model, {})
    total = save.save(Path(folder), family, model, values, lambda name: "float32", int(5e9)).sizes
    Path(folder, "config.json").write_text(json.dumps({**described, "torch_dtype": "float32"}))
    return sum(total.values())
