"""The other side of `understudy benchmark --against`: a process that does the same work with another library.

python -m research.bench.libraries NAME reads calls from its standard input, one JSON line each, and answers in lines.
Between two calls it waits for input and uses no processor, so that the two sides can be measured in turn.

A folder says what to do: config.json and safetensors as transformers writes them, and batch.npz with what it is to
read. So both sides have the same architecture, the same first parameters and the same tokens, and must find the same
loss. Libraries are imported where they are used: a process holds its own alone, and its memory is measured.
"""

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from research.bench import measure
from research.rollouts import rewards as reward_lib
from research.rollouts.rewards import Reward, Sample

# Fields of an optimizer -> those of transformers' TrainingArguments.
_FIELDS_OF_TRL = {
    "learning_rate": "learning_rate",
    "b1": "adam_beta1",
    "b2": "adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
    "clip_norm": "max_grad_norm",
}
_TRAINING_OF_TRL = {
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "constant",
    "max_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "remove_unused_columns": False,
}


class Library:
    """What all libraries have in common. `train` and `decode` set `work`, which `run` repeats."""

    work: Callable[[], Any]

    def run(self, n: int) -> list[float]:
        """Does what was prepared n times; returns the seconds of each."""
        return measure.timed(self.work, n)

    def matmul(self, n: int, dtype: str) -> list[float]:
        """The seconds of each of n square matrix products of measure.PRODUCT."""
        product = self._product(dtype)
        product()
        return measure.timed(product, n)

    def _product(self, dtype: str) -> Callable[[], Any]:
        raise NotImplementedError

    def memory(self) -> dict[str, int | None]:
        """Bytes at the peak of what was run, and on the device of all."""
        return {"resident_peak": measure.peak_resident(), "device_peak": self.device_peak()}

    def device_peak(self) -> int | None:
        raise NotImplementedError

    def _begin(self, work: Callable[[], Any]) -> Any:
        """Prepares `work`, and does it once."""
        self.work = work
        result = work()
        measure.forget_peak()
        return result


