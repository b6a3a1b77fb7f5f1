"""Data selection: which part of the data should a model learn from, by what smaller ones say of it?

    python -m research.main --config=experiments/select.py        # a study: ways to select, beside random and all
    python -m research.main --config=experiments/select.py:wide   # all ways, five seeds, clean data with each
    python -m research.main --config=experiments/select.py:rho1 --config.data.path=x.jsonl \\
        --config.roles.reference.init_from=runs/reference

Records of five generated tasks, of which 30 % are spoiled in known ways: answers of other prompts, copies, pieces of
another language. Models of two sizes have learned related tasks before. A small one goes on with all of the records, a
second one with a few that are good; both score them all (understudy score), and the larger model goes on with what each
way keeps, 60 % of the tokens (understudy select). All train for as many steps of as many tokens. `full` learns from
all, `truth` from what isn't spoiled, `random` from as many tokens by chance; rho1 and rho select of each batch while
they train. The same without noise is `clean`.

:rho1 and :rho are one run of that objective, on data and with a reference that are named.
"""

import functools
import json
from typing import Any

from ml_collections import ConfigDict

from experiments import base
from research import config as config_lib
from research.errors import InputError
from research.studies import selection_report

# What understudy select is asked for; `objective`: what selects while training, from all of the data.
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "truth": {"file": "rest"},
    "random": {"keep": "random"},
    "perplexity": {"by": "loss", "keep": "bottom"},
    "band": {"by": "loss", "keep": "middle"},
    "ifd": {"by": "ifd", "keep": "top", "max": 1.0},
    "ifd_low": {"by": "ifd", "keep": "bottom"},
    "rho": {"by": "rho", "keep": "top"},
    "rho_once": {"by": "rho", "keep": "top", "drop": "copies_before"},
    "ifd_low_once": {"by": "ifd", "keep": "bottom", "drop": "copies_before"},
    "dsir": {"by": "dsir", "keep": "gumbel"},
    "rho1": {"objective": {"terms": {"rho1": {"keep": 0.6}}}},
    "rho_online": {"objective": {"terms": {"rho": {"keep": 0.6}}}},
}
DEFAULT = ("random", "truth", "rho", "rho1", "perplexity", "ifd_low", "full", "band", "ifd")
SCORERS = ("perplexity", "ifd", "rho", "duplicates", "dsir")
SMALL = {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 4, "d_ff": 128}
LARGE = {"num_layers": 2, "d_model": 128, "num_heads": 4, "num_kv_heads": 4, "d_ff": 256}
SHAPES = {"small": SMALL, "large": LARGE}
TASKS = ("reverse/1", "copy/1", "upper/1", "sort_letters/1", "delete_letter/1")
BEFORE = "tasks:copy/2,tasks:upper/2,tasks:reverse/2,tasks:sort_letters/2"  # longer words; none to delete from
METRICS = ("eval/nll", "eval/test/exact_match")


def get_config(arg: str = ""):
    chosen = base.variants(arg, "wide", "rho1", "rho")
    alone = chosen & {"rho1", "rho"}
    if len(alone) > 1 or (alone and "wide" in chosen):
        raise InputError(f"--config=...:{','.join(sorted(chosen))}: a run has one objective. Name one of rho1 and rho.")
    config = base.get_config()
    config.steps, config.batch_size, config.seq_len = 100, 8, 64
    config.objective = {"terms": {"sft": 1.0}}
    config.data.update(eval_fraction=0.05)
    config.tokenizer.kind = "byte"
    config.model.update(LARGE)
    config.optimizer.update(name="muon", learning_rate=2e-3, warmup_steps=10, weight_decay=0.1)
    config.eval.update(every=100, batches=0)
    config.checkpoint.update(every=0, keep_last=1)
    config.log.tensorboard = False
    if alone:
        config.objective = {"terms": {next(iter(alone)): {"keep": 0.6}}}
        config.roles = {"reference": {"init_from": ""}}
        config.data.path = ""
    else:
        wide = "wide" in chosen
        study = {
            "ways": tuple(WAYS) if wide else DEFAULT,
            "clean_ways": tuple(WAYS) if wide else ("random", "perplexity", "rho", "rho1"),
            "seeds": 5 if wide else 3,
            "keep": 0.6,  # of the tokens
            "noise": 0.3,
            "pool": 2400,
            "reference": 600,
            "test": 200,
            "base_steps": 300,
            "small_steps": 100,
            "store": "",
        }
        with config.unlocked():
            config.study = ConfigDict(study)
    if "debug" in chosen:
        base.debug(config)
        config.data.max_records = 0
        if not alone:
            config.study.update(pool=60, reference=20, test=10, base_steps=2, small_steps=2, seeds=2)
    return config


def finish(config, arg, overrides):
    chosen = base.variants(arg, *arg.split(","))
    if chosen & {"rho1", "rho"}:
        for field, value in (
            ("data.path", config.data.path),
            ("roles.reference.init_from", config.roles.reference.init_from),
        ):
            if not value:
                raise InputError(f"--config.{field}: is missing. Give it; see the experiment's docstring.")
    base.finish(config, arg, overrides)


