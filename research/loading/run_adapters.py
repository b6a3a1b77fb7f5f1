"""The adapter of a run: put to a model, or written."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from research import params
from research.config import Config
from research.devices import sharding
from research.errors import InputError
from research.loading import frozen, runs
from research.loading.start import Start
from research.models import transformer, virtual
from research.pretrained import checkpoints, peft


@dataclasses.dataclass(frozen=True)
class RunAdapter:
    """The adapter of a run.

    Attributes:
      workdir: of the run.
      config: of the run.
      start: what its policy began with, and the model with the adapter.
      step, ema: which checkpoint, see names.find.
    """

    workdir: str
    config: Config
    start: Start
    step: int | None = None
    ema: bool = False

    def check_apart(self) -> None:
        """Raises InputError where the adapter can't be without the run's own model."""
        if self.start.model.config.added_rows:
            raise InputError(
                f"{self.workdir}: added tokens to its model, and its adapter belongs to the model with them. Name it "
                "as the model, or write it whole (understudy export --merge)."
            )

    @property
    def options(self) -> dict[str, Any]:
        """{"kind": ..., option: value}."""
        return {option: value for option, value in self.config.adapter.items() if option != "init_from"}

    def fill(self, values: Any) -> Any:
        """Parameters of a model and the adapter, with those that the run has trained in their place.

        Raises:
          InputError: the model isn't the one that the run began with.
        """
        placements = {name: x.sharding for name, x in params.named_leaves(values)}
        self._check_base(values)
        return params.put(values, self.read(placements))

    def _check_base(self, values: Any) -> None:
        """Raises InputError where a model isn't the one that the run began with."""
        shapes = {name: x.shape for name, x in params.named_leaves(values)}
        remedy = f"It began with {self.config.model.init_from!r}."
        for name, spec in params.named_leaves(self.start.model.specs):
            if name in shapes and shapes[name] != spec.shape:
                raise InputError(
                    f"{self.workdir}: was made for another model: {name} is {list(spec.shape)} there, and "
                    f"{list(shapes[name])} in this one. {remedy}"
                )
        marks = frozen.marks_of(self.workdir, "policy") or {}
        name = params.first_difference(marks, params.fingerprint(values), 1e-3)
        if name is not None:
            raise InputError(f"{self.workdir}: was made for another model: {name} has other values there. {remedy}")

    def read(self, where: Mapping[str, Any]) -> Any:
        """What the run has trained, whose layers may lie in pieces.

        Args:
          where: name of a parameter, without pieces -> its sharding.
        """
        which = {"step": self.step, "ema": self.ema}
        names = checkpoints.parameter_names(self.workdir, **which)["policy"]
        specs = params.named(self.start.model.specs, names)
        return runs.read_trained(self.workdir, "policy", specs, where, **which)

    def written(self) -> peft.Trained:
        """The adapter as the run has trained it, to be written.

        Raises:
          InputError: the model that it is for has no name, or is gone.
        """
        self.check_apart()
        start, model = self.start, self.start.model
        if start.base is None:
            raise InputError(
                f"{self.workdir}: its adapter is for a model of random parameters (model.init_from = ''), which no "
                "other tool has. Write the whole model: --merge."
            )
        placements = params.shardings(model.specs, sharding.make_mesh({}, jax.devices()[:1]), model.rules)
        drawn = start.draw_adapter(placements)
        before = start.open_adapter(start.base.open()).fill(drawn) if start.open_adapter else drawn
        own = self.read(dict(params.named_leaves(placements)))
        if model.adapter.merged:
            own = virtual.realized(params.overlay(before, own))
        leaves = peft.leaves_of(before, model.specs) | peft.leaves_of(own, model.specs)
        initial = self._initial(placements) if model.adapter.changes_base else {}
        marks = {} if initial else frozen.marks_of(self.workdir, "policy") or {}
        rslora = bool(self.options.get("rslora"))
        return peft.Trained(self.options["kind"], rslora, leaves, initial, start.base.name, marks)

    def _initial(self, placements: Any) -> dict[str, Any]:
        """The adapter's parameters before the first step, where its `init` changed the model's."""
        model = self.start.model
        whole = self.start.read(model.specs, placements)
        _, added = params.split(whole, params.like(transformer.make_specs(model.config), whole))
        return peft.leaves_of(added, model.specs)
