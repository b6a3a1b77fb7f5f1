"""What may differ when a run goes on: for each field of a config what becomes of a change, and the same for its data.

A change either has its effect from the step at which the run goes on, and is said, or it is refused. `FIELDS` is the
whole table; docs/configs.md shows it.
"""

import dataclasses
import enum
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from research import config as config_lib
from research.config import Config
from research.errors import InputError
from research.ops import quantized

RECORD = "config.json"  # in a workdir: what it ran with
_SHOWN = 6  # a message lists at most so many changes


class Effect(enum.Enum):
    """What becomes of a changed field when a run goes on; in docs/configs.md, under these values.

    SAID: it takes effect from that step, and is said. HOW: the same, but results stay as they are up to rounding. DATA:
    it is said where the rows stay as they are, and refused where they don't. FREE: it says nothing of the result, and
    nothing is said.
    """

    SAID = "takes effect"
    HOW = "same result"
    DATA = "same rows only"
    REFUSED = "refused"
    FREE = "free"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of a change.

    Attributes:
      effect: of most changes.
      why: it is refused, as a clause that follows a colon.
      switch: a change from 0 to another number, or back, is refused.
      apart: a change to or from one of these values is refused.
    """

    effect: Effect
    why: str = ""
    switch: bool = False
    apart: tuple[str, ...] = ()

    def text(self) -> str:
        """For a table."""
        refused = ("0",) if self.switch else self.apart
        return f"{self.effect.value}; to or from {' or '.join(refused)} refused" if refused else self.effect.value


@dataclasses.dataclass(frozen=True)
class Change:
    """A field that differs; None stands for one that isn't there."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.before!r} -> {self.now!r}"

    def rule(self) -> Rule:
        """What becomes of it."""
        rule = rule_of(self.field)
        known = None not in (self.before, self.now)  # else it is inherited, and the checkpoint says whether it fits
        switched = rule.switch and known and bool(self.before) != bool(self.now)
        apart = self.before in rule.apart or self.now in rule.apart
        return dataclasses.replace(rule, effect=Effect.REFUSED) if switched or apart else rule


def _rules(rule: Rule, section: str, names: str) -> dict[str, Rule]:
    return {f"{section}.{name}" if section else name: rule for name in names.split()}


_SAID, _HOW, _DATA, _FREE = (Rule(effect) for effect in (Effect.SAID, Effect.HOW, Effect.DATA, Effect.FREE))
_MODEL = Rule(Effect.REFUSED, "the parameters are those of the model that they were trained as")
_START = Rule(Effect.REFUSED, "it is used where a run begins, and would have no effect")
_SEED = Rule(Effect.REFUSED, "the parameters began with it, and it orders the data")
_ROWS = Rule(Effect.REFUSED, "rows would be laid out anew, and the place in the data would be another")
_TOKENIZER = Rule(Effect.REFUSED, "the parameters are of the tokens that the run began with")
_TRAINED = Rule(Effect.REFUSED, "the checkpoint holds what was trained, and its optimizer's state")
_ROLLOUT = Rule(
    Effect.REFUSED, "the checkpoint holds the answers of a rollout, some of which may not be trained on yet"
)
_STATE = Rule(Effect.REFUSED, "the optimizer's state in the checkpoint is of another kind")
_AVERAGE = Rule(Effect.SAID, "the checkpoint has a moving average, or has none", switch=True)
_HELD = Rule(Effect.SAID, "what is trained was trained beside the kernels as they were held", apart=quantized.KINDS)
_SWITCH = Rule(Effect.SAID, "the optimizer's state in the checkpoint is of another kind", switch=True)

