"""Supervised fine-tuning: prompts and responses, loss on the responses; by default on generated tasks with verifiers.

    python -m research.main --config=experiments/sft.py
    python -m research.main --config=experiments/sft.py --config.data.path=my_pairs.jsonl

Cost: 1:11 on 2 CPU cores (0.9 M parameters, 0.8 M tokens). Expect: held-out exact match from 0 to above 0.95 (1.00 when
it was measured), loss from 5.9 to about 0.003.
"""

from experiments import base

finish = base.finish


def get_config(arg: str = ""):
    chosen = base.variants(arg)
    config = base.get_config()
    config.steps = 400
    config.batch_size = 8
    config.seq_len = 256
    config.objective = {"terms": {"sft": 1.0}, "sft": {"z_loss": 0.0, "label_smoothing": 0.0}}
    config.data.path = "tasks:copy,tasks:reverse,tasks:upper,tasks:sort_letters"
    config.data.examples = 8_000
    config.tokenizer.kind = "byte"
    config.model.update(num_layers=4, d_model=128, num_heads=4, num_kv_heads=4, d_ff=384)
    config.optimizer.update(name="muon", learning_rate=3e-3, warmup_steps=50, schedule="cosine", weight_decay=0.1)
    config.eval.update(every=100, batches=10, generate=128, max_new_tokens=16)
    config.checkpoint.update(every=100, best_metric="eval/loss")
    return base.debug(config) if "debug" in chosen else config
