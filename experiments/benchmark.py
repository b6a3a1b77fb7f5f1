"""What understudy benchmark measures: shapes to compare by, which train on the built-in text as well.

    understudy benchmark --config=experiments/benchmark.py:small
    understudy benchmark --config=experiments/benchmark.py:small --only=train,decode --against=hf
    understudy benchmark --config=experiments/benchmark.py:small,lora --only=train --against=peft,peft_compile
    understudy benchmark --config=experiments/benchmark.py:small,dpo --only=train --against=trl
    understudy benchmark --config=experiments/benchmark.py:small,grpo --only=train --against=trl
    understudy benchmark --config=experiments/benchmark.py:smol --only=train --config.batch_size=8
    understudy benchmark --config=experiments/benchmark.py:1b --only=train,decode --decode_batch=64 --steps=20
    python -m research.main --config=experiments/benchmark.py:small

`small` (the default): Llama-shaped, 6.82 M parameters, 8 x 256 tokens. `smol` and `360m`: the shapes of SmolLM2-135M
and SmolLM2-360M (V 49152, tied; arXiv:2502.02737), 2 x 256 tokens. `1b`: a Llama of 1.24 B parameters (the shape of
Llama 3.2 1B), 8 x 4096 tokens for one GPU of 80 GB. AdamW, gradients clipped at 1.0; no evaluation. `lora` trains LoRA
of rank 16 on all linear maps of one of them, `int8` and `nf4` the same beside a base that is held so (QLoRA). `dpo`
learns from 8 pairs of answers of 256 tokens each (`smol` 512, `1b` 4096) with a reference of the same shape, `cached`
with a reference's log-probs. `grpo` answers 2 prompts of 32 tokens 4 times each, 128 tokens long, rewards short texts
and makes an update of these 8 answers, without a reference; `shared` computes each prompt once in that.

Cost: `small`, all parts, a few minutes on 2 CPU cores. On one GPU the line with `1b` is meant to take less than eight
minutes; the other parts write its 15 GB of training state several times.
"""

from experiments import base
from research.errors import InputError

SHAPES = {
    "small": {"vocab_size": 4096, "num_layers": 6, "d_model": 256, "num_heads": 8, "num_kv_heads": 4, "d_ff": 768},
    "smol": {"vocab_size": 49_152, "num_layers": 30, "d_model": 576, "num_heads": 9, "num_kv_heads": 3, "d_ff": 1536},
    "360m": {"vocab_size": 49_152, "num_layers": 32, "d_model": 960, "num_heads": 15, "num_kv_heads": 5, "d_ff": 2560},
    "1b": {"vocab_size": 128_256, "num_layers": 16, "d_model": 2048, "num_heads": 32, "num_kv_heads": 8, "d_ff": 8192},
}


QUANTIZED = ("int8", "nf4")
PREFERENCES = ("dpo", "cached")
PROMPT, ANSWER = 32, 128  # tokens, of `grpo`


def get_config(arg: str = ""):
    chosen = base.variants(arg, *SHAPES, "lora", *QUANTIZED, *PREFERENCES, "grpo", "shared")
    if "grpo" in chosen and chosen & set(PREFERENCES):
        raise InputError(f"--config=...:{arg}: a step learns from preferences or from rewards. Leave one of them out.")
    if "shared" in chosen and "grpo" not in chosen:
        raise InputError(f"--config=...:{arg}: answers share a prompt in `grpo` alone. Add it, or leave `shared` out.")
    size = next((name for name in SHAPES if name in chosen), "small")
    config = base.get_config()
    config.steps = 200
    config.batch_size = {"smol": 2, "360m": 2}.get(size, 8)
    config.seq_len = 4096 if size == "1b" else 256
    config.objective = {"terms": {"next_token": 1.0}}
    config.data.path = "builtin:python_docs"
    config.tokenizer.update(kind="bpe", vocab_size=4096)
    config.model.update(SHAPES[size], mlp="swiglu", norm_eps=1e-5, tie_embeddings=size != "small")
    if size != "small":
        config.model.update(max_length=8192, rope_theta=500_000.0 if size == "1b" else 100_000.0)
    if size == "1b":
        config.model.remat = "full"
    config.optimizer.update(name="adamw", learning_rate=1e-3, warmup_steps=20, weight_decay=0.1, clip_norm=1.0)
    config.eval.update(every=0)
    config.checkpoint.update(every=0, keep_last=1)
    if chosen & {"lora", *QUANTIZED}:
        config.adapter = {"kind": "lora", "rank": 16}
    for kind in chosen & set(QUANTIZED):
        config.frozen_dtype = kind
    if chosen & set(PREFERENCES):
        config.batch_size, config.seq_len = 8, 1024 if size == "smol" else 2 * config.seq_len  # a pair in each row
        config.objective = {"terms": {"preference": {"kind": "sigmoid", "cached": "cached" in chosen}}}
        config.data.path = "preferences:reverse"
    if "grpo" in chosen:
        config.batch_size, config.seq_len = 8, PROMPT + ANSWER
        config.data.update(path="tasks:reverse", pack=False)
        config.rewards = {"length": {"unit": "characters", "most": 1, "over": 10 * ANSWER}}
        config.rollout.update(answers=4, max_new_tokens=ANSWER, shared_prompts="shared" in chosen)
        config.advantage.update(kind="group", scale="group")
        config.objective = {"terms": {"policy_gradient": {"aggregation": "seq-mean-token-mean"}}}
    if "debug" in chosen:
        config.model.vocab_size = 0
        return base.debug(config)
    return config


def finish(config, arg, overrides):
    base.finish(config, arg, overrides)
    chosen = base.variants(arg, *arg.split(","))
    if "dpo" in chosen and "cached" not in chosen and not config.roles:
        # A model of the policy's shape. A run, unlike the benchmark, has to be told which.
        config.roles = {"reference": config.model.to_dict()}
