"""What a role of a run begins with: the parameters of another model, or random ones."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import params
from research.devices import compilation
from research.loading.types import AdapterSource, Base, ModelSource
from research.models import added_rows, transformer
from research.models.specs import make_specs
from research.ops import quantized


@dataclasses.dataclass(frozen=True)
class Start:
    """What a role of a run begins with: the parameters of another model, or random ones.

    Attributes:
      role: its name.
      model: what it computes.
      seed: of the run.
      base: the model that its parameters are read from; None for random ones.
      new_rows: how the rows of added tokens begin; see models.added_rows.
      frozen_dtype: of the run's config.
      open_adapter: the base -> the adapter whose parameters the model's adapter begins with; None where they are drawn.
    """

    role: str
    model: transformer.Model
    seed: int
    base: Base | None = None
    new_rows: str = "mean"
    frozen_dtype: str = "auto"
    open_adapter: Callable[[ModelSource], AdapterSource] | None = None

    def read(self, specs: Any, placements: Any) -> Any:
        """The initial parameters, each in its spec's dtype; kernels whose specs are quantised are as they are read.

        A classifier made of a language model takes all but the head from it. Tokens that the model has beyond those of
        the other begin as `new_rows` says.

        Args:
          specs: of the model, its layers in one stack.
          placements: a NamedSharding for each.

        Raises:
          InputError: there is no such model, or it has other parameters.
        """
        if self.base is None:
            return self.draw(specs, placements)
        base = self.base.open()
        if self.model.adapter is None or self.model.of:
            return self._read_model(base, specs, placements)
        return self._read_with_adapter(base, specs, placements)

    def _read_model(self, base: ModelSource, specs: Any, placements: Any) -> Any:
        """The parameters of the model, without an adapter's."""
        if self.model.config.added_rows:
            return self._read_with_new_rows(base, specs, placements)
        return self._read_body(base, specs, placements)

    def _read_with_adapter(self, base: ModelSource, specs: Any, placements: Any) -> Any:
        """The same with those of the adapter, which are drawn, and begin as it says."""
        own = params.like(make_specs(self.model.config), specs)
        (model, added), (where, beside) = params.split(specs, own), params.split(placements, own)
        if self.model.adapter.init:
            model = params.held_in(quantized.float_specs(model), jnp.float32)
            where = params.shardings(model, jax.tree.leaves(where)[0].mesh, self.model.rules)
        values = params.join(self._read_model(base, model, where), self._draw(added, beside))
        if self.model.adapter.init is not None:
            finish = functools.partial(adapted, self.model, specs)
            donated = () if quantized.any_in(specs) else 0  # quantised kernels have no room for others
            begin = jax.jit(finish, donate_argnums=donated, out_shardings=placements)
            values = begin(values, initial_keys(self.seed)[0])
        return self.open_adapter(base).fill(values) if self.open_adapter else values

    def _read_body(self, base: ModelSource, specs: Any, placements: Any) -> Any:
        """What the other model has of the parameters; a head that it hasn't is drawn."""
        if self.model.config.num_labels == base.config.num_labels:
            return base.read(specs, placements)
        head = {name: spec for name, spec in specs.items() if name in transformer.HEAD}
        c = dataclasses.replace(base.config, num_labels=0)
        body = params.overlay(transformer.make_model(c).specs, {k: v for k, v in specs.items() if k not in head})
        mesh = jax.tree.leaves(placements)[0].mesh
        values = base.read(body, params.shardings(body, mesh, base.rules))
        fresh = self._draw(head, {name: placements[name] for name in head})
        return {name: fresh[name] if name in fresh else values[name] for name in specs}

    def _read_with_new_rows(self, base: ModelSource, specs: Any, placements: Any) -> Any:
        """The same, where tokens were added to the other model's."""
        c, mesh = self.model.config, jax.tree.leaves(placements)[0].mesh
        fewer = added_rows.before(c, specs, base.config.vocab_size)
        grown = {name: spec for name, spec in fewer.items() if name in added_rows.grown_names(c)}
        where = {name: placements[name] for name in fewer} | params.shardings(grown, mesh, base.rules)
        values = self._read_body(base, fewer, where)
        noise = self._draw_noise(mesh) if self.new_rows == "random" else {}
        names = [name for name in specs if name in grown or name not in fewer]
        to = {name: placements[name] for name in names}
        grow = jax.jit(functools.partial(added_rows.grow, c), out_shardings=to)
        return values | grow({name: values[name] for name in grown}, noise)

    def _draw_noise(self, mesh: jax.sharding.Mesh) -> Any:
        specs = added_rows.noise_specs(self.model.config)
        return self._draw(specs, params.shardings(specs, mesh))

    def draw(self, specs: Any, placements: Any) -> Any:
        """Random parameters: those of a whole run with this seed, whatever else it has."""
        return self._jitted(lambda key: adapted(self.model, specs, self._initial(specs, key), key), placements)

    def draw_adapter(self, placements: Any, specs: Any = None) -> Any:
        """The parameters of the model's adapter alone, as they are before its `init`.

        Args:
          placements: of the model and the adapter.
          specs: the same; by default in float32.
        """
        specs = self.model.specs if specs is None else specs
        own = params.like(transformer.make_specs(self.model.config), specs)
        return self._draw(params.split(specs, own)[1], params.split(placements, own)[1])

    def _draw(self, specs: Any, placements: Any) -> Any:
        """The same of some of the parameters, as they are before an adapter's `init`; some kinds add none."""
        if not specs:
            return {}
        return self._jitted(lambda key: self._initial(specs, key), placements)

    def _initial(self, specs: Any, key: jax.Array) -> Any:
        return params.init({self.role: quantized.float_specs(specs)}, key)[self.role]

    def _jitted(self, draw: Callable[[jax.Array], Any], placements: Any) -> Any:
        options = compilation.compiler_options(jax.tree.leaves(placements)[0].mesh)
        return jax.jit(draw, out_shardings=placements, compiler_options=options)(initial_keys(self.seed)[0])

    def held(self, specs: Any) -> Any:
        """The specs of parameters as the run holds them where it doesn't train them."""
        return quantized.held_in(specs, self.frozen_dtype) if self.frozen_dtype in quantized.KINDS else specs

    def fingerprint(self, values: Any) -> dict[str, tuple[float, float]]:
        """params.fingerprint of parameters, as the run holds them where it doesn't train them."""
        if self.frozen_dtype in quantized.KINDS:
            specs = self.held({name: self.model.specs[name] for name in values})
            where = params.shardings(specs, jax.tree.leaves(values)[0].sharding.mesh, self.model.rules)
            values = jax.jit(lambda values: quantized.hold(values, specs), out_shardings=where)(values)
        return params.fingerprint(values)


def adapted(model: transformer.Model, specs: Any, values: Any, key: jax.Array) -> Any:
    """A model's parameters and those of its adapter as they begin, from those that were read or drawn.

    Args:
      model: with an adapter or without.
      specs: of the result, for its dtypes; some kernels may be quantised, which those of `values` aren't yet.
      values: as they were read or drawn.
      key: of the run's initial parameters.
    """
    if model.adapter is None or model.of or model.adapter.init is None:
        return quantized.hold(values, specs)
    key = jax.random.fold_in(key, np.uint32(zlib.crc32(b"adapter")))
    return quantized.hold(model.adapter.init(values, key, model._replace(specs=specs)), specs)


def initial_keys(seed: int) -> jax.Array:
    """A run's two keys: of its initial parameters, and of its steps."""
    return jax.random.split(jax.random.PRNGKey(np.uint32(seed & 0xFFFFFFFF)), 2)
