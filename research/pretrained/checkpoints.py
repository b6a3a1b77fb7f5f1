"""Reads the checkpoints of a run: which there are, and what is in them. run/checkpoint.py writes them.

Orbax is imported where it is used: that takes a third of all imports' time.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from research.errors import InputError
from research.files import read_json
from research.params import path_name
from research.pretrained import wholeness
from research.pretrained.wholeness import FOLDER, steps

State = Any  # a pytree of arrays
T = TypeVar("T")


def best_step(workdir: str | Path) -> int:
    """The checkpoint that is best by the run's checkpoint.best_metric.

    Raises:
      InputError: the run names no metric, or no checkpoint has its value.
    """
    record = wholeness.read_record(workdir)["config"]["checkpoint"]
    name, sign = record["best_metric"], 1 if record["best_mode"] == "max" else -1
    scores = {}
    for step in steps(workdir):
        file = Path(workdir) / FOLDER / str(step) / "metrics" / "metrics"
        wholeness.check_outline(file.parent.parent)
        if file.is_file() and name in (metrics := read_json(file)):
            scores[step] = score(metrics, name, sign)
    if not scores:
        raise InputError(f"{workdir}: has no best checkpoint (checkpoint.best_metric = {name!r}). Take the newest one.")
    return max(scores, key=lambda step: scores[step])


def score(metrics: Mapping[str, float], name: str, sign: float) -> float:
    """How good a checkpoint is by a metric. One that lacks it, or has a NaN, is worse than any."""
    value = metrics.get(name, math.nan)
    return -math.inf if math.isnan(value) else sign * value


def parameter_names(workdir: str | Path, *, step: int | None = None, ema: bool = False) -> dict[str, Any]:
    """Role -> nested dicts of the names of those parameters that a checkpoint holds.

    Args: see `restore_params`.

    Raises:
      InputError: there is no such checkpoint.
    """
    return _from_newest(workdir, step, lambda folder, _: dict(metadata(folder).get("ema" if ema else "params") or {}))


def restore_params(
    workdir: str | Path, like: State, *, step: int | None = None, ema: bool = False
) -> tuple[State, int]:
    """Reads the parameters alone from a working directory: (params, step).

    Args:
      workdir: of a run.
      like: role -> pytree of ShapeDtypeStruct with shardings; other roles are left.
      step: by default the newest.
      ema: take the moving average instead.

    Raises:
      InputError: there is no checkpoint, or its parameters have other names or shapes.
    """
    key = "ema" if ema else "params"
    wanted = {key: like}
    leaves = jax.tree_util.tree_leaves_with_path(wanted)

    def read(folder: Path, step: int) -> tuple[State, int]:
        tree = metadata(folder)
        check_shapes(workdir, tree.get(key), like, key)
        values = restore_named(folder, tree, {path_name(path): leaf for path, leaf in leaves})
        return jax.tree_util.tree_map_with_path(lambda path, _: values[path_name(path)], wanted)[key], step

    return _from_newest(workdir, step, read)


def _from_newest(workdir: str | Path, step: int | None, read: Callable[[Path, int], T]) -> T:
    """What `read` gives for the folder of a checkpoint's state and its step. The newest is looked for again where a run
    that is under way has removed it meanwhile."""
    while True:
        folder, found = _folder(workdir, step)
        try:
            return read(folder, found)
        except (InputError, OSError):
            time.sleep(0.2)  # a folder is removed file by file
            if step is not None or not (there := steps(workdir)) or there[-1] == found:
                raise


def metadata(folder: Path) -> dict[str, Any]:
    """The nested dicts and lists of a checkpoint's state, with a shape at each leaf.

    Raises:
      InputError: the checkpoint is damaged.
    """
    import orbax.checkpoint as ocp

    quiet()
    wholeness.check_outline(folder.parent)
    with ocp.PyTreeCheckpointer() as reader:
        try:
            return dict(reader.metadata(folder).item_metadata.tree)
        except Exception as error:
            raise unreadable(folder, error) from error


def restore_named(folder: Path, tree: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads some of a checkpoint's arrays, by name; all of its files are checked meanwhile.

    Args:
      folder: of the state.
      tree: its `metadata`.
      wanted: path_name in `tree` -> ShapeDtypeStruct with a sharding.

    Raises:
      InputError: the checkpoint is damaged.
    """
    import orbax.checkpoint as ocp

    target = jax.tree_util.tree_map_with_path(lambda path, _: wanted.get(path_name(path), ocp.PLACEHOLDER), tree)
    with wholeness.checking(folder.parent), ocp.PyTreeCheckpointer() as reader:
        try:
            arguments = ocp.checkpoint_utils.construct_restore_args(target)
            values = reader.restore(folder, args=ocp.args.PyTreeRestore(target, restore_args=arguments))
        except Exception as error:
            raise unreadable(folder, error) from error
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(values) if path_name(path) in wanted}


