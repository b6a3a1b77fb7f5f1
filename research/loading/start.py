"""Models by name, wherever they come from: a run of ours, a Hugging Face folder or hub name, a .gguf file."""

import dataclasses
import functools
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research import config as config_lib
from research import params
from research.devices import compilation, sharding
from research.errors import InputError
from research.files import fingerprint, read_json, write_json
from research.models import adapters, added_rows, kernels, transformer, virtual
from research.models.adapters import Adapter
from research.models.config import ModelConfig
from research.models.specs import make_specs
from research.ops import quantized
from research.pretrained import checkpoints, peft, save
from research.pretrained import load as pretrained
from research.sources import tokenizers

BASE = "base"  # what requests call a model without its adapters
FROZEN = "frozen.json"  # in a workdir: role -> params.fingerprint of what isn't trained of it
_SHOWN = 4  # a message lists at most so many tokens
ORIGIN = "origin.json"  # in a workdir: the config.json and dtypes of the checkpoint that the run began with


class Found(NamedTuple):
    """A model that has been found; its parameters haven't been read.

    Attributes:
      name: as it was asked for.
      config: what it computes, in the default dtype of this process's devices.
      rules: logical axis -> mesh axis.
      tokenizer: () -> its tokenizer; raises InputError where there is none.
      template: how prompts are put to it.
      read: (specs, placements) -> parameters, in the specs' dtypes.
      origin: what an export writes again: {"config", "generation", "dtypes"}; empty for a model that began with us.
      adapter: what stands in front of its documents (Adapter.merged), whose parameters `read` gives where the specs
        have them; None for nothing.
      holding_error: () -> of a run that held kernels quantised its frozen_dtype, and how far they are from those that
        it began with (quantized.relative_error); None of any other model. It reads what the run began with.
      trained: the adapter of a run that has one; `read` merges it where it can be.
    """

    name: str
    config: ModelConfig
    rules: dict[str, Any]
    tokenizer: Callable[[], tokenizers.Tokenizer]
    has_tokenizer: bool
    template: str
    read: Callable[[Any, Any], Any]
    origin: dict[str, Any]
    adapter: Adapter | None = None
    holding_error: Callable[[], tuple[str, float] | None] = lambda: None
    trained: "RunAdapter | None" = None