def study(config, add):
    s = config.study
    if s.seeds < 1:
        raise InputError(f"--config.study.seeds = {s.seeds}: must be at least 1.")
    for field, names in (("ways", s.ways), ("clean_ways", s.clean_ways)):
        for name in names:
            if name not in WAYS:
                raise InputError(f"--config.study.{field}: there is no way {name!r}. Name some of {', '.join(WAYS)}.")
    flags = {"output": "{workdir}", "tasks": ",".join(TASKS), "seed": 0}
    flags |= {"held_out": s.reference, **{name: s[name] for name in ("pool", "test", "noise")}}
    files = add.command("data", "research.studies.planted_noise", flags).workdir
    starts = {name: add.train(f"start-{name}", _start(config, shape)).workdir for name, shape in SHAPES.items()}
    reference = add.train("reference", _small(config, files, "reference", starts["small"])).workdir
    tables = []
    for pool, ways in (("pool", s.ways), ("clean", s.clean_ways)):
        if ways:
            tables.append(_Pool(config, add, files, pool, reference, starts).table(ways))
    return functools.partial(selection_report.report, tables, METRICS)


class _Pool:
    """The stages of one pool of records.

    Args:
      config: of the study.
      add: takes stages.
      files: the folder of the records.
      pool: the file of those to select from.
      reference: the run of the reference.
      starts: of each size the run that models of it begin with.
    """

    def __init__(self, config: ConfigDict, add: Any, files: str, pool: str, reference: str, starts: dict[str, str]):
        self.config, self.add, self.files, self.name, self.reference = config, add, files, pool, reference
        self.path, self.start = f"{files}/{pool}.jsonl", starts["large"]
        self.current = add.train(f"current-{pool}", _small(config, files, pool, starts["small"])).workdir
        flags = {"with": ",".join(SCORERS), "model": self.current, "reference": reference, "data": self.path}
        flags |= {"target": f"{files}/reference.jsonl", "output": "{workdir}/scores.jsonl"}
        flags["options"] = json.dumps({name: {"model": reference} for name in ("perplexity", "ifd")})
        self.scores = f"{add.command(f'scores-{pool}', 'score', flags).workdir}/scores.jsonl"

    def table(self, ways: Any) -> selection_report.Pool:
        """Adds the runs of the ways; returns what is to be reported of them."""
        seeds = range(self.config.study.seeds)
        return selection_report.Pool(
            self.name,
            self.path,
            self.scores,
            {"current": self.current, "reference": self.reference},
            [self.way(name, seeds) for name in ways if not (name == "truth" and self.name == "clean")],
        )

    def way(self, name: str, seeds: range) -> selection_report.Way:
        options = dict(WAYS[name])
        objective, file = options.pop("objective", None), options.pop("file", self.name)
        drawn = options.get("keep") in ("random", "gumbel")
        lists = [self.select(name, options, seed if drawn else None) if options else "" for seed in seeds]
        runs = []
        for seed, kept in zip(seeds, lists, strict=True):
            run = self.config.copy_and_resolve_references()
            run.seed = seed
            _begin(run, self.start)
            run.data.update(path=f"{self.files}/{file}.jsonl", eval_path=f"{self.files}/test.jsonl", select=kept)
            run.eval.tasks = (f"exact_match,limit=100,max_new_tokens=12,name=test:{self.files}/test.jsonl",)
            if objective:
                run.objective, run.roles = objective, {"reference": {"init_from": self.reference}}
            runs.append(self.add.train(f"{name}-{self.name}-s{seed}", run).workdir)
        uses = ("reference",) if objective else _models(options)
        return selection_report.Way(name, runs, lists if options else [], uses, bool(objective))

    def select(self, name: str, options: dict[str, Any], seed: int | None) -> str:
        """Adds a selection; returns its file."""
        flags = {"scores": self.scores, "tokens": self.config.study.keep, "output": "{workdir}/kept.jsonl", **options}
        flags |= {} if seed is None else {"seed": seed}
        title = f"select-{name}-{self.name}" + ("" if seed is None else f"-s{seed}")
        return f"{self.add.command(title, 'select', flags).workdir}/kept.jsonl"


def _models(options: dict[str, Any]) -> tuple[str, ...]:
    """The small models that a score is made with."""
    return {"loss": ("reference",), "ifd": ("reference",), "rho": ("current", "reference")}.get(options.get("by"), ())


def _start(config: ConfigDict, shape: dict[str, int]) -> ConfigDict:
    """A model that learns related tasks, before any of the records."""
    run = config.copy_and_resolve_references()
    run.steps, run.batch_size = config.study.base_steps, 2 * config.batch_size
    run.model.update(shape)
    run.data.update(path=BEFORE, examples=4_000)
    run.optimizer.update(learning_rate=5e-3, warmup_steps=max(1, run.steps // 10))
    run.eval.update(every=run.steps, batches=10)
    return run


def _begin(run: ConfigDict, start: str) -> None:
    """Has a run begin with a model, which decides its shape."""
    defaults = config_lib.defaults()["model"]
    run.model.update({name: defaults[name] for name in (*LARGE, "head_dim")})
    run.model.init_from = start


def _small(config: ConfigDict, files: str, part: str, start: str) -> ConfigDict:
    """A small model that learns from one of the files."""
    run = config.copy_and_resolve_references()
    run.steps = config.study.small_steps
    _begin(run, start)
    run.data.update(path=f"{files}/{part}.jsonl", eval_path=f"{files}/test.jsonl")
    run.optimizer.warmup_steps = max(1, run.steps // 10)
    run.eval.every = run.steps
    return run
