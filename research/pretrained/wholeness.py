"""Whether a run's checkpoints, and the files beside them, are what was written.

checkpoints/STEP/digests.json has the digests of the files below it; config.json in a workdir is sealed (see
research.digests), and has those of the files that a run writes once. Damage is named where it is read, with what goes
on from the checkpoint before it. Nothing here deletes anything.
"""

import concurrent.futures
import contextlib
import functools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from research import digests
from research.errors import InputError
from research.files import read_json, write_json

FOLDER = "checkpoints"  # in a workdir
ASIDE = "checkpoints_aside"  # in a workdir: those later than one that a run went on from
DIGESTS = "digests.json"
RECORD = "config.json"  # in a workdir: what it ran with
FILES = "files"  # in RECORD: the digests of files beside it
WHOLE = "whole"  # in place of a step: the newest that is whole
_STEP = "_CHECKPOINT_METADATA"  # Orbax writes it last, as a checkpoint gets its name
_OUTLINE = 2**20  # bytes of a file that is read in outline


class Damaged(InputError):
    """A checkpoint isn't what was written."""


def steps(workdir: str | Path) -> list[int]:
    """Steps of the checkpoints of a working directory, in order."""
    folder = Path(workdir) / FOLDER
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def seal(folder: Path, names: Iterable[str]) -> None:
    """Reads a checkpoint that is about to be complete back in outline, and writes the digests of its files.

    Args:
      folder: of the checkpoint.
      names: params.path_name of the arrays of its state.

    Raises:
      OSError, ValueError: it can't be read, or lacks some of them.
    """
    if lacking := set(names) - arrays(folder / "state"):
        raise ValueError(f"{folder}: the array {min(lacking)} was not written")
    for item in folder.glob("*/_METADATA"):
        if not item.with_name("manifest.ocdbt").is_file():
            raise ValueError(f"{item.parent}: its parts were not put together")
    json.loads((folder / "run/metadata").read_text())
    _write_digests(folder, digests.of_folder(folder, [_STEP]))


def arrays(state: Path) -> set[str]:
    """The params.path_name of the arrays in the folder of a checkpoint's state, as its outline has them."""
    there = json.loads((state / "_METADATA").read_text())["tree_metadata"].values()
    held = (each for each in there if not each["value_metadata"].get("skip_deserialize"))
    return {"/".join(str(key["key"]) for key in each["key_metadata"]) for each in held}


def seal_rest(folder: Path) -> None:
    """Adds the digests of what Orbax writes as a checkpoint gets its name. Without them that isn't checked."""
    known = _known(folder)
    if isinstance(known, dict):
        with contextlib.suppress(OSError):
            _write_digests(folder, digests.of_folder(folder, [DIGESTS, *known]) | known)


def _write_digests(folder: Path, entries: Mapping[str, Any]) -> None:
    write_json(folder / DIGESTS, digests.seal({"files": dict(entries)}), indent=None)


def outline_fault(folder: Path) -> str:
    """What is wrong with a checkpoint as far as its small files and the sizes of all show; "" if nothing."""
    known = _known(folder)
    if isinstance(known, str):
        return known
    small = {name: entry for name, entry in known.items() if entry["size"] <= _OUTLINE}
    for name, entry in known.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is gone"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size:,} bytes, and had {entry['size']:,}"
    return digests.first_fault(folder, small)


def whole_fault(folder: Path, part: slice = slice(None)) -> str:
    """What is wrong with a checkpoint's files, or with a part of them; "" if nothing. All is read."""
    known = _known(folder)
    if isinstance(known, str):
        return known
    return digests.first_fault(folder, dict(list(known.items())[part]))