def find(name: str, *, step: int | str | None = None, ema: bool = False) -> Found:
    """Finds a model and reads what it computes.

    Args:
      name: a run's workdir, a folder as transformers saves it, a hub name (NAME/MODEL or NAME/MODEL@REVISION), or a
        .gguf file.
      step: of a run: which of its checkpoints, or "best" by its checkpoint.best_metric; by default the newest.
      ema: of a run: take the moving average of the parameters.

    Raises:
      InputError: there is no such model, or it can't be read.
    """
    name = os.path.expanduser(name)
    if checkpoints.steps(name):
        return _find_run(name, checkpoints.best_step(name) if step == "best" else step, ema)
    if (Path(name) / "metrics.jsonl").is_file() or (Path(name) / checkpoints.FOLDER).is_dir():
        raise InputError(
            f"{name}: is the workdir of a run that has saved no checkpoint yet. Name another, or let it run."
        )
    for flag, given in (("--step", step is not None), ("--ema", ema)):
        if given:
            raise InputError(f"{flag}: {name} isn't the workdir of a run, and has no such thing. Leave it out.")
    found = pretrained.open_pretrained(name)
    c = dataclasses.replace(found.config, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    origin = {
        "config": found.json,
        "generation": found.generation,
        "dtypes": {} if found.quantized else {n: e.dtype.name for n, e in found.entries.items()},
    }
    return Found(
        name=name,
        config=c,
        rules=sharding.RULES,
        tokenizer=lambda: _tokenizer(found.where),
        has_tokenizer=tokenizers.is_there(found.where),
        template="auto",
        read=lambda specs, placements: pretrained.load(found, specs, placements),
        origin=origin,
    )


def source(name: str) -> dict[str, Any]:
    """What the parameters of a model are read from, in a few words: equal as long as they are.

    Args:
      name: see `find`.

    Returns:
      of JSON types: "step", of a run's newest checkpoint, else None; "content", a hash (see files.fingerprint).

    Raises:
      InputError: there is no such model.
    """
    if steps := checkpoints.steps(os.path.expanduser(name)):
        folder = Path(name).expanduser() / checkpoints.FOLDER / str(steps[-1])
        return {"step": steps[-1], "content": fingerprint(folder, (p for p in folder.rglob("*") if p.is_file()))}
    path = pretrained.find(name)
    if path.is_file():
        return {"step": None, "content": fingerprint(path, [path])}
    return {"step": None, "content": fingerprint(path, [path / "config.json", *path.glob("*.safetensors")])}


def _tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not tokenizers.is_there(path):
        raise InputError(f"{path}: comes without a tokenizer. Copy its tokenizer.json beside the weights.")
    return tokenizers.load_pretrained(path)


def _find_run(workdir: str, step: int | None, ema: bool) -> Found:
    record = Path(workdir) / "config.json"
    if not record.is_file():
        raise InputError(f"{workdir}: lacks config.json, which a run writes beside its checkpoints.")
    config = config_lib.parse(read_json(record)["config"])
    tokenizer = tokenizers.load_tokenizer(workdir)
    c, rules = config_lib.model_config(config, tokenizer.size), sharding.make_rules(config.rules)
    model = transformer.make_model(c, rules, adapters.load(config.adapter, tokenizer=tokenizer))
    start = _start_of(config, model)
    origin = Path(workdir) / ORIGIN
    return Found(
        name=workdir,
        config=added_rows.whole(model.adapter.grown(c) if model.adapter and model.adapter.grown else c),
        rules=rules,
        tokenizer=lambda: tokenizer,
        has_tokenizer=True,
        template=config.data.template,
        read=lambda specs, placements: _read_held(workdir, start, specs, placements, step=step, ema=ema),
        origin=read_json(origin, {}),
        adapter=model.adapter.merged if model.adapter else None,
        holding_error=functools.partial(_holding_error, workdir, start),
        trained=RunAdapter(workdir, config, model, step, ema) if config.adapter else None,
    )


@dataclasses.dataclass(frozen=True)
class Start:
    """What a role of a run begins with: the parameters of another model, or random ones.

    Attributes:
      role: its name.
      model: what it computes.
      seed: of the run.
      base: the model that its parameters are read from, or that one's name; "" for random ones.
      new_rows: how the rows of added tokens begin; see models.added_rows.
      frozen_dtype: of the run's config.
      saved: where the parameters of the model's adapter are read from, see `open_adapter`; "" where they are drawn.
    """

    role: str
    model: transformer.Model
    seed: int
    base: Found | str
    new_rows: str = "mean"
    frozen_dtype: str = "auto"
    saved: str = ""

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
        base = find(self.base) if isinstance(self.base, str) and self.base else self.base
        if not base:
            return self.draw(specs, placements)
        if self.model.adapter is None or self.model.of:
            return self._read_model(base, specs, placements)
        return self._read_with_adapter(base, specs, placements)

    def _read_model(self, base: Found, specs: Any, placements: Any) -> Any:
        """The parameters of the model, without an adapter's."""
        if self.model.config.added_rows:
            return self._read_with_new_rows(base, specs, placements)
        return self._read_body(base, specs, placements)

    def _read_with_adapter(self, base: Found, specs: Any, placements: Any) -> Any:
        """The same with those of the adapter, which are drawn, and begin as it says."""
        own = params.like(make_specs(self.model.config), specs)
        (model, added), (where, beside) = params.split(specs, own), params.split(placements, own)
        if self.model.adapter.init:
            model = params.held_in(quantized.float_specs(model), jnp.float32)
            where = params.shardings(model, jax.tree.leaves(where)[0].mesh, self.model.rules)
        values = params.join(self._read_model(base, model, where), self._draw(added, beside))
        if self.model.adapter.init is not None:
            finish = functools.partial(adapted, self.model, specs)
            begin = jax.jit(finish, donate_argnums=0, out_shardings=placements)
            values = begin(values, initial_keys(self.seed)[0])
        return open_adapter(self.saved, base).fill(values) if self.saved else values

    def _read_body(self, base: Found, specs: Any, placements: Any) -> Any:
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

    def _read_with_new_rows(self, base: Found, specs: Any, placements: Any) -> Any:
        """The same, where tokens were added to the other model's."""
        c, mesh = self.model.config, jax.tree.leaves(placements)[0].mesh
        fewer = added_rows.before(c, specs, base.config.vocab_size)
        grown = {name: spec for name, spec in fewer.items() if name in added_rows.grown_names(c)}
        where = {name: placements[name] for name in fewer} | params.shardings(grown, mesh, base.rules)
        values = self._read_body(base, fewer, where)
        noise = self._draw(*_placed(added_rows.noise_specs(c), mesh)) if self.new_rows == "random" else {}
        names = [name for name in specs if name in grown or name not in fewer]
        to = {name: placements[name] for name in names}
        grow = jax.jit(functools.partial(added_rows.grow, c), out_shardings=to)
        return values | grow({name: values[name] for name in grown}, noise)

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
        """The same of some of the parameters, as they are before an adapter's `init`."""
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
    begun = model.adapter.init(values, key, model._replace(specs=specs))
    return quantized.hold(begun, specs)


def _start_of(config: config_lib.Config, model: transformer.Model) -> Start:
    """Where the policy of a run began."""
    saved, section = config.adapter.get("init_from", ""), config.model
    return Start("policy", model, config.seed, section.init_from, section.new_rows, config.frozen_dtype, saved)


def _placed(specs: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Specs, and placements for them."""
    return specs, params.shardings(specs, mesh)


def initial_keys(seed: int) -> jax.Array:
    """A run's two keys: of its initial parameters, and of its steps."""
    return jax.random.split(jax.random.PRNGKey(np.uint32(seed & 0xFFFFFFFF)), 2)


def read_run(
    workdir: str, start: Start, specs: Any, placements: Any, *, step: int | None = None, ema: bool = False
) -> Any:
    """The parameters of a role of a run: those that it trains of a checkpoint, the others from where it began.

    Args:
      workdir: of the run.
      start: of the role.
      specs, placements: see Start.read.
      step: of the checkpoint; by default the newest.
      ema: take the moving average.

    Raises:
      InputError: there is no such checkpoint, it has parameters of other shapes, or what the run began with is gone or
        has changed.
    """
    mesh, held = jax.tree.leaves(placements)[0].mesh, start.held(specs)
    plain = functools.partial(_dequantized, specs)
    roles = checkpoints.parameter_names(workdir, step=step, ema=ema)
    if roles and start.role not in roles:  # nothing of it is trained
        values = start.read(held, params.shardings(held, mesh, start.model.rules))
        return values if held == specs else jax.jit(plain, out_shardings=placements)(values)
    names = roles.get(start.role, {})
    trained = params.named(specs, names)
    marks = _marks(workdir, start.role)
    if trained == specs or marks is None:
        like = params.abstract(specs, placements)
        return checkpoints.restore_params(workdir, {start.role: like}, step=step, ema=ema)[0][start.role]
    values = start.read(held, params.shardings(held, mesh, start.model.rules))
    check_unchanged(workdir, start, marks, values)
    where = {params.path_name(path): s for path, s in jax.tree_util.tree_leaves_with_path(placements)}
    like = jax.tree_util.tree_map_with_path(
        lambda path, s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where[params.whole_name(path)]),
        trained,
        is_leaf=params.is_spec,
    )
    own = checkpoints.restore_params(workdir, {start.role: like}, step=step, ema=ema)[0][start.role]
    put = lambda values, own: params.put(plain(values), own)  # noqa: E731
    donated = 0 if held == specs else ()  # quantised kernels have no room for others
    return jax.jit(put, donate_argnums=donated, out_shardings=placements)(values, own)


def _dequantized(specs: Any, values: Any) -> Any:
    """Parameters as their specs say, of which none is quantised."""
    return quantized.hold(quantized.read_all(values, jnp.float32), specs)


def _read_held(workdir: str, start: Start, specs: Any, placements: Any, **which: Any) -> Any:
    """The parameters of a run's policy, as `_read_whole` gives them, where some of the specs may be quantised: of a
    checkpoint that holds all of them one kernel is read at a time."""
    if not quantized.any_in(specs):
        return _read_whole(workdir, start, specs, placements, **which)
    names = checkpoints.parameter_names(workdir, **which).get(start.role, {})
    whole = not start.model.config.added_rows and params.named(specs, names) == specs
    mesh, rules = jax.tree.leaves(placements)[0].mesh, start.model.rules
    values = []
    for part in quantized.kernel_by_kernel(specs) if whole else [specs]:
        plain = quantized.float_specs(part)
        read = _read_whole(workdir, start, plain, params.shardings(plain, mesh, rules), **which)
        hold = jax.jit(lambda x, part=part: quantized.hold(x, part), out_shardings=params.shardings(part, mesh, rules))
        values.append(hold(read))
    return params.join(*values)


def _read_whole(workdir: str, start: Start, specs: Any, placements: Any, **which: Any) -> Any:
    """The parameters of a run's policy with all rows of embedding and head in one matrix, and its adapter merged.

    Args: see `read_run`; the specs are those of added_rows.whole(start.model.config).
    """
    c, rules = start.model.config, start.model.rules
    if not c.added_rows:
        return _read_merged(workdir, start, specs, placements, **which)
    apart = added_rows.apart(c, specs)
    where = params.shardings(apart, jax.tree.leaves(placements)[0].mesh, rules) | placements
    values = _read_merged(workdir, start, apart, where, **which)
    to = {name: placements[name] for name in added_rows.grown_names(c)}
    joined = jax.jit(functools.partial(added_rows.join, c), out_shardings=to)
    parts = {name: values[name] for name in apart if name in to or name not in specs}
    return {name: values[name] for name in specs} | joined(parts)


def _read_merged(workdir: str, start: Start, specs: Any, placements: Any, **which: Any) -> Any:
    """The parameters of a run's policy with its adapter merged.

    Args: see `read_run`; the specs are those of the model alone, with those of Adapter.merged.
    """
    adapter, model = start.model.adapter, kernels.bare(specs)
    if adapter is None:
        return read_run(workdir, start, specs, placements, **which)
    names = make_specs(start.model.config)
    if adapter.merged is not None and model == specs:
        raise InputError(
            f"{workdir}: its adapter ({adapter.kind}) puts something in front of every document, which can't be merged "
            "into a model. Use the run itself to generate, score and evaluate."
        )
    whole = adapter.specs(params.held_in(params.named(specs, names), jnp.float32))
    where = params.shardings(whole, jax.tree.leaves(placements)[0].mesh, start.model.rules)
    values = read_run(workdir, start, whole, params.overlay(where, kernels.bare(placements)), **which)
    return jax.jit(functools.partial(_merge, specs), donate_argnums=0, out_shardings=placements)(
        *params.split(values, params.like(names, values))
    )


def _merge(specs: Any, values: Any, added: Any) -> Any:
    """A model's parameters, in the dtypes of the specs, with those of its adapter merged, or `realized`. Biases that
    only some of the layers' maps have are 0 in the others."""
    merged = virtual.realized(kernels.merge(params.join(values, added)))
    zeros = params.tree_map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs)
    return jax.tree.map(lambda x, spec: x.astype(spec.dtype), params.overlay(zeros, merged), specs)


