"""Damaged files of every kind give the right result, or an error that names the file: never a traceback, other numbers,
or more than a minute or 4 GiB.

UNDERSTUDY_FUZZ_SECONDS sets the length, and UNDERSTUDY_FUZZ_SEED goes again through the tries of an earlier run.
"""

import os
import secrets
import time

import pytest
from fuzzing import Fuzz, world

MOST_FAULTS = 20


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_damage_is_an_error_that_names_the_file(tmp_path, monkeypatch, capsys):
    seconds = float(os.environ.get("UNDERSTUDY_FUZZ_SECONDS", "100"))
    seed = int(os.environ.get("UNDERSTUDY_FUZZ_SEED", str(secrets.randbits(32))))
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "own"))
    fuzz = Fuzz(world(tmp_path), tmp_path / "damaged", seed)
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end and len(fuzz.faults) < MOST_FAULTS:
        fuzz.one(number)
        number += 1
    with capsys.disabled():
        print(f"\nUNDERSTUDY_FUZZ_SEED={seed}: {number} tries\n{fuzz.table()}")
    assert not fuzz.faults, "\n".join(map(str, fuzz.faults))
