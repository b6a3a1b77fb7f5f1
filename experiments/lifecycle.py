"""The whole life of a model in one study: pretraining, demonstrations, a reward model, and what is learned from it.

    python -m research.main --config=experiments/lifecycle.py --workdir=runs/life
    python -m research.main --config=experiments/lifecycle.py:dpo       # or ppo, grpo, best_of: one way alone
    python -m research.main --config=experiments/lifecycle.py:no_sft    # the rewards' policies begin as pretrained
    python -m research.main --config=experiments/lifecycle.py:lora      # adapters in the place of full fine-tuning
    python -m research.main --config=experiments/lifecycle.py:denoise   # pretraining restores corrupted text, too
    python -m research.main --config=experiments/lifecycle.py:smollm2,lora --config.model.init_from=MODEL

All is known of this world, and nothing is downloaded: the text is generated programs and dialogues, in which a word is
to be copied and half of the answers are bad; demonstrations and preferences are of the same dialogues, a tenth of
them by mistake; and each answer has a planted utility, the true reward, of which the reward model has seen few pairs.
After each stage the same is measured: the loss of held-out programs, which shows what is forgotten, how many answers
are right, the true reward and the reward model's, the KL from the policy after SFT, and length.

Variants with the same --workdir's store share their stages.

Cost: 0.18 M parameters; 1:54 of CPU time a seed. Expect, of one seed: true rewards of -0.4 after pretraining, 0.9 after
SFT, 2.0 after PPO, 1.0 after GRPO, which gets as much from the reward model and answers nothing right, 1.2 after DPO,
1.9 of the best of 16. docs/lifecycle.md has the tables, and what each stage cost.
"""

import dataclasses
import functools
from typing import Any

from ml_collections import ConfigDict

from experiments import base
from research import config as config_lib
from research.errors import InputError
from research.rollouts.presets import PRESETS
from research.studies import lifecycle, lifecycle_report
from research.studies.lifecycle import Phase
from research.studies.stages import Plan

TASK, FLIPPED = "preferences:copy/1", "0.1"  # the share of preferences and demonstrations that are mistakes
TEXT, PROSE = "grammar:functions", "builtin:python_docs"  # prose: what a named model may have read
MODEL = {"num_layers": 3, "d_model": 64, "num_heads": 4, "num_kv_heads": 4, "d_ff": 192}
WAYS = ("ppo", "grpo", "dpo", "best_of")
ANSWERS = "research.studies.answers"
# Learning rates of full fine-tuning, of adapters, and of adapters of a larger model.
RATES = {"sft": 2e-3, "reward": 1e-3, "ppo": 5e-4, "grpo": 5e-4, "dpo": 3e-4, "critic": 1e-3}
LORA_RATES = {"sft": 1e-2, "reward": 1e-2, "ppo": 3e-3, "grpo": 3e-3, "dpo": 3e-3, "critic": 3e-3}
LARGER_RATES = {"sft": 2e-4, "reward": 2e-4, "ppo": 1e-4, "grpo": 1e-4, "dpo": 5e-5, "critic": 1e-4}
STUDY = {
    "seeds": 3,
    "pretrain_steps": 300,
    "sft_steps": 150,
    "demonstrations": 2_000,
    "reward_steps": 100,
    "pairs": 400,  # that the reward model and DPO learn from
    "dpo_steps": 60,
    "policy_steps": 60,  # updates by PPO or GRPO
    "batch": 64,  # answers of such an update
    "prompts": 16,
    "answers": 8,  # to each prompt of a rollout
    "delay": 10,  # updates in which PPO's critic learns alone
    "kl": 0.02,  # weight of the KL in PPO's reward and in GRPO's loss
    "best_of": 16,
    "judged": 128,  # prompts, after each stage
}
DEBUG = {"seeds": 1, "pretrain_steps": 2, "sft_steps": 2, "demonstrations": 50, "reward_steps": 2, "pairs": 50}
DEBUG |= {"dpo_steps": 2, "policy_steps": 2, "batch": 8, "prompts": 2, "answers": 4, "delay": 1, "best_of": 4}
DEBUG |= {"judged": 8}
LARGER = {"seeds": 1, "sft_steps": 60, "reward_steps": 60, "dpo_steps": 40, "policy_steps": 40, "batch": 32}
LARGER |= {"prompts": 8, "delay": 4, "best_of": 8, "judged": 64}