def _holding_error(workdir: str, start: Start) -> tuple[str, float] | None:
    """See Found.holding_error."""
    kind, specs = start.frozen_dtype, start.model.specs
    marks = _marks(workdir, start.role) or {}
    if kind not in quantized.KINDS or not any(name.endswith(f"kernel/{kind}") for name in marks):
        return None
    values = start.read(*_placed(specs, sharding.make_mesh({}, jax.devices()[:1])))
    held = start.held(specs)
    return kind, float(jax.jit(lambda x: quantized.relative_error(quantized.hold(x, held), x))(values))


def read_untrained(workdir: str, start: Start, specs: Any, placements: Any) -> Any:
    """A role's parameters as a run began, or where its checkpoints hold all of them, as in the newest one: what isn't
    trained is the same in both.

    Args: see `read_run`.

    Raises:
      InputError: what the run began with is gone, or has changed.
    """
    marks = _marks(workdir, start.role)
    if marks is None:
        return read_run(workdir, start, specs, placements)
    values = start.read(specs, placements)
    check_unchanged(workdir, start, marks, values)
    return values


def note_frozen(workdir: str, frozen: Mapping[str, Any], write: bool) -> None:
    """Notes in the workdir what isn't trained of a run's trained roles. All processes call it; one is to write."""
    marks = {role: params.fingerprint(values) for role, values in frozen.items()}
    if marks and write:
        write_json(Path(workdir) / FROZEN, marks)


