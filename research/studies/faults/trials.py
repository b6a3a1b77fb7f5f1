"""Plants faults into small runs, measures what a diagnosis reads of them, and writes it down: a stage of a study.

    python -m research.studies.faults.trials --part=dev --data=runs/data --starts='{"text": "runs/text", ...}' \\
        --output=runs/trials

A line of trials.jsonl is a run: what was planted, what was measured before the first step and after the last, and the
metrics of each step, so that thresholds can be judged without running anything again. What the file has already isn't
run again.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from research import cli, files
from research.cli import Flag
from research.config import Config
from research.devices import compilation
from research.diagnosis import probes, trial
from research.diagnosis.programs import Programs
from research.diagnosis.subject import Subject
from research.diagnosis.types import Evidence
from research.run.assemble import Parts
from research.sources.tokenizers import TokenizerSpec
from research.sources.tokenizers.making import make_tokenizer
from research.studies.faults import healthy, plants, setups
from research.studies.faults.files import PARTS
from research.studies.faults.plants import Plant

TRIALS_FILE = "trials.jsonl"
HEALTHY = "healthy"
_DIGITS = 7
_TRIED = (probes.range_test,)  # which trains for some steps, as the run then does

COMMAND = cli.Command(
    "faults.trials",
    __doc__,
    flags=(
        Flag("part", "of the study: dev or test", metavar="PART", parse=cli.one_of(*PARTS), required=True),
        Flag("data", "the folder that research.studies.faults.files has written", metavar="DIR", required=True),
        Flag("starts", "name -> the run that others begin with", metavar="JSON", parse=json.loads, required=True),
        Flag("setups", "which kinds of runs; by default all", (), "all", "NAME,...", cli.words),
        Flag("only", "which plants; by default all, and healthy runs", (), "all", "NAME,...", cli.words),
        Flag("seeds", "runs of each plant in each kind of run", 1, metavar="N", parse=cli.whole(1)),
        Flag("output", "the folder that is written to", metavar="DIR", parse=cli.path, required=True),
    ),
    examples=(),
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run of the study.

    Attributes:
      title: of it.
      setup: the kind of run.
      part: "dev" or "test".
      values: of its config, by dotted names.
      plant: what is planted; None in a healthy run.
    """

    title: str
    setup: str
    part: str
    values: Mapping[str, Any]
    plant: Plant | None = None

    @property
    def key(self) -> str:
        return f"{self.part}/{self.setup}/{self.title}/{self.values['seed']}"


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _run)


