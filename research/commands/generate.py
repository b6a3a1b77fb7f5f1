"""Lets a model write: an answer, a conversation, completions of a file of prompts, or what is missing in a text.

A model that was trained to fill in (docs/data.md, the views fim and denoise) writes what belongs between --prefix and
--suffix. One that was trained on masked tokens, such as BERT, gives the likeliest tokens for each [MASK] of --fill or
--data. Completions go to stdout, all else to stderr. With --output, each record gets `completion`, `tokens` and
`logprob`; with --n=8 `completions`, a list, and lists of the others: what `understudy score --reward` and `understudy
filter` read. A killed run leaves OUTPUT.partial, and the same command goes on from there.
"""

import dataclasses
import functools
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from research import cli, files
from research.cli import Flag
from research.errors import InputError, printable

COMMAND = cli.Command(
    "generate",
    __doc__,
    flags=(
        cli.MODEL,
        cli.STEP,
        cli.EMA,
        cli.ADAPTER,
        Flag("prompt", "answer this, or continue it under the template plain; it is written as it comes"),
        Flag(
            "prefix",
            "fill in what belongs between this and --suffix",
            shown="nothing, if there is a suffix",
            empty=True,
        ),
        Flag(
            "suffix",
            "fill in what belongs between --prefix and this",
            shown="nothing, if there is a prefix",
            empty=True,
        ),
        Flag("fill", "show the likeliest tokens for each [MASK] in this text; several are filled in each by itself"),
        Flag(
            "form",
            "how a prefix and a suffix are shown: psm, spm or sentinel",
            shown="as in training, else psm, or sentinel where the tokenizer has those alone",
            metavar="FORM",
            parse=cli.one_of("psm", "spm", "sentinel"),
        ),
        Flag(
            "data",
            'answer prompts, or fill in texts: .txt, one a line, or .jsonl with "prompt", "messages", "text", or '
            '"prefix" and "suffix"',
            metavar="FILE",
            parse=cli.path,
        ),
        Flag("interactive", "hold a conversation; /help says what can be done in one", False),
        Flag(
            "output",
            "write completions, tokens and log-probabilities here as JSON lines",
            metavar="FILE",
            parse=cli.path,
        ),
        cli.OVERWRITE,
        Flag("system", "begin with this system message, where a prompt has none of its own"),
        cli.TEMPLATE,
        Flag(
            "max_new_tokens",
            "of an answer",
            shown="256, or half of model.max_length if that is less",
            metavar="N",
            parse=cli.whole(),
        ),
        Flag("temperature", "divides the logits; 0 is greedy", 0.0, metavar="X", parse=cli.number),
        Flag(
            "top_k",
            "draw from the K likeliest; for a [MASK], show these",
            0,
            "all of them, and 5 for a [MASK]",
            metavar="K",
            parse=cli.whole(),
        ),
        Flag("top_p", "draw from the likeliest with this mass; 1 is off", 1.0, metavar="X", parse=cli.number),
        Flag("min_p", "draw from those X times as likely as the likeliest", 0.0, metavar="X", parse=cli.number),
        Flag("stop", "end before this text", many=True),
        Flag("n", "answers to each prompt, each drawn by itself", 1, metavar="N", parse=cli.whole(1)),
        cli.SERVERS,
        cli.SEED,
        Flag(
            "batch_size",
            "how many answers to the prompts of a file are decoded at once, or asked of each server",
            16,
            metavar="N",
            parse=cli.whole(1),
            of=("data",),
        ),
    ),
    examples=(
        'understudy generate --model=runs/sft --prompt="What is 2 + 2?"',
        "understudy generate --model=runs/sft --data=prompts.jsonl --output=completions.jsonl",
        "understudy generate --model=runs/sft --data=prompts.jsonl --output=answers.jsonl --n=8 --temperature=1",
        "understudy generate --model=runs/sft --interactive",
        'understudy generate --model=runs/fim --prefix="def add(a, b):" --suffix="    return total"',
        'understudy generate --model=runs/bert --fill="Paris is the [MASK] of France."',
    ),
    renamed={"checkpoint": "model", "prompts": "data"},
    resumable=True,
)
_FILTERS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # of draws -> what turns each off
_SAMPLING = ("temperature", *_FILTERS)
_OF_PROMPTS = ("system", "template", "form", "max_new_tokens", "temperature", "top_p", "min_p", "stop", "n", "seed")
_OF_MASKS = ("model", "step", "ema", "adapter", "top_k")
_MASK_CANDIDATES = 5
_DECIDING = ("model", "step", "ema", "adapter", "system", "form", "max_new_tokens", *_SAMPLING, "stop", "n", "seed")


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _generate)


