"""A run's policy as it was while it was trained: what it trains apart from the rest, with Adam's moments."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research import config as config_lib
from research import optim, params
from research.devices import sharding
from research.errors import InputError
from research.loading import names, runs
from research.models import adapters, transformer
from research.pretrained import checkpoints, wholeness
from research.sources import tokenizers


class TrainedPolicy(NamedTuple):
    """What a run had trained by one of its checkpoints.

    Attributes:
      step: of the checkpoint.
      own: what the run trains, whose layers may lie in pieces, float32.
      first, second: Adam's moments of it; None of a run that wasn't asked for them.
      rate: the learning rate of the step that led there.
    """

    step: int
    own: Any
    first: Any
    second: Any
    rate: float


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedRun:
    """The policy of a run.

    Attributes:
      workdir: of the run.
      config: of the run.
      mesh: to lay parameters out on.
    """

    workdir: str
    config: config_lib.Config
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def model(self) -> transformer.Model:
        """With its adapter beside the kernels."""
        tokenizer = tokenizers.load_tokenizer(self.workdir)
        adapter = adapters.load(self.config.adapter, tokenizer=tokenizer)
        return transformer.make_model(config_lib.model_config(self.config, tokenizer.size), self.config_rules, adapter)

    @property
    def config_rules(self) -> Any:
        """Logical axis -> mesh axis."""
        return sharding.make_rules(self.config.rules)

    @functools.cached_property
    def whole(self) -> Any:
        """All parameters, at the newest checkpoint; those that aren't trained in the compute dtype."""
        start = names.make_start(self.config, "policy", self.model)
        specs = transformer.in_compute_dtype(self.model)
        placements = params.shardings(specs, self.mesh, self.config_rules)
        return runs.read_run(self.workdir, start, specs, placements)

    def at(self, step: int, *, moments: bool) -> TrainedPolicy:
        """What was trained by a checkpoint.

        Raises:
          InputError: there is no such checkpoint, or it has no moments of Adam.
        """
        trained = checkpoints.parameter_names(self.workdir, step=step).get("policy", {})
        specs = params.named(self.model.specs, trained)
        where = dict(params.named_leaves(params.shardings(self.model.specs, self.mesh, self.config_rules)))
        own = runs.read_trained(self.workdir, "policy", specs, where, step=step)
        first, second = self._moments(step, own) if moments else (None, None)
        rate = float(optim.make_schedule(self.config.optimizer, self.config.steps)(max(0, step - 1)))
        return TrainedPolicy(step, own, first, second, rate)

    def _moments(self, step: int, own: Any) -> tuple[Any, Any]:
        """Adam's moments of what is trained, float32."""
        if self.config.optimizer.moments != "float32":
            raise InputError(
                f"{self.workdir}: has moments in 8 bits (optimizer.moments = {self.config.optimizer.moments!r}), which "
                "aren't read here. Take a run that has them in float32, or the option preconditioner = 'none'."
            )
        folder = Path(self.workdir).resolve() / checkpoints.FOLDER / str(step) / "state"
        tree = checkpoints.metadata(folder)
        places: dict[str, dict[str, str]] = {"mu": {}, "nu": {}}
        for path, _ in jax.tree_util.tree_leaves_with_path(tree):
            if there := re.fullmatch(r"opt_state/(?:.*/)?(mu|nu)/policy/(.*)", params.path_name(path)):
                places[there[1]][there[2]] = there[0]
        leaves = dict(params.named_leaves(own))
        if lacking := sorted(leaves.keys() - (places["mu"].keys() & places["nu"].keys())):
            raise InputError(
                f"{self.workdir}: its checkpoint of step {step} has no moments of Adam of {lacking[0]} (optimizer.name "
                f"= {self.config.optimizer.name!r}). Take a run with adamw, or the option preconditioner = 'none'."
            )
        wanted = {
            place[name]: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
            for place in places.values()
            for name, x in leaves.items()
        }
        values = checkpoints.restore_named(folder, tree, wanted)

        def tree_of(kind: str) -> Any:
            return jax.tree_util.tree_map_with_path(lambda path, _: values[places[kind][params.path_name(path)]], own)

        return tree_of("mu"), tree_of("nu")


def open_trained(workdir: str, mesh: jax.sharding.Mesh) -> TrainedRun:
    """A run, as far as it was trained.

    Raises:
      InputError: it is no run, or has no checkpoint.
    """
    if not checkpoints.steps(workdir):
        raise InputError(f"{workdir}: isn't the workdir of a run with checkpoints, whose gradients are asked for.")
    about = wholeness.read_record(workdir)
    return TrainedRun(workdir, config_lib.parse(about["config"]), mesh)
