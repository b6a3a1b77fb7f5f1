"""Weak-to-strong generalisation: what does a strong model learn from a weaker one's labels?

    python -m research.main --config=experiments/weak_to_strong.py
    python -m research.main --config=experiments/weak_to_strong.py:smollm2 --config.study.data=texts.jsonl \\
        --config.study.strong=model.gguf

A study (Burns et al., arXiv:2312.09390). Small models learn to predict text; the weak ones then learn a task from few
true labels, and label the text that the strong one learns from, under each loss. The ceiling learned the same text from
true labels. The table has accuracies, the performance gap recovered and agreement, over seeds. The task is to tell
which of four topics a paragraph has; `study.data` may be any file of records with `text` and `label` (numbers from 0
on, or names): the classes are those that it has.

Cost on 2 CPU cores: 14 minutes, 2 of them pretraining. Expect: weak 0.53 and 0.60, student 0.56 and 0.63, ceiling 0.82;
the table tells which loss helps, and which doesn't. :smollm2 takes some 35 minutes with SmolLM2-135M and 6,000 short
texts.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import base
from research import loading, params
from research.errors import InputError, did_you_mean
from research.models.config import ModelConfig
from research.models.specs import make_specs
from research.sources import entries, records
from research.studies import pgr_report
from research.studies.stages import Plan

SIZES = {
    "xs": {"num_layers": 1, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "d_ff": 96},
    "s": {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 4, "d_ff": 192},
    "l": {"num_layers": 4, "d_model": 128, "num_heads": 4, "num_kv_heads": 4, "d_ff": 384},
}

# What a student learns with: options of objectives/weak_to_strong.py, and how its labels are made of the weak ones.
STUDENTS = {
    "soft": {"loss": "cross_entropy"},
    "hard": {"loss": "hard_cross_entropy"},
    "confidence": {"loss": "auxiliary_confidence", "coefficient": 0.5, "warmup_steps": 16},
    "product": {"loss": "product_of_confidence"},
    "reverse_kl": {"loss": "reverse_kl"},
    "reverse_ce": {"loss": "reverse_cross_entropy"},
    "adaptive": {"loss": "adaptive_confidence"},
    "bootstrap": {"loss": "bootstrap", "coefficient": 0.2, "hard": True},
    "filtered": {"loss": "cross_entropy", "keep": 0.5},  # the most confident half of each class
    "ensemble": {"loss": "cross_entropy", "ensemble": True},  # the mean of the weak models of all seeds
    "chain": {"loss": "cross_entropy", "chain": True},  # weak labels teach the next size up, and its labels the next
}


TOPICS = ("language", "interfaces", "concurrency", "internet")  # the classes of builtin:python_topics, in their order


def get_config(arg: str = ""):
    variants = base.variants(arg, "smollm2")
    config = base.get_config()  # of a classifier; pretraining and sizes are set below
    config.batch_size = 8
    config.seq_len = 256
    config.steps = 40
    config.tokenizer.vocab_size = 2048
    config.objective = {"terms": {"classify": 1.0}}
    config.data.update(format="labelled", template="plain", on_long="truncate", eval_fraction=0.1)
    config.model.num_labels = 4
    config.optimizer.update(name="adamw", learning_rate=3e-3, warmup_steps=8, schedule="cosine", weight_decay=0.01)
    config.eval.update(every=20, batches=0)
    config.checkpoint.update(every=20, keep_last=1, best_metric="eval/label_nll")  # stops early, on weak labels
    config.log.tensorboard = False
    study = {
        "data": "builtin:python_topics",
        "labels": (),  # names of the classes, in their order; by default those of the data
        "weak_records": 150,
        "strong_records": 2800,
        "test_records": 1500,
        "pretrain_data": "builtin:python_docs",  # "": small models begin at random; study.data: all of it but the test
        "pretrain_steps": 400,
        "weak": ("xs", "s"),
        "strong": "l",  # of SIZES, or a model as model.init_from takes it
        "strong_learning_rate": 1e-3,
        "strong_steps": 60,
        "students": ("soft", "hard", "confidence", "product", "reverse_kl", "adaptive", "filtered"),
        "seeds": 3,
        "store": "",
    }
    if "smollm2" in variants:
        config.model.num_labels = 2
        config.batch_size = 4
        config.steps = 80
        config.eval.every = config.checkpoint.every = 26
        study |= {"data": "", "weak": ("s",), "seeds": 1}
        study |= {"weak_records": 600, "strong_records": 6000, "test_records": 1500}
        study |= {"strong": "", "strong_steps": 104, "strong_learning_rate": 1e-4, "students": ("soft", "confidence")}
    with config.unlocked():
        config.study = ConfigDict(study)
    if "smollm2" in variants:
        config.study.pretrain_data = config.study.get_oneway_ref("data")
    if "debug" in variants:
        config.steps, config.seq_len, config.eval.every, config.checkpoint.every = 2, 64, 1, 1
        config.optimizer.warmup_steps = 1
        config.study.update(weak_records=40, strong_records=60, test_records=20, pretrain_steps=2, strong_steps=2)
        config.study.update(seeds=2, students=("soft", "confidence", "filtered", "ensemble", "chain"))
    return config


def finish(config, arg, overrides):
    if "model.num_labels" in overrides:
        raise InputError("--config.model.num_labels: the classes are those of --config.study.data. Leave it out.")


def study(config, add):
    s = config.study
    for field in ("data", "strong"):
        if not s[field]:
            raise InputError(
                f"study.{field} is missing. Give --config.study.{field}=...; see the experiment's docstring."
            )
    for student in s.students:
        if student not in STUDENTS:
            raise InputError(f"study.students: {student!r} isn't there.{did_you_mean(student, STUDENTS)}")
    classes = _classes(s.data, tuple(s.labels))
    config = config.copy_and_resolve_references()
    config.study.labels, config.model.num_labels = classes.names, classes.count
    split = f"weak:{s.weak_records},strong:{s.strong_records},test:{s.test_records}"
    files = add.command("split", "split", {"data": s.data, "parts": split, "output": "{workdir}"}).workdir
    cells = [cell for weak in s.weak for cell in _Pair(config, add, files, weak).cells()]
    return functools.partial(pgr_report.report, cells)


class _Classes(NamedTuple):
    """The classes of a task: their names, () where labels are numbers, and how many there are."""

    names: tuple[str, ...]
    count: int


def _classes(data: str, names: tuple[str, ...]) -> _Classes:
    """The classes that the records of a study have.

    Args:
      data: study.data.
      names: study.labels; () takes them from the records, in alphabetical order.

    Raises:
      InputError: there is no such data, a label is neither a number nor a name, or a class has no record.
    """
    if data == "builtin:python_topics" and names in ((), TOPICS):
        return _Classes(TOPICS, len(TOPICS))
    seen = set()
    for entry in filter(None, data.split(",")):
        for where, raw in entries.locate(entry, count=0, seed=0).read():
            label = records.parse(raw).get("label")
            if not isinstance(label, int | str) or (isinstance(label, int) and label < 0):
                raise InputError(f"{where}: label = {label!r:.40}: must be a number from 0 on, or a name.")
            seen.add(int(label) if isinstance(label, bool) else label)
    if len({type(label) for label in seen}) != 1:
        raise InputError(f"study.data = {data}: some labels are numbers and some names. Write them in one way.")
    if isinstance(next(iter(seen)), str):
        names = names or tuple(sorted(seen))
        known = set(names)
    else:
        known = set(range(len(names) or len(seen)))
    if known != seen or len(known) < 2:
        lacking, foreign = sorted(known - seen), sorted(seen - known)
        fault = f"no record has the label {lacking[0]!r}" if lacking else f"there is a label {foreign[:1]}"
        raise InputError(
            f"study.data = {data}: {fault if known != seen else 'all records have one label'}, and study.labels = "
            f"{names}. Each class needs records: mend study.labels, or the data."
        )
    return _Classes(names, len(known))


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The stages of one weak size.

    Attributes:
      config: of the study.
      add: takes stages.
      files: the folder with weak.jsonl, strong.jsonl and test.jsonl.
      weak: name of the size.
    """

    config: ConfigDict
    add: Plan
    files: str
    weak: str

    @property
    def strong(self) -> str:
        """The strong model's name."""
        return self.config.study.strong if self.config.study.strong in SIZES else "strong"

    @property
    def between(self) -> list[str]:
        """The sizes between weak and strong."""
        sizes = list(SIZES)
        return sizes[sizes.index(self.weak) + 1 : sizes.index(self.strong)] if self.strong in sizes else []

    def cells(self) -> list[dict[str, Any]]:
        """Adds the stages; returns the report's cells."""
        s, cells = self.config.study, []
        weak = [
            self.train("weak", self.weak, seed, f"{self.files}/weak.jsonl", {"classify": {}}) for seed in range(s.seeds)
        ]
        for seed in range(s.seeds):
            ceiling = self.train("ceiling", s.strong, seed, f"{self.files}/strong.jsonl", {"classify": {}})
            ceiling = self.label_test(f"ceiling-{self.strong}-s{seed}", ceiling)
            students = [name for name in s.students if "chain" not in STUDENTS[name] or self.between]
            cells += [self.cell(student, seed, weak, ceiling) for student in students]
        return cells

    def cell(self, student: str, seed: int, weak: list[str], ceiling: str) -> dict[str, Any]:
        """Adds the stages of a student.

        Args:
          student: of STUDENTS.
          seed: of its run.
          weak: the weak models, one a seed.
          ceiling: the ceiling's answers to the test.
        """
        options = dict(STUDENTS[student])
        keep, ensemble, chain = (options.pop(k, d) for k, d in (("keep", 1.0), ("ensemble", 0), ("chain", 0)))
        first = supervisor = ",".join(weak) if ensemble else weak[seed]
        name = f"{self.weak}{'-all' if ensemble else f'-s{seed}'}"
        data = self.label(f"labels-{name}-{keep:g}", supervisor, f"{self.files}/strong.jsonl", keep)
        for size in self.between if chain else ():
            supervisor = self.train(f"chain-{name}", size, seed, data, {"weak_to_strong": options})
            data = self.label(f"chain-{name}-{size}-labels", supervisor, f"{self.files}/strong.jsonl")
        model = self.train(f"{student}-{name}", self.config.study.strong, seed, data, {"weak_to_strong": options})
        return {
            "weak_size": self.weak,
            "strong_size": self.strong,
            "loss": student,
            "seed": seed,
            "weak": self.label_test(f"weak-{name}", first),
            "student": self.label_test(f"{student}-{name}-{self.strong}", model),
            "ceiling": ceiling,
            "weak_params": _count(self.config, self.weak),
            "strong_params": _count(self.config, self.config.study.strong),
        }

    def train(self, name: str, size: str, seed: int, data: str, objective: Mapping[str, Any]) -> str:
        """Adds a run; returns its folder."""
        model = self.strong if size == self.config.study.strong else size
        base = _pretrained(self.config, self.add, size, self.files)
        run = _classifier(self.config, base, size, seed, data, objective)
        return self.add.train(f"{name}-{model}-s{seed}", run).workdir

    def label(self, name: str, model: str, data: str, keep: float = 1.0) -> str:
        """Adds a labelling; returns the labels' file."""
        flags = {"model": model, "data": data, "output": "{workdir}/labels.jsonl", "step": "best", "keep": keep}
        flags["overwrite"] = True
        return f"{self.add.command(name, 'label', flags).workdir}/labels.jsonl"

    def label_test(self, name: str, model: str) -> str:
        return self.label(f"{name}-test", model, f"{self.files}/test.jsonl")


