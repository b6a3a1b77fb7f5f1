"""Fine-tuning at full size on a pod, to train, or to plan before the bill (understudy plan).

    python -m research.main --config=experiments/large.py:8b --config.model.init_from=MODEL \\
        --config.data.path=chats.jsonl
    understudy plan --config=experiments/large.py:70b --topology=v5p:8x8x8

SFT of the shapes of Llama 3 8B (the default) and 70B (:70b; arXiv:2407.21783, table 3) and of Mixtral 8x7B (:mixtral;
arXiv:2401.04088, table 1), and the distillation of a student of Llama 3.2 1B's shape from an 8B teacher (:distill).
Packed rows of 4096 tokens, 4 a chip where there are 256. Without model.init_from it trains a new model.

Cost and fit: see the table of plans in docs/scale.md.
"""

from experiments import base

finish = base.finish

LLAMA = {"mlp": "swiglu", "norm_eps": 1e-5, "rope_theta": 500_000.0, "max_length": 8192, "vocab_size": 128_256}
LLAMA |= {"num_heads": 32, "num_kv_heads": 8, "tie_embeddings": False}
SHAPES = {
    "1b": LLAMA | {"num_layers": 16, "d_model": 2048, "d_ff": 8192, "tie_embeddings": True},
    "8b": LLAMA | {"num_layers": 32, "d_model": 4096, "d_ff": 14_336},
    "70b": LLAMA | {"num_layers": 80, "d_model": 8192, "num_heads": 64, "d_ff": 28_672},
    "mixtral": LLAMA
    | {"num_layers": 32, "d_model": 4096, "d_ff": 14_336, "num_experts": 8, "experts_per_token": 2}
    | {"vocab_size": 32_000, "rope_theta": 1e6},
}


def get_config(arg: str = ""):
    chosen = base.variants(arg, "8b", "70b", "mixtral", "distill")
    config = base.get_config()
    config.steps = 1000
    config.batch_size = 256
    config.seq_len = 4096
    config.objective = {"terms": {"sft": 1.0}}
    config.data.path = "tasks:copy,tasks:reverse,tasks:upper,tasks:sort_letters"
    config.mesh.update(data=1, fsdp=-1)
    size = next((name for name in ("70b", "mixtral") if name in chosen), "1b" if "distill" in chosen else "8b")
    config.model.update(SHAPES[size], remat="full")
    config.optimizer.update(name="adamw", learning_rate=1e-5, warmup_steps=50, schedule="cosine", weight_decay=0.0)
    config.eval.update(every=200, batches=10)
    config.checkpoint.update(every=200, keep_last=2)
    if "distill" in chosen:
        config.objective = {"terms": {"distill": 1.0}, "distill": {"kind": "forward_kl"}}
        config.roles = {"teacher": SHAPES["8b"] | {"init_from": "", "remat": "full"}}
    if "mixtral" in chosen:
        config.mesh.expert = 8
    if "70b" in chosen:
        config.mesh.tensor = 2
    if "debug" in chosen:
        config.model.update(vocab_size=0, num_experts=min(config.model.num_experts, 2), max_length=256)
        config.mesh.update(expert=1, tensor=1)
        return base.debug(config)
    return config