def _run(args: SimpleNamespace) -> None:
    out = Path(args.output)
    files.check_folder(args.output, "--output")
    out.mkdir(parents=True, exist_ok=True)
    compilation.use_compilation_cache(str(Path(args.data) / "cache"))
    path = out / TRIALS_FILE
    if path.exists():
        files.whole_lines(path)
    done = {line["key"] for line in read(path)}
    todo = [each for each in trials(args.part, args.data, args.starts, args.seeds) if each.key not in done]
    todo = [each for each in todo if not args.setups or each.setup in args.setups]
    todo = [each for each in todo if not args.only or (each.plant.title if each.plant else HEALTHY) in args.only]
    shared: dict[str, tuple[Parts, Programs]] = {}
    with open(path, "a", encoding="utf-8") as file:
        for number, each in enumerate(todo, 1):
            line = run(each, shared)
            file.write(files.json_line(line).decode())
            file.flush()
            print(f"{number}/{len(todo)} {each.key} {line['seconds']:.1f} s", file=sys.stderr, flush=True)
    jax.clear_caches()  # a study in one process would keep the programs of all its runs, some 40 MB each


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file of trials; none where there is none, and without one that was left half-written."""
    lines = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


def trials(part: str, folder: str, starts: Mapping[str, str], seeds: int) -> Iterator[Trial]:
    """All runs of a part of the study, those of one kind after each other.

    Args:
      part: "dev" or "test".
      folder: of the data.
      starts: of setups.STARTS -> the workdir of that run.
      seeds: how many runs there are of each plant in each kind.
    """
    for name in setups.SETUPS:
        base = setups.setup(name, part, folder, starts)
        for title, values in healthy.runs(name, part, base["optimizer.learning_rate"]):
            yield Trial(title, name, part, base | values)
        for plant in plants.PLANTS:
            if name in plant.setups:
                values = filled(plant.values, {"data": folder, **starts})
                for seed in range(seeds):
                    yield Trial(plant.title, name, part, base | values | {"seed": base["seed"] + seed}, plant)


def filled(value: Any, names: Mapping[str, str]) -> Any:
    """Values with {data} and the like filled in."""
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace("{" + name + "}", text)
        return value
    if isinstance(value, Mapping):
        return {name: filled(each, names) for name, each in value.items()}
    return value


def run(each: Trial, shared: dict[str, tuple[Parts, Programs]]) -> dict[str, Any]:
    """Runs and measures one; the line to write.

    Args:
      each: what to run.
      shared: the programs of the runs before, which one with the same shapes uses again.
    """
    began = time.perf_counter()
    subject = make_subject(each, shared)
    before = probes.measure(subject, skip=_TRIED)
    after, records = trial.train(subject, setups.STEPS)
    measured = probes.measure(after, before)
    return {
        "key": each.key,
        "title": each.title,
        "cause": each.plant.cause if each.plant else HEALTHY,
        "signed": each.plant in plants.SIGNED,
        "setup": each.setup,
        "part": each.part,
        "stage": subject.stage,
        "records": [_rounded(record) for record in records],
        "before": _rounded(before.signals),
        "after": _rounded(measured.signals),
        "seconds": round(time.perf_counter() - began, 2),
    }


def evidence(line: Mapping[str, Any], measured: str = "after") -> Evidence:
    """What was measured of a run: "before" its first step, or "after" the last."""
    signals = {name: float(value) for name, value in line[measured].items()}
    return Evidence(line["stage"], measured == "after", signals)


def make_subject(each: Trial, shared: dict[str, tuple[Parts, Programs]]) -> Subject:
    """The run, before its first step, with what is planted."""
    plant, config = each.plant, setups.parse(dict(each.values))
    key = _program_key(config, plant)

    def change_parts(parts: Parts) -> Parts:
        if key not in shared:
            changed = plant.parts(parts) if plant and plant.parts else parts
            # Probes read models and terms alone, which most faults of a step leave as they are.
            reads = _reading_key(config, plant if changed.evaluate is not parts.evaluate else None)
            shared.setdefault(reads, (changed, Programs(changed)))
            shared[key] = changed, shared[reads][1]
        return shared[key][0]

    change_batch = plant.batch(_BYTES) if plant and plant.batch else None
    subject = Subject.of(config, change_parts=change_parts, change_batch=change_batch)
    began = trial.copied(subject.state).params
    subject = dataclasses.replace(subject, programs=shared[key][1], first_params=lambda: began)
    return plant.subject(subject) if plant and plant.subject else subject


_BYTES = make_tokenizer(TokenizerSpec(kind="byte"), lambda: iter(()))


def _program_key(config: Config, plant: Plant | None) -> str:
    """What decides the programs of a run: not what they are handed as arguments."""
    values = dataclasses.asdict(config)
    values["seed"] = values["data"]["path"] = values["data"]["eval_path"] = values["data"]["shuffle"] = ""
    values["optimizer"]["learning_rate"] = values["model"]["init_from"] = ""
    for role in values["roles"].values():
        role["init_from"] = ""
    fault = plant.title if plant and plant.parts else ""
    return json.dumps([values, fault], sort_keys=True, default=str)


def _reading_key(config: Config, plant: Plant | None) -> str:
    """What decides the programs of probes: models, terms and the shape of a batch."""
    values = dataclasses.asdict(config)
    read = {name: values[name] for name in ("model", "adapter", "roles", "objective", "batch_size", "seq_len", "mesh")}
    read["roles"] = {role: {**each, "init_from": ""} for role, each in read["roles"].items()}
    read["model"] = {**read["model"], "init_from": ""}
    return json.dumps(["probes", read, plant.title if plant else ""], sort_keys=True, default=str)


def _rounded(values: Mapping[str, float]) -> dict[str, Any]:
    """Numbers of few digits; what isn't finite as text."""
    short = {name: float(f"{value:.{_DIGITS}g}") for name, value in values.items()}
    return {name: value if value - value == 0 else str(value) for name, value in short.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
