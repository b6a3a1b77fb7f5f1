"""How a command ends: its exit status, and an error on one line."""

import sys
from collections.abc import Callable

from research.errors import Exit, InputError, Unavailable, printable

_DISK_ERRORS = (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


def finish(work: Callable[[], int | None], *, resumable: bool = False) -> int:
    """Does a command's work, and returns its exit status. An error is a line on stderr; a bug keeps its traceback.

    Args:
      work: what it returns is the status, None being 0.
      resumable: where it is interrupted, say that the same command goes on.
    """
    try:
        return work() or Exit.DONE
    except InputError as error:
        return fail(error, Exit.BAD_INPUT)
    except Unavailable as error:
        return fail(error, Exit.LOST)
    except _DISK_ERRORS as error:
        return fail(f"{error.filename}: {error.strerror}.", Exit.FAILED)
    except KeyboardInterrupt:
        if resumable:
            print("interrupted: the same command goes on", file=sys.stderr)
        return Exit.INTERRUPTED


def fail(error: object, status: int) -> int:
    """Prints an error, on one line but for a traceback, and returns the status."""
    text = str(error)
    if "Traceback" not in text:
        text = " ".join(line.strip() for line in text.splitlines())
    print(f"error: {printable(text)}", file=sys.stderr)
    return status
