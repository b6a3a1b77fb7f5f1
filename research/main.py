"""Runs one experiment: python -m research.main --config=experiments/sft.py [--workdir=DIR] [--config.a.b=value ...]."""

from research.devices import startup

if __name__ == "__main__":
    startup.leave_loops()
    startup.use_huge_pages()

import gc
import os
import shlex
import sys
import time
import traceback

from absl import app, flags
from ml_collections import config_flags

from research.errors import InputError, explain_flag_error

# Exit statuses. 75 is sysexits.h's EX_TEMPFAIL: the same command goes on from where it stopped. See distributed.LOST.
BAD_INPUT, DIVERGED, PREEMPTED = 2, 3, 75

_CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment: experiments/NAME.py[:VARIANT,...].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files go. Default: a dated folder under runs/.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where peers aren't found by themselves.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "With --coordinator: processes of the run.", lower_bound=0)
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "With --coordinator: which one this is, from 0.")


def main(argv: list[str]) -> int:
    app.define_help_flags()
    gc.disable()  # what imports make stays; to look for garbage in it again and again takes a quarter of their time
    try:
        flags.FLAGS(argv)
        if _CONFIG.value is None:
            raise InputError("--config: names no experiment. For example: --config=experiments/sft.py")
        values = _CONFIG.value.to_dict()
    except Exception as error:
        return _fail(explain_flag_error(error, argv), BAD_INPUT)
    else:
        from research import config
        from research.devices import distributed
        from research.run import run
        from research.studies import study
    finally:
        gc.freeze()
        gc.enable()
    try:
        distributed.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    except InputError as error:
        return _fail(error, BAD_INPUT)
    except distributed.Unreachable as error:
        return _fail(error, distributed.LOST)
    if distributed.several() and ("study" in values or not _WORKDIR.value):
        told = "the runs of a study are processes of their own" if "study" in values else "--workdir: is missing"
        error = f"{told}. Give each run of several processes a --workdir on storage that all share; --submit a study."
        return distributed.leave(_fail(error, BAD_INPUT))
    if "study" in values:
        return study.main(argv)
    name = os.path.basename(flags.FLAGS["config"].config_filename).removesuffix(".py")
    workdir = _WORKDIR.value or os.path.join("runs", time.strftime(f"%Y-%m-%d_%H-%M-%S_{name}"))
    command = shlex.join(["python", "-m", "research.main", *argv[1:]])
    try:
        run.run(config.parse(values), workdir, started=startup.start_time(), command=command)
    except run.Diverged as error:
        return _fail(error, DIVERGED)
    except run.Preempted as stop:
        print(stop, file=sys.stderr)
        return PREEMPTED
    except InputError as error:
        return distributed.leave(_fail(error, BAD_INPUT))
    except Exception:
        traceback.print_exc()
        return distributed.leave(1)
    return 0


def _fail(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
