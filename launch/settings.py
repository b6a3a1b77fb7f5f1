"""Reads the settings of a launcher: settings.env, the environment, the command line.

Shell scripts take them as assignments, with RUN once more as the array ARGUMENTS:

    settings=$(python3 launch/settings.py --require=ZONE,PROJECT -- "$@"); eval "$settings"
"""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

FILE = Path(__file__).with_name("settings.env")
BAD_INPUT = 2
_NUMBERS = {"NODES": 1, "PROCESSES": 1, "DEVICES": 1, "SLICES": 1, "MAX_RESTARTS": 0, "GRACE": 1, "POLL": 0}
_NUMBERS |= {"SERVERS": 0, "SERVER_PORT": 1, "SERVER_DEVICES": 1, "SERVER_LORA_RANK": 0}
_CHOICES = {"PLATFORM": ("cpu", "gpu", "tpu"), "SPOT": ("0", "1"), "KEEP": ("0", "1")}


class SettingError(ValueError):
    """A setting is missing, unknown or has no such value. The message names it and says what to do."""


def read(
    argv: Sequence[str], require: Iterable[str] = (), mount: str = "", run: bool = True
) -> tuple[dict[str, str], bool]:
    """Returns every setting as text, and whether --dry_run was given. An empty value means none.

    RUN comes back as a shell quotes it.

    Args:
      argv: NAME=value or --name=value, --dry_run, and after `--` the arguments of research.main, which become RUN.
      require: the names, besides RUN, that must have a value.
      mount: where the nodes' shared storage appears, if the launcher decides that; --workdir must lie under it.
      run: whether there must be a RUN.

    Raises:
      SettingError: a name isn't known, a value is missing or not allowed.
    """
    values = _read_file(FILE)
    known = list(values)
    values.update({name: os.environ[name] for name in known if name in os.environ})
    argv, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    dry_run = False
    for argument in argv:
        if argument == "--dry_run":
            dry_run = True
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        if name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
            raise SettingError(f"{argument}: no such setting. {hint} What research.main is to get comes after --.")
        if not equals:
            raise SettingError(f"{argument}: has no value. Write {name}=VALUE.")
        values[name.upper()] = value
    if words:
        values["RUN"] = shlex.join(words)
    _check(values, (*(("RUN",) if run else ()), *require))
    if not run:
        return values, dry_run
    arguments = _arguments(values["RUN"])
    for flag in ("--config", "--workdir"):
        if not arguments.get(flag):
            raise SettingError(f"RUN = {values['RUN']!r}: has no {flag}=..., without which a restart can't go on.")
    if mount and not arguments["--workdir"].startswith(f"{mount}/"):
        raise SettingError(f"RUN = {values['RUN']!r}: its --workdir isn't under {mount}, all that outlives a node.")
    values["RUN"] = shlex.join(shlex.split(values["RUN"]))
    return values, dry_run


def _arguments(run: str) -> dict[str, str]:
    try:
        words = shlex.split(run)
    except ValueError as error:
        raise SettingError(f"RUN = {run!r}: {error}") from None
    flags = (word.partition("=") for word in words)
    return {
        name: value if equals else following
        for (name, equals, value), following in zip(flags, [*words[1:], ""], strict=True)
    }


def _read_file(file: Path) -> dict[str, str]:
    values = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.isidentifier():
            raise SettingError(f"{file}:{number}: {line!r} is no NAME=value line.")
        values[name] = value.strip()
    return values


def _check(values: dict[str, str], require: Iterable[str]) -> None:
    if values["SERVERS"] not in ("", "0"):
        require = (*require, "SERVER_MODEL")
    for name in require:
        if not values[name]:
            remedy = "-- --config=... --workdir=..." if name == "RUN" else f"{name}=VALUE"
            raise SettingError(f"{name}: is missing. Give it in {FILE.name}, in the environment or as {remedy}")
    for name, least in _NUMBERS.items():
        if not values[name].isdecimal() or int(values[name]) < least:
            raise SettingError(f"{name} = {values[name]!r}: is no whole number from {least} on.")
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise SettingError(f"{name} = {values[name]!r}: is none of {', '.join(choices)}.")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", values["RUN_NAME"]):
        raise SettingError(f"RUN_NAME = {values['RUN_NAME']!r}: must be small letters, digits and -, 40 at most.")


def main(argv: Sequence[str]) -> int:
    own, given = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    options = dict(option.removeprefix("--").split("=", 1) for option in own)
    try:
        values, dry_run = read(given, filter(None, options.get("require", "").split(",")), options.get("mount", ""))
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    for name, value in {**values, "DRY_RUN": str(int(dry_run))}.items():
        print(f"{name}={shlex.quote(value)}")
    print(f"ARGUMENTS=({values['RUN']})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
