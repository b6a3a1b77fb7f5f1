"""Which parameters of a run's roles are trained and which are frozen, and where they begin."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research import config as config_lib
from research import loading, params
from research.config import Config
from research.errors import InputError
from research.models import kernels, transformer
from research.models.adapters.lora import CONSTANTS
from research.models.adapters.types import WRITTEN
from research.models.flops import Flops, per_token
from research.ops import quantized

Tree = Any  # a pytree


@dataclasses.dataclass(frozen=True)
class Roles:
    """The parameters of all roles, in two trees: what is trained and what isn't.

    Attributes:
      models: role -> Model.
      whole: role -> specs of the parameters that are its own, each layer's in one stack, in the dtype to read them in.
      cut: trained role -> the same, with layers in pieces where only some are trained.
      masks: trained role -> True for those that are trained, in the shape of `cut`.
      trained: role -> specs of what is trained of it; under "objectives" those of the terms.
      frozen: role -> specs of what isn't.
    """

    models: Mapping[str, transformer.Model]
    whole: dict[str, Tree]
    cut: dict[str, Tree]
    masks: dict[str, Tree]
    trained: dict[str, Tree]
    frozen: dict[str, Tree]

    @property
    def references(self) -> list[str]:
        """The roles that are another one as it began: what that one trains is theirs alone."""
        return [role for role, model in self.models.items() if model.of and not model.synced and role not in self.whole]

    @property
    def partial(self) -> list[str]:
        """The roles that hold frozen parameters of a trained role, their own or another's."""
        return [*self.divided, *self.references]

    @property
    def divided(self) -> list[str]:
        """The trained roles of which a part is frozen."""
        return [role for role in self.cut if role in self.frozen]

    def flops(self, length: int) -> dict[str, Flops]:
        """The model FLOPs of a token of each role that makes a pass, in sequences of `length` tokens: with a gradient
        where some of it is trained. One that has only a head of its own makes none."""
        return {
            role: per_token(
                model.config,
                self.cut.get(role, model.specs),
                self.masks.get(role),
                length,
                model.adapter.prefix if model.adapter else 0,
            )
            for role, model in self.models.items()
            if not (model.of and role in self.whole)
        }

    def draw(self, key: jax.Array) -> dict[str, Tree]:
        """Random parameters of all roles, as `arrange` takes them."""
        values = params.init({**quantized.float_specs(self.whole), **self._terms()}, key)
        return values | {
            role: loading.adapted(self.models[role], specs, values[role], key) for role, specs in self.whole.items()
        }

    def draw_terms(self, key: jax.Array) -> dict[str, Tree]:
        """Random parameters of the terms."""
        return params.init(self._terms(), key)

    def arrange(self, values: Mapping[str, Tree]) -> tuple[dict[str, Tree], dict[str, Tree]]:
        """Whole models -> (trained, frozen): their parameters in the shape of the specs. `values` are those of some
        trained roles; roles of which nothing is trained have no part in it."""
        trained = {name: values[name] for name in self._terms() if name in values}
        frozen = {}
        for role in self.cut.keys() & values.keys():
            trained[role], rest = params.split(params.in_pieces(values[role], self.cut[role]), self.masks[role])
            if role in self.frozen:
                frozen[role] = quantized.hold(rest, self.frozen[role])
        for role in self.references:
            if self.models[role].of in trained:
                owner = trained[self.models[role].of]
                own = owner if self.models[role].adapter else kernels.bare(owner)
                frozen[role] = quantized.hold(own, self.frozen[role])
        return trained, frozen

    def _terms(self) -> dict[str, Tree]:
        return {"objectives": self.trained["objectives"]} if "objectives" in self.trained else {}


def make_roles(
    config: Config, trained: Collection[str], models: Mapping[str, transformer.Model], terms: Mapping[str, Tree]
) -> Roles:
    """Divides the parameters of a run.

    Args:
      config: checked.
      trained: the roles that the objective trains.
      models: role -> Model.
      terms: name -> ParamSpecs of the terms that have some.

    Raises:
      InputError: `trainable` or a group of the optimizer matches nothing, or a role can't be what it is to be.
    """
    if config.adapter and "policy" not in trained:
        raise InputError("adapter: the objective doesn't train the policy, which would have it. Leave it out.")
    roles = Roles(models, {}, {}, {}, {}, {})
    for role, model in models.items():
        own = _own_specs(config, role, model)
        if role in trained:
            _divide(config, roles, role, own)
        elif own:
            roles.frozen[role] = held(config, model, own)
            roles.whole[role] = roles.frozen[role]
    for role, model in models.items():
        if model.synced:
            if model.of not in roles.cut:
                raise InputError(
                    f"roles.{role}.sync_every: nothing of {model.of!r} is trained: there is nothing to follow. "
                    "Leave it out."
                )
        elif model.of and role not in roles.whole:
            _check_reference(roles, role)
            own = roles.trained[model.of] if model.adapter else kernels.bare(roles.trained[model.of])
            roles.frozen[role] = params.held_in(own, float_dtype(config, model))
    _check_frozen_dtype(config, roles)
    _check_trained_dtype(config, roles)
    if terms:
        roles.trained["objectives"] = dict(terms)
    return roles