class HuggingFace(Library):
    """transformers and torch: fused AdamW, or with `compiled` torch.compile and a static cache too."""

    def __init__(self, compiled: bool):
        import torch

        self.torch, self.compiled = torch, compiled
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def train(self, folder: str, optimizer: dict[str, float], microbatches: int, dtype: str, remat: bool) -> dict:
        """Prepares a step and makes one, which compiles; returns its loss."""
        torch, batch = self.torch, np.load(f"{folder}/batch.npz")
        model = self._trained(folder)
        if remat:
            model.gradient_checkpointing_enable()
        adamw = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=optimizer["learning_rate"],
            betas=(optimizer["b1"], optimizer["b2"]),
            eps=optimizer["eps"],
            weight_decay=optimizer["weight_decay"],
            fused=True,
        )
        forward = torch.compile(model) if self.compiled else model
        tokens, labels = (
            torch.from_numpy(batch[name]).long().to(self.device).chunk(microbatches) for name in ("tokens", "labels")
        )
        parts = list(zip(tokens, labels, strict=True))
        half = dtype == "bfloat16"

        def step() -> float:
            adamw.zero_grad(set_to_none=True)
            total = 0.0
            for tokens, labels in parts:
                with torch.autocast(self.device, torch.bfloat16, enabled=half):
                    loss = forward(input_ids=tokens, labels=labels, use_cache=False).loss / microbatches
                loss.backward()
                total = total + loss.detach()
            if optimizer["clip_norm"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer["clip_norm"])
            adamw.step()
            return float(total)  # waits for the device

        return {"loss": self._begin(step)}

    def decode(self, folder: str, new_tokens: int, dtype: str) -> dict:
        """Prepares greedy decoding of the prompts in the folder; returns its tokens."""
        torch = self.torch
        model = self._model(folder).to(getattr(torch, dtype)).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        prompts = torch.from_numpy(np.load(f"{folder}/batch.npz")["prompts"]).long().to(self.device)
        options = {"cache_implementation": "static"} if self.compiled else {}

        def generate() -> Any:
            with torch.inference_mode():
                out = model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    **options,
                )
            return out[:, prompts.shape[1] :].cpu().tolist()

        return {"tokens": self._begin(generate)}

    def _product(self, dtype: str) -> Callable[[], Any]:
        torch, size = self.torch, measure.PRODUCT[self.device == "cuda"]
        a = torch.ones((size, size), dtype=getattr(torch, dtype), device=self.device)

        def product() -> None:
            torch.matmul(a, a)
            if self.device == "cuda":
                torch.cuda.synchronize()

        return product

    def _model(self, folder: str) -> Any:
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(folder).float().to(self.device)

    def _trained(self, folder: str) -> Any:
        return self._model(folder).train()

    def device_peak(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.device == "cuda" else None


class Peft(HuggingFace):
    """The same model with the adapter in the folder, which alone is trained."""

    def _trained(self, folder: str) -> Any:
        import peft

        return peft.PeftModel.from_pretrained(self._model(folder), f"{folder}/adapter", is_trainable=True).train()


class Trl(HuggingFace):
    """TRL's trainers with fused AdamW; with `compiled` their torch_compile."""

    def train(
        self, folder: str, optimizer: dict[str, float], microbatches: int, dtype: str, remat: bool, options: dict
    ) -> dict:
        """Has the DPOTrainer learn from the pairs in the folder for a step; returns its loss. `options`: of
        bench.preferences.trl_options."""
        datasets, trl = _trl()
        pairs = np.load(f"{folder}/pairs.npz")
        self.tensors = {name: self.torch.from_numpy(pairs[name]) for name in pairs.files}
        rows, reference = range(len(pairs["input_ids"]) // 2), f"{folder}/reference"
        self.clock = _clock()
        self.trainer = trl.DPOTrainer(
            self._trained(folder),
            self._model(reference).eval() if os.path.exists(reference) else None,
            args=trl.DPOConfig(**self._arguments(folder, optimizer, len(rows), microbatches, dtype, remat), **options),
            # What is said here isn't read: `_collate` puts the batch in its place.
            train_dataset=datasets.Dataset.from_list(
                [{"prompt": "0", "chosen": "0", "rejected": "0", "row": row} for row in rows]
            ),
            processing_class=_tokenizer_of_numbers(1),
            data_collator=self._collate,
            callbacks=[self.clock],
        )
        self._begin(lambda: self.run(1))
        return {"loss": self.trainer.state.log_history[0]["loss"]}

    def reinforce(
        self, folder: str, optimizer: dict[str, float], microbatches: int, dtype: str, remat: bool, options: dict
    ) -> dict:
        """Has the GRPOTrainer answer the prompts in the folder and learn from rewards, for a step; returns its loss,
        and of the answers the entropy and the number of tokens. `options`: of bench.reinforcement.trl_options."""
        datasets, trl = _trl()
        data = np.load(f"{folder}/prompts.npz")
        prompts = [" ".join(map(str, row)) for row in data["prompts"]]
        rows = len(prompts) * options["num_generations"]
        entries = list(reward_lib.load(options.pop("rewards")).values())
        self.clock = _clock()
        arguments = self._arguments(folder, optimizer, rows, microbatches, dtype, remat)
        weights = [entry.weight for entry in entries]
        self.trainer = trl.GRPOTrainer(
            self._trained(folder),
            reward_funcs=[_Reward(entry.name, entry.make()) for entry in entries],
            args=trl.GRPOConfig(**arguments, **options, reward_weights=weights),
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=_tokenizer_of_numbers(int(data["vocab_size"])),
            callbacks=[self.clock],
        )
        self._begin(lambda: self.run(1))
        log = self.trainer.state.log_history[0]
        tokens = log["completions/mean_length"] * rows
        return {"loss": log["loss"], "entropy": log["entropy"], "new_tokens": round(tokens)}

    def _arguments(
        self, folder: str, optimizer: dict[str, float], rows: int, microbatches: int, dtype: str, remat: bool
    ) -> dict[str, Any]:
        """What all of TRL's configs are given: `rows` make a step."""
        return {
            "output_dir": f"{folder}/trl",
            "per_device_train_batch_size": rows // microbatches,
            "gradient_accumulation_steps": microbatches,
            "gradient_checkpointing": remat,
            "torch_compile": self.compiled,
            "bf16": dtype == "bfloat16",
            "use_cpu": self.device == "cpu",
            **_TRAINING_OF_TRL,
            **{_FIELDS_OF_TRL[name]: value for name, value in optimizer.items()},
        }

    def run(self, n: int) -> list[float]:
        """Trains for n steps; returns the seconds of each, without those of reading data."""
        self.clock.seconds = []
        self.trainer.args.max_steps = n
        self.trainer.train()
        return self.clock.seconds

    def _collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [example["row"] for example in examples]
        count = len(self.tensors["input_ids"]) // 2
        batch = {
            name: x[rows + [count + row for row in rows]] for name, x in self.tensors.items() if name != "reference"
        }
        if "reference" in self.tensors:
            chosen, rejected = self.tensors["reference"].split(count)
            batch |= {"ref_chosen_logps": chosen[rows], "ref_rejected_logps": rejected[rows]}
        return batch


def _clock() -> Any:
    """A callback of transformers' Trainer whose `seconds` are those of each step."""
    import transformers

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    return Clock()


def _trl() -> tuple[Any, Any]:
    """The packages datasets and trl, which reports each trainer that it makes, and is kept from that."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    import datasets
    import trl

    return datasets, trl


class _Reward:
    """One of our rewards as TRL calls one."""

    def __init__(self, name: str, reward: Reward):
        self.__name__, self.reward = name, reward

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float | None]:
        samples = zip(prompts, completions, completion_ids, strict=True)
        return [self.reward(Sample({}, prompt, text, len(ids), "length")) for prompt, text, ids in samples]


def _tokenizer_of_numbers(count: int) -> Any:
    """A tokenizer whose words are the numbers below `count`, its ids. The word `end` is none of a model's: a trainer
    can't do without one that ends a text and pads it, and here no text is to end."""
    import tokenizers
    import transformers

    words = {**{str(number): number for number in range(count)}, "end": count}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="end"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="end", eos_token="end")


class PlainJax(Library):
    """jax.jit as one would first write it: autodiff through attention, whole logits, optax.adamw; our linear maps."""

    def train(self, folder: str, optimizer: dict[str, float], microbatches: int, dtype: str, remat: bool) -> dict:
        """Prepares a step and makes one; returns its loss."""
        import jax
        import jax.numpy as jnp
        import optax

        if microbatches > 1:
            raise measure.Failed("plain jax has no microbatches")
        model, params = self._model(folder, dtype, attention="reference", remat="full" if remat else "none")
        clip = [optax.clip_by_global_norm(optimizer["clip_norm"])] if optimizer["clip_norm"] else []
        o = {k: optimizer[k] for k in ("learning_rate", "b1", "b2", "eps", "weight_decay")}
        update = optax.chain(*clip, optax.adamw(**o))
        data = np.load(f"{folder}/batch.npz")
        batch = {k: jnp.asarray(data[k]) for k in ("tokens", "segment_ids", "positions")}
        targets = jnp.asarray(data["labels"][:, 1:])

        def loss(params: Any) -> jax.Array:
            hidden = model.hidden(params, batch)[:, :-1]
            head = model.unembed(params)
            logits = jnp.einsum("btd,dv->btv", hidden, head.kernel.astype(hidden.dtype)).astype(jnp.float32)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
            return jnp.sum(jnp.where(targets >= 0, each, 0.0)) / jnp.sum(targets >= 0).astype(jnp.float32)

        @jax.jit
        def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
            value, grads = jax.value_and_grad(loss)(params)
            changes, state = update.update(grads, state, params)
            return optax.apply_updates(params, changes), state, value

        step = jax.jit(step, donate_argnums=(0, 1))
        self.state = params, update.init(params)

        def work() -> float:
            *self.state, value = step(*self.state)
            return float(jax.block_until_ready((self.state, value))[1])

        return {"loss": self._begin(work)}

    def _product(self, dtype: str) -> Callable[[], Any]:
        import jax

        size = measure.PRODUCT[jax.devices()[0].platform != "cpu"]
        a, product = jax.numpy.ones((size, size), dtype), jax.jit(jax.numpy.matmul)
        return lambda: jax.block_until_ready(product(a, a))

    def _model(self, folder: str, dtype: str, **changes: str) -> tuple[Any, Any]:
        import jax

        from research import params
        from research.devices import sharding
        from research.models import transformer
        from research.pretrained import load

        found = load.open_pretrained(folder)
        model = transformer.make_model(dataclasses.replace(found.config, dtype=dtype, **changes))
        mesh = sharding.make_mesh({}, jax.devices()[:1])
        return model, load.load(found, model.specs, params.shardings(model.specs, mesh))

    def device_peak(self) -> int | None:
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def make(name: str) -> Any:
    """The object whose methods are called."""
    if name == "jax":
        return PlainJax()
    kind = {"hf": HuggingFace, "peft": Peft, "trl": Trl}[name.partition("_")[0]]
    return kind(compiled=name.endswith("_compile"))


def main(argv: Sequence[str]) -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print isn't an answer
    peer = make(argv[0])
    for line in sys.stdin:
        values = json.loads(line)
        method = getattr(peer, values.pop("call"), None)
        try:
            if method is None:
                raise measure.Failed(f"{argv[0]} has nothing of the kind")
            answer = {"result": method(**values)}
        except measure.Failed as error:
            answer = {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:500]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
