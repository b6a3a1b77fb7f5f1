"""Lets a model write: understudy generate --model=MODEL --prompt="..."

Completions go to stdout, all else to stderr. With --output, a killed run leaves OUTPUT.partial, and the same command
goes on from there.
"""

import argparse
import bisect
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax

from research import cli, files
from research.errors import InputError
from research.models.sampling import (
    BATCHES_AT_ONCE,
    Completion,
    SamplingConfig,
    generate_batches,
    longest_prompt,
    make_generate,
    make_stream,
)
from research.sources.formats import TEMPLATES, render_prompt

Decode = Callable[[list[int]], str]
Messages = list[dict[str, str]]

_CHAT_HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


class Prompt(NamedTuple):
    """What the user gave, and where: a text, {"prompt": text} or {"messages": [...]}."""

    where: str
    record: str | Mapping[str, Any]


def main(argv: Sequence[str]) -> int:
    return cli.run(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    description, _, _ = __doc__.partition(":")
    parser = cli.make_parser("generate", description)
    add = parser.add_argument
    model = "a run's workdir, a Hugging Face folder or hub name, or a .gguf file"
    add("--model", "--checkpoint", dest="model", metavar="MODEL", help=model)
    add("--step", type=int, help="which of a run's checkpoints; default: the newest")
    add("--ema", action="store_true", help="take the moving average of the parameters")
    add("--prompt", help="answer this, or continue it under the template plain; it is written as it comes")
    add("--prompts", metavar="FILE", help='.txt, one prompt a line, or .jsonl with "prompt" or "messages"')
    add("--interactive", action="store_true", help="hold a conversation")
    add("--system", metavar="TEXT", help="begin with this system message, where a prompt has none of its own")
    add("--output", metavar="FILE", help="write completions, tokens and log-probabilities here as JSON lines")
    add("--template", choices=TEMPLATES, help="how prompts are put to the model; default: its own way")
    add("--max_new_tokens", type=int, help="default: 256, or half of model.max_length if that is less")
    add("--temperature", type=float, default=0.0, help="default: 0, greedy")
    add("--top_k", type=int, default=0, help="default: 0, off")
    add("--top_p", type=float, default=1.0, help="default: 1, off")
    add("--min_p", type=float, default=0.0, help="default: 0, off")
    add("--seed", type=int, default=0)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; can be repeated")
    add("--batch_size", type=int, default=16, help="how many prompts of a file are decoded at once")
    args = cli.parse(parser, argv)
    if not args.model:
        raise InputError(f"--model: names no model. Give {model}.")
    given = [f"--{name}" for name in ("prompt", "prompts", "interactive") if getattr(args, name)]
    if len(given) != 1:
        found = " and ".join(given) if given else "no prompt"
        raise InputError(f"{found} given: use one of --prompt=TEXT, --prompts=FILE and --interactive.")
    if args.interactive and args.output:
        raise InputError(f"--output = {args.output}: a conversation isn't written to a file. Leave it out.")
    if args.batch_size < 1:
        raise InputError(f"--batch_size = {args.batch_size}: must be at least 1.")
    if "" in args.stop:
        raise InputError("--stop: an empty text would end everything before it begins. Leave it out.")
    return args


def _run(args: argparse.Namespace) -> None:
    prompts = read_prompts(args.prompts) if args.prompts else [Prompt("--prompt", args.prompt)]

    from research import loading  # last, because it takes long to import

    loaded = loading.load_model(args.model, step=args.step, ema=args.ema)
    model, tokenizer = loaded.model, loaded.tokenizer
    default = min(256, model.config.max_length // 2)
    config = SamplingConfig(
        max_new_tokens=default if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        stop_tokens=tokenizer.stop,
    )
    longest = longest_prompt(model, config)
    template = args.template or loaded.template
    key = jax.random.key(args.seed)

    def ids_of(prompt: Prompt) -> list[int]:
        try:
            ids = render_prompt(_with_system(prompt.record, args.system), tokenizer, template)
        except InputError as error:
            raise InputError(f"{prompt.where}: {error}") from error
        if len(ids) > longest:
            raise InputError(
                f"{prompt.where}: is {len(ids)} tokens long, and there is room for {longest} (model.max_length = "
                f"{model.config.max_length} less --max_new_tokens={config.max_new_tokens}). Shorten the one, or "
                "lower the other."
            )
        return ids

    if args.prompts or args.output:
        generate = make_generate(model, config, tokenizer.size)
        ids = [ids_of(prompt) for prompt in prompts]
        with _open(args.output, _identity(args, ids)) as (file, done):
            for first in range(done, len(ids), size := BATCHES_AT_ONCE * args.batch_size):
                batch = ids[first : first + size]
                completions = _complete(generate, loaded.params, batch, key, args.batch_size, longest, first, len(ids))
                for prompt, completion in zip(prompts[first:], completions, strict=False):
                    text, completion = cut(completion, tokenizer.decode, args.stop)
                    print(_to_json(prompt, text, completion) if args.output else text, file=file)
                file.flush()
        return

    stream = make_stream(model, config, tokenizer.size)
    params = jax.jit(model.unstack)(loaded.params)

    def answer(prompt: Prompt, key: jax.Array) -> Iterator[str]:
        return stream_text(stream(params, ids_of(prompt), key), tokenizer.decode, args.stop)

    def reply(messages: Messages, turn: int) -> Iterator[str]:
        return answer(Prompt("the conversation", {"messages": messages}), jax.random.fold_in(key, turn))

    if args.interactive:
        chat(reply, input)
        return
    for piece in answer(prompts[0], key):
        print(piece, end="", flush=True)
    print()


def read_prompts(path: str) -> list[Prompt]:
    """Reads a file of prompts, one a line.

    Raises:
      InputError: the file can't be read or holds no prompt, or a line is at fault.
    """
    suffix = Path(path).suffix
    if suffix not in (".txt", ".jsonl"):
        raise InputError(f"--prompts = {path}: ends in neither .txt nor .jsonl. Rename it to what it is.")
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts = {path}: can't be read ({error}). Give a file of UTF-8 text.") from error
    if not lines:
        raise InputError(f"--prompts = {path}: is empty. Write one prompt a line.")
    prompts = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            raise InputError(f"{where}: is an empty line. Remove it, or write a prompt.")
        prompts.append(Prompt(where, _record(line, where) if suffix == ".jsonl" else line))
    return prompts


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: is no JSON ({error}). Write one object a line.") from error
    if not isinstance(record, dict) or not {"prompt", "messages"} & record.keys():
        raise InputError(f'{where}: is no object with "prompt" or "messages". Add the one or the other.')
    messages = record.get("messages", [])
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f'{where}: "messages" is no list of objects with "role" and "content". Write it as one.')
    return record


def _with_system(record: str | Mapping[str, Any], system: str | None) -> str | Mapping[str, Any]:
    if system is None:
        return record
    record = {"prompt": record} if isinstance(record, str) else record
    messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
    if messages[0].get("role") == "system":
        return record
    return {"messages": [{"role": "system", "content": system}, *messages]}


def _complete(generate, params, ids, key, batch_size: int, longest: int, first: int, total: int) -> list[Completion]:
    began = time.perf_counter()
    completions = generate_batches(
        generate,
        params,
        ids,
        key,
        batch_size=min(batch_size, total),
        longest=longest,
        first_row=first,
        progress=lambda done: print(f"{first + done} of {total} prompts", file=sys.stderr),
    )
    count, seconds = sum(len(c.tokens) for c in completions), time.perf_counter() - began
    print(f"{count} tokens in {seconds:.1f} s, compiling included", file=sys.stderr)
    return completions


def cut(completion: Completion, decode: Decode, stops: Sequence[str]) -> tuple[str, Completion]:
    """The text before the first stop, and the tokens up to the one that completes that stop."""
    text = decode(completion.tokens)
    at = _first_stop(text, stops)
    if at is None:
        return text, completion
    tokens, logprobs = completion
    n = bisect.bisect_left(range(len(tokens)), True, key=lambda n: _first_stop(decode(tokens[:n]), stops) is not None)
    return text[:at], Completion(tokens[:n], logprobs[:n])


def stream_text(chunks: Iterable[list[int]], decode: Decode, stops: Sequence[str] = ()) -> Iterator[str]:
    """Turns tokens into pieces of text as they come; joined, they are what `cut` gives for all of them.

    What may change with the next token is held back: bytes that are no whole character yet, which decode to U+FFFD, and
    what may be the beginning of a stop.
    """
    tokens: list[int] = []
    given = 0
    for chunk in chunks:
        tokens += chunk
        text = decode(tokens)
        at = _first_stop(text, stops)
        if at is not None:
            yield text[given:at]
            return
        text = text.rstrip("\ufffd")
        held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        if len(text) - held > given:
            yield text[given : len(text) - held]
            given = len(text) - held
    yield decode(tokens)[given:]


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    return min((text.index(stop) for stop in stops if stop in text), default=None)


def chat(reply: Callable[[Messages, int], Iterator[str]], read: Callable[[], str]) -> None:
    """Holds a conversation on the terminal.

    Args:
      reply: (messages so far, the last by the user; number of the turn) -> the answer, in pieces.
      read: returns the user's next line, and raises EOFError after the last.
    """
    print(_CHAT_HELP, file=sys.stderr)
    messages: Messages = []
    turn = 0
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = read().strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages = []
        elif line.startswith("/"):
            print(_CHAT_HELP, file=sys.stderr)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            answer = ""
            try:
                for piece in reply(asked, turn):
                    print(piece, end="", flush=True)
                    answer += piece
            except InputError as error:
                print(f"error: {error} /reset forgets the conversation.", file=sys.stderr)
                continue
            except KeyboardInterrupt:
                pass  # what has come so far is the answer
            print(flush=True)
            turn += 1
            if answer.strip():
                messages = [*asked, {"role": "assistant", "content": answer}]
            else:
                print("(an empty answer: the question is forgotten)", file=sys.stderr)


def _to_json(prompt: Prompt, text: str, completion: Completion) -> str:
    asked = {"prompt": prompt.record} if isinstance(prompt.record, str) else prompt.record
    return json.dumps(
        {**asked, "completion": text, "tokens": completion.tokens, "logprob": sum(completion.logprobs)},
        ensure_ascii=False,
    )


def _identity(args: argparse.Namespace, ids: list[list[int]]) -> str:
    """Hash of what decides the completions."""
    decides = {k: v for k, v in vars(args).items() if k not in ("prompt", "prompts", "output", "interactive")}
    return hashlib.sha256(json.dumps([decides, ids], sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _open(path: str | None, identity: str) -> Iterator[tuple[TextIO, int]]:
    """Opens PATH.partial for what is to come, and says how many lines are there from a run of the same command that was
    killed; it becomes PATH at the end.

    Raises:
      InputError: it can't be written.
    """
    if path is None:
        yield sys.stdout, 0
        return
    partial, begun = Path(f"{path}.partial"), Path(f"{path}.partial.id")
    try:
        if not (begun.is_file() and begun.read_text() == identity and partial.is_file()):
            partial.write_bytes(b"")
            begun.write_text(identity)
        done = files.whole_lines(partial)
        file = open(partial, "a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"--output = {path}: can't be written ({error}). Name another file.") from error
    with file:
        yield file, done
    partial.replace(path)
    begun.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
