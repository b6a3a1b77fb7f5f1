"""Small subjects of diagnoses, which tests share."""

import json

import jax
import runs

from research.diagnosis.subject import Subject

MODEL = {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "d_ff": 64, "max_length": 64}


def answers(count=64):
    """Records of prompts and responses, all different."""
    return [{"prompt": f"Repeat the number {i}:", "response": f"It is {i * 7 % 101}."} for i in range(count)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def config(path, **fields):
    """Of six steps of supervised fine-tuning on a file."""
    values = {
        "steps": 6,
        "seq_len": 64,
        "model": MODEL,
        "data": {"path": str(path), "eval_fraction": 0.25},
        "objective": {"terms": {"sft": 1.0}},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
        "eval": {"every": 6, "batches": 2},
        "checkpoint": {"every": 6, "best_metric": ""},
    }
    return runs.small(**{**values, **fields})


def subject(made, workdir="", **options):
    return Subject.of(made, workdir, devices=jax.devices()[:1], **options)
