"""Serves a model by the API of OpenAI: chat and completions for any client of it, and a page to chat on.

Requests are decoded together, each by its own settings, in --slots rows that are refilled as answers end. Clients set
base_url to http://HOST:PORT/v1, and the browser's page is http://HOST:PORT/. On another address than this machine's
own, requests need a token: that of the environment variable UNDERSTUDY_TOKEN, or one that is made up and shown. What
requests may hold, what is refused, and what it takes to serve many people is in docs/serving.md.
"""

import os
import secrets
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from research import cli
from research.cli import Flag
from research.errors import InputError

TOKEN = "UNDERSTUDY_TOKEN"
COMMAND = cli.Command(
    "serve",
    __doc__,
    flags=(
        cli.MODEL,
        cli.STEP,
        cli.EMA,
        cli.ADAPTER,
        Flag("host", "the address to listen on; 0.0.0.0 is every one of this machine", "127.0.0.1", metavar="ADDRESS"),
        Flag("port", "the port to listen on; 0 is any that is free", 8000, metavar="N", parse=cli.whole(0, 65535)),
        Flag("name", "what requests call the model", shown="the last part of --model", metavar="NAME"),
        cli.TEMPLATE,
        Flag("slots", "how many answers are written at once", 8, metavar="N", parse=cli.whole(1, 1024)),
        Flag(
            "max_length",
            "the most tokens of a prompt with its answer",
            shown="2048, or model.max_length if that is less",
            metavar="N",
            parse=cli.whole(2),
        ),
        Flag(
            "max_new_tokens",
            "of a chat's answer where the request doesn't say",
            shown="256, or half of --max_length if that is less",
            metavar="N",
            parse=cli.whole(1),
        ),
        Flag("waiting", "how many answers may wait for a slot; more are refused", 64, metavar="N", parse=cli.whole(0)),
        Flag("rate", "requests of one address in a minute; 0 is no limit", 0, metavar="N", parse=cli.whole(0)),
        Flag("seconds", "the most that an answer may take", 600.0, metavar="X", parse=cli.above_zero),
    ),
    examples=(
        "understudy serve --model=runs/sft",
        "understudy serve --model=model.gguf --name=small --port=8080 --slots=2",
        "understudy serve --model=runs/sft --host=0.0.0.0 --rate=60",
    ),
)
_MAX_LENGTH, _MAX_NEW_TOKENS = 2048, 256


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _serve)


def _serve(args: SimpleNamespace) -> None:
    # Late: jax and the models take 1 s, which --help and a wrong flag needn't wait for.
    from research import loading
    from research.devices import compilation
    from research.serving.server import Limits, Server, is_loopback

    token = make_token(is_loopback(args.host))
    compilation.use_compilation_cache()
    loaded = loading.load_model(args.model, step=args.step, ema=args.ema, adapter=args.adapter).with_adapter()
    service = make_service(loaded, args)
    try:
        server = Server((args.host, args.port), service, token, Limits(rate=args.rate))
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host = {args.host}, --port = {args.port}: can't be listened on ({error}). Use --port=0 for a free "
            "port, or another --host."
        ) from error
    rows = service.scheduler.rows
    print("compiling ...", file=sys.stderr, flush=True)
    rows.warm_up()
    service.scheduler.start()
    say(server, rows)
    try:
        server.serve_forever()
    finally:
        service.scheduler.close()
        server.server_close()


def make_service(loaded: Any, args: SimpleNamespace) -> Any:
    """A routes.Service of a model; its scheduler hasn't started yet.

    Args:
      loaded: of loading.load_model.
      args: the command's flags.

    Raises:
      InputError: a length doesn't fit the model.
    """
    from research.serving.routes import Service
    from research.serving.rows import Rows
    from research.serving.scheduler import Scheduler

    longest = loaded.model.max_length
    max_length = min(_MAX_LENGTH, longest) if args.max_length is None else args.max_length
    if max_length > longest:
        raise InputError(f"--max_length = {max_length}: the model reads {longest} tokens. Lower it.")
    most = min(_MAX_NEW_TOKENS, max_length // 2) if args.max_new_tokens is None else args.max_new_tokens
    if most >= max_length:
        raise InputError(f"--max_new_tokens = {most}: leaves no room for a prompt in {max_length} tokens. Lower it.")
    tokenizer = loaded.tokenizer
    rows = Rows(loaded.model, loaded.params, tokenizer.size, tokenizer.stop, args.slots, max_length)
    name = args.name or os.path.basename(os.path.normpath(args.model))
    template = loaded.template_for(args.template)
    return Service(name, tokenizer, template, Scheduler(rows, args.waiting), max_length, most, args.seconds)


def make_token(local: bool) -> str:
    """What requests must show; "" for nothing."""
    given = os.environ.get(TOKEN, "")
    if not given.isascii() or not given.isprintable():
        raise InputError(f"{TOKEN}: holds what no header of HTTP can. Use letters and digits.")
    return given or ("" if local else secrets.token_urlsafe(24))


def say(server: Any, rows: Any) -> None:
    """Says where the server is, and what it takes."""
    host, port = server.server_address[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{host}:{port}"
    memory = f"{rows.count} slots of {rows.longest} tokens, up to {rows.cache_bytes() / 1e9:.2g} GB of cache"
    lines = [
        f"model {server.service.name!r}: {memory}",
        f"api   {url}/v1",
        f"page  {url}/" + (f"#token={server.token}" if server.token else ""),
    ]
    if server.token:
        said = "of " + TOKEN if os.environ.get(TOKEN) else server.token
        lines.append(f"token {said}; it is sent in the clear: put a proxy with TLS before a network that isn't trusted")
    print("\n".join([*lines, "Ctrl-C ends it."]), file=sys.stderr, flush=True)