def _marks(workdir: str, role: str) -> dict[str, Any] | None:
    """What a run has noted of a role; None where its checkpoints hold all of it."""
    file = Path(workdir) / FROZEN
    return read_json(file).get(role) if file.is_file() else None


def check_unchanged(workdir: str, start: Start, marks: Mapping[str, Any], values: Any) -> None:
    """Raises InputError where parameters that aren't trained aren't those that the run began with.

    Args:
      workdir: of the run.
      start: of the role.
      marks: params.fingerprint of them when the run began.
      values: the parameters that are read now.
    """
    now = start.fingerprint(values)
    for name, (total, norm) in marks.items():
        if max(abs(now[name][0] - total), abs(now[name][1] - norm)) > 1e-4 * norm + 1e-6:
            source = f"{start.base}" if isinstance(start.base, str) else start.base.name
            raise InputError(
                f"{workdir}: {name} of the role {start.role!r} isn't trained, hence not in the checkpoints but in "
                f"{source or f'the seed {start.seed}'}, and has other values there than when the run began. Restore "
                "what it began with, or start in a new --workdir."
            )


def open_adapter(name: str, base: Found) -> "peft.Saved | RunAdapter":
    """An adapter that has been trained; its parameters haven't been read.

    Args:
      name: a folder that PEFT or an export wrote, or the workdir of a run with an adapter.
      base: the model that it is for.

    Raises:
      InputError: there is no such adapter, its kind isn't offered here, or it is for another model.
    """
    name = os.path.expanduser(name)
    if checkpoints.steps(name):
        run = find(name).trained
        if run is None:
            raise InputError(f"{name}: is a run without an adapter. Name it as the model, or name another run.")
        run.check_apart()
        return run
    if not peft.is_folder(name):
        raise InputError(
            f"{name}: is no adapter: neither a folder with adapter_config.json nor a run's workdir with a checkpoint. "
            "Name the folder that PEFT or understudy export wrote."
        )
    family, _ = save.choose(base.config, base.origin.get("config", {}))
    return peft.understand(peft.open_folder(name), family, base.config)