def _check_frozen_dtype(config: Config, roles: Roles) -> None:
    """Raises InputError where frozen_dtype has no effect."""
    quantizes = config.frozen_dtype in quantized.KINDS
    if config.frozen_dtype == "auto" or (quantized.any_in(roles.frozen) if quantizes else roles.frozen):
        return
    reason = "no kernel of the layers is frozen" if quantizes and roles.frozen else "nothing is frozen"
    raise InputError(
        f"frozen_dtype = {config.frozen_dtype!r}: has no effect, since {reason}. Leave it out, or train less: an "
        "adapter, trainable."
    )


def _check_trained_dtype(config: Config, roles: Roles) -> None:
    """Raises InputError where trained_dtype has no effect."""
    leaves = jax.tree.leaves(roles.trained, is_leaf=params.is_spec)
    if config.trained_dtype != "float32" and not any(spec.contracts for spec in leaves):
        raise InputError(
            f"trained_dtype = {config.trained_dtype!r}: has no effect, since no kernel is trained, and all else is "
            "held in float32. Leave it out."
        )


def held(config: Config, model: transformer.Model, specs: Tree) -> Tree:
    """The specs of what isn't trained of a model, as config.frozen_dtype has it.

    Raises:
      InputError: a kernel can't be held so.
    """
    specs = params.held_in(specs, float_dtype(config, model))
    return quantized.held_in(specs, config.frozen_dtype) if config.frozen_dtype in quantized.KINDS else specs


def float_dtype(config: Config, model: transformer.Model) -> Any:
    """In which kernels that aren't trained are held where they aren't quantised, as the copy that a reference has."""
    auto = config.frozen_dtype in ("auto", *quantized.KINDS)
    return jnp.dtype(model.config.dtype if auto else config.frozen_dtype)


def _own_specs(config: Config, role: str, model: transformer.Model) -> Tree:
    """The parameters of a role that are in no other: of one with another's trunk its head, if it has one."""
    if not model.of:
        return model.specs
    head = config.roles[role].num_labels
    return {name: spec for name, spec in model.specs.items() if name in transformer.HEAD} if head else {}


def _divide(config: Config, roles: Roles, role: str, own: Tree) -> None:
    """Adds a trained role."""
    if not own:
        raise InputError(
            f"roles.{role}.of = {roles.models[role].of!r}: the objective trains it, and it has no parameters of its "
            f"own. Give it a head: roles.{role}.num_labels."
        )
    patterns, cut = _patterns(config, roles, role), own
    if not roles.models[role].of:
        for field, pattern in patterns.items():
            cut = params.cut(cut, pattern, field)
        for name, group in config.optimizer.groups.items():
            cut = params.cut(cut, group["match"], f"optimizer.groups.{name}.match", prefix=f"{role}/")
    masks = [_trained(cut, pattern, field) for field, pattern in patterns.items()]
    mask = jax.tree.map(lambda *each: any(each), *masks)
    trained, rest = params.split(cut, mask)
    trained, own = (params.held_in(specs, config.trained_dtype) for specs in (trained, own))
    rest = held(config, roles.models[role], rest)
    names = {
        params.whole_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained, is_leaf=params.is_spec)
    }
    frozen = held(config, roles.models[role], own)
    roles.whole[role] = jax.tree_util.tree_map_with_path(
        lambda path, spec, kept: spec if params.path_name(path) in names else kept, own, frozen, is_leaf=params.is_spec
    )
    roles.cut[role], roles.masks[role], roles.trained[role] = cut, mask, trained
    if rest:
        roles.frozen[role] = rest


def _trained(specs: Tree, pattern: str, field: str) -> Tree:
    """True for what an expression trains: what it matches, without the constants of adapters.

    Raises:
      InputError: it matches nothing else.
    """
    as_written = field in WRITTEN or not field.startswith("adapter.")
    matched = params.matching(specs, pattern, field, as_written=as_written)
    mask = jax.tree_util.tree_map_with_path(
        lambda path, own: own and not re.fullmatch(CONSTANTS, params.whole_name(path)), matched
    )
    if not any(jax.tree.leaves(mask)):
        raise InputError(
            f"{field} = {pattern!r}: matches only what no run trains: scales of adapters, rates of dropout, and "
            "the two matrices that VeRA's maps share. Leave it out."
        )
    return mask


def _patterns(config: Config, roles: Roles, role: str) -> dict[str, str]:
    """What is trained of a role: a field of the config -> the regular expression that it stands for."""
    if roles.models[role].adapter and not roles.models[role].of:
        return dict(roles.models[role].adapter.trained)
    field = "trainable" if isinstance(config.trainable, str) else f"trainable.{role}"
    return {field: config_lib.trainable_pattern(config, role)}


def _check_reference(roles: Roles, role: str) -> None:
    """Raises InputError where a role of another's trunk would be that other role itself."""
    owner, where = roles.models[role].of, f"roles.{role}.of = {roles.models[role].of!r}"
    section = "policy" if owner == "policy" else f"role {owner!r}"
    if owner not in roles.cut:
        raise InputError(f"{where}: nothing of the {section} is trained, so this would be the {section} itself.")
    if not set(roles.frozen.get(owner, {})) - set(transformer.HEAD):
        raise InputError(
            f"{where}: all of the {section}'s trunk is trained, so there is nothing to share: this would be the "
            f"{section} itself, and follow it. Freeze a part (trainable), or name a model to hold a second time: "
            f"roles.{role}.init_from."
        )
