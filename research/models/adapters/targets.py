"""The linear maps of a model that an adapter changes, found by a regular expression on their names."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from research import params
from research.errors import InputError
from research.models.specs import Specs
from research.params import ParamSpec

ALL = "all"  # every linear map of the layers but routers
BIASES = r"(.*/)?(\w+_)?bias(_\w+)?"  # names of biases


@dataclasses.dataclass(frozen=True)
class Target:
    """A linear map of a model, or its embedding; of a stack of layers those at which an adapter is.

    Attributes:
      path: of the dict that holds its kernel, such as ("layers", "attention", "q"); of the embedding ("embed",).
      kernel: its spec: [*lead, *in, *out]; lead are layers and experts.
      chosen: for each layer whether it is meant; one value where there is no stack.
    """

    path: tuple[str, ...]
    kernel: ParamSpec
    chosen: tuple[bool, ...]

    @property
    def name(self) -> str:
        return "/".join(self.path)

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"

    @property
    def num_lead(self) -> int:
        """How many axes come before those that are summed over."""
        return next(i for i, axis in enumerate(self.kernel.axes) if axis in self.kernel.contracts)

    @property
    def num_in(self) -> int:
        """How many axes are summed over."""
        return len(self.kernel.contracts)

    @property
    def ins(self) -> int:
        """The product of the axes that are summed over."""
        return int(np.prod(self.kernel.shape[self.num_lead : self.num_lead + self.num_in]))

    @property
    def outs(self) -> int:
        """The product of the axes that come out."""
        return int(np.prod(self.kernel.shape[self.num_lead + self.num_in :]))

    def names(self) -> list[str]:
        """The names that an expression may match: for each layer its own."""
        if not self.stacked:
            return [self.name]
        return [f"layers/{i}/{'/'.join(self.path[1:])}" for i in range(len(self.chosen))]

    def matches(self, pattern: str, field: str) -> np.ndarray:
        """For each layer, whether an expression matches the map's name there, or the end of it from a slash on.

        Raises:
          InputError: it is no regular expression.
        """
        try:
            names = re.compile(f"(.*/)?({pattern})")
        except re.error as error:
            raise InputError(f"{field} = {pattern!r}: is no regular expression ({error}).") from error
        whole = bool(names.fullmatch(self.name))
        return np.array([whole or bool(names.fullmatch(name)) for name in self.names()])


def find(specs: Specs, pattern: str, exclude: str = "", *, embed: bool = False) -> list[Target]:
    """The linear maps that `targets` and `exclude` of an adapter name.

    Args:
      specs: of a model.
      pattern: what the end of their names matches, such as "q|v" or "attention/.*" or "layers/3/mlp/up"; "all".
      exclude: the same of those that stay as they are; "" for none.
      embed: whether the embedding may be one.

    Raises:
      InputError: an expression, or one of its alternatives, matches nothing; or they leave nothing.
    """
    maps = _maps(specs)
    if embed:
        maps["embed"] = Target(("embed",), specs["embed"], (True,))
    every = [target for target in maps.values() if target.stacked and target.path[-1] != "router"]
    if pattern == ALL:
        targets = every
    else:
        _check_matches(maps, pattern, "targets")
        targets = [_narrow(target, target.matches(pattern, "targets")) for target in maps.values()]
        targets = [target for target in targets if any(target.chosen)]
    if exclude:
        _check_matches({target.name: target for target in targets}, exclude, "exclude")
        targets = [_narrow(target, ~target.matches(exclude, "exclude")) for target in targets]
        targets = [target for target in targets if any(target.chosen)]
    if not targets:
        raise InputError(f"exclude = {exclude!r}: leaves none of the targets = {pattern!r}.")
    return targets


def check_whole(targets: list[Target], pattern: str) -> None:
    """Raises InputError where only some layers of a map are meant, for kinds that are in all or in none."""
    for target in targets:
        if not all(target.chosen):
            raise InputError(
                f"targets = {pattern!r}: names some layers of {target.name}, and this kind is in all or in none. Name "
                "all, or use lora."
            )


def by_pattern(targets: list[Target], patterns: Mapping[str, Any], default: Any, field: str) -> dict[str, list[Any]]:
    """Name of a target -> for each of its layers the value of the last pattern that matches, or the default.

    Raises:
      InputError: a pattern matches no target.
    """
    values = {target.name: [default] * len(target.chosen) for target in targets}
    for pattern, value in patterns.items():
        _check_matches({target.name: target for target in targets}, pattern, field)
        for target in targets:
            for i in np.flatnonzero(target.matches(pattern, field)):
                values[target.name][i] = value
    return values


def put(specs: Specs, path: tuple[str, ...], added: Mapping[str, Any]) -> Specs:
    """The specs with further entries in the dict at `path`."""
    if not path:
        return {**specs, **added}
    return {**specs, path[0]: put(specs[path[0]], path[1:], added)}


def has_biases(specs: Specs) -> bool:
    """Whether a model has any bias."""
    return any(re.fullmatch(BIASES, name) for name, _ in params.named_leaves(specs))


def _maps(specs: Specs) -> dict[str, Target]:
    targets: dict[str, Target] = {}

    def visit(node: Specs, path: tuple[str, ...]) -> None:
        kernel = node.get("kernel")
        if params.is_spec(kernel):
            targets["/".join(path)] = Target(path, kernel, (True,) * (kernel.shape[0] if path[0] == "layers" else 1))
        for name, part in node.items():
            if isinstance(part, dict):
                visit(part, (*path, name))

    visit(specs, ())
    return targets


def _narrow(target: Target, chosen: np.ndarray) -> Target:
    """The target at those of its layers that are chosen too."""
    return dataclasses.replace(target, chosen=tuple(bool(a and b) for a, b in zip(target.chosen, chosen, strict=True)))


def _check_matches(maps: Mapping[str, Target], pattern: str, field: str) -> None:
    """Raises InputError where an expression, or one of its alternatives, matches none of the maps."""
    for part, narrowed in [(pattern, pattern), *params.alternatives(pattern)]:
        if not any((target.matches(narrowed, field) & np.array(target.chosen)).any() for target in maps.values()):
            subject = f"{field} = {pattern!r}:" + (f" {part!r}" if part != pattern else "")
            hint = ' The head is trained whole: also = "head".' if re.search("head", part) else ""
            raise InputError(f"{subject} matches none of the linear maps, which are {', '.join(maps)}.{hint}")
