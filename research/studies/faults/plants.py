"""The faults of the study: how each is planted, in which kinds of runs, and which are not."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from research.diagnosis.subject import Subject
from research.studies.faults import changes, failing, losses
from research.studies.faults.changes import ChangeBatch, ChangeParts, Exploding

FAILING = f"{failing.__file__}:judge"


@dataclasses.dataclass(frozen=True)
class Plant:
    """A fault that is put into a run.

    Attributes:
      cause: the name of the cause that a diagnosis is to find.
      setups: the kinds of runs that it is planted in.
      values: fields of the config; in strings {data} is the folder of the data, and {NAME} the start of that name.
      parts: changes the run's programs.
      batch: (tokenizer) -> changes the batches to train on.
      subject: changes what the run begins with.
      name: of the plant, where a cause has several; "" is the cause's.
    """

    cause: str
    setups: tuple[str, ...]
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: ChangeParts | None = None
    batch: Callable[[Any], ChangeBatch] | None = None
    subject: Callable[[Subject], Subject] | None = None
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or self.cause


def _batch(change: ChangeBatch) -> Callable[[Any], ChangeBatch]:
    return lambda tokenizer: change


def _policy(change: Callable[[Any], Any]) -> Callable[[Subject], Subject]:
    return lambda subject: changes.begun(subject, change)


_SGD = {
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.3,
    "optimizer.momentum": 0.0,
    "optimizer.nesterov": False,
    "optimizer.weight_decay": 0.0,
}

# Those of which signatures were measured with another program; see docs/planted_faults.md.
SIGNED: tuple[Plant, ...] = (
    Plant("lr_zero_schedule", ("text", "sft"), {"optimizer.learning_rate": 0.0}),
    Plant("warmup_longer_than_run", ("text", "sft"), {"steps": 100_000, "optimizer.warmup_steps": 100_000}),
    Plant("lr_too_small", ("text", "lora"), {"optimizer.learning_rate": 1e-7}),
    Plant("lr_too_high", ("text", "sft"), {"optimizer.learning_rate": 0.3}),
    Plant("frozen_all", ("text", "sft"), {"optimizer.weight_decay": 0.0}, changes.of_kind(changes.Unreached)),
    Plant("optimizer_holds_stale_params", ("text", "lora"), parts=changes.stale),
    Plant("only_norms_trainable", ("text", "sft"), {"trainable": ".*norm/.*"}),
    Plant("all_labels_masked", ("sft", "lora"), batch=_batch(changes.masked)),
    Plant("almost_all_labels_masked", ("sft", "lora"), batch=_batch(changes.mostly_masked)),
    Plant("label_shift_double", ("text", "sft"), parts=losses.targets_at(2)),
    Plant("label_no_shift", ("text", "sft"), parts=losses.targets_at(0)),
    Plant(
        "grad_not_zeroed",
        ("text", "sft"),
        parts=changes.of_kind(changes.Accumulating),
        subject=changes.with_sums,
    ),
    Plant("clip_too_small_sgd", ("text", "sft"), {**_SGD, "optimizer.clip_norm": 1e-4}),
    Plant("bf16_underflow", ("text", "sft"), {"optimizer.learning_rate": 2e-5}, subject=_policy(changes.in_bfloat16)),
    Plant("adam_eps_too_big", ("text", "sft"), {"optimizer.eps": 1.0}),
    Plant("weight_decay_too_big", ("text", "sft"), {"optimizer.weight_decay": 100.0}),
    Plant("sorted_data_order", ("text",), {"data.path": "{data}/sorted.jsonl", "data.shuffle": False}),
    Plant("same_batch_every_step", ("text", "sft"), batch=lambda tokenizer: changes.always_the_first()),
    Plant("contradictory_duplicates", ("sft", "lora"), {"data.path": "{data}/conflicts.jsonl"}),
    Plant("random_labels", ("text",), parts=losses.chance_targets),
    Plant("dropout_too_high", ("text", "sft"), parts=changes.with_hidden(changes.dropping(0.7), training_only=True)),
    Plant("saturated_attention", ("text", "sft"), subject=_policy(changes.saturated)),
    Plant("dead_mlp_zero_init_both", ("text", "sft"), subject=_policy(changes.dead_mlp)),
    Plant("lora_both_zero", ("lora",), subject=_policy(changes.both_zero)),
    Plant("tokenizer_mismatch", ("text", "sft"), {"tokenizer.kind": "{data}/permuted"}),
    Plant("no_causal_mask", ("text", "sft"), parts=changes.with_hidden(changes.not_causal)),
    Plant("nan_batches_skipped", ("sft", "lora"), batch=_batch(changes.infinite)),
    Plant("one_exploding_batch", ("text", "sft"), {**_SGD, "optimizer.clip_norm": 0.0}, changes.of_kind(Exploding)),
    Plant(
        "teacher_worse_than_student",
        ("distill",),
        {
            "model.init_from": "{teacher}",
            "roles": {"teacher": {"init_from": "{weak}"}},
            "objective": {"terms": {"distill": {"kind": "forward_kl"}}},
        },
    ),
    Plant("loss_divided_twice", ("text", "sft"), _SGD, losses.scaled(1e-3)),
)


def _preference(**options: Any) -> dict[str, Any]:
    return {"objective": {"terms": {"preference": {"kind": "sigmoid", "beta": 0.1, **options}}}}


def _distill(weight: float = 0.5, **options: Any) -> dict[str, Any]:
    terms = {"distill": {"weight": weight, "kind": "forward_kl", **options}, "sft": 1 - weight}
    return {"objective": {"terms": terms}}


def _groups(**rates: float) -> dict[str, Any]:
    matches = {"layers": "policy/layers/.*", "b": "policy/.*lora/b", "critic": "critic/.*", "policy": "policy/.*"}
    return {"optimizer.groups": {name: {"match": matches[name], "learning_rate": rates[name]} for name in rates}}


OTHERS: tuple[Plant, ...] = (
    Plant("duplicate_records", ("sft",), {"data.path": "{data}/duplicates.jsonl"}),
    Plant("constant_targets", ("sft",), {"data.path": "{data}/constant.jsonl"}),
    Plant("empty_answers", ("sft",), {"data.path": "{data}/empty.jsonl"}),
    Plant("answers_cut", ("sft",), {"data.path": "{data}/long.jsonl", "data.on_long": "truncate"}),
    Plant("records_dropped", ("sft",), {"data.path": "{data}/long.jsonl"}),
    Plant("overfitting", ("sft",), {"data.path": "{data}/few.jsonl", "optimizer.learning_rate": 5e-3}),
    Plant("answers_of_other_prompts", ("sft",), {"data.path": "{data}/shuffled.jsonl"}),
    Plant("empty_batches", ("sft",), batch=_batch(changes.sometimes_masked)),
    Plant("document_leak", ("sft",), parts=changes.with_hidden(changes.across_documents)),
    Plant("positions_ignored", ("text",), parts=changes.with_hidden(changes.without_positions)),
    Plant("prompt_trained", ("sft",), {"objective": {"terms": {"next_token": 1.0}}}),
    Plant("end_not_supervised", ("sft",), batch=lambda tokenizer: changes.without_ends(tokenizer.stop)),
    Plant("padding_trained", ("sft",), {"data.pack": False}, losses.padding_too),
    Plant("ids_beyond_vocabulary", ("text",), batch=_batch(changes.beyond)),
    Plant("double_bos", ("sft",), batch=lambda tokenizer: changes.twice_begun(tokenizer.bos)),
    Plant("lossy_tokenizer", ("sft",), {"tokenizer.kind": "{data}/lower"}),
    Plant("untrained_tokens", ("sft",), subject=_policy(changes.new_rows)),
    Plant("rate_zero_most_steps", ("text",), {"optimizer.delay_steps": 50}),
    Plant("gradient_ascent", ("text",), parts=changes.of_kind(changes.Ascending)),
    Plant("loss_too_large", ("text",), parts=losses.scaled(1e3)),
    Plant("moments_lost", ("text",), parts=changes.of_kind(changes.Forgetful)),
    Plant("idle_group", ("text",), _groups(layers=0.0)),
    Plant("adapter_stays_zero", ("lora",), _groups(b=0.0)),
    Plant("adapter_scale_tiny", ("lora",), {"adapter": {"kind": "lora", "rank": 8, "alpha": 1e-3}}),
    Plant("some_batches_not_finite", ("sft",), batch=_batch(changes.sometimes_infinite)),
    Plant("softcap_too_small", ("text",), {"model.logit_softcap": 1.0}),
    Plant("weights_not_loaded", ("text",), subject=_policy(changes.drawn_anew(False))),
    Plant("weights_partly_loaded", ("text",), subject=_policy(changes.drawn_anew(True))),
    Plant("wrong_rope_base", ("text",), {"model.rope_theta": 20.0}),
    Plant("rope_base_misread", ("text",), parts=changes.with_hidden(changes.other_base)),
    Plant("init_too_large", ("scratch",), {"model.init_std": 0.5}),
    Plant("init_all_zero", ("scratch",), {"model.init_std": 0.0}),
    Plant(
        "dead_units", ("scratch",), {"model.mlp": "relu", "model.mlp_bias": True}, subject=_policy(changes.dead_units)
    ),
    Plant(
        "router_collapse",
        ("scratch",),
        {"model.num_experts": 4, "model.experts_per_token": 1},
        subject=_policy(changes.same_router),
    ),
    Plant("teacher_reads_other_tokens", ("distill",), subject=changes.teacher_of_other_tokens),
    Plant("teacher_is_student", ("distill",), {"roles": {"teacher": {"init_from": "{tasks}"}}}),
    Plant("teacher_without_weight", ("distill",), _distill(0.001)),
    Plant("temperature_squared_missing", ("distill",), _distill(temperature=4.0)),
    Plant("temperature_too_high", ("distill",), _distill(temperature=100.0, scale_by_temperature=True)),
    Plant("chosen_is_rejected", ("preference", "reward"), {"data.path": "{data}/same.jsonl"}),
    Plant("wrong_reference", ("preference",), {"roles": {"reference": {"init_from": "{tasks}"}}}),
    Plant("likelihood_displacement", ("preference",), {"optimizer.learning_rate": 2e-3}),
    Plant(
        "preferences_without_signal",
        ("preference",),
        {"data.path": "{data}/chance.jsonl", "optimizer.learning_rate": 3e-4},
    ),
    Plant("preferences_without_signal", ("reward",), {"data.path": "{data}/chance.jsonl"}),
    Plant("beta_too_small", ("preference",), _preference(beta=1e-4)),
    Plant("beta_too_large", ("preference",), _preference(beta=30.0)),
    Plant("reward_reads_length", ("reward",), {"data.path": "{data}/longer.jsonl"}),
    Plant("reward_reads_shortness", ("reward",), {"data.path": "{data}/shorter.jsonl"}),
    Plant("reward_fails", ("rl",), {"rewards": {"failing": {"reward": FAILING}}}),
    Plant("verifier_never_fires", ("rl",), {"data.path": "{data}/never.jsonl", "data.eval_path": ""}),
    Plant("reward_always_fires", ("rl",), {"rewards": {"regex": {"pattern": "(?s).*"}}}),
    Plant("groups_without_variance", ("rl",), {"rollout.temperature": 0.02}),
    Plant("answers_cut_off", ("rl",), {"rollout.max_new_tokens": 3}),
    Plant("entropy_collapse", ("rl",), {"optimizer.learning_rate": 1e-3}, losses.entropy_lowered(1.0)),
    Plant("critic_useless", ("critic",), _groups(policy=3e-4, critic=1e-6)),
    Plant(
        "kl_too_strong",
        ("rl",),
        {
            "objective": {"terms": {"policy_gradient": {"kind": "ppo", "kl": "k3", "kl_coef": 10.0}}},
            "roles": {"reference": {"init_from": "{weak}"}},
        },
    ),
    Plant("evaluation_too_small", ("sft",), {"data.eval_path": "{data}/tiny_eval.jsonl"}),
    Plant("average_lags", ("text",), {"ema_decay": 0.99999}),
    Plant("evaluation_seen_in_training", ("sft",), {"data.eval_path": "{data}/near_eval.jsonl"}),
    Plant("evaluation_of_other_data", ("text",), {"data.eval_path": "{data}/other.jsonl"}),
)

PLANTS = (*SIGNED, *OTHERS)

# Causes that the study plants nowhere, and why.
UNPLANTED: dict[str, str] = {
    "rate_above_range": "is seen before a run; lr_too_high is planted",
    "rate_below_range": "is seen before a run; lr_too_small is planted",
    "batch_not_learned": "is seen before a run; frozen_all is planted",
    "unknown_tokens": "the tokenizers of the study know every byte",
    "adapter_matched_nothing": "a run refuses such a config before it begins",
    "sampler_gap": "the only engine of the study is the trainer's own model",
}