def _count(config, size):
    """Number of parameters."""
    if size in SIZES:
        rows = config.tokenizer.vocab_size if _pretrains(config) else 384  # bytes and special tokens, padded
        c = ModelConfig(**SIZES[size], vocab_size=rows)
    else:
        c = loading.find(size).config
    return params.count(make_specs(c))


def _classifier(config, base, size, seed, data, objective):
    """The config of a run that makes a classifier of a language model, `base`, or of none where that is ""."""
    run = config.copy_and_resolve_references()
    run.seed = seed
    run.objective = {"terms": dict.fromkeys(objective, 1.0), **objective}
    run.data.path = data
    run.data.labels = tuple(config.study.labels)
    run.model.init_from = base
    if not base:
        run.model.update(SIZES[size])
    if size == config.study.strong:
        run.steps, run.optimizer.learning_rate = config.study.strong_steps, config.study.strong_learning_rate
    return run


def _pretrains(config):
    return bool(config.study.pretrain_data and config.study.pretrain_steps)


def _pretrained(config, add, size, files):
    """The model that a classifier begins with: one that exists, or a small one that this adds; "" for none."""
    if size not in SIZES:
        return size
    return add.train(f"pretrain-{size}", _pretrain(config, size, files)).workdir if _pretrains(config) else ""


def _pretrain(config, size, files):
    run = base.get_config()
    run.steps = config.study.pretrain_steps
    run.batch_size, run.seq_len = 16, min(128, config.seq_len)
    own = config.study.pretrain_data == config.study.data
    run.data.path = f"{files}/weak.jsonl,{files}/strong.jsonl" if own else config.study.pretrain_data
    run.tokenizer.update(kind="bpe", vocab_size=config.tokenizer.vocab_size)
    run.model.update(SIZES[size])
    run.optimizer.update(name="muon", learning_rate=3e-3, warmup_steps=run.steps // 10, weight_decay=0.1)
    run.eval.update(every=run.steps, batches=20)
    run.checkpoint.update(every=0, keep_last=1)
    return run
