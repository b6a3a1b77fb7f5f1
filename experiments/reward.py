"""Reward models: one number for an answer, learned from which of two answers was preferred.

    python -m research.main --config=experiments/reward.py           # a tenth of the labels is the wrong way round
    python -m research.main --config=experiments/reward.py:noisy     # three tenths are
    python -m research.main --config=experiments/reward.py:plain     # a loss that doesn't know; or :smoothed
    python -m research.main --config=experiments/reward.py:compare   # a study of all these, over seeds
    python -m research.main --config=experiments/reward.py:weak_to_strong  # a study of learning from a weak model
    python -m research.main --config=experiments/reward.py:smollm2 --config.model.init_from=MODEL \\
        --config.data.path=pairs.jsonl

on generated preferences, whose utility is planted: `eval/accuracy` and `eval/calibration_error` are of held-out labels,
of which as many are the wrong way round as in training, and `eval/utility/accuracy` is of labels that are all right.

Cost: 0.13 M parameters, 0.82 M tokens; 25 s of CPU time. Expect: accuracy 0.90 (more can't be expected of labels
of which a tenth is wrong), of right labels 0.998, calibration error 0.01; `:plain` learns as much, with a
calibration error of 0.11. docs/preferences.md says why.

In `:weak_to_strong` a weak reward model, which learned from few pairs, and a weak policy, by its implicit rewards, say
which of two answers is the better one, and stronger reward models learn from that (Burns et al., arXiv:2312.09390).
Cost: 88 stages, five minutes of CPU time. Expect: weak reward model 0.77, its students 0.82 to 0.85, ceiling 0.99; weak
policy 0.85, its students about the same.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments import base
from research import config as config_lib
from research import params
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.specs import make_specs
from research.studies import compare_report, pgr_report
from research.studies.stages import Plan

TASK = "preferences:reverse"
FEW, MANY = 0.1, 0.3  # the shares of labels that are the wrong way round
MODEL = {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 4, "d_ff": 192}
METRICS = ("eval/accuracy", "eval/utility/accuracy", "eval/calibration_error")
# The ways of the study: the share of labels that is the wrong way round, and the options of reward.
WAYS: dict[str, tuple[float, dict[str, float]]] = {
    "10-flipped": (FEW, {"flipped": FEW}),
    "10-plain": (FEW, {}),
    "30-plain": (MANY, {}),
    "30-smoothed": (MANY, {"label_smoothing": MANY}),
    "30-flipped": (MANY, {"flipped": MANY}),
}
WEAK = {"num_layers": 1, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "d_ff": 96}
BETA = 0.1  # of the policies' training, and so of their rewards
SFT, BY_DPO = {"sft": {}}, {"preference": {"beta": BETA}}
DPO = "dpo"  # the student that is a policy
# What students learn with: options of objectives/weak_to_strong.py.
STUDENTS: dict[str, dict[str, Any]] = {
    "soft": {"loss": "cross_entropy"},
    "hard": {"loss": "hard_cross_entropy"},
    "confidence": {"loss": "auxiliary_confidence", "coefficient": 0.5, "warmup_steps": 30},
    "product": {"loss": "product_of_confidence"},
    "adaptive": {"loss": "adaptive_confidence"},
}


def get_config(arg: str = ""):
    chosen = base.variants(arg, "noisy", "plain", "smoothed", "compare", "smollm2", "weak_to_strong")
    alone = chosen & {"compare", "smollm2", "weak_to_strong"}
    others = chosen & {"noisy", "plain", "smoothed"}
    if len(alone) > 1 or (alone and others) or {"plain", "smoothed"} <= chosen:
        clash = ",".join(sorted(chosen))
        raise InputError(
            f"--config=...:{clash}: compare, smollm2 and weak_to_strong stand alone, and plain and smoothed are two "
            "losses."
        )
    config = base.get_config()
    config.steps, config.batch_size, config.seq_len = 400, 16, 128
    config.tokenizer.kind = "byte"
    config.model.num_labels = 1
    config.optimizer.update(name="muon", learning_rate=6e-3, warmup_steps=20, schedule="cosine", weight_decay=0.01)
    config.eval.update(every=200, batches=100)
    config.checkpoint.update(every=0, keep_last=1)
    config.log.tensorboard = False
    flip = MANY if "noisy" in chosen else FEW
    if "smollm2" in chosen:
        _set_larger(config)
    else:
        config.model.update(MODEL)
        config.data.examples = 12_000
        limit = 40 if "debug" in chosen else 1000
        config.eval.tasks = (f"best_of,limit={limit},name=utility:{TASK}/0",)
        option = "label_smoothing" if "smoothed" in chosen else "flipped"
        _set_way(config, flip, {} if "plain" in chosen else {option: flip})
    if "debug" in chosen:
        base.debug(config)
    if "compare" in chosen:
        with config.unlocked():
            config.study = ConfigDict({"seeds": 2 if "debug" in chosen else 3, "store": ""})
    if "weak_to_strong" in chosen:
        _set_weak_to_strong(config, debug="debug" in chosen)
    return config


def _set_weak_to_strong(config: ConfigDict, debug: bool) -> None:
    """Sets the study's fields, and of the runs what all have in common."""
    study = {
        "data": f"{TASK}/0",
        "weak_records": 20,  # of each seed its own
        "strong_records": 3000,
        "test_records": 1500,
        "weak_steps": 60,
        "start_steps": 60,  # of the language model that the weak policy begins with; strong ones have `steps`
        "policy_steps": 30,
        "students": tuple(STUDENTS),
        "students_of_policy": ("soft", "hard", DPO),
        "seeds": 3,
        "store": "",
    }
    config.steps = 100
    config.eval.tasks = ()
    if debug:
        study |= {"weak_records": 40, "strong_records": 60, "test_records": 20, "seeds": 2}
        study |= {"weak_steps": 2, "start_steps": 2, "policy_steps": 2, "students": ("soft", "confidence")}
        study |= {"students_of_policy": ("hard", DPO)}
        config.steps = 2
    config.eval.update(every=config.steps, batches=20, generate=0)
    with config.unlocked():
        config.study = ConfigDict(study)


