"""Pretraining: next-token prediction on plain text, by default the English inside Python's standard library.

    python -m research.main --config=experiments/pretrain.py
    python -m research.main --config=experiments/pretrain.py --config.data.path=my_texts.jsonl
    python -m research.main --config=experiments/pretrain.py:moe    # a mixture of 8 experts, 2 for each token

    understudy sweep --config=experiments/pretrain.py --workdir=runs/sweeps/pretrain

Cost: 4:40 on 2 CPU cores (4.2 M parameters, 1.0 M tokens). Expect: held-out bits per byte from 3.75 to about 2.03.
"""

from experiments import base

finish = base.finish


def get_config(arg: str = ""):
    chosen = base.variants(arg, "moe")
    config = base.get_config()
    config.steps = 500
    config.batch_size = 8
    config.seq_len = 256
    config.objective = {"terms": {"next_token": 1.0}, "next_token": {"z_loss": 0.0, "label_smoothing": 0.0}}
    config.data.path = "builtin:python_docs"
    config.tokenizer.kind = "bpe"
    config.tokenizer.vocab_size = 4096
    config.model.update(num_layers=4, d_model=256, num_heads=8, num_kv_heads=4, d_ff=768)
    config.optimizer.update(name="muon", learning_rate=3e-3, warmup_steps=50, schedule="cosine", weight_decay=0.1)
    config.eval.update(every=250, batches=20)
    config.checkpoint.update(every=250, best_metric="eval/loss")
    if "moe" in chosen:
        config.steps, config.seq_len = 300, 128
        config.objective.terms.update(load_balance=0.03, router_z=0.001)
        config.model.update(num_layers=2, d_model=128, d_ff=256, num_experts=8, experts_per_token=2)
    return base.debug(config) if "debug" in chosen else config


def sweep(add):
    for name in ("muon", "adamw"):
        for learning_rate in (1e-3, 3e-3):
            add({"optimizer.name": name, "optimizer.learning_rate": learning_rate})