def adapter_options(name: str, base: Found, own: Mapping[str, Any]) -> dict[str, Any]:
    """The section `adapter` of a run whose adapter goes on from a trained one.

    Args:
      name, base: see `open_adapter`.
      own: what the config says; what isn't of the parameters themselves may differ.

    Raises:
      InputError: the config says another thing than the adapter, or see `open_adapter`.
    """
    options = open_adapter(name, base).options
    defaults = adapters.defaults(options["kind"])
    for option, value in own.items():
        there = options.get(option, defaults.get(option))
        if option in ("init_from", "dropout", "decay") or value == there:
            continue
        if option == "also":
            options["also"] = value if value.startswith(f"{there}|") else "|".join(filter(None, (there, value)))
            continue
        raise InputError(f"adapter.{option} = {value!r}: {name}, which it begins with, has {there!r}. Leave it out.")
    free = {option: own[option] for option in ("dropout", "decay") if option in own}
    return {**options, **free, "init_from": name}


@dataclasses.dataclass(frozen=True)
class RunAdapter:
    """The adapter of a run.

    Attributes:
      workdir: of the run.
      config: of the run.
      model: what it trains, with its adapter.
      step, ema: see `find`.
    """

    workdir: str
    config: config_lib.Config
    model: transformer.Model
    step: int | None = None
    ema: bool = False

    def check_apart(self) -> None:
        """Raises InputError where the adapter can't be without the run's own model."""
        if self.model.config.added_rows:
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
        there = dict(params.named_leaves(values))
        for name, spec in params.named_leaves(self.model.specs):
            if name in there and there[name].shape != spec.shape:
                raise InputError(
                    f"{self.workdir}: was made for another model: {name} is {list(spec.shape)} there, and "
                    f"{list(there[name].shape)} in this one. It began with {self.config.model.init_from!r}."
                )
        marks = {name: mark for name, mark in (_marks(self.workdir, "policy") or {}).items()}
        now = params.fingerprint(values)
        for name, (total, norm) in marks.items():
            if name in now and max(abs(now[name][0] - total), abs(now[name][1] - norm)) > 1e-3 * norm + 1e-6:
                raise InputError(
                    f"{self.workdir}: was made for another model: {name} has other values there. It began with "
                    f"{self.config.model.init_from!r}."
                )
        where = {name: x.sharding for name, x in there.items()}
        return params.put(values, self.read(where))

    def read(self, where: Mapping[str, Any]) -> Any:
        """What the run has trained, whose layers may lie in pieces.

        Args:
          where: name of a parameter, without pieces -> its sharding.
        """
        which = {"step": self.step, "ema": self.ema}
        names = checkpoints.parameter_names(self.workdir, **which)["policy"]
        like = jax.tree_util.tree_map_with_path(
            lambda path, s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where[params.whole_name(path)]),
            params.named(self.model.specs, names),
            is_leaf=params.is_spec,
        )
        return checkpoints.restore_params(self.workdir, {"policy": like}, **which)[0]["policy"]

    def written(self) -> peft.Trained:
        """The adapter as the run has trained it, to be written.

        Raises:
          InputError: the model that it is for has no name, or is gone.
        """
        self.check_apart()
        base, rules, specs = self.config.model.init_from, self.model.rules, self.model.specs
        if not base:
            raise InputError(
                f"{self.workdir}: its adapter is for a model of random parameters (model.init_from = ''), which no "
                "other tool has. Write the whole model: --merge."
            )
        start = _start_of(self.config, self.model)
        placements = params.shardings(specs, sharding.make_mesh({}, jax.devices()[:1]), rules)
        begun = start.draw_adapter(placements)
        begun = open_adapter(start.saved, find(base)).fill(begun) if start.saved else begun
        leaves = peft.leaves_of(begun, specs)
        own = self.read(dict(params.named_leaves(placements)))
        initial = {}
        if self.model.adapter.changes_base:
            whole = start.read(specs, placements)
            _, added = params.split(whole, params.like(transformer.make_specs(self.model.config), whole))
            initial = peft.leaves_of(added, specs)
        marks = {} if initial else _marks(self.workdir, "policy") or {}
        rslora = bool(self.options.get("rslora"))
        if self.model.adapter.merged:
            own = virtual.realized(params.overlay(begun, own))
        leaves = leaves | peft.leaves_of(own, specs)
        return peft.Trained(self.options["kind"], rslora, leaves, initial, base, marks)


