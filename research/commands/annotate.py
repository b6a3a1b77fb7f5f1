"""Writes what a teacher or a reference says of a run's data, for training without it in memory.

For each token that the run learns from, train and held-out, the log-probabilities of the teacher's k likeliest next
tokens and the mass of the others. The teacher is config.roles.teacher, or --teacher=MODEL. Then, with the same data,

  --config.data.annotations=DIR --config.objective.distill.cached=True

With --reference, the log-probability of each of these tokens itself, for the objective preference. The reference is
config.roles.reference, and without that role what the policy begins with, config.model.init_from. Then

  --config.data.annotations=DIR --config.objective.preference.cached=True

The size on disk is stated and reserved before anything is computed. A killed run goes on where it was.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from research import cli, files
from research.cli import Flag
from research.errors import InputError

COMMAND = cli.Command(
    "annotate",
    __doc__,
    flags=(
        Flag("output", "the folder of the annotations", metavar="DIR", parse=cli.path, required=True),
        Flag(
            "teacher",
            "a model, in place of config.roles.teacher",
            shown="the config's",
            metavar="MODEL",
            parse=cli.path,
        ),
        Flag("reference", "write the reference's log-probs, and nothing of a teacher", False),
        Flag("k", "how many of the likeliest tokens", 32, metavar="K", parse=cli.whole()),
        Flag("temperature", "divides the teacher's logits", 1.0, metavar="X", parse=cli.above_zero),
        Flag(
            "on",
            "which tokens, as config.objective.distill.on: supervised or all",
            "supervised",
            metavar="TOKENS",
            parse=cli.one_of("supervised", "all"),
        ),
    ),
    examples=(
        "understudy annotate --config=experiments/sft.py --teacher=runs/large --output=annotations --k=16",
        "understudy annotate --config=experiments/sft.py --config.model.init_from=runs/sft --reference --output=notes",
    ),
    experiment=True,
    resumable=True,
    makes_folders=True,
)


_OF_TEACHERS = ("teacher", "k", "temperature", "on")


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _annotate)


def _annotate(args: SimpleNamespace) -> None:
    files.check_folder(args.output, "--output")
    from research import config  # late: jax and the models take 1 s, which --help and a wrong flag needn't wait for

    if args.reference:
        for flag in COMMAND.flags:
            if flag.name in _OF_TEACHERS and getattr(args, flag.name) != flag.default:
                raise InputError(f"--{flag.name}: is of a teacher. Leave it out, or --reference.")
    values, k = args.experiment.values, 0 if args.reference else args.k
    if args.teacher:
        values["roles"] = {**values["roles"], "teacher": {"init_from": args.teacher}}
    if not args.reference and not k:
        raise InputError("--k=0: must be at least 1.")
    annotate(config.parse(values), args.output, k=k, temperature=args.temperature, on=args.on)


def annotate(config: Any, output: str, *, k: int = 32, temperature: float = 1.0, on: str = "supervised") -> None:
    """Annotates the data of a run; see sources/annotations.py for what is written.

    Args:
      config: a research.config.Config; of a teacher with roles["teacher"]. What its objective says isn't looked at.
      output: a folder: a new one, or what an earlier call with the same arguments has left.
      k: how many tokens; 0 for the log-probs of a reference: roles["reference"], or what the policy begins with.
      temperature: divides the teacher's logits.
      on: "supervised" or "all"; see objectives/distill.py.

    Raises:
      InputError: an argument or the config is at fault, the disk has no room, or `output` holds something else.
    """
    from research import config as config_lib  # late: see above
    from research import loading, params
    from research.devices import sharding
    from research.evals.teacher_annotations import Teacher
    from research.models import transformer
    from research.run import record, resolve
    from research.sources import opening

    role, section = _section(config, k)
    if name := section.init_from:  # before the data is tokenised
        loading.find(name).config.check_language_model(f"roles.{role} = {name}")
    if config.data.streaming:
        raise InputError(
            "data.streaming = True: annotations are of tokens that are kept. Set it to False, with as much data "
            "(data.max_records) as the cache has room for."
        )
    plain = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, annotations=""),
        roles={role: section},
        objective={"terms": {"next_token": 1.0}},
    )
    inputs = resolve.resolve(plain, output, objective=config.objective)
    base, tokenizer, config = inputs.bases[role], inputs.data.tokenizer, inputs.config
    rules = sharding.make_rules(config.rules)
    model = transformer.make_model(config_lib.model_config(config, tokenizer.size, role=role), rules)
    if k > tokenizer.size:
        raise InputError(f"--k={k}: must be in 1..{tokenizer.size}, the size of the tokenizer.")
    specs = transformer.in_compute_dtype(model)
    teacher = Teacher(
        name=base.name,
        source=loading.identity(section.init_from),
        model=model,
        read=functools.partial(base.read, specs, params.shardings(specs, inputs.mesh, rules)),
        mesh=inputs.mesh,
        rules=rules,
        k=k,
        temperature=temperature,
        on=on,
        vocab_size=tokenizer.size,
        rows=config.batch_size // config.microbatches,
        seq_len=config.seq_len,
    )
    record.describe_data(functools.partial(print, file=sys.stderr), inputs.data.report)
    for line in record.data_warnings(inputs.data.report, config.seq_len):
        print(f"warning  {line}", file=sys.stderr)
    virtual = len(resolve.virtual_ids(config, tokenizer.size))
    settings = opening.settings(config_lib.data_spec(config), tokenizer, config.seed, virtual)
    total = teacher.annotate(inputs.data, settings, Path(output))
    print(f"{total:,} tokens annotated: --config.data.annotations={output}", file=sys.stderr)


def _section(config: Any, k: int) -> tuple[str, Any]:
    """The role that speaks, and what the config says of it.

    Raises:
      InputError: it names no model.
    """
    from research.config import RoleSection  # late: see above

    role = "teacher" if k else "reference"
    section = config.roles.get(role)
    if section is None and k:
        raise InputError('--teacher: names no model, and the config has no roles = {"teacher": {"init_from": ...}}.')
    if section is not None and section.of and k:
        raise InputError(f"roles.teacher.of = {section.of!r}: isn't a model of its own. Use --teacher.")
    if section is None or (section.of == "policy" and not k):
        if not config.model.init_from:
            raise InputError("--reference: config.model.init_from names no model, and there is no roles.reference.")
        section = RoleSection(init_from=config.model.init_from)
    return role, section
