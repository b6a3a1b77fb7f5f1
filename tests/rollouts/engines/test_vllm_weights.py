"""A real vLLM server computes with the weights that it was given: its log-probabilities are ours, before and after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import loading, params
from research.devices import sharding
from research.models import adapters, transformer
from research.models.specs import make_specs
from research.rollouts.engines import client, sending, server, weights
from research.rollouts.engines.policy import Policy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS = ([504, 3575, 282, 4649, 314], [1, 4093, 198, 28120, 253, 2, 198, 1, 520, 9531, 198])
ANSWERS, TOKENS = 4, 32
LORA = ("lora/a", "lora/b", "lora/magnitude")
# The server's weights are changed by whole ones for good, and those come last.
OPTIONS = {
    "lora": {"kind": "lora", "rank": 8},
    "rslora": {"kind": "lora", "rank": 16, "rslora": True, "targets": "q|v|down"},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "whole": {},
}


class Run:
    """A policy with the model of a server, its parameters, and their way to the server."""

    def __init__(self, place, options, folder):
        source = loading.find(place.model)
        adapter, base = adapters.load(options), make_specs(source.config)
        self.url, self.model = place.url, transformer.make_model(source.config, sharding.RULES, adapter)
        mesh = sharding.make_mesh({}, jax.devices()[:1])
        self.values = source.read(base, params.shardings(base, mesh, self.model.rules))
        if adapter:
            own = params.split(self.model.specs, params.like(base, self.model.specs))[1]
            self.values = params.join(self.values, params.init(own, jax.random.key(0)))
        if adapter and adapter.init:
            self.values = adapter.init(self.values, jax.random.key(1), self.model)
        policy = Policy(self.model, options, source.origin["config"], place.model)
        self.weights = sending.make_weights(policy, folder, dtype="float32")

    def update(self, version):
        """Changes all that is trained, and gives it to the server."""
        names = [name for name, _ in params.named_leaves(self.values)]
        leaves, tree = jax.tree.flatten(self.values)
        trained = [self.model.adapter is None or name.endswith(LORA) for name in names]
        keys = jax.random.split(jax.random.key(version), len(leaves))
        noise = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
        size = [0.02 if self.model.adapter else 0.03 * jnp.std(x) for x in leaves]
        new = [x + s * n if on else x for x, s, n, on in zip(leaves, size, noise, trained, strict=True)]
        self.values = jax.tree.unflatten(tree, new)
        self.weights.stage(self.values, version)
        assert weights.sync(self.weights, [self.url], version) == {}
        assert self.weights.served(self.url) == version

    def answers(self, model, stamp):
        """Rows of prompt and answer, and what the server says of the answers' tokens; all of them have this stamp."""
        rows, said = [], []
        for i, prompt in enumerate(PROMPTS):
            sampling = {"max_tokens": TOKENS, "temperature": 1.0, "n": ANSWERS, "seed": i, "logprobs": 0}
            sampling |= {"ignore_eos": True, "detokenize": False}
            body = {"model": model, "token_ids": prompt, "sampling_params": sampling}
            for choice in client.ask(self.url, "/inference/v1/generate", body, seconds=300)["choices"]:
                assert [span["version"] for span in choice["weight_versions"]] == [stamp]
                rows.append((prompt, choice["token_ids"]))
                said.append([token["logprob"] for token in choice["logprobs"]["content"]])
        return rows, np.array(said)

    def log_probs(self, rows):
        """[R, N], ours of the same tokens."""
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        tokens, segments = np.zeros((2, len(rows), longest), np.int32)
        for i, (prompt, answer) in enumerate(rows):
            tokens[i, : len(prompt) + len(answer)] = prompt + answer
            segments[i, : len(prompt) + len(answer)] = 1
        batch = {"tokens": tokens, "segment_ids": segments, "positions": np.tile(np.arange(longest), (len(rows), 1))}
        logits = jax.jit(lambda p: self.model.unembed(p).logits(self.model.hidden(p, batch)))(self.values)
        every = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[:, :, 0]
        starts = [len(prompt) - 1 for prompt, _ in rows]
        return np.stack([every[i, start : start + TOKENS] for i, start in enumerate(starts)])


@pytest.mark.parametrize("name", list(OPTIONS))
def test_log_probs_are_ours_before_and_after_updates(vllm_server, tmp_path, name):
    run = Run(vllm_server, OPTIONS[name], tmp_path)
    beside = isinstance(run.weights, sending.AdapterWeights)
    assert beside == (name in ("lora", "rslora"))
    gaps = []
    if beside or name == "dora":  # the first of the others
        rows, said = run.answers("policy", server.START)
        gaps.append(np.abs(said - run.log_probs(rows)).max())
    for version in (1, 2):
        before = run.values
        run.update(version)
        rows, said = run.answers(run.weights.model(version), run.weights.stamp(version))
        ours = run.log_probs(rows)
        gaps.append(np.abs(said - ours).max())
        run.values, after = before, run.values
        moved = np.abs(run.log_probs(rows) - ours).max()
        run.values = after
        assert moved > 0.1, "the update is too small to be seen"
    print(f"{name}: largest differences {', '.join(f'{gap:.1e}' for gap in gaps)} of {ours.size} tokens each")
    assert max(gaps) < 1e-3
