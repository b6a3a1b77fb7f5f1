"""Checkpoints: {state, source state, resolved config}, written by Orbax in the background.

Orbax writes into a temporary folder and renames it when all is there, so that a kill at any moment leaves the earlier
checkpoints whole; what a kill left behind is removed at the next start.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from research.errors import InputError

State = Any  # a pytree of arrays

FOLDER = "checkpoints"


class Checkpointer:
    """The checkpoints of one working directory: the last `keep_last` and, if a metric is named, the best by it.

    Args:
      workdir: checkpoints lie in workdir/checkpoints/STEP.
      keep_last: how many of the newest to keep.
      best_metric: name among the metrics given to `save`, or "" for none.
      best_mode: "min" or "max".
    """

    def __init__(self, workdir: str | Path, *, keep_last: int = 2, best_metric: str = "", best_mode: str = "min"):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every internal step at the level of warnings
        keep: list[Any] = [policies.LatestN(keep_last)]
        if best_metric:
            sign = -1.0 if best_mode == "min" else 1.0
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: sign * metrics[best_metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._best_metric = best_metric
        self._manager = ocp.CheckpointManager(
            Path(workdir).resolve() / FOLDER,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
            ),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self, state: State, source: Mapping[str, Any], config: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Starts to write; returns when the state is copied off the device. A step that is there is left alone."""
        step = int(state.step)
        if self.latest() == step:
            return
        best = {k: v for k, v in metrics.items() if k == self._best_metric}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                run=ocp.args.JsonSave({"source": dict(source), "config": dict(config)}),
            ),
            metrics=best or None,
            force=True,
        )

    def restore(self, like: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """Returns (state, source state) of `step`, by default the newest, on the devices that `like` asks for.

        Args:
          like: pytree of ShapeDtypeStruct with shardings.

        Raises:
          InputError: the checkpoint is damaged, or was made by a run of other shapes.
        """
        step = self.latest() if step is None else step
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(like), run=ocp.args.JsonRestore()),
            )
        except Exception as error:
            raise InputError(
                f"{self._manager.directory / str(step)}: this checkpoint can't be read into the model and "
                f"optimizer that the config describes: {_first_line(error)}\nIf the config has changed, start in a new "
                f"--workdir; if the checkpoint is damaged, delete the folder, and the run goes on from the one before."
            ) from error
        return restored["state"], restored["run"]["source"]

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def has_checkpoint(workdir: str | Path) -> bool:
    folder = Path(workdir) / FOLDER
    return folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())


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
    if not has_checkpoint(workdir):
        raise InputError(
            f"{workdir}: no checkpoint of a run here (it has no {FOLDER}/STEP). Name a --workdir of a run."
        )
    with ocp.CheckpointManager(Path(workdir).resolve() / FOLDER, item_names=("state", "run")) as manager:
        step = manager.latest_step() if step is None else step
        if step not in manager.all_steps():
            raise InputError(f"{workdir}: has no step {step}; there are {sorted(manager.all_steps())}.")
        key = "ema" if ema else "params"
        _check_shapes(manager, step, key, like, workdir)
        wanted = {key: like}
        with ocp.PyTreeCheckpointer() as reader:
            state = reader.restore(
                manager.directory / str(step) / "state",
                args=ocp.args.PyTreeRestore(
                    wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                ),
            )
    return state[key], step


def _check_shapes(manager: Any, step: int, key: str, like: State, workdir: Any) -> None:
    there = manager.item_metadata(step)["state"].tree.get(key)
    if there is None:
        raise InputError(f"{workdir}: the checkpoint of step {step} holds no {key!r}.")
    shapes = {jax.tree_util.keystr(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(there)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        name = jax.tree_util.keystr(path)
        if shapes.get(name) != tuple(leaf.shape):
            found = shapes.get(name, "missing")
            raise InputError(
                f"{workdir}: parameter {name} has shape {found} in the checkpoint and {tuple(leaf.shape)} in the "
                "config's model. Give config.model the values of the checkpoint's run (its config.json)."
            )


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON to a temporary file and renames it, so that a kill leaves the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