def restore_two_trees(folder: Path, tree: Mapping[str, Any], like: State) -> State | None:
    """The state of a checkpoint that was written while trained and frozen parameters were one tree, with `trainable`.

    It holds parameters that aren't trained, which are left out, and its moments lie a level deeper. None where the
    checkpoint isn't one of these, or has moments of other parameters.

    Args:
      folder, tree: see `restore_named`.
      like: a dataclass of pytrees of ShapeDtypeStruct with shardings.
    """
    if not isinstance(tree["opt_state"], Mapping) or "inner_state" not in tree["opt_state"]:
        return None
    shapes = {path_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    fields = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(fields)}
    older = {name: name.replace("opt_state/", "opt_state/inner_state/", 1) for name in leaves}
    if any(shapes.get(older[name]) != tuple(leaf.shape) for name, leaf in leaves.items()):
        return None
    if any(name not in older.values() for name in shapes if name.startswith("opt_state/")):
        return None
    values = restore_named(folder, tree, {older[name]: leaf for name, leaf in leaves.items()})
    state = jax.tree_util.tree_map_with_path(lambda path, _: values[older[path_name(path)]], fields)
    return dataclasses.replace(like, **state)


def check_shapes(workdir: str | Path, tree: Any, like: State, key: str) -> None:
    """Raises InputError where a checkpoint lacks parameters, or they have other shapes.

    Args:
      workdir: for errors.
      tree: the `metadata` of the parameters.
      like: the parameters that are wanted.
      key: what the checkpoint calls them.
    """
    if tree is None:
        raise InputError(f"{workdir}: its checkpoint holds no {key!r}. Only a run with ema_decay > 0 has an average.")
    shapes = {jax.tree_util.keystr(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        name = jax.tree_util.keystr(path)
        if shapes.get(name) != tuple(leaf.shape):
            raise InputError(
                f"{workdir}: parameter {name} has shape {shapes.get(name, 'missing')} in the checkpoint and "
                f"{tuple(leaf.shape)} in the config's model. Give config.model and trainable the values of the "
                "checkpoint's run (its config.json)."
            )


def unreadable(folder: Path, error: BaseException) -> InputError:
    """What to say of a checkpoint whose state can't be read."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if not (folder / "manifest.ocdbt").is_file() and any(folder.glob("ocdbt.process_*")):
        reason = "its parts were written, and not put together (state/manifest.ocdbt)"
    return wholeness.damaged(folder.parent, reason)


def quiet() -> None:
    """Orbax reports every internal step at the level of warnings, and what it raises as an error with its traceback;
    asyncio does that for all of its writes but the first that fails."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _folder(workdir: str | Path, step: int | None) -> tuple[Path, int]:
    """The folder of a checkpoint's state, and its step."""
    there = steps(workdir)
    if not there:
        raise InputError(f"{workdir}: has no {FOLDER}/STEP. Name the --workdir of a run that has saved a checkpoint.")
    step = there[-1] if step is None else step
    if step not in there:
        raise InputError(f"{workdir}: has no checkpoint of step {step}; there are {', '.join(map(str, there))}.")
    return Path(workdir).resolve() / FOLDER / str(step) / "state", step
