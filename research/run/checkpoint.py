"""Checkpoints: {state, place of the experience, resolved config}, written by Orbax in the background.

Orbax writes into a temporary folder and renames it when all is there, so that a kill at any moment leaves the earlier
checkpoints whole; what a kill left behind is removed at the next start. It is imported where it is used: that takes a
third of all imports' time.
"""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from research.errors import InputError
from research.files import read_json
from research.rollouts.experience import Place

State = Any  # a pytree of arrays

FOLDER = "checkpoints"


class Checkpointer:
    """The checkpoints of one working directory: the last `keep_last` and, if a metric is named, the best by it.

    Nothing is imported or touched before the first use, or `prepare`.

    Args:
      workdir: checkpoints lie in workdir/checkpoints/STEP.
      keep_last: how many of the newest to keep.
      best_metric: name among the metrics given to `save`, or "" for none.
      best_mode: "min" or "max".
    """

    def __init__(self, workdir: str | Path, *, keep_last: int = 2, best_metric: str = "", best_mode: str = "min"):
        self._folder = Path(workdir).resolve() / FOLDER
        self._keep_last, self._best_metric, self._best_mode = keep_last, best_metric, best_mode
        self._made: Any = None
        self._lock = threading.Lock()
        self._preparing: threading.Thread | None = None

    def prepare(self) -> None:
        """Imports Orbax and opens the folder, in the background. If that fails, it is tried again by the first use,
        which has the error then."""

        def work() -> None:
            with contextlib.suppress(Exception):
                self._manager  # noqa: B018

        if self._preparing is None:
            self._preparing = threading.Thread(target=work, daemon=True, name="checkpoints")
            self._preparing.start()

    @property
    def _manager(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = self._open()
            return self._made

    def _open(self) -> Any:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        _quiet()
        keep: list[Any] = [policies.LatestN(self._keep_last)]
        score = None
        if self._best_metric:
            sign = -1.0 if self._best_mode == "min" else 1.0
            score = lambda metrics: sign * metrics[self._best_metric]  # noqa: E731
            keep.append(policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
        handlers = ocp.DefaultCheckpointHandlerRegistry()
        # Compression takes more of the processor than all else that a save does, for a tenth of the bytes.
        for item in ("state", "buffer"):
            handlers.add(item, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
            handlers.add(item, ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
        json_handler = ocp.JsonCheckpointHandler()
        handlers.add("run", ocp.args.JsonSave, json_handler)
        handlers.add("run", ocp.args.JsonRestore, json_handler)
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                best_fn=score,  # without it, metrics aren't written, and the best is forgotten when the run is resumed
                cleanup_tmp_directories=True,
            ),
            handler_registry=handlers,
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: State, place: Place, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Starts to write; returns when the state is copied off the device. A step that is there is left alone.

        On CPU nothing is copied: until it is written, the step that the state is donated to makes new arrays instead.

        Raises:
          Exception: what went wrong with the save before.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        if self.latest() == step:
            return
        best = {k: v for k, v in metrics.items() if k == self._best_metric}
        items = {
            "state": ocp.args.PyTreeSave(state),
            "run": ocp.args.JsonSave({"source": dict(place.source), "config": dict(config)}),
        }
        if jax.tree.leaves(place.buffer):
            items["buffer"] = ocp.args.PyTreeSave(place.buffer)
        self._manager.save(
            step,
            args=ocp.args.Composite(**items),
            metrics=best or None,
            force=True,
        )

    def restore(self, like: State, buffer: Any = (), step: int | None = None) -> tuple[State, Place]:
        """Returns the state and the experience's place of `step`, by default the newest, on the devices asked for.

        Args:
          like: pytree of ShapeDtypeStruct with shardings.
          buffer: the same, of the experience's buffer.
          step: of the checkpoint.

        Raises:
          InputError: the checkpoint is damaged, or was made by a run of other shapes.
        """
        import orbax.checkpoint as ocp

        step = self.latest() if step is None else step
        folder = self._manager.directory / str(step)
        try:
            found = ocp.PyTreeCheckpointer().metadata(folder / "state").item_metadata.tree
        except Exception as error:
            raise _damaged(Path(folder / "state"), error) from error
        _check_shapes(folder, found.get("params"), like.params, "params")
        # A checkpoint from before objectives had carries will do for one that has none.
        there = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
        if "carry" not in found and not like.carry:
            del there["carry"]
        items = {"state": ocp.args.StandardRestore(there), "run": ocp.args.JsonRestore()}
        if jax.tree.leaves(buffer):
            items["buffer"] = ocp.args.StandardRestore(buffer)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except ValueError as error:  # the structures differ: another optimizer, or an average that wasn't there
            raise InputError(
                f"{folder}: was saved with another optimizer, objective or ema_decay than the config's: "
                f"{str(error)[:300]}\n"
                "Start in a new --workdir, with model.init_from to take the parameters along."
            ) from error
        except Exception as error:
            raise _damaged(Path(folder / "state"), error) from error
        place = Place(restored["run"]["source"], restored["buffer"] if "buffer" in items else buffer)
        return like.replace(**restored["state"]), place

    def wait(self) -> None:
        """Until all is written. Raises what went wrong with it."""
        if self._made is not None:
            self._made.wait_until_finished()

    def close(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
        if self._made is not None:
            self._made.close()


def make_checkpointer(config: Any, workdir: str | Path) -> Checkpointer:
    """The checkpoints of a run, kept as the section `checkpoint` of its config says."""
    section = config.checkpoint
    return Checkpointer(
        workdir, keep_last=section.keep_last, best_metric=section.best_metric, best_mode=section.best_mode
    )


def steps(workdir: str | Path) -> list[int]:
    """Steps of the checkpoints of a working directory, in order."""
    folder = Path(workdir) / FOLDER
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def best_step(workdir: str | Path) -> int:
    """The checkpoint that is best by the run's checkpoint.best_metric.

    Raises:
      InputError: the run names no metric, or no checkpoint has its value.
    """
    record = read_json(Path(workdir) / "config.json")["config"]["checkpoint"]
    name, sign = record["best_metric"], 1 if record["best_mode"] == "max" else -1
    scores = {}
    for step in steps(workdir):
        file = Path(workdir) / FOLDER / str(step) / "metrics" / "metrics"
        if file.is_file():
            scores[step] = sign * read_json(file)[name]
    if not scores:
        raise InputError(f"{workdir}: has no best checkpoint (checkpoint.best_metric = {name!r}). Take the newest one.")
    return max(scores, key=lambda step: scores[step])


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
    import orbax.checkpoint as ocp

    there = steps(workdir)
    if not there:
        raise InputError(f"{workdir}: has no {FOLDER}/STEP. Name the --workdir of a run that has saved a checkpoint.")
    step = there[-1] if step is None else step
    if step not in there:
        raise InputError(f"{workdir}: has no checkpoint of step {step}; there are {', '.join(map(str, there))}.")
    key = "ema" if ema else "params"
    wanted = {key: like}
    folder = Path(workdir).resolve() / FOLDER / str(step) / "state"
    _quiet()
    with ocp.PyTreeCheckpointer() as reader:
        try:
            found = reader.metadata(folder).item_metadata.tree
        except Exception as error:
            raise _damaged(folder, error) from error
        _check_shapes(workdir, found.get(key), like, key)
        try:
            state = reader.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
                ),
            )
        except Exception as error:
            raise _damaged(folder, error) from error
    return state[key], step


def _check_shapes(workdir: str | Path, found: Any, like: State, key: str) -> None:
    if found is None:
        raise InputError(f"{workdir}: its checkpoint holds no {key!r}. Only a run with ema_decay > 0 has an average.")
    shapes = {jax.tree_util.keystr(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(found)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        name = jax.tree_util.keystr(path)
        if shapes.get(name) != tuple(leaf.shape):
            raise InputError(
                f"{workdir}: parameter {name} has shape {shapes.get(name, 'missing')} in the checkpoint and "
                f"{tuple(leaf.shape)} in the config's model. Give config.model the values of the checkpoint's run (its "
                "config.json)."
            )


def _damaged(folder: Path, error: BaseException) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return InputError(
        f"{folder}: this checkpoint is damaged and can't be read: {reason}\nDelete {folder.parent} to go on from the "
        "checkpoint before it."
    )


def _quiet() -> None:
    """Orbax reports every internal step at the level of warnings."""
    logging.getLogger("absl").setLevel(logging.ERROR)