def get_config(arg: str = ""):
    chosen = base.variants(arg, *WAYS, "no_sft", "lora", "denoise", "smollm2")
    if {"denoise", "smollm2"} <= chosen:
        raise InputError("--config=...:denoise,smollm2: a model that is named isn't pretrained. Leave one out.")
    config = base.get_config()  # of SFT; what the other stages have of their own is set below
    config.steps, config.batch_size, config.seq_len = STUDY["sft_steps"], 16, 128
    config.objective = {"terms": {"sft": 1.0}}
    _ask(config, "chosen")
    config.data.examples = 12_000
    config.model.update(MODEL)
    config.optimizer.update(name="adamw", learning_rate=RATES["sft"], schedule="cosine", weight_decay=0.0)
    config.optimizer.warmup_steps = 10
    config.eval.update(every=config.steps, batches=10, max_new_tokens=48)
    config.checkpoint.update(every=50, keep_last=1)
    config.log.tensorboard = False
    study = {**STUDY, "ways": tuple(way for way in WAYS if way in chosen) or WAYS, "store": ""}
    study |= {"sft": "no_sft" not in chosen, "denoise": "denoise" in chosen}
    study |= {
        "text": TEXT,
        "text_records": 200,
        "adapter": ConfigDict({"kind": "lora", "rank": 8} if "lora" in chosen else {}),
    }
    study["rates"] = ConfigDict(LORA_RATES if "lora" in chosen else RATES)
    if "smollm2" in chosen:
        config.batch_size, config.checkpoint.every = 4, 20
        study |= {**LARGER, "text": PROSE, "text_records": 40, "rates": ConfigDict(LARGER_RATES)}
        study["adapter"] = ConfigDict({"kind": "lora", "rank": 16} if "lora" in chosen else {})
    if "debug" in chosen:
        base.debug(config)
        study |= {**DEBUG, "text_records": 8}
    with config.unlocked():
        config.study = ConfigDict(study)
    return config


def finish(config, arg, overrides):
    chosen = base.variants(arg, *arg.split(","))
    if "smollm2" in chosen and not config.model.init_from:
        raise InputError("--config.model.init_from: is missing. Give it; see the experiment's docstring.")
    if config.model.init_from:
        _leave_shape(config, overrides)
        if config.study.denoise:
            raise InputError("--config=...:denoise: a model that is named isn't pretrained. Leave one out.")
    for way in config.study.ways:
        if way not in WAYS:
            raise InputError(f"--config.study.ways: there is no way {way!r}. Use some of {', '.join(WAYS)}.")


def study(config, add):
    lives = [_Life(config, add, seed).phases() for seed in range(config.study.seeds)]
    phases = [
        Phase(name, kind, tuple(filter(None, runs)), tuple(filter(None, answers)))
        for (name, *_), (kind, *_), runs, answers in (zip(*same, strict=True) for same in zip(*lives, strict=True))
    ]
    start = [p.name for p in phases if p.kind in (lifecycle.PRETRAIN, lifecycle.SFT)][-1]
    return functools.partial(lifecycle_report.report, phases, start)


