"""Checkpoints: {state, place of the experience, resolved config}, written by Orbax in the background.

Orbax writes into a temporary folder and renames it when all is there, so that a kill at any moment leaves the earlier
checkpoints whole; what a kill left behind is removed at the next start. It is imported where it is used: that takes a
third of all imports' time.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from research.devices import distributed
from research.errors import InputError
from research.params import path_name
from research.pretrained import checkpoints
from research.pretrained.checkpoints import FOLDER, best_step, restore_params, steps
from research.rollouts.experience import Place

State = Any  # a pytree of arrays

__all__ = ["FOLDER", "Checkpointer", "best_step", "make_checkpointer", "restore_params", "steps"]


class Checkpointer:
    """The checkpoints of one working directory: the last `keep_last` and, if a metric is named, the best by it.

    Nothing is imported or touched before the first use, or `prepare`.

    Args:
      workdir: checkpoints lie in workdir/checkpoints/STEP.
      keep_last: how many of the newest to keep.
      best_metric: name among the metrics given to `save`, or "" for none.
      best_mode: "min" or "max".
      read_only: whether nothing of the folder may change, not even what a save that is under way has begun.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep_last: int = 2,
        best_metric: str = "",
        best_mode: str = "min",
        read_only: bool = False,
    ):
        self._folder, self._read_only = Path(workdir).resolve() / FOLDER, read_only
        self._keep_last, self._best_metric, self._best_mode = keep_last, best_metric, best_mode
        self._opened: Any = None
        self._lock = threading.Lock()
        self._preparing: threading.Thread | None = None

    def prepare(self) -> None:
        """Imports Orbax and opens the folder, in the background. If that fails, it is tried again by the first use,
        which has the error then.

        Several processes open it at once: they wait for each other in a collective, and one that is made beside the
        step's could be entered in another order by another process.
        """
        if distributed.several():
            self._manager  # noqa: B018
            return

        def work() -> None:
            with contextlib.suppress(Exception):
                self._manager  # noqa: B018

        if self._preparing is None:
            self._preparing = threading.Thread(target=work, daemon=True, name="checkpoints")
            self._preparing.start()

    @property
    def _manager(self) -> Any:
        with self._lock:
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _open(self) -> Any:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        checkpoints.quiet()
        keep: list[Any] = [policies.LatestN(self._keep_last)]
        score = None
        if self._best_metric:
            sign = -1.0 if self._best_mode == "min" else 1.0
            score = lambda metrics: checkpoints.score(metrics, self._best_metric, sign)  # noqa: E731
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
                cleanup_tmp_directories=not self._read_only,
                read_only=self._read_only,
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
        tree = checkpoints.metadata(folder / "state")
        checkpoints.check_shapes(folder, tree.get("params"), like.params, "params")
        items = {"run": ocp.args.JsonRestore()}
        if jax.tree.leaves(buffer):
            _check_buffer(folder, buffer)
            items["buffer"] = ocp.args.StandardRestore(buffer)
        # One from before trained and frozen parameters were two trees, or from before objectives had carries and
        # roles followed others.
        older = checkpoints.restore_two_trees(folder / "state", tree, like)
        if older is None:
            there = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
            for name in ("carry", "synced"):
                if name not in tree and not there[name]:
                    del there[name]
            items["state"] = ocp.args.StandardRestore(there)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except ValueError as error:  # the structures differ: another optimizer, or an average that wasn't there
            raise InputError(
                f"{folder}: was saved with another optimizer, objective, ema_decay or trainable than the config's"
                f"{_difference(tree, there)}. Set what the run began with, or start in a new --workdir, with "
                "model.init_from to take the parameters along."
            ) from error
        except Exception as error:
            raise checkpoints.damaged(Path(folder / "state"), error) from error
        place = Place(_source(restored["run"]), restored["buffer"] if "buffer" in items else buffer)
        return older or like.replace(**restored["state"]), place

    def wait(self) -> None:
        """Until all is written. Raises what went wrong with it."""
        if self._opened is not None:
            self._opened.wait_until_finished()

    def close(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
        if self._opened is not None:
            self._opened.close()


def _check_buffer(folder: Any, wanted: Any) -> None:
    """Raises InputError where a checkpoint's answers haven't the fields that the run would train them with."""
    saved = checkpoints.metadata(folder / "buffer")
    if isinstance(wanted, Mapping) and (differing := sorted(saved.keys() ^ wanted.keys())):
        name = differing[0]
        has, would = ("have", "not have") if name in saved else ("don't have", "have")
        raise InputError(
            f"{folder}: its answers {has} the field {name!r}, and with the config's objective and advantage they would "
            f"{would} it. Set what the run began with, or start in a new --workdir, with model.init_from to take the "
            "parameters along."
        )


def _difference(saved: Any, wanted: Any) -> str:
    """The first array that only one of two states has, for a message; "" where they have the same."""
    names = [{path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)} for state in (saved, wanted)]
    lacking, foreign = min(names[1] - names[0], default=""), min(names[0] - names[1], default="")
    parts = [f"it lacks {lacking}" if lacking else "", f"it has {foreign}" if foreign else ""]
    return f" ({', and '.join(filter(None, parts))})" if any(parts) else ""


def _source(run: Mapping[str, Any]) -> dict[str, Any]:
    """The source's state. Checkpoints from before it counted rows hold the number of batches."""
    source = run["source"]
    return {"row": source["step"] * run["config"]["batch_size"]} if source.keys() == {"step"} else source


def make_checkpointer(config: Any, workdir: str | Path, *, read_only: bool = False) -> Checkpointer:
    """The checkpoints of a run, kept as the section `checkpoint` of its config says."""
    section = config.checkpoint
    return Checkpointer(
        workdir,
        keep_last=section.keep_last,
        best_metric=section.best_metric,
        best_mode=section.best_mode,
        read_only=read_only,
    )
