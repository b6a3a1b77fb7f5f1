"""What TRL, transformers, PEFT, Levanter and nanoGPT call the fields of a config, for errors that answer with ours.

docs/coming-from.md has the same in tables.
"""

import difflib
from collections.abc import Iterable

_REFERENCE = "roles.reference"
_LOSS = "objective.terms.policy_gradient"
_PAIRS = "objective.terms.preference"

# Theirs -> ours; what follows a semicolon is said beside it. Where there is no such field, a sentence in brackets.
NAMES: dict[str, str] = {
    # Length of the run and size of a batch.
    "max_steps": "steps",
    "max_iters": "steps",
    "num_train_steps": "steps",
    "num_steps": "steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "lr_decay_iters": "steps; schedules end with the run",
    "per_device_train_batch_size": "batch_size; it counts the rows of a whole update, over devices and microbatches",
    "train_batch_size": "batch_size; it counts the rows of a whole update, over devices and microbatches",
    "per_device_eval_batch_size": "batch_size; evaluations take batches of the same size",
    "gradient_accumulation_steps": "microbatches; batch_size counts the rows of all of them together",
    "per_device_parallelism": "microbatches; a batch is cut into so many parts",
    "max_length": "seq_len; model.max_length is how much the model itself could read",
    "max_seq_length": "seq_len",
    "max_seq_len": "seq_len",
    "seq_length": "seq_len",
    "block_size": "seq_len",
    "model_max_length": "seq_len",
    "data_seed": "seed",
    "resume_from_checkpoint": "(The same command with the same --workdir goes on from its last checkpoint.)",
    "output_dir": "(It is the flag --workdir=DIR.)",
    "out_dir": "(It is the flag --workdir=DIR.)",
    "run_name": "(A run is known by its folder: --workdir=DIR.)",
    # Optimizer.
    "lr": "optimizer.learning_rate",
    "optim": "optimizer.name",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_schedule": "optimizer.schedule",
    "scheduler": "optimizer.schedule",
    "decay_lr": "optimizer.schedule; without decay it is 'constant'",
    "warmup": "optimizer.warmup_steps",
    "warmup_iters": "optimizer.warmup_steps",
    "warmup_ratio": "optimizer.warmup_share",
    "min_lr": "optimizer.end_ratio; as a fraction of learning_rate",
    "min_lr_ratio": "optimizer.end_ratio",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "beta1": "optimizer.b1",
    "beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.clip_norm",
    "grad_clip": "optimizer.clip_norm",
    "ema_beta": "ema_decay",
    "label_smoothing_factor": "objective.terms.sft.label_smoothing",
    # Memory, precision, devices.
    "bf16": "model.dtype; 'bfloat16', which `auto` takes on GPU and TPU. Parameters are in trained_dtype",
    "fp16": "model.dtype; 'bfloat16': there is no float16",
    "torch_dtype": "model.dtype",
    "mp": "model.dtype",
    "gradient_checkpointing": "model.remat; 'full' recomputes most, 'none' keeps all",
    "activation_checkpointing": "model.remat; 'full' recomputes most, 'none' keeps all",
    "use_gradient_checkpointing": "model.remat; 'full' recomputes most, 'none' keeps all",
    "attn_implementation": "model.attention",
    "torch_compile": "(Leave it out: every step is compiled.)",
    "compile": "(Leave it out: every step is compiled.)",
    "use_liger_kernel": "(Leave it out: no loss holds the logits of a whole batch.)",
    "fsdp": "mesh.fsdp",
    "deepspeed": "mesh.fsdp; how many devices share the parameters",
    "tensor_parallel_size": "mesh.tensor",
    "model_axis_size": "mesh.tensor",
    "use_cpu": "(It is the environment variable JAX_PLATFORMS=cpu.)",
    "dataloader_num_workers": "(Leave it out: batches are made beside the steps.)",
    "load_in_4bit": "frozen_dtype; 'nf4'",
    "load_in_8bit": "frozen_dtype; 'int8'",
    # Evaluation, checkpoints, logs.
    "logging_steps": "log.every",
    "log_interval": "log.every",
    "report_to": "log.wandb; the name of the project. log.tensorboard is on",
    "wandb_project": "log.wandb",
    "wandb_log": "log.wandb; the name of the project",
    "eval_steps": "eval.every",
    "eval_interval": "eval.every",
    "steps_per_eval": "eval.every",
    "eval_strategy": "eval.every; in steps, 0 for never",
    "eval_on_start": "eval.every; the first evaluation is before the first step",
    "eval_iters": "eval.batches",
    "max_eval_batches": "eval.batches",
    "save_steps": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "save_strategy": "checkpoint.every; in steps, 0 for the last alone",
    "save_total_limit": "checkpoint.keep_last",
    "load_best_model_at_end": "checkpoint.best_metric; such as 'eval/loss'. The best is kept beside the last",
    "metric_for_best_model": "checkpoint.best_metric; such as 'eval/loss'",
    "greater_is_better": "checkpoint.best_mode; 'max' or 'min'",
    "early_stopping_patience": "checkpoint.patience",
    "push_to_hub": "(It is a command of its own: understudy export.)",
    "hub_model_id": "(It is a command of its own: understudy export.)",
    # Model.
    "model_name_or_path": "model.init_from",
    "pretrained_model_name_or_path": "model.init_from",
    "initialize_from_hf": "model.init_from",
    "base_model": "model.init_from",
    "tokenizer_name_or_path": "tokenizer.kind",
    "n_layer": "model.num_layers",
    "num_hidden_layers": "model.num_layers",
    "n_head": "model.num_heads",
    "num_attention_heads": "model.num_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "n_embd": "model.d_model",
    "hidden_size": "model.d_model",
    "hidden_dim": "model.d_model",
    "intermediate_size": "model.d_ff",
    "intermediate_dim": "model.d_ff",
    "initializer_range": "model.init_std",
    "rms_norm_eps": "model.norm_eps",
    # Data.
    "packing": "data.pack",
    "eval_packing": "data.pack",
    "dataset": "data.path",
    "dataset_name": "data.path; 'hf:NAME'",
    "train_file": "data.path",
    "eval_dataset": "data.eval_path",
    "validation_file": "data.eval_path",
    "validation_split_percentage": "data.eval_fraction; as a fraction",
    "dataset_text_field": "data.fields; {'text': COLUMN}",
    "chat_template_path": "data.template",
    "shuffle_dataset": "data.shuffle",
    "truncation_mode": "data.on_long; 'truncate' or 'drop'",
    "completion_only_loss": "objective.terms; 'sft' learns the answers alone, 'next_token' every token",
    "assistant_only_loss": "objective.terms; 'sft' learns the assistant's turns alone, 'next_token' every token",
    "train_on_inputs": "objective.terms; 'next_token' learns every token, 'sft' the answers alone",
    # Adapters.
    "use_peft": "adapter.kind; 'lora'",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "lora_modules_to_save": "adapter.also",
    "modules_to_save": "adapter.also",
    "use_rslora": "adapter.rslora",
    "use_dora": "adapter.dora",
    "init_lora_weights": "adapter.init",
    "num_virtual_tokens": "adapter.tokens",
    # Preferences and reward models.
    "beta": f"{_PAIRS}.beta; of GRPO it is {_LOSS}.kl_coef",
    "loss_type": f"{_PAIRS}.kind; of GRPO it is {_LOSS}.kind and .aggregation",
    "loss_weights": f"{_PAIRS}; each loss is a term with a weight of its own",
    "ref_model": f"{_REFERENCE}; such as {_REFERENCE}.init_from=MODEL or {_REFERENCE}.of=policy",
    "precompute_ref_log_probs": f"{_PAIRS}.cached; with data.annotations, which understudy annotate writes",
    "sync_ref_model": f"{_REFERENCE}.sync_every",
    "ref_model_sync_steps": f"{_REFERENCE}.sync_every",
    "ref_model_mixup_alpha": f"{_REFERENCE}.sync_weight",
    "f_divergence_type": f"{_PAIRS}.divergence",
    "f_alpha_divergence_coef": f"{_PAIRS}.divergence_alpha",
    "use_weighting": f"{_PAIRS}.wpo",
    "discopop_tau": f"{_PAIRS}.tau",
    "simpo_gamma": f"{_PAIRS}.gamma",
    "rpo_alpha": f"{_PAIRS}.sft",
    "center_rewards_coefficient": "objective.terms.reward.centering",
    # Reinforcement learning and distillation.
    "num_generations": "rollout.answers",
    "max_completion_length": "rollout.max_new_tokens",
    "max_prompt_length": "seq_len; prompt and answer share it, and longer prompts are left out",
    "generation_batch_size": "rollout.prompts; prompts, and not answers",
    "steps_per_generation": "rollout.prompts; prompts answered at a time, over several updates",
    "num_iterations": "rollout.epochs",
    "num_ppo_epochs": "rollout.epochs",
    "epsilon": f"{_LOSS}.clip_low; and .clip_high",
    "epsilon_high": f"{_LOSS}.clip_high",
    "cliprange": f"{_LOSS}.clip_low; and .clip_high",
    "delta": f"{_LOSS}.dual_clip",
    "kl_coef": f"{_LOSS}.kl_coef; in the reward it is advantage.kl.weight",
    "entropy_coef": f"{_LOSS}.entropy_coef",
    "top_entropy_quantile": f"{_LOSS}.top_entropy",
    "off_policy_mask_threshold": f"{_LOSS}.off_policy_mask",
    "importance_sampling_level": f"{_LOSS}.kind; of a sequence 'gspo'",
    "vllm_importance_sampling_mode": f"{_LOSS}.correction",
    "scale_rewards": "advantage.scale",
    "multi_objective_aggregation": "advantage.combine",
    "mask_truncated_completions": "rollout.truncated; 'mask'",
    "reward_funcs": "rewards; such as rewards.exact_match=1.0",
    "reward_model_path": "rewards.reward_model; with a role of its own",
    "reward_weights": "rewards; such as rewards.exact_match=0.5",
    "use_vllm": "rollout.engine; 'vllm'",
    "vllm_server_base_url": "rollout.servers",
    "vf_coef": "objective.terms.value",
    "cliprange_value": "objective.terms.value.clip",
    "lmbda": "rollout.share",
    "teacher_model_name_or_path": "roles.teacher.init_from",
    "class_weights": "objective.terms.classify.class_weights",
}


