"""Writes a model for other tools, as transformers' save_pretrained does; of a run with an adapter that alone, as PEFT.

DIR holds config.json, safetensors, tokenizer and chat template; of an adapter adapter_config.json and its parameters,
which PEFT puts to the model that the run began with. With --merge they are merged into that model, which is written
whole: sums in float32, rounded once.

With --push it goes to the Hugging Face hub, with a model card (README.md): data, settings, metrics, and the licence of
the model that the run began with. Of paths on this machine the card has the last part alone. Log in by `hf auth login`,
or set HF_TOKEN.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from research import cli, files
from research.cli import Flag
from research.errors import InputError

_SHARD_GB = 5.0

COMMAND = cli.Command(
    "export",
    __doc__,
    flags=(
        cli.MODEL,
        cli.STEP,
        cli.EMA,
        Flag("merge", "of a run with an adapter: write the whole model, its adapter merged", False),
        Flag(
            "output",
            "a folder that doesn't exist yet",
            metavar="DIR",
            parse=cli.path,
            required=True,
            unless=("push",),
        ),
        Flag("push", "upload it to the Hugging Face hub, as OWNER/MODEL", metavar="NAME"),
        Flag("private", "where --push makes the repository, it is seen by its owner alone", False, of=("push",)),
        Flag(
            "license",
            "what the card says, such as apache-2.0",
            shown="that of the model that the run began with",
            metavar="ID",
            of=("push",),
        ),
        Flag(
            "dtype",
            "of all tensors: float32, bfloat16 or float16",
            shown="of each tensor what it was in the checkpoint that the run began with; of an adapter float32",
            metavar="DTYPE",
            parse=cli.one_of("float32", "bfloat16", "float16"),
        ),
        Flag(
            "max_shard_gb",
            "begin a new file before one grows above this",
            _SHARD_GB,
            metavar="GB",
            parse=cli.above_zero,
        ),
    ),
    examples=(
        "understudy export --model=runs/sft --output=exported",
        "understudy export --model=runs/lora --merge --output=merged",
        "understudy export --model=runs/sft --push=me/my-model --private",
    ),
    renamed={"checkpoint": "model"},
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _run)


def _run(args: SimpleNamespace) -> None:
    if args.output:
        files.check_output(args.output, folder=True)
    if not args.push:
        _export(args)
        return

    # Late: jax and the models take 1 s, which --help and a wrong flag needn't wait for.
    from research import loading
    from research.loading import card
    from research.pretrained import hub

    origin = card.trace(args.model)
    if origin.base and not (origin.license or args.license):
        raise InputError(
            f"--push = {args.push}: the licence of {origin.base}, which this began with, isn't known: there is no "
            "README.md with one beside it. Look it up, and give it as --license=ID."
        )
    hub.check(args.push)
    with tempfile.TemporaryDirectory() as folder:
        args.output = args.output or os.path.join(folder, "model")
        _export(args)
        peft = bool(loading.find(args.model).run_adapter) and not args.merge
        text = card.write(args.model, args.push, origin, license=args.license or "", peft=peft)
        files.write_text(Path(args.output) / card.FILE, text)
        print(hub.push(Path(args.output), args.push, private=args.private), file=sys.stderr)


def _export(args: SimpleNamespace) -> None:
    """Writes the folder."""
    import jax  # late, as above

    from research import loading, params
    from research.devices import sharding
    from research.models import transformer
    from research.pretrained import export

    model = loading.find(args.model, step=args.step, ema=args.ema)
    if model.run_adapter and not args.merge:
        _export_adapter(args, model)
        return
    if args.merge and not model.run_adapter:
        raise InputError(f"--merge: {args.model} has no adapter that could be merged. Leave it out.")
    specs = transformer.make_specs(model.config)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    architecture, sizes, not_finite, pad = export.export(
        Path(args.output),
        model.config,
        model.read(specs, params.shardings(specs, mesh, model.rules)),
        model.origin,
        model.tokenizer() if model.has_tokenizer else None,
        dtype=args.dtype,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
    )
    if model.config.prefix:
        print(
            f"{args.model}: is a prefix LM. transformers reads prompts from left to right, so that it gives other text "
            "there; read here, the export is a prefix LM again (prefix_lm in its config.json)",
            file=sys.stderr,
        )
    if error := model.holding_error():
        print(
            f"{args.model}: was trained beside kernels held in {error[0]}, and the export has these, dequantised: they "
            f"are {error[1]:.2%} from those that it began with (root mean square)",
            file=sys.stderr,
        )
    if pad:
        print(
            f"{args.model}: transformers reads a classifier or reward model at the last token that isn't the pad. For "
            f"this model {pad}",
            file=sys.stderr,
        )
    if not model.has_tokenizer:
        print(f"{args.model}: comes without a tokenizer, and so does the export", file=sys.stderr)
    if not_finite:
        print(f"{args.model}: {len(not_finite)} tensors hold NaN or infinity, {not_finite[0]} first", file=sys.stderr)
    written = ", ".join(f"{_size(n)} of {dtype}" for dtype, n in sizes.items())
    print(f"{args.output}: {architecture}, {written}", file=sys.stderr)


def _export_adapter(args: SimpleNamespace, model: Any) -> None:
    """Writes the adapter of a run as a folder of PEFT."""
    from research.pretrained import peft, save  # late, as above

    if args.max_shard_gb != _SHARD_GB:
        raise InputError(f"--max_shard_gb = {args.max_shard_gb}: an adapter is one file. Leave it out, or --merge.")
    trained = model.run_adapter.written()
    family, _ = save.choose(model.config, model.origin.get("config", {}))
    size = peft.write(Path(args.output), family, model.config, trained, args.dtype or "float32")
    if error := model.holding_error():
        print(
            f"{args.model}: was trained beside kernels held in {error[0]}, which are {error[1]:.2%} from those of "
            f"{trained.base} (root mean square): beside that it gives other logits. --merge writes the kernels as held",
            file=sys.stderr,
        )
    if trained.kind == "prefix" and any(model.config.sliding_window):
        shortest = min(filter(None, model.config.sliding_window))
        print(
            f"{args.model}: PEFT's layers with a sliding window see no prefix beyond it, and here they do: logits are "
            f"the same up to {shortest} tokens, the prefix among them",
            file=sys.stderr,
        )
    beside = _beside(trained.base)
    print(f"{args.output}: {trained.kind}, {_size(size)}; PEFT reads it beside {beside}", file=sys.stderr)


def _beside(base: str) -> str:
    """Says what PEFT is to read an adapter beside, of which a run began with the model `base`."""
    from research.pretrained import checkpoints  # late, as above

    if not (checkpoints.steps(base) or base.lower().endswith(".gguf")):
        return base
    return (
        f"what understudy export --model={base} --output=BASE writes. The base_model_name_or_path of its "
        f"adapter_config.json is {base}, which transformers doesn't load as it is: set it to BASE for what goes by it, "
        "such as AutoPeftModel"
    )


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 5e4 else f"{size / 1e3:,.1f} kB"
