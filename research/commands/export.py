"""Writes a model for other tools: understudy export --checkpoint=WORKDIR --output=DIR

DIR holds what transformers' save_pretrained writes: config.json, safetensors, tokenizer and chat template.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from research import cli
from research.errors import InputError

_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> int:
    return cli.run(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    description, _, _ = __doc__.partition(":")
    parser = cli.make_parser("export", description)
    add = parser.add_argument
    add(
        "--checkpoint",
        "--model",
        metavar="M",
        help="a run's workdir, a Hugging Face folder or hub name, or a .gguf file",
    )
    add("--output", metavar="DIR", help="a folder that doesn't exist yet")
    add("--step", type=int, help="of a run: which of its checkpoints; default: the newest")
    add("--ema", action="store_true", help="of a run: take the moving average of the parameters")
    add(
        "--dtype", choices=_DTYPES, help="default: of each tensor what it was in the checkpoint that the run began with"
    )
    add("--max_shard_gb", type=float, default=5.0, help="begin a new file before one grows above this; default: 5")
    args = cli.parse(parser, argv, ("checkpoint", "output"), "See --help.")
    if args.max_shard_gb <= 0:
        raise InputError(f"--max_shard_gb = {args.max_shard_gb}: must be above 0.")
    return args


def _run(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if output.exists():
        raise InputError(f"--output = {output}: is there already. Name a folder that isn't, or remove it.")

    import jax  # last, because these take long to import

    from research import loading, params
    from research.devices import sharding
    from research.models.specs import make_specs
    from research.pretrained import save

    found = loading.find(args.checkpoint, step=args.step, ema=args.ema)
    origin = found.origin or {"config": {}, "generation": {}, "dtypes": {}}
    family, config = save.choose(found.config, origin["config"])
    tokenizer = found.tokenizer() if found.has_tokenizer else None
    specs = make_specs(found.config)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    values = found.read(specs, params.shardings(specs, mesh, found.rules))

    making = output.with_name(output.name + ".part")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    if tokenizer:
        tokenizer.save(making)
    total = save.save(
        making,
        family,
        found.config,
        values,
        dtype=lambda name: args.dtype or origin["dtypes"].get(name, "float32"),
        max_shard_bytes=int(args.max_shard_gb * 1e9),
    )
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos} if tokenizer else {}
    config = {**ids, **config, "dtype" if "dtype" in config else "torch_dtype": max(total, key=total.get)}
    _write(making / "config.json", config)
    if origin["generation"]:
        _write(making / "generation_config.json", origin["generation"])
    elif tokenizer:
        _write(making / "generation_config.json", {**ids, "eos_token_id": list(tokenizer.stop)})
    making.rename(output)
    sizes = ", ".join(f"{n / 1e6:,.1f} MB of {kind}" for kind, n in total.items())
    if not tokenizer:
        print(f"{args.checkpoint}: comes without a tokenizer, and so does the export", file=sys.stderr)
    print(f"{output}: {config['architectures'][0]}, {sizes}", file=sys.stderr)


def _write(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