def answer(name: str) -> str:
    """Returns " Here it is X." for what another library calls a field; "" for what none does."""
    ours, _, remark = NAMES.get(name, "").partition("; ")
    if ours.startswith("("):
        return f" {ours[1:-1]}"
    return f" Here it is {ours}{f' ({remark})' if remark else ''}." if ours else ""


def hint(field: str, known: Iterable[str]) -> str:
    """What a field that isn't there may have meant: another library's word, or the nearest of ours.

    Args:
      field: as given, such as "optimizer.lr".
      known: all dotted names of fields.
    """
    known, last = list(known), field.rpartition(".")[2]
    if there := answer(last):
        return there
    section = field.rpartition(".")[0]
    own = [name for name in known if section and name.rpartition(".")[0] == section]
    if close := difflib.get_close_matches(field, own, n=1, cutoff=0.9):
        return f" Did you mean {close[0]!r}?"
    if same := [name for name in known if name.rpartition(".")[2] == last]:
        return f" Did you mean {_listed(same)}?"
    scores = {name: _similarity(field, name) for name in known}
    nearest = max(scores, key=lambda name: scores[name], default="")
    return f" Did you mean {nearest!r}?" if nearest and scores[nearest] > 0.7 else ""


def _similarity(field: str, name: str) -> float:
    """Of two dotted names: that of the whole, or a little less than that of their last parts."""
    whole = difflib.SequenceMatcher(None, field, name).ratio()
    lasts = difflib.SequenceMatcher(None, field.rpartition(".")[2], name.rpartition(".")[2]).ratio()
    return max(whole, 0.95 * lasts)


def _listed(names: list[str]) -> str:
    quoted = [repr(name) for name in names[:4]]
    return " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