FIELDS: dict[str, Rule] = {
    **_rules(_SAID, "", "steps epochs batch_size roles objective"),
    "frozen_dtype": _HELD,
    **_rules(_HOW, "", "microbatches rules"),
    **_rules(_FREE, "", "max_bad_steps stall_seconds compilation_cache"),
    "seed": _SEED,
    "seq_len": _ROWS,
    "trainable": _TRAINED,
    "adapter": _TRAINED,
    "trained_dtype": _TRAINED,
    "ema_decay": _AVERAGE,
    **_rules(_HOW, "mesh", "data fsdp expert sequence tensor"),
    **_rules(
        _MODEL,
        "model",
        "vocab_size num_layers d_model num_heads num_kv_heads head_dim d_ff mlp num_experts experts_per_token "
        "normalize_router block norm norm_offset positions rotary_dim causal attention_bias attention_out_bias "
        "mlp_bias head_bias qk_norm tie_embeddings embed_scale embed_norm token_types head_transform num_labels "
        "added_rows added_from",
    ),
    **_rules(
        _SAID,
        "model",
        "norm_eps rope_theta local_rope_theta max_length prefix sliding_window attention_scale "
        "attention_scale_by_layer attention_softcap logit_softcap dtype precision",
    ),
    **_rules(
        _SAID,
        "model.rope_scaling",
        "kind factor original_length attention_factor low_freq_factor high_freq_factor beta_fast beta_slow truncate "
        "short_factors long_factors",
    ),
    **_rules(_HOW, "model", "remat attention"),
    **_rules(_START, "model", "init_from init_std new_rows"),
    "roles.NAME.of": _MODEL,
    "roles.NAME.adapter": _MODEL,
    "roles.NAME.sync_every": Rule(Effect.SAID, "the checkpoint has the parameters of a role that follows", switch=True),
    "roles.NAME.sync_weight": _SAID,
    **_rules(_TOKENIZER, "tokenizer", "kind vocab_size eos_token added_tokens"),
    **_rules(
        _DATA,
        "data",
        "path sources eval_path eval_fraction format fields template pack shuffle on_bad_record on_long labels "
        "num_classes prompt examples max_records select annotations weights streaming buffer eval_records",
    ),
    "data.cache_dir": _FREE,
    **_rules(
        _SAID,
        "rollout",
        "share epochs filter_rounds truncated max_new_tokens temperature top_k top_p min_p slots engine staleness",
    ),
    **_rules(_ROLLOUT, "rollout", "prompts answers pairs shared_prompts ahead"),
    **_rules(_FREE, "rollout", "servers in_flight answer_seconds outage_seconds transfer"),
    **_rules(_SAID, "", "rewards"),
    **_rules(_SAID, "advantage.kl", "weight estimator clip target horizon"),
    **_rules(_SAID, "advantage", "kind scale whiten combine clip epsilon decay gamma lam"),
    **_rules(_STATE, "optimizer", "name scale_by_parameter factor_min_size mu_dtype moments groups"),
    **_rules(_SWITCH, "optimizer", "weight_decay clip_norm"),
    **_rules(
        _SAID,
        "optimizer",
        "learning_rate schedule delay_steps warmup_steps warmup_share start_ratio end_ratio decay_fraction decay_shape "
        "timescale cycles b1 b2 eps momentum nesterov muon_scaling rounding",
    ),
    **_rules(_FREE, "checkpoint", "every keep_last patience"),
    **_rules(_SAID, "checkpoint", "best_metric best_mode"),
    **_rules(_SAID, "eval", "every batches generate max_new_tokens sets tasks"),
    "eval.show": _FREE,
    **_rules(_FREE, "log", "every tensorboard wandb diagnose"),
    "plan.prices": _FREE,
}


def rule_of(field: str) -> Rule:
    """What becomes of a change of a field, or of what is in a mapping that has a rule.

    A role is as the policy, and what a group of the optimizer sets is as what all parameters have.

    Raises:
      KeyError: there is no rule.
    """
    parts = field.split(".")
    if parts[0] == "roles" and len(parts) > 2:
        own = f"roles.NAME.{parts[2]}" in FIELDS
        parts = ["roles", "NAME", parts[2]] if own else ["model", *parts[2:]]
    if parts[:2] == ["optimizer", "groups"] and ".".join(["optimizer", *parts[3:]]) in FIELDS:
        parts = ["optimizer", *parts[3:]]
    for size in range(len(parts), 0, -1):
        if rule := FIELDS.get(".".join(parts[:size])):
            return rule
    raise KeyError(field)


