"""Labels text with classifiers: the probability of each class.

Each record keeps its fields and gets `probs`, the probability of each class: what `data.format=labelled` trains on. A
`label` that it had, its true class, is renamed to `gold` and becomes a number. Several models, parted by commas, label
together: their probabilities are averaged. A language model labels without training where `--words` names a word for
each class: "--words= no, yes". Such a model may be asked of servers.

A killed run leaves OUTPUT.partial, and the same command goes on from there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from research import cli, files
from research.cli import Flag

COMMAND = cli.Command(
    "label",
    __doc__,
    flags=(
        Flag(
            "model",
            "workdirs of runs, or with --words a language model from anywhere",
            metavar="MODEL[,MODEL]",
            required=True,
            parse=cli.paths,
        ),
        cli.STEP,
        cli.EMA,
        Flag(
            "data",
            ".jsonl, .jsonl.gz, .json, .parquet or .txt; a folder or glob of them",
            metavar="FILE",
            parse=cli.path,
            required=True,
        ),
        Flag("output", "where the records go, as JSON lines", metavar="FILE", parse=cli.path, required=True),
        Flag(
            "fields", 'columns of other names: \'{"text": "headline"}\'', None, "the run's", "JSON", cli.names_by_name
        ),
        Flag("prompt", "what the model reads, with {text} in it", shown="the run's"),
        Flag(
            "words",
            "of each class, parted by commas, as the language model would go on",
            shown="the run's",
            metavar="WORD,...",
            parse=lambda text: tuple(text.split(",")),
        ),
        Flag("keep", "keep this share of each predicted class, the most confident ones", 1.0, "", "SHARE", cli.share),
        Flag("max_records", "label only the first N; 0 labels all", 0, metavar="N", parse=cli.whole(0)),
        cli.SERVERS,
        cli.OVERWRITE,
    ),
    examples=(
        "understudy label --model=runs/classifier --data=texts.jsonl --output=labelled.jsonl",
        'understudy label --model=SmolLM2-135M --data=texts.jsonl --output=labelled.jsonl "--words= no, yes"',
    ),
    renamed={"checkpoint": "model", "input": "data"},
    resumable=True,
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _label)


def _label(args: SimpleNamespace) -> None:
    files.check_output(args.output, overwrite=args.overwrite)

    # Late: jax and the models take 1 s, which --help and a wrong flag needn't wait for.
    from research.devices import compilation
    from research.evals import labels, served

    origin = labels.find_records(args.data)
    compilation.use_compilation_cache()
    servers = served.Servers(args.servers) if args.servers else None
    reading = labels.Reading(args.step, args.ema, args.fields, args.prompt, args.words, servers)
    classifiers = labels.open_classifiers(args.model, origin, reading)
    count = labels.write_labels(
        classifiers, origin, Path(args.output), words=args.words, keep=args.keep, max_records=args.max_records
    )
    print(f"{count:,} records labelled: {args.output}", file=sys.stderr)
