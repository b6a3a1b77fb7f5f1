"""Supervised fine-tuning of a model that exists: name it, and the data.

    python -m research.main --config=experiments/finetune.py \\
        --config.model.init_from=NAME --config.data.path=pairs.jsonl

NAME is a Hugging Face folder or hub name, a .gguf file, or the workdir of a run. Prompts are put to the model by its
own chat template; the loss is on the answers. SmolLM2-135M-Instruct, 100 steps of 8 x 128 tokens of two-digit sums,
2 CPU cores: 9 minutes of steps and 3 of evaluation; held-out loss 2.96 to 0.70, exact match of 112 answers 0 to 0.33
(--config.seq_len=128 --config.optimizer.learning_rate=2e-4).
"""

from experiments import base
from research.errors import InputError


def get_config(arg: str = ""):
    chosen = base.variants(arg)
    config = base.get_config()
    config.steps = 100
    config.batch_size = 8
    config.seq_len = 256
    config.objective = {"terms": {"sft": 1.0}, "sft": {"z_loss": 0.0, "label_smoothing": 0.0}}
    config.data.path = "tasks:copy,tasks:reverse,tasks:upper,tasks:sort_letters"
    config.data.examples = 2_000
    config.model.init_from = ""  # what to start from
    config.optimizer.update(name="adamw", learning_rate=5e-5, warmup_steps=10, schedule="cosine", weight_decay=0.0)
    config.eval.update(every=50, batches=10, generate=64, max_new_tokens=64)
    config.checkpoint.update(every=50, best_metric="eval/loss")
    return base.debug(config) if "debug" in chosen else config


def finish(config, arg, overrides):
    base.finish(config, arg, overrides)
    if not config.model.init_from:
        raise InputError("--config.model.init_from: is missing. Name the model to start from.")