def changes(before: Config, now: Config) -> list[Change]:
    """The fields that differ, but for those that are free."""
    plain = [json.loads(json.dumps(config_lib.to_dict(config))) for config in (before, now)]
    differences = (Change(*each) for each in _differences(*plain, ""))
    return [change for change in differences if change.rule().effect != Effect.FREE]


def _differences(before: Any, now: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            if key in before and key in now:
                yield from _differences(before[key], now[key], f"{name}.{key}")
            else:
                yield f"{name}.{key}"[1:], before.get(key), now.get(key)
    elif before != now:
        yield name[1:], before, now


def check_steps(workdir: str, step: int, config: Config) -> None:
    """Raises InputError where a run has taken more steps than it is to take."""
    if step > config.steps:
        raise InputError(
            f"steps = {config.steps}: {workdir} has a checkpoint of step {step} already. Raise steps above {step} to "
            "go on from it, or name another --workdir."
        )


def is_finished(workdir: str, step: int, before: Config, now: Config) -> bool:
    """Whether the last step is taken, and nothing is left to do.

    Raises:
      InputError: it is, and the config isn't what it was taken with.
    """
    if step < now.steps:
        return False
    if unmet := [change for change in changes(before, now) if change.rule().effect != Effect.HOW]:
        raise InputError(
            f"{workdir}: is finished at step {step}, so that {_names(unmet)} would have no effect. Raise steps, or "
            "name another --workdir."
        )
    return True


def check(workdir: str, before: Config, now: Config) -> list[Change]:
    """What differs where a run goes on, to be said.

    Raises:
      InputError: a change can't be honoured; the message names it.
    """
    differences = changes(before, now)
    _check_rewards(workdir, before, now)
    refused = [change for change in differences if change.rule().effect == Effect.REFUSED]
    if refused:
        reasons = dict.fromkeys(change.rule().why for change in refused)
        raise InputError(
            f"{_names(refused)}: can't change in {workdir}, where the run goes on: {'; '.join(reasons)}. Set what the "
            f"run began with, or {_remedy(workdir)}"
        )
    return differences


def _check_rewards(workdir: str, before: Config, now: Config) -> None:
    """Raises InputError where a run's batches would no longer be, or become, the answers of its checkpoint."""
    kl, was = now.advantage.kl, before.advantage.kl
    if kl.target and was.target and kl.weight != was.weight:
        raise InputError(
            f"advantage.kl.weight = {was.weight} -> {kl.weight}: can't change in {workdir}, where the run goes on: it "
            "is where the controller begins, which goes on with its own. Set what the run began with, or change "
            "advantage.kl.target."
        )
    what = ""
    if bool(before.rewards) != bool(now.rewards):
        what = f"rewards = {dict(before.rewards)} -> {dict(now.rewards)}"
    elif now.rewards and before.batch_size != now.batch_size:
        what = f"batch_size = {before.batch_size} -> {now.batch_size}"
    elif now.rewards and before.rollout.temperature != now.rollout.temperature:
        what = f"rollout.temperature = {before.rollout.temperature} -> {now.rollout.temperature}"
    if what:
        raise InputError(
            f"{what}: can't change in {workdir}, where the run goes on: with rewards {_ROLLOUT.why}. Set what the run "
            f"began with, or {_remedy(workdir)}"
        )


def task_changes(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[Change]:
    """The tasks of `eval.tasks` whose records are others than they were, under the same name.

    Args:
      before: task -> evals.tasks.identity of when the run was last started; None of a run that didn't keep it.
      now: the same as it is now.
    """
    differences = []
    for name, task in now.items():
        old = (before or {}).get(name, task)
        if old != task:
            other = "" if old["records"] != task["records"] else ", but others"
            counts = f"{old['records']:,} records", f"{task['records']:,} records{other}"
            differences.append(Change(f"eval.tasks.{name}", *counts))
    return differences


def measures_anew(differences: Sequence[Change]) -> bool:
    """Whether evaluations may give other metrics than before."""
    return any(change.field.startswith(("eval.", "checkpoint.best_")) for change in differences)


def check_data(workdir: str, before: Mapping[str, Any] | None, now: Mapping[str, Any], found: Sequence[Change]) -> None:
    """Refuses data that isn't what the run began with.

    Args:
      workdir: of the run.
      before: sources.identity.identity of the data that it began with; None of a run that is from before this was kept.
      now: the same of the data that it would go on with.
      found: the fields that differ.

    Raises:
      InputError: they differ, or can't be compared and the config's data differs; the message says in what.
    """
    fields = [change for change in found if change.rule().effect == Effect.DATA]
    now = json.loads(json.dumps(now))
    if before is None and not fields:
        return
    if before is None:
        raise InputError(
            f"{_names(fields)}: this run is from before runs kept what their data was made of, and whether it would "
            f"stay the same can't be known. Set what it began with, or {_remedy(workdir)}"
        )
    if _nameless(before) == _nameless(now):
        return
    what = "; ".join(_data_differences(before, now)) or "rows are laid out in another way"
    asked = f" ({_names(fields)})" if fields else ""
    raise InputError(
        f"data: isn't what {workdir} began with{asked}: {what}. Its order and its held-out part would be others. Put "
        f"back what it began with, or {_remedy(workdir)}"
    )


def check_sources(workdir: str, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Refuses frozen roles whose parameters aren't those that the run began with, under the name that they had.

    Args:
      workdir: of the run.
      before: role -> loading.identity of what it was read from; None of a run that is from before this was kept.
      now: the same as it is now.

    Raises:
      InputError: one differs.
    """
    for role, source in now.items():
        old = (before or {}).get(role)
        if old is None or old == source:
            continue
        what = f"it was at step {old['step']}, and is at {source['step']}" if old["step"] != source["step"] else ""
        field = "model.init_from" if role == "policy" else f"roles.{role}.init_from"
        raise InputError(
            f"{field}: has other parameters under this name than when {workdir} began"
            f"{f' ({what})' if what else ''}, and nothing of the role is trained. Put back what it was, or "
            f"{_remedy(workdir)}"
        )


def _nameless(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What data is made of, wherever it lies."""
    parts = {part: [{**source, "name": ""} for source in identity[part]] for part in ("sources", "evaluated")}
    return {**identity, **parts}


def _data_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for part, use in (("sources", ""), ("evaluated", " (evaluated)")):
        old, new = before[part], now[part]
        if len(old) != len(new):
            yield f"{len(old)} sources -> {len(new)}{use}"
            continue
        for a, b in zip(old, new, strict=True):
            name = a["name"] if a["name"] == b["name"] else f"{a['name']} -> {b['name']}"
            if a["records"] != b["records"]:
                yield f"{name}{use}: {a['records']:,} records -> {b['records']:,}"
            elif a["content"] != b["content"]:
                yield f"{name}{use}: {a['records']:,} records as before, but not the same tokens"
    if before["annotations"] != now["annotations"]:
        yield "other annotations"
    for part in ("rows", "held_out_rows"):
        if before[part] != now[part]:
            yield f"{before[part]:,} {part.replace('_', '-', 1).replace('_', ' ')} -> {now[part]:,}"


def _names(differences: Sequence[Change]) -> str:
    # What a run began with decides other fields, and comes first.
    ordered = sorted(differences, key=lambda change: not change.field.endswith("init_from"))
    more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return ", ".join(str(change).replace(": ", " = ", 1) for change in ordered[:_SHOWN]) + more


def _remedy(workdir: str) -> str:
    return f"start in a new --workdir, with model.init_from={workdir} to take the parameters along."
