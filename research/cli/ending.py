"""How a command ends: its exit status, and an error on one line."""

import sys
from collections.abc import Callable

from research import console
from research.errors import Exit, InputError, Unavailable, disk_fault, printable


def finish(work: Callable[[], int | None], *, resumable: bool = False, output: str = "") -> int:
    """Does a command's work, and returns its exit status. An error is a line on stderr; a bug keeps its traceback.

    Args:
      work: what it returns is the status, None being 0.
      resumable: where it is interrupted, say that the same command goes on.
      output: what it writes, for a disk that is full.
    """
    try:
        status = work() or Exit.DONE
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except InputError as error:
        return fail(error, Exit.BAD_INPUT)
    except Unavailable as error:
        return fail(error, Exit.LOST)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and console.is_unread():
            console.drop_output()
            return Exit.UNREAD
        if not (fault := disk_fault(error)):
            raise
        _drop_broken_output()
        if output and "/" not in fault:
            fault = f"{output}: {fault}"
        return fail(f"{fault}.{' The same command goes on.' if resumable and output else ''}", Exit.FAILED)
    except KeyboardInterrupt:
        if resumable:
            print("interrupted: the same command goes on", file=sys.stderr)
        return Exit.INTERRUPTED


def _drop_broken_output() -> None:
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):
        console.drop_output()


def fail(error: object, status: int) -> int:
    """Prints an error, on one line but for a traceback, and returns the status."""
    text = str(error)
    if "Traceback" not in text:
        text = " ".join(line.strip() for line in text.splitlines())
    print(f"error: {printable(text)}", file=sys.stderr)
    return status