def finish(config, arg, overrides):
    base.finish(config, arg, overrides)
    if "smollm2" in base.variants(arg, *arg.split(",")):
        for section, name in (("model", "init_from"), ("data", "path")):
            if not config[section][name]:
                raise InputError(f"--config.{section}.{name}: is missing. Give it; see the experiment's docstring.")


def study(config, add):
    if "students" in config.study:
        return _WeakToStrong(config, add).report()

    def run(way, seed):
        values = config.copy_and_resolve_references()
        values.seed = seed
        _set_way(values, *WAYS[way])
        return add.train(f"{way}-s{seed}", values).workdir

    runs = {way: [run(way, seed) for seed in range(config.study.seeds)] for way in WAYS}
    return functools.partial(compare_report.report, runs, METRICS)


def _set_way(config: ConfigDict, flip: float, options: dict[str, float]) -> None:
    """Sets what a small model learns: pairs, of whose labels a share is flipped, likewise in its evaluation."""
    path = f"{TASK}/{flip}"
    config.data.update(path=path, eval_path=path)
    config.objective = {"terms": {"reward": options}}


def _set_larger(config: ConfigDict) -> None:
    """A model that is named, on pairs that are named."""
    config.objective = {"terms": {"reward": {"centering": 0.01}}}
    config.steps, config.batch_size, config.seq_len = 100, 4, 512
    config.tokenizer.kind, config.data.path = "auto", ""
    config.optimizer.update(name="adamw", learning_rate=2e-5, warmup_steps=10, weight_decay=0.0)
    config.eval.update(every=50, batches=40)