class LoadedModel(NamedTuple):
    """A model, ready to run. `template` is how prompts are put to it (sources.formats). `tokenizer` is None only where
    `load_model` was told that none is needed, and the model comes with none. `adapters` holds the model with each
    of its adapters, by their names; what these leave as it is they share with `params`."""

    model: transformer.Model
    params: Any
    tokenizer: tokenizers.Tokenizer | None
    template: str
    mesh: jax.sharding.Mesh
    adapters: Mapping[str, "LoadedModel"] = {}

    @property
    def each(self) -> list["LoadedModel"]:
        """The model by itself, and with each of its adapters."""
        return [self, *self.adapters.values()]

    @property
    def max_length(self) -> int:
        """The longest document that it may be given, whatever the adapter."""
        return min(loaded.model.max_length for loaded in self.each)

    def adapter_of(self, request: Any, where: str) -> str:
        """The adapter that a request is for: what its field `adapter` names; of one that names none the only one.

        Args:
          request: a record, or a text, which names none.
          where: the request, for errors.

        Raises:
          InputError: there is no such adapter, or there are several and it names none.
        """
        if not self.adapters:
            return BASE
        name = request.get("adapter") if isinstance(request, Mapping) else None
        known = ", ".join(map(repr, self.adapters))
        if name is None:
            if len(self.adapters) == 1:
                return next(iter(self.adapters))
            raise InputError(
                f'{where}: is for which of the adapters {known}? Name one in a field "adapter", or {BASE!r} for the '
                "model without."
            )
        if name != BASE and name not in self.adapters:
            raise InputError(
                f"{where}: adapter = {name!r}: no such adapter. There are {known}, and {BASE!r} for the model without."
            )
        return name

    def beside(self, adapter: str) -> "LoadedModel":
        """The model with an adapter, or by itself for BASE."""
        return self if adapter == BASE else self.adapters[adapter]

    def with_adapter(self) -> "LoadedModel":
        """The model with its only adapter, if it has one.

        Raises:
          InputError: it has several.
        """
        if len(self.adapters) > 1:
            raise InputError("--adapter: came several times, and here the model has one at a time. Give one.")
        return next(iter(self.adapters.values())) if self.adapters else self


