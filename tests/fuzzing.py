"""Files of every kind, how each is read, and how one is damaged; see test_fuzz.py.

A kind of files has a folder as it should be and a function that reads a copy of it and says what it found. A try
damages one file of a copy: bytes are flipped, overwritten, cut off, put in or zeroed.
"""

import dataclasses
import hashlib
import json
import re
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import safetensors.numpy
from runs import small

from research import digests, files, loading
from research.commands import annotate
from research.config import RoleSection
from research.errors import InputError
from research.pretrained import load
from research.pretrained.peft import folder as peft_folder
from research.pretrained.peft import reading as peft_reading
from research.run import run
from research.sources import cache_entries, dataset, entries, scores, store
from research.sources.chat import render_parts
from research.sources.tokenizers import reading
from research.studies import history

MOST_SECONDS, MOST_BYTES = 60, 4 * 2**30
TEXT = "the quick brown fox: 12 jumps\n\n over it"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of files.

    Attributes:
      name: for the count of outcomes.
      folder: as it should be.
      read: the folder -> what it holds, as something that can be compared.
      strict: other content than the right one is a fault. Else a file may say something else, as those of others may,
        which have no digests.
      damaged: patterns of the files that are damaged; by default all.
    """

    name: str
    folder: Path
    read: Callable[[Path], Any]
    strict: bool
    damaged: tuple[str, ...] = ("*",)

    def files(self) -> list[Path]:
        """The files that may be damaged, below the folder."""
        paths = {path for pattern in self.damaged for path in self.folder.rglob(pattern) if path.is_file()}
        return sorted(path.relative_to(self.folder) for path in paths)


def digest(*values: Any) -> str:
    """Of arrays, texts and whatever prints as what it is."""
    result = hashlib.blake2b(digest_size=16)
    for value in values:
        value = value[:] if isinstance(value, digests.Checked) else value
        if isinstance(value, np.ndarray | jax.Array):
            value = np.ascontiguousarray(np.asarray(value))
            result.update(repr((value.dtype, value.shape)).encode())
            result.update(value.tobytes())
        else:
            result.update(repr(value).encode(errors="backslashreplace"))
    return result.hexdigest()


def damage(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """Some bytes changed, and how."""
    size, at = len(data), int(rng.integers(max(len(data), 1)))
    long = min(int(2 ** rng.uniform(0, 13)), size - at)
    how = rng.choice(["flip", "bytes", "cut", "zero", "insert", "drop", "digit"])
    if not size:
        return rng.bytes(long + 1), "fill"
    if how == "flip":
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :], f"flip at {at}"
    if how == "bytes":
        return data[:at] + rng.bytes(long) + data[at + long :], f"{long} bytes at {at}"
    if how == "cut":
        return data[:at], f"cut to {at}"
    if how == "zero":
        return data[:at] + bytes(long) + data[at + long :], f"{long} zeroed at {at}"
    if how == "insert":
        return data[:at] + rng.bytes(min(long, 64)) + data[at:], f"inserted at {at}"
    if how == "drop":
        return data[:at] + data[at + long :], f"{long} dropped at {at}"
    numbers = list(re.finditer(rb"(?<=[:\[,\s])-?[\d.]+", data))  # of a text such as JSON
    if not numbers:
        return data[:at] + b"\xff" * min(8, size - at) + data[at + 8 :], f"ff at {at}"
    found = numbers[int(rng.integers(len(numbers)))]
    value = rng.choice([b"-1", b"0", b"1e999", b"NaN", b"9" * 30, b"9" * 5000, b"2147483648", b'"x"', b"[]", b"null"])
    return data[: found.start()] + value + data[found.end() :], f"{value[:20]} at {found.start()}"


def world(folder: Path) -> list[Kind]:
    """Makes files of every kind."""
    others = [make(folder / make.__name__) for make in (_hugging_face, _gguf, _peft, _scores)]
    return [*_of_runs(folder), *others]


def _of_runs(folder: Path) -> Iterator[Kind]:
    """A workdir with checkpoints, the cache of its tokens, and what a teacher says of them."""
    workdir, cache, noted = folder / "run", folder / "cache", folder / "annotations"
    config = small(data={"path": "tasks:copy", "examples": 40, "cache_dir": str(cache), "pack": False})
    run.run(config, str(workdir), devices=jax.devices()[:1])
    spec = dataclasses.replace(dataset.DataSpec(path="tasks:copy", examples=40, pack=False), seq_len=32)
    tokenizer = loading.find(str(workdir)).tokenizer()

    def read_model(path: Path) -> str:
        model = loading.load_model(str(path), check=None)
        return digest(*jax.tree.leaves(model.params), model.model.config, model.tokenizer.encode(TEXT))

    def read_records(path: Path) -> str:
        made = history.load_run(str(path))
        found = files.read_json(path / "done.json", {})
        return digest(sorted(made.series), made.config, made.finished, found, [x for _, x in made.series.values()])

    def open_tokens(path: Path) -> store.Store:
        origin = entries.locate("tasks:copy", count=40, seed=0)
        options = {"format": "auto", "fields": {}, "template": "auto", "on_bad_record": "error"}
        return store.open_store(origin, tokenizer, cache_dir=str(path), **options)

    def read_tokens(path: Path) -> str:
        found = open_tokens(path)
        return digest(found.tokens, found.mask, found.length, found.key, found.bytes, found.counts, found.samples)

    for entry in cache_entries.read_entries(cache):
        if entry.kind != "tokens":
            entry.remove()
    open_tokens(cache)
    kept = open_tokens(cache).folder
    for entry in cache_entries.read_entries(cache):
        if entry.paths[0] != kept:
            entry.remove()
    shutil.rmtree(cache / "xla", ignore_errors=True)
    data = dataclasses.replace(config.data, cache_dir=str(folder / "other"))
    teacher = RoleSection(init_from=str(workdir))
    noting = dataclasses.replace(config, data=data, batch_size=8, roles={"teacher": teacher}, objective=_DISTILL)
    annotate.annotate(noting, str(noted), k=4, on="all")

    def read_annotations(path: Path) -> str:
        spec_of = dataclasses.replace(spec, annotations=str(path), cache_dir=str(folder / "other"))
        found = dataset.load(spec_of, config.tokenizer, tokenizer, seed=0)
        return digest(*(x for _, x in sorted(found.train[0][0].batch(np.arange(4)).items())))

    yield Kind("checkpoint", workdir, read_model, True, ("checkpoints/4/**/*",))
    yield Kind("records", workdir, read_records, False, ("metrics.jsonl", "done.json", "config.json"))
    yield Kind("workdir", workdir, read_model, True, ("config.json", "tokenizer.json", "tokenizer_config.json"))
    yield Kind("cache", cache, read_tokens, True)
    yield Kind("annotations", noted, read_annotations, True)


_DISTILL = {"terms": {"distill": 1.0}, "distill": {"on": "all"}}


def _hugging_face(folder: Path) -> Kind:
    """A folder in two shards, with a tokenizer and a chat template."""
    golden = Path(__file__).parent / "golden/hf_tiny/llama"
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(golden / name, folder)
    tensors = safetensors.numpy.load_file(golden / "model.safetensors")
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    tokenizer = reading.load_pretrained(Path(__file__).parent / "golden/runs/plain")
    tokenizer = tokenizer.with_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(CHAT)

    def read(path: Path) -> str:
        found, said = load.open_pretrained(str(path)), reading.load_pretrained(path)
        arrays = [entry.read() for _, entry in sorted(found.entries.items())]
        turns = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "a"}]
        parts = render_parts(said.chat, turns) if said.chat else ()
        return digest(*arrays, found.config, said.encode(TEXT), said.decode(said.encode(TEXT)), parts, said.stop)

    return Kind("hugging face", folder, read, False)


def _gguf(folder: Path) -> Kind:
    """A Llama of one layer with a vocabulary and merges."""
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    letters = sorted(reading.tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "th", "the", "<|endoftext|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template(CHAT)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    for name, shape in (shapes | {"blk.0.ffn_down": (32, 64)}).items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def read(path: Path) -> str:
        file = str(path / "tiny.gguf")
        found, said = load.open_pretrained(file), reading.load_pretrained(file)
        return digest(*(entry.read() for _, entry in sorted(found.entries.items())), found.config, said.encode(TEXT))

    return Kind("gguf", folder, read, False)


def _peft(folder: Path) -> Kind:
    """A LoRA beside a model."""
    golden = Path(__file__).parent / "golden"
    shutil.copytree(golden / "peft_adapters/lora_qv", folder)
    model = load.open_pretrained(str(golden / "hf_tiny/llama"))

    def read(path: Path) -> str:
        saved = peft_reading.understand(peft_folder.open_folder(path), model.family, model.config)
        leaves = {name: sorted(parts.items()) for name, parts in sorted(saved.leaves().items())}
        return digest(saved.options, *(x for parts in leaves.values() for _, x in parts), list(leaves))

    return Kind("peft", folder, read, False)


def _scores(folder: Path) -> Kind:
    folder.mkdir()
    rows = [scores.row(("a.jsonl", i), f"{i:016x}", (9, 5), {"ifd": i / 7, "good": i % 2 == 0}, 20) for i in range(20)]
    (folder / "scores.jsonl").write_bytes(b"".join(rows))

    def read(path: Path) -> str:
        table = scores.read(path / "scores.jsonl")
        return digest(table.files, table.number, table.digest, table.tokens, *table.columns.values())

    return Kind("scores", folder, read, True)


@dataclasses.dataclass(frozen=True)
class Fault:
    """What a try should not have come to."""

    number: int
    kind: str
    what: str

    def __str__(self) -> str:
        return f"try {self.number}, {self.kind}: {self.what}"


@dataclasses.dataclass
class Fuzz:
    """Tries on files of every kind, each a function of the seed and its number.

    Attributes:
      kinds: see `world`.
      folder: where damaged copies lie.
      seed: of all tries.
      outcomes: (kind, outcome) -> how often.
      faults: those found.
    """

    kinds: list[Kind]
    folder: Path
    seed: int
    outcomes: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    faults: list[Fault] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._right = {kind.name: kind.read(self._copy(kind)) for kind in self.kinds}
        for kind in self.kinds:  # what is read twice is the same: else nothing can be told
            assert kind.read(self._copy(kind)) == self._right[kind.name], kind.name

    def _copy(self, kind: Kind) -> Path:
        shutil.rmtree(self.folder / kind.name, ignore_errors=True)
        return Path(shutil.copytree(kind.folder, self.folder / kind.name))

    def one(self, number: int) -> None:
        """Damages a file, reads it, and notes what comes of it."""
        rng = np.random.default_rng([self.seed, number])
        kind = self.kinds[number % len(self.kinds)]
        path, names = self._copy(kind), kind.files()
        name = names[int(rng.integers(len(names)))]
        before = (path / name).read_bytes()
        after, how = damage(before, rng)
        if after == before:
            return
        (path / name).write_bytes(after)
        outcome = self._read(kind, path, name, number, f"{name}, {how}")
        self.outcomes[kind.name, outcome] += 1

    def _read(self, kind: Kind, path: Path, name: Path, number: int, how: str) -> str:
        began = time.monotonic()
        try:
            with _limited():
                found = kind.read(path)
            outcome = "right" if found == self._right[kind.name] else "as it says"
            if outcome != "right" and kind.strict:
                self._fault(number, kind, f"{how}: other content, without a word")
                outcome = "other content"
        except InputError as error:
            outcome = "error"
            known = (str(path), name.name, path.name, *(["chat template"] if name.suffix == ".jinja" else []))
            if not any(part in str(error) for part in known):
                self._fault(number, kind, f"{how}: the error names no file: {error!s:.300}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = type(error).__name__
            last = "".join(traceback.format_exception(error)[-4:])
            self._fault(number, kind, f"{how}: {last[-1500:]}")
        if (took := time.monotonic() - began) > MOST_SECONDS:
            self._fault(number, kind, f"{how}: took {took:.0f} s")
        return outcome

    def _fault(self, number: int, kind: Kind, what: str) -> None:
        self.faults.append(Fault(number, kind.name, what))

    def table(self) -> str:
        """How often each kind came to what."""
        lines = []
        for kind in self.kinds:
            counts = {what: n for (name, what), n in sorted(self.outcomes.items()) if name == kind.name}
            lines.append(
                f"{kind.name}: {sum(counts.values())} tries; {', '.join(f'{w} {n}' for w, n in counts.items())}"
            )
        return "\n".join(lines)


class _limited:
    """Memory beyond what the process has now is limited to MOST_BYTES, and time to MOST_SECONDS."""

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, self._before[1]))
        self._handler = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(MOST_SECONDS)

    def __exit__(self, *exception: object) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self._handler)
        resource.setrlimit(resource.RLIMIT_AS, self._before)


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"takes more than {MOST_SECONDS} s")