def _known(folder: Path) -> dict[str, Any] | str:
    """The digests of a checkpoint's files; none where it is from before they were kept. Or what is wrong with them."""
    try:
        content = json.loads((folder / DIGESTS).read_text())
        if digests.is_whole(content) and digests.SEAL in content:
            return content["files"]
    except FileNotFoundError:
        older = ["state/_METADATA", "run/metadata", _STEP]
        return _fault_of_json(folder, [name for name in older if (folder / name).is_file()]) or {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return f"{DIGESTS} isn't what was written"


def _fault_of_json(folder: Path, names: Iterable[str]) -> str:
    for name in names:
        try:
            if not isinstance(json.loads((folder / name).read_text()), dict):
                raise ValueError
        except (OSError, ValueError, RecursionError):
            return f"{name} isn't what was written"
    return ""


def damaged(folder: Path, fault: str) -> Damaged:
    """What to say of a checkpoint that isn't whole: workdir/checkpoints/STEP."""
    workdir = folder.parent.parent
    before = newest_whole(workdir, int(folder.name))
    remedy = f"Put it back from a copy, or go on from the one before it: the same command with --step={before}."
    if before is None:
        remedy = "There is none before it that is whole. Put it back from a copy, or start in a new --workdir."
    return Damaged(f"{folder}: this checkpoint is damaged: {fault}. {remedy}")


def newest_whole(workdir: str | Path, below: int | None = None) -> int | None:
    """The newest checkpoint that is whole, of those below a step; None where there is none."""
    for step in reversed(steps(workdir)):
        folder = Path(workdir) / FOLDER / str(step)
        if (below is None or step < below) and not (outline_fault(folder) or whole_fault(folder)):
            return step
    return None


def check_outline(folder: Path) -> None:
    """Raises Damaged where a checkpoint's small files, or the sizes of the others, aren't what was written."""
    if fault := outline_fault(folder):
        raise damaged(folder, fault)


@contextlib.contextmanager
def checking(folder: Path, part: slice = slice(None)) -> Iterator[None]:
    """Checks a checkpoint's files, or a part of them, while they are read in the block.

    Raises:
      Damaged: they aren't what was written. That comes before whatever reading them raised.
    """
    check_outline(folder)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        fault = pool.submit(_whole_fault_once, folder, part.start, part.step, _stamp(folder))
        try:
            yield
        finally:
            if said := fault.result():
                raise damaged(folder, said)


@functools.lru_cache(64)
def _whole_fault_once(folder: Path, start: int | None, step: int | None, stamp: tuple[int, ...]) -> str:
    """`whole_fault`, once for as long as no file changes: a command reads a checkpoint in several passes."""
    return whole_fault(folder, slice(start, None, step))


def _stamp(folder: Path) -> tuple[int, ...]:
    known = _known(folder)
    stats = []
    with contextlib.suppress(OSError):  # what is gone is a fault, and found as such
        stats = [(folder / name).stat() for name in (known if isinstance(known, dict) else ())]
    return tuple(x for stat in stats for x in (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


def read_record(workdir: str | Path) -> dict[str, Any]:
    """What a run's config.json holds; `config` is what it last ran with. Where it is gone, a checkpoint has it too.

    Raises:
      InputError: it is damaged, or is gone and no checkpoint has it.
    """
    path = Path(workdir) / RECORD
    if path.is_file():
        record = read_json(path, {}, remedy=_record_remedy(workdir))
        if not digests.is_whole(record):
            raise InputError(
                f"{path}: isn't what the run wrote. If you changed it yourself, take its field {digests.SEAL!r} out. "
                f"{_record_remedy(workdir)}"
            )
        if not isinstance(record.get("config"), dict):
            raise InputError(f"{path}: doesn't say what the run ran with. {_record_remedy(workdir)}")
        return record
    held = _holding_record(workdir)
    if held is None:
        raise InputError(
            f"{path}: isn't there, and says of which run the checkpoints are. Put it back from a copy, or name another "
            "--workdir."
        )
    print(f"{path}: is gone; taken from the checkpoint of step {held}", file=sys.stderr)
    return _record_of(workdir, held)


def _record_remedy(workdir: str | Path) -> str:
    held = _holding_record(workdir)
    if held is None:
        return "Put it back from a copy, or name another --workdir."
    return f"Put it back from a copy, or move it away: the checkpoint of step {held} has what it held."


def _holding_record(workdir: str | Path) -> int | None:
    """The newest checkpoint that has what config.json held; None where none has."""
    return next((step for step in reversed(steps(workdir)) if _record_of(workdir, step)), None)


def _record_of(workdir: str | Path, step: int) -> dict[str, Any]:
    """What a checkpoint has of the run's config.json; {} where it is from before that was kept, or damaged."""
    folder = Path(workdir) / FOLDER / str(step)
    if outline_fault(folder):
        return {}
    run = read_json(folder / "run/metadata", {})
    return {**run["record"], "config": run["config"]} if "record" in run else {}


def check_files(workdir: str | Path, record: Mapping[str, Any]) -> None:
    """Raises InputError where a file that a run wrote once, such as its tokenizer, isn't what was written.

    Args:
      workdir: of the run.
      record: see `read_record`.
    """
    if fault := digests.first_fault(Path(workdir), record.get(FILES, {})):
        raise InputError(
            f"{workdir}: {fault}. Put the file back from a copy; if you changed it yourself, take it out of {FILES!r} "
            f"in {RECORD}, and the field {digests.SEAL!r}."
        )


def set_aside(workdir: str | Path, after: int) -> None:
    """Moves the checkpoints after a step into workdir/checkpoints_aside, for a run that goes on from it."""
    for step in steps(workdir):
        if step > after:
            folder = Path(workdir) / ASIDE
            folder.mkdir(exist_ok=True)
            names = (f"{step}" if i == 0 else f"{step}.{i}" for i in range(10**6))
            place = next(folder / name for name in names if not (folder / name).exists())
            (Path(workdir) / FOLDER / str(step)).rename(place)
            print(f"moved    the checkpoint of step {step} to {place}", file=sys.stderr)
