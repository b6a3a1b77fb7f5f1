"""Checkpoints: {state, place of the experience, resolved config}, written by Orbax in the background.

Orbax writes into a temporary folder and renames it when all is there, so that a kill at any moment leaves the earlier
checkpoints whole; what a kill left behind is removed at the next start. Before the renaming, what was written is read
back in outline and its digests are added (pretrained/wholeness.py): only then may an older checkpoint go. Orbax is
imported where it is used: that takes a third of all imports' time.
"""

import asyncio
import contextlib
import dataclasses
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from research.devices import distributed
from research.errors import InputError, disk_fault
from research.files import read_json
from research.params import path_name
from research.pretrained import checkpoints, wholeness
from research.pretrained.checkpoints import FOLDER, best_step, restore_params, steps
from research.rollouts.experience import Place

State = Any  # a pytree of arrays
_SAVE_SECONDS = 4 * 3600  # of a save of several processes, at most
_ALWAYS = 100 * 365 * 24 * 3600  # seconds; Orbax asks the clock how long a save takes, and that may be set ahead

__all__ = [
    "FOLDER",
    "Checkpointer",
    "SaveFailed",
    "best_step",
    "choose",
    "make_checkpointer",
    "restore_params",
    "steps",
]


def print_line(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


class SaveFailed(Exception):
    """The last save came to nothing, since the disk is full, broken or gone. Those before it are whole."""


class Checkpointer:
    """The checkpoints of one working directory: the last `keep_last` and, if a metric is named, the best by it.

    Nothing is imported or touched before the first use, or `prepare`.

    Args:
      workdir: checkpoints lie in workdir/checkpoints/STEP.
      keep_last: how many of the newest to keep.
      best_metric: name among the metrics given to `save`, or "" for none.
      best_mode: "min" or "max".
      read_only: whether nothing of the folder may change, not even what a save that is under way has begun.
      say: prints a line about a save that came to nothing; the next one is tried all the same.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep_last: int = 2,
        best_metric: str = "",
        best_mode: str = "min",
        read_only: bool = False,
        say: Callable[[str], None] = print_line,
    ):
        self._say, self._failed = say, ""
        self._saving: int | None = None  # the step that is being written
        self._folder, self._read_only = Path(workdir).resolve() / FOLDER, read_only
        self._keep_last, self._best_metric, self._best_mode = keep_last, best_metric, best_mode
        self._opened: Any = None
        self._lock = threading.Lock()
        self._preparing: threading.Thread | None = None
        self._names: set[str] = set()  # of the arrays that are being written

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
        _leave_late_writes()
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
                temporary_path_class=_sealed_path(self._seal),
                # Process 0 reads all back while the others wait; who has died, the watch says.
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=_SAVE_SECONDS if distributed.several() else _ALWAYS
                ),
            ),
            handler_registry=handlers,
        )

    def _seal(self, folder: Path) -> None:
        wholeness.seal(folder, self._names)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: State, place: Place, record: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Starts to write; returns when the state is copied off the device. A step that is there is left alone.

        On CPU nothing is copied: until it is written, the step that the state is donated to makes new arrays instead.

        Args:
          state, place: of the run.
          record: what the run's config.json holds, for when that is lost.
          metrics: of the evaluation at this step.

        A save that comes to nothing since the disk is full or broken is said, here or by the next call, and not raised
        but by `wait`.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        self._settle()
        try:
            if self.latest() == step:
                return
        except OSError as error:
            self._fail(step, error)
            return
        best = {k: v for k, v in metrics.items() if k == self._best_metric}
        rest = {name: value for name, value in record.items() if name != "config"}
        run = {"source": dict(place.source), "config": record.get("config", {}), "record": rest}
        items = {"state": ocp.args.PyTreeSave(state), "run": ocp.args.JsonSave(run)}
        if jax.tree.leaves(place.buffer):
            items["buffer"] = ocp.args.PyTreeSave(place.buffer)
        self._names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
        self._failed, self._saving = "", step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=best or None, force=True)
        except Exception as error:
            self._fail(step, error)

    def _settle(self) -> None:
        """Waits until what is being written is there, or has come to nothing."""
        if self._opened is None or self._saving is None:
            return
        try:
            self._opened.wait_until_finished()
        except Exception as error:
            self._fail(self._saving, error)
        self._saving = None

    def _fail(self, step: int, error: Exception) -> None:
        """Notes and says that a save came to nothing because of the disk. Raises what comes of something else, and
        where there are several processes, of which only some may know."""
        fault = disk_fault(error) or (str(error) if isinstance(error, FileNotFoundError | TimeoutError) else "")
        if not fault or distributed.several():
            raise error
        self._drop(step)
        there = steps(self._folder.parent)
        whole = f"the checkpoint of step {there[-1]} is whole" if there else "there is no checkpoint yet"
        self._failed = f"{self._folder / str(step)}: couldn't be saved ({fault}); {whole}"
        self._say(self._failed)

    def _drop(self, step: int) -> None:
        """Forgets what Orbax knows, which counts on a save that came to nothing, and removes what it left."""
        with contextlib.suppress(Exception):
            self._opened.close()
        self._opened, self._saving = None, None
        for left in self._folder.glob(f"{step}.*"):
            shutil.rmtree(left, ignore_errors=True)

    def restore(self, like: State, buffer: Any = (), step: int | None = None) -> tuple[State, Place]:
        """Returns the state and the experience's place of `step`, by default the newest, on the devices asked for.

        Args:
          like: pytree of ShapeDtypeStruct with shardings.
          buffer: the same, of the experience's buffer.
          step: of the checkpoint.

        Raises:
          InputError: the checkpoint is damaged, or was made by a run of other shapes.
        """

        step = self.latest() if step is None else step
        folder = self._folder / str(step)
        mine = slice(jax.process_index(), None, jax.process_count())
        with wholeness.checking(folder, mine):
            return self._restore(folder, like, buffer)

    def _restore(self, folder: Path, like: State, buffer: Any) -> tuple[State, Place]:
        """`restore`, of files that are being checked."""
        import orbax.checkpoint as ocp

        if jax.tree.leaves(buffer):
            _check_buffer(folder, buffer)
        elif not distributed.several() and (state := _restore_same(folder / "state", like)) is not None:
            return state, Place(_source(read_json(folder / "run/metadata")), buffer)
        tree = checkpoints.metadata(folder / "state")
        checkpoints.check_shapes(folder, tree.get("params"), like.params, "params")
        # One from before trained and frozen parameters were two trees, or from before objectives had carries and
        # roles followed others.
        state = checkpoints.restore_two_trees(folder / "state", tree, like)
        there = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
        for name in ("carry", "synced"):
            if name not in tree and not there[name]:
                del there[name]
        if state is None and (difference := _difference(tree, there)):
            raise InputError(
                f"{folder}: was saved with another optimizer, objective, ema_decay or trainable than the config's "
                f"({difference}). Set what the run began with, or start in a new --workdir, with model.init_from to "
                "take the parameters along."
            )
        with ocp.StandardCheckpointer() as reader:
            try:
                state = state or like.replace(**reader.restore(folder / "state", there))
                if jax.tree.leaves(buffer):
                    buffer = reader.restore(folder / "buffer", buffer)
            except Exception as error:
                raise checkpoints.unreadable(folder / "state", error) from error
        return state, Place(_source(read_json(folder / "run/metadata")), buffer)

    def wait(self) -> None:
        """Until all is written.

        Raises:
          SaveFailed: the last save came to nothing.
        """
        self._settle()
        if self._failed:
            raise SaveFailed(f"{self._failed}. The same command goes on from there.")

    def close(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
        if self._opened is not None:
            self._settle()
            if self._opened is not None:
                self._opened.close()


def _restore_same(folder: Path, like: State) -> State | None:
    """The state of a checkpoint that has the arrays of `like` and no others; None where it hasn't, or where they can't
    be read. Nothing is asked of the arrays before, which takes Orbax a sixth of a restore. For one process alone: of
    several only some may fail, and would try again while the others wait."""
    import orbax.checkpoint as ocp

    leaves = jax.tree_util.tree_leaves_with_path(like)
    try:
        if wholeness.arrays(folder) != {path_name(path) for path, _ in leaves}:
            return None
        with ocp.StandardCheckpointer() as reader:
            fields = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
            state = like.replace(**reader.restore(folder, fields))
    except Exception:
        return None
    same = all(x.shape == leaf.shape for x, (_, leaf) in zip(jax.tree.leaves(state), leaves, strict=True))
    return state if same else None


def _leave_late_writes() -> None:
    """Has writes say nothing that end after the first of them failed: nobody waits for them any more, and each would
    print that the event loop is closed, some before the save's own error is known."""
    before = sys.unraisablehook  # they end in threads of another language, whose errors nobody can catch
    if getattr(before, "__module__", "") == __name__:
        return

    def hook(late: Any) -> None:
        if not (late.exc_type is RuntimeError and "Event loop is closed" in str(late.exc_value)):
            before(late)

    sys.unraisablehook = hook


def _sealed_path(seal: Callable[[Path], None]) -> type:
    """Orbax's temporary folder of a checkpoint, on which `seal` is called before it gets its name."""
    import orbax.checkpoint as ocp

    class SealedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
        async def finalize(self, *args: Any, **kwargs: Any) -> None:
            if self.get_final().name.isdigit():  # not a part of a checkpoint
                await asyncio.to_thread(seal, Path(self.get()))
            await super().finalize(*args, **kwargs)
            if self.get_final().name.isdigit():
                await asyncio.to_thread(wholeness.seal_rest, Path(self.get_final()))

    return SealedPath


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
    """The first array that only one of two states has, or has in another shape; "" where they have the same."""
    shapes = [
        {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
        for state in (saved, wanted)
    ]
    lacking, foreign = min(shapes[1].keys() - shapes[0], default=""), min(shapes[0].keys() - shapes[1], default="")
    parts = [f"it lacks {lacking}" if lacking else "", f"it has {foreign}" if foreign else ""]
    if other := [name for name in sorted(shapes[0].keys() & shapes[1]) if shapes[0][name] != shapes[1][name]]:
        parts.append(f"its {other[0]} is {list(shapes[0][other[0]])} and not {list(shapes[1][other[0]])}")
    return ", and ".join(filter(None, parts))


def _source(run: Mapping[str, Any]) -> dict[str, Any]:
    """The source's state. Checkpoints from before it counted rows hold the number of batches."""
    source = run["source"]
    return {"row": source["step"] * run["config"]["batch_size"]} if source.keys() == {"step"} else source


def check_name(workdir: str | Path) -> None:
    """Raises InputError where Orbax would take a folder's name for a pattern, and put no checkpoint together."""
    if found := sorted(set("[]*?") & set(str(Path(workdir).resolve()))):
        raise InputError(f"--workdir = {workdir}: holds {' '.join(found)}, which checkpoints can't have. Name another.")


def choose(workdir: str | Path, step: int | str | None = None) -> int | None:
    """The checkpoint that a run goes on from; None of a new run.

    Args:
      workdir: of the run.
      step: of a checkpoint; wholeness.WHOLE for the newest that is whole; None for the newest.

    Raises:
      InputError: there is no such checkpoint; or the newest, where that is asked for, is damaged in its outline.
    """
    there = steps(workdir)
    if step is None or not there:
        if step not in (None, wholeness.WHOLE):
            raise InputError(f"--step={step}: {workdir} has no checkpoints. Leave it out to begin a run.")
        return there[-1] if there else None
    if step == wholeness.WHOLE:
        if (whole := wholeness.newest_whole(workdir)) is None:
            raise InputError(f"--step={step}: none of the checkpoints in {workdir} is whole. Name another --workdir.")
        return whole
    if step not in there:
        known = ", ".join(map(str, there))
        raise InputError(f"--step={step}: {workdir} has no checkpoint of that step; there are {known}.")
    return step


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