def name_adapters(flags: Sequence[str]) -> dict[str, str]:
    """Name -> folder or workdir, of flags [NAME=]DIR; without a name the last part of DIR is it.

    Raises:
      InputError: a name comes twice, or means the model itself.
    """
    named: dict[str, str] = {}
    for flag in flags:
        name, equals, folder = flag.partition("=")
        if not (equals and re.fullmatch(r"[\w.-]+", name)):
            name, folder = Path(flag).name, flag
        if name in named or name == BASE:
            reason = "is the model without an adapter" if name == BASE else "names two adapters"
            raise InputError(f"--adapter = {flag}: {name!r} {reason}. Name it otherwise: --adapter=NAME={folder}.")
        named[name] = folder
    return named


def _with_adapter(name: str, found: Found, loaded: LoadedModel) -> LoadedModel:
    """A model with an adapter; what the adapter leaves as it is are the model's own arrays.

    Raises:
      InputError: there is no such adapter, or it is for another model.
    """
    if loaded.model.adapter:
        raise InputError(
            f"--adapter = {name}: {found.name} puts something in front of every document already. Name the model that "
            "it began with."
        )
    saved, values = open_adapter(name, found), loaded.params
    with adapters.naming_fields(f"--adapter = {name}"):
        model = transformer.make_model(found.config, found.rules, adapters.load(saved.options))
    specs, start = transformer.in_compute_dtype(model), Start("policy", model, 0, found, saved=name)
    placements = params.shardings(specs, loaded.mesh, found.rules)
    if model.adapter.init is None or model.adapter.merged:
        values = saved.fill(params.join(values, start.draw_adapter(placements, specs)))
    else:
        values = _sharing(values, start.read(specs, placements))
    if model.adapter.merged is None:
        return loaded._replace(params=values)
    front = transformer.make_model(found.config, found.rules, model.adapter.merged)
    return loaded._replace(model=front, params=virtual.realized(values))


