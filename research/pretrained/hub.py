"""The Hugging Face hub, as a place that models are given to."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research.errors import InputError, Unavailable

_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")


def check(name: str) -> str:
    """Checks that a model can be pushed, before it is made; returns the user whom the hub takes this for.

    Args:
      name: OWNER/MODEL, or MODEL of the user.

    Raises:
      InputError: the name can't be one, or the hub doesn't know the user.
      Unavailable: the hub can't be reached.
    """
    if not _NAME.fullmatch(name) or ".." in name or "--" in name or name.endswith("."):
        raise InputError(f"--push = {name}: isn't the name of a model on the hub. Write OWNER/MODEL.")
    with _asking(name) as hub:
        return str(hub.whoami()["name"])


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads a folder as one commit, into a repository that is made where there is none; returns its address.

    Args:
      folder: of the model; all that is in it.
      name: see `check`.
      private: a repository that is made is seen by its owner alone.

    Raises:
      InputError: the hub refuses it.
      Unavailable: the hub can't be reached.
    """
    with _asking(name) as hub:
        made = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Written by understudy export")
        return str(made)


@contextmanager
def _asking(name: str) -> Iterator[Any]:
    """The hub's API, whose errors are ours."""
    import huggingface_hub.errors  # here: it takes 0.2 s

    try:
        yield huggingface_hub.HfApi()
    except Exception as error:  # each version of huggingface_hub has its own, and that of its HTTP library
        status = getattr(getattr(error, "response", None), "status_code", 0)
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        if status == 401 or isinstance(error, huggingface_hub.errors.LocalTokenNotFoundError):
            raise InputError(
                f"--push = {name}: the hub has no token that it knows. Run `hf auth login`, or set HF_TOKEN to one "
                "that may write."
            ) from error
        if 400 <= status < 500:
            raise InputError(f"--push = {name}: the hub refuses it ({reason}).") from error
        raise Unavailable(f"--push = {name}: the hub can't be had ({type(error).__name__}: {reason}).") from error