@dataclasses.dataclass(frozen=True)
class _WeakToStrong:
    """The stages of the study of learning from a weak model.

    Attributes:
      config: of the study.
      add: takes stages.
    """

    config: ConfigDict
    add: Plan

    def report(self) -> functools.partial:
        """Adds the stages; returns what reports them."""
        s = self.config.study
        parts = "".join(f"weak{seed}:{s.weak_records}," for seed in range(s.seeds))
        parts += f"strong:{s.strong_records},test:{s.test_records}"
        # Twice as many as are needed, since prompts that come again are dropped.
        count = 2 * (s.seeds * s.weak_records + s.strong_records + s.test_records)
        flags = {"data": s.data, "parts": parts, "output": "{workdir}", "examples": count}
        files = self.add.command("split", "split", flags).workdir
        return functools.partial(pgr_report.report, [x for seed in range(s.seeds) for x in self.cells(files, seed)])

    def cells(self, files: str, seed: int) -> list[dict[str, Any]]:
        """Adds the stages of a seed; returns the report's cells."""
        s, test, true = self.config.study, f"{files}/test.jsonl", f"{files}/strong.jsonl"
        ceiling = {"model": self.add.train(f"ceiling-s{seed}", self.strong_run(seed, true, {"reward": {}})).workdir}
        ceilings = {"reward model": self.score(f"ceiling-s{seed}-test", ceiling, test)}
        if DPO in s.students_of_policy:
            ceiling = self.strong_policy(f"ceiling-policy-s{seed}", seed, true)
            ceilings["policy"] = self.score(f"ceiling-policy-s{seed}-test", ceiling, test)
        weak = {
            "reward model": ({"model": self.weak_model(files, seed)}, s.students),
            "policy": (self.weak_policy(files, seed), s.students_of_policy),
        }
        cells = []
        for kind, (supervisor, students) in weak.items():
            name = f"{kind.replace(' ', '-')}-s{seed}"
            labels = self.score(f"labels-{name}", supervisor, true)
            tested = self.score(f"weak-{name}-test", supervisor, test)
            for student in students:
                strong = "policy" if student == DPO else "reward model"
                learned = self.score(f"{student}-{name}-test", self.student(student, name, seed, labels), test)
                cells.append(
                    {"weak_size": kind, "strong_size": strong, "loss": student, "seed": seed}
                    | {"weak": tested, "student": learned, "ceiling": ceilings[strong]}
                    | {"weak_params": _count(WEAK), "strong_params": _count(MODEL)}
                )
        return cells

    def student(self, student: str, supervisor: str, seed: int, labels: str) -> dict[str, Any]:
        """Adds a student; returns the flags that score takes for its rewards.

        Args:
          student: of STUDENTS, or DPO.
          supervisor: for its name.
          seed: of its run.
          labels: the file of pairs with the weak model's rewards.
        """
        if student == DPO:
            return self.strong_policy(f"{student}-{supervisor}", seed, labels, labelled=True)
        run = self.strong_run(seed, labels, {"weak_to_strong": {"head": "pairs", **STUDENTS[student]}}, labelled=True)
        return {"model": self.add.train(f"{student}-{supervisor}", run).workdir}

    def run(self, seed: int, data: str, terms: Mapping[str, Mapping[str, Any]], steps: int) -> ConfigDict:
        """The config of a run."""
        run = self.config.copy_and_resolve_references()
        run.seed, run.steps, run.eval.every = seed, steps, steps
        run.optimizer.warmup_steps = max(1, steps // 10)
        run.data.update(path=data, eval_path="")
        run.objective = {"terms": terms}
        return run

    def strong_run(
        self, seed: int, data: str, terms: Mapping[str, Mapping[str, Any]], labelled: bool = False
    ) -> ConfigDict:
        """The config of a run of a strong model. `labelled`: by the rewards in the data."""
        run = self.run(seed, data, terms, self.config.steps)
        if labelled:
            run.data.fields = {"rewards": "rewards"}
        return run

    def weak_run(self, files: str, seed: int, terms: Mapping[str, Mapping[str, Any]], steps: int) -> ConfigDict:
        """The config of a run that learns from the few pairs of its seed."""
        run = self.run(seed, f"{files}/weak{seed}.jsonl", terms, steps)
        run.data.eval_path = f"{files}/test.jsonl"  # nothing is chosen by it, and of so few pairs none is left
        run.model.update(WEAK)
        return run

    def weak_model(self, files: str, seed: int) -> str:
        """Adds the weak reward model; returns its folder."""
        run = self.weak_run(files, seed, {"reward": {}}, self.config.study.weak_steps)
        return self.add.train(f"weak-s{seed}", run).workdir

    def weak_policy(self, files: str, seed: int) -> dict[str, Any]:
        """Adds the weak policy; returns what `policy` does."""
        s = self.config.study
        start, run = self.weak_run(files, seed, SFT, s.start_steps), self.weak_run(files, seed, BY_DPO, s.policy_steps)
        return self.policy(f"weak-policy-s{seed}", start, run)

    def strong_policy(self, name: str, seed: int, data: str, labelled: bool = False) -> dict[str, Any]:
        """Adds a strong policy, which learns to answer as the labels want it too; returns what `policy` does."""
        start, run = (self.strong_run(seed, data, terms, labelled) for terms in (SFT, BY_DPO))
        return self.policy(name, start, run)

    def policy(self, name: str, start: ConfigDict, run: ConfigDict) -> dict[str, Any]:
        """Adds a policy, and what it begins with; returns the flags that score takes for its rewards.

        Args:
          name: of the policy.
          start, run: the configs of both runs, of a model of rewards.
        """
        start.model.num_labels = 0
        folder = self.add.train(f"{name}-start", start).workdir
        run.model.update(config_lib.defaults()["model"], init_from=folder)
        run.roles = {"reference": {"init_from": folder}}
        run.optimizer.update(name="adamw", learning_rate=1e-3)
        return {"model": self.add.train(name, run).workdir, "reference": folder, "beta": BETA}

    def score(self, name: str, model: Mapping[str, Any], data: str) -> str:
        """Adds a scoring; returns the file with the rewards."""
        flags = {"reward": True, **model, "data": data, "output": "{workdir}/rewards.jsonl", "overwrite": True}
        return f"{self.add.command(name, 'score', flags).workdir}/rewards.jsonl"


def _count(sizes: Mapping[str, int]) -> int:
    """Number of parameters of a model of bytes."""
    return params.count(make_specs(ModelConfig(**sizes, vocab_size=384, num_labels=1)))