def _sharing(values: Any, own: Any) -> Any:
    """`own` with the arrays of `values` where they are the same."""
    there = dict(params.named_leaves(values))

    def shared(path: tuple, x: jax.Array) -> jax.Array:
        other = there.get(params.path_name(path))
        return x if other is None or not bool(jnp.array_equal(x, other)) else other

    return jax.tree_util.tree_map_with_path(shared, own)


def load_model(
    name: str,
    *,
    step: int | str | None = None,
    ema: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    needs_tokenizer: bool = True,
    adapter: Sequence[str] = (),
    check: Callable[[ModelConfig, str], None] | None = ModelConfig.check_language_model,
) -> LoadedModel:
    """Reads a model to run it; kernels are held in the compute dtype.

    Args:
      name, step, ema: see `find`.
      mesh: to lay the parameters out on; by default one device.
      needs_tokenizer: else the model may come without one.
      adapter: adapters for it, see `name_adapters`.
      check: (config, name) -> raises InputError where it is of a kind that won't do, before its parameters are read;
        by default where it doesn't predict the next token. None takes any.

    Raises:
      InputError: there is no such model, it can't be read, it is of another kind, or its tokenizer doesn't fit it.
    """
    found = find(name, step=step, ema=ema)
    if check is not None:
        check(found.config, name)
    mesh = mesh or sharding.make_mesh({}, jax.devices()[:1])
    model = transformer.make_model(found.config, found.rules, found.adapter)
    tokenizer = found.tokenizer() if needs_tokenizer or found.has_tokenizer else None
    if tokenizer is not None:
        check_vocabulary(name, tokenizer, found.config)
    specs = transformer.in_compute_dtype(model)
    values = found.read(specs, params.shardings(specs, mesh, found.rules))
    loaded = LoadedModel(model, values, tokenizer, found.template, mesh)
    named = name_adapters(adapter)
    return loaded._replace(adapters={own: _with_adapter(folder, found, loaded) for own, folder in named.items()})


def check_vocabulary(name: str, tokenizer: tokenizers.Tokenizer, c: ModelConfig) -> None:
    """Raises InputError where the tokenizer gives ids that the model has no embedding for."""
    if tokenizer.size > c.vocab_size:
        raise InputError(
            f"{name}: its tokenizer has {tokenizer.size} tokens, and its embedding {c.vocab_size} rows. They don't "
            "belong together: take both from one copy of the model."
        )


def check_reads(field: str, found: Found, tokenizer: tokenizers.Tokenizer) -> None:
    """Raises InputError where a model that is given the ids of `tokenizer` would take them for other tokens.

    A model without a tokenizer is taken at its word if it has an embedding for every id.
    """
    if not found.has_tokenizer:
        return check_vocabulary(f"{field} = {found.name}", tokenizer, found.config)
    theirs, ours = found.tokenizer().backend.get_vocab(), tokenizer.backend.get_vocab()
    if theirs == ours:
        return None
    if theirs.items() < ours.items() and min(i for token, i in ours.items() if token not in theirs) >= len(theirs):
        added = sorted(ours.keys() - theirs.keys(), key=ours.get)
        some = ", ".join(added[:_SHOWN]) + (f" and {len(added) - _SHOWN} more" if len(added) > _SHOWN else "")
        raise InputError(
            f"{field}.init_from = {found.name}: doesn't know {some}, which the policy's tokenizer has beyond its own: "
            "they would be noise to it. Name a model that was trained with them, such as a run that added them."
        )
    token, _ = min(ours.items() - theirs.items() or theirs.items() - ours.items(), key=lambda item: item[1])
    known = f"{token!r} is {ours.get(token, 'unknown')} to the policy and {theirs.get(token, 'unknown')} to it"
    raise InputError(
        f"{field}.init_from = {found.name}: has another tokenizer than the policy, with {len(theirs)} tokens for "
        f"{len(ours)}: {known}. Give the policy its tokenizer (tokenizer.kind), distil across tokenizers "
        "(objective.distill.kind='uld'), or train on what it writes (understudy generate, then sft)."
    )