@dataclasses.dataclass(frozen=True)
class _Life:
    """The stages of one seed.

    Attributes:
      config: of the study.
      add: takes stages.
      seed: of its runs.
    """

    config: ConfigDict
    add: Plan
    seed: int

    def phases(self) -> list[tuple[str, str, str, str]]:
        """Adds the stages; returns of each name, kind, the folder of its run and that of its answers, "" for none."""
        s, begun = self.config.study, []
        model = self.config.model.init_from or self.train("pretrain", self.pretraining())
        begun.append((lifecycle.PRETRAIN, model))
        if s.sft:
            model = self.train("sft", self.tuning(model))
            begun.append((lifecycle.SFT, model))
        judge = self.train("reward", self.rewarding(model))
        rows = []
        for kind, folder in begun:
            name, run = ("as it is", "") if folder == self.config.model.init_from else (kind, folder)
            rows.append((name, kind, run, self.answers(kind, folder, model, judge)))
        rows.append(("reward model", lifecycle.REWARD, judge, ""))
        for way in s.ways:
            if way == "best_of":
                answers = self.answers(f"best_of_{s.best_of}", model, model, judge, samples=s.best_of)
                rows.append((f"best of {s.best_of}", lifecycle.BEST_OF, "", answers))
            else:
                run = self.train(way, self.preferring(model) if way == "dpo" else self.reinforcing(way, model, judge))
                rows.append((way, lifecycle.POLICY, run, self.answers(way, run, model, judge)))
        return rows

    def train(self, name: str, run: ConfigDict) -> str:
        """Adds a run; returns its folder."""
        return self.add.train(f"{self.name(name)}-s{self.seed}", run).workdir

    def name(self, stage: str) -> str:
        """A stage's name with what sets the variant apart."""
        s = self.config.study
        marks = ["denoise"] if s.denoise else []
        if stage != lifecycle.PRETRAIN:
            marks += (["lora"] if s.adapter else []) + ([] if s.sft else ["no_sft"])
        return "-".join((stage, *marks))

    def answers(self, name: str, model: str, start: str, judge: str, samples: int = 1) -> str:
        """Adds what is measured after a stage; returns its folder."""
        s = self.config.study
        text = (f"perplexity,limit={s.text_records},name=text:{s.text}",) if samples == 1 else ()
        flags = {"model": model, "start": start, "reward": judge, "data": f"{TASK}/0/subtle", "output": "{workdir}"}
        flags |= {"limit": s.judged, "samples": samples, "seed": self.seed, "task": text}
        flags["max_new_tokens"] = self.config.eval.max_new_tokens
        return self.add.command(f"{self.name(name)}-answers-s{self.seed}", ANSWERS, flags).workdir

    def run(self, steps: int, model: str) -> ConfigDict:
        """The config of a run that begins with a model."""
        run = self.config.copy_and_resolve_references()
        run.seed, run.steps, run.eval.every = self.seed, steps, steps
        run.optimizer.warmup_steps = min(run.optimizer.warmup_steps, max(1, steps // 10))
        run.model.init_from = model
        _leave_shape(run)
        run.adapter = self.config.study.adapter.to_dict()
        return run

    def pretraining(self) -> ConfigDict:
        """Programs, and dialogues with good answers and bad ones."""
        s, run = self.config.study, self.config.copy_and_resolve_references()
        run.seed, run.steps, run.eval.every = self.seed, s.pretrain_steps, s.pretrain_steps
        run.eval.tasks = (f"perplexity,limit={s.text_records},name=text:{s.text}",)
        run.data.update(path="", format="auto")
        run.data.fields = {}
        dialogues = {"path": f"{TASK}/0.5/subtle", "format": "prompt_response", "fields": {"response": "chosen"}}
        sources = {"programs": {"path": TEXT, "weight": 0.5}, "dialogues": {**dialogues, "weight": 0.5}}
        terms: dict[str, Any] = {"next_token": 1.0}
        if s.denoise:
            sources["holes"] = {"path": TEXT, "weight": 0.5, "view": {"kind": "denoise"}}
            terms = {"next_token": {"sources": ["dialogues", "programs"]}}
            terms["restored"] = {"objective": "sft", "sources": ["holes"]}
        run.data.sources, run.objective = sources, {"terms": terms}
        run.optimizer.update(name="muon", learning_rate=6e-3, weight_decay=0.1)
        run.optimizer.warmup_steps = max(1, s.pretrain_steps // 20)
        return run

    def tuning(self, model: str) -> ConfigDict:
        """Demonstrations."""
        run = self.run(self.config.study.sft_steps, model)
        run.data.max_records = self.config.study.demonstrations
        run.optimizer.learning_rate = self.config.study.rates["sft"]
        return run

    def rewarding(self, model: str) -> ConfigDict:
        """A reward model, of few pairs."""
        run = self.run(self.config.study.reward_steps, model)
        _compare(run, self.config.study.pairs)
        run.model.num_labels = 1
        run.objective = {"terms": {"reward": {"centering": 0.01}}}
        run.optimizer.learning_rate = self.config.study.rates["reward"]
        run.eval.tasks = (f"best_of,limit={4 * self.config.study.judged},name=utility:{TASK}/0/subtle",)
        if run.adapter:
            run.adapter = {**run.adapter, "also": "head"}
        return run

    def preferring(self, model: str) -> ConfigDict:
        """DPO on the reward model's pairs."""
        run = self.run(self.config.study.dpo_steps, model)
        _compare(run, self.config.study.pairs)
        run.objective = {"terms": {"preference": {"kind": "sigmoid"}}}
        run.roles = {"reference": self.reference(model)}
        run.optimizer.learning_rate = self.config.study.rates["dpo"]
        return run

    def reinforcing(self, way: str, model: str, judge: str) -> ConfigDict:
        """PPO or GRPO by the reward model; the true reward is reported alone."""
        s, run, preset = self.config.study, self.run(self.config.study.policy_steps, model), PRESETS[way]
        longest = self.config.eval.max_new_tokens
        run.batch_size, run.seq_len, run.eval.every = s.batch, min(run.seq_len, longest + 32), 0
        _ask(run, "right", flipped="0")
        run.data.pack, run.log.every = False, min(4, run.log.every)  # each line is a point of a curve
        run.rewards = {"proxy": {"reward": "reward_model"}, "true": {"reward": "utility", "weight": 0.0}}
        run.rollout.update(prompts=s.prompts, answers=s.answers, max_new_tokens=longest, **preset.rollout)
        run.advantage.update(preset.advantage)
        roles = {"reference": self.reference(model), "reward": {"init_from": judge, "num_labels": 1}}
        run.optimizer.update(learning_rate=s.rates[way], schedule="constant")
        loss: dict[str, Any] = dict(preset.loss)
        if way == "grpo":
            run.objective, run.roles = {"terms": {"policy_gradient": {**loss, "kl_coef": s.kl}}}, roles
            return run
        run.advantage.kl.weight = s.kl
        run.objective = {"terms": {"policy_gradient": loss, "value": 0.5}}
        critic = {"of": "policy"} if s.adapter else {"init_from": judge}
        run.roles = {**roles, "critic": {**critic, "num_labels": 1}}
        run.optimizer.groups = {
            "policy": {"match": "policy/.*", "delay_steps": s.delay},
            "critic": {"match": "critic/.*", "learning_rate": s.rates["critic"]},
        }
        return run

    def reference(self, model: str) -> dict[str, Any]:
        """What a policy is held to: the one that it began as."""
        return {"of": "policy", "adapter": False} if self.config.study.adapter else {"init_from": model}


def _ask(config: ConfigDict, response: str, flipped: str = FLIPPED) -> None:
    """Sets prompts, each with the answer in a column of the preferences."""
    config.data.update(path=f"{TASK}/{flipped}/subtle", format="prompt_response")
    config.data.fields = {"response": response}


def _compare(config: ConfigDict, pairs: int) -> None:
    """Sets pairs of answers; what is held out are others, whose labels are right."""
    config.data.update(path=f"{TASK}/{FLIPPED}/subtle", eval_path=f"{TASK}/0/subtle", format="auto", max_records=pairs)
    config.data.fields = {}


def _leave_shape(config: ConfigDict, overrides=()) -> None:
    """Leaves the architecture to the model that a run begins with."""
    defaults = config_lib.defaults()["model"]
    fields = MODEL.keys() | base.DEBUG_MODEL.keys()
    config.model.update({name: defaults[name] for name in fields if f"model.{name}" not in overrides})