def _generate(args: SimpleNamespace) -> None:
    _check(args)

    # Late: jax and the models take 1 s, which --help and a wrong flag needn't wait for.
    from research import loading
    from research.devices import compilation
    from research.evals import completions, conversation, line_reader, prompts

    questions = prompts.read_prompts(args.data) if args.data else [prompts.Prompt(*_asked(args))]
    form = _form(args, [prompts.is_gap(question) for question in questions])
    compilation.use_compilation_cache()
    check = functools.partial(_check_kind, args)
    loaded = loading.load_model(args.model, step=args.step, ema=args.ema, adapter=args.adapter, check=check)
    if not loaded.model.config.causal:
        _fill(args, loaded.with_adapter(), questions)
        return
    responder = completions.make_responder(
        loaded,
        {name: getattr(args, name) for name in _SAMPLING},
        max_new_tokens=args.max_new_tokens,
        template=args.template,
        system=None if args.interactive else args.system,
        stops=args.stop,
        seed=args.seed,
        form=form,
        **_by_servers(args),
    )

    def reply(messages: list[Any], turn: int, temperature: float) -> Generator[str, None, bool]:
        return responder.stream(prompts.Prompt("the conversation", {"messages": messages}), turn, temperature)

    if args.interactive:
        talk = conversation.Talk(system=args.system or "", temperature=args.temperature)
        conversation.chat(reply, line_reader.make_reader(), talk, responder.sampling.max_new_tokens)
    elif args.output:
        flags = {name: getattr(args, name) for name in _DECIDING} | ({"servers": True} if args.servers else {})
        completions.write_completions(responder, questions, Path(args.output), args.batch_size, flags)
    elif args.data or args.n > 1 or args.servers:
        for answers in responder.complete(questions, args.batch_size, n=args.n):
            for _, text, _ in answers:
                print(_on_terminal(text), flush=True)
    else:
        for piece in responder.stream(questions[0]):
            print(_on_terminal(piece), end="", flush=True)
        print()


def _on_terminal(text: str) -> str:
    """A model's words; on a terminal without escape sequences."""
    return printable(text) if sys.stdout.isatty() else text


def _by_servers(args: SimpleNamespace) -> dict[str, Any]:
    """What make_responder takes where servers write."""
    if not args.servers:
        return {}
    from research.evals import served  # late, as above

    limits = dataclasses.replace(served.LIMITS, in_flight=args.batch_size)
    return {"make": served.Servers(args.servers, limits).make_generate}


def _check_kind(args: SimpleNamespace, config: Any, name: str) -> None:
    """Raises InputError where a model can't do what is asked, or a flag has no effect with it."""
    if args.fill:
        config.check_masked_language_model(name)
    elif config.causal or config.num_labels:
        config.check_language_model(name)
    elif not args.data:
        raise InputError(
            f"{name}: is {config.kind}, and doesn't predict the next token. Name a language model, or use --fill=TEXT "
            "or --data with [MASK] in the texts."
        )
    for flag in _OF_PROMPTS if not config.causal else ():
        if flag in args.texts:
            raise InputError(f"--{flag}: is of answers, and a [MASK] is filled in without. Leave it out.")
    for flag, off in _FILTERS.items() if config.causal and not args.temperature else ():
        if getattr(args, flag) != off:
            raise InputError(
                f"--{flag} = {args.texts[flag]}: nothing is drawn without a temperature. Give one, such as "
                "--temperature=1, or leave it out."
            )
    if config.causal and args.n > 1 and not args.temperature:
        raise InputError(
            f"--n = {args.n}: all answers to a prompt are the same without a temperature. Give one, such as "
            "--temperature=1, or leave it out."
        )


def _fill(args: SimpleNamespace, loaded: Any, texts: Sequence[Any]) -> None:
    """Shows or writes the likeliest tokens for the masks of texts."""
    from research.evals import fill  # late, as above

    filler = fill.Filler(loaded, args.top_k or _MASK_CANDIDATES)
    if args.output:
        flags = {name: getattr(args, name) for name in _OF_MASKS}
        fill.write_fills(filler, texts, Path(args.output), args.batch_size, flags)
        return
    for filled in filler.fill(texts, args.batch_size):
        for text, masks in filled:
            print(_on_terminal(fill.table(text, masks)), flush=True)


def _asked(args: SimpleNamespace) -> tuple[str, str | dict[str, str]]:
    """Where the one prompt of the command line is, and what it says; of a conversation nothing yet."""
    if args.fill:
        return "--fill", args.fill
    if args.prefix or args.suffix:
        return "--prefix and --suffix", {"prefix": args.prefix or "", "suffix": args.suffix or ""}
    return "--prompt", args.prompt or ""


def _form(args: SimpleNamespace, gaps: Sequence[bool]) -> str:
    """How prefixes and suffixes are shown, "" where there are none; `gaps` says of each prompt whether it has them.

    Raises:
      InputError: some have, or a flag is of the other kind.
    """
    if any(gaps) and not all(gaps):
        raise InputError(
            f"--data = {args.data}: has records with a prefix and a suffix, and others. Put each kind into a file."
        )
    if not any(gaps):
        if args.form:
            raise InputError(f"--form = {args.form}: is of a prefix and a suffix, and there are none. Leave it out.")
        return ""
    for name in ("template", "system"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name}: is of prompts, and a middle is filled in without. Leave it out.")
    return args.form or "auto"


def _check(args: SimpleNamespace) -> None:
    """Raises InputError where flags don't go together."""
    asked = [f"--{name}" for name in ("prompt", "fill", "data", "interactive") if getattr(args, name)]
    gap = [f"--{name}" for name in ("prefix", "suffix") if getattr(args, name)]
    if len(asked) + bool(gap) != 1:
        said = " and ".join(asked + gap) if asked or gap else "no prompt"
        raise InputError(
            f"{said} given: use one of --prompt=TEXT, --fill=TEXT, --data=FILE, --interactive, and --prefix=TEXT with "
            "--suffix=TEXT."
        )
    if args.interactive and args.output:
        raise InputError(f"--output = {args.output}: a conversation isn't written to a file. Leave it out.")
    if args.interactive and args.n > 1:
        raise InputError(f"--n = {args.n}: a conversation goes on with one answer. Leave it out.")
    for flag in ("interactive", "fill", "adapter") if args.servers else ():
        if getattr(args, flag):
            raise InputError(f"--{flag}: isn't for servers, which answer prompts with one model. Leave --servers out.")
    if args.output:
        files.check_output(args.output, overwrite=args.overwrite)
