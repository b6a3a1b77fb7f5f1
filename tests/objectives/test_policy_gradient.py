"""The loss of the policy's own answers: its parts by hand, cuts of the batch, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import objectives, params, train
from research.devices import sharding
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.objectives.policy_gradient import notices
from research.objectives.terms import Inputs, row_numbers
from research.objectives.types import Sampler
from research.ops.policy_losses import LOSSES
from research.sources import fields

B, T, V, KNOWN, TEMPERATURE = 8, 16, 32, 30, 0.7
SIZE = {"vocab_size": V, "num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16}
NAMES = (*fields.group("text"), *fields.group("rollout"), *fields.group("old"), *fields.group("reference"))
SAMPLER = Sampler(TEMPERATURE, KNOWN)
BUDGET = {"aggregation": "seq-mean-token-sum-norm", "budget": 12}
TERMS = {
    "ppo": {"kl_coef": 0.1, "entropy_coef": 0.05, "dual_clip": 3.0},
    "budget": {**BUDGET, "old": "trainer", "correction": "token", "bounds": (0.5, 1.5), "drop": True},
    "gspo": {"kind": "gspo", "clip_low": 0.1, "clip_high": 0.1, "top_entropy": 0.5, "off_policy_mask": 0.02},
    "gmpo": {"kind": "gmpo", "old": "trainer", "correction": "sequence", "kl": "k2", "kl_coef": 0.3},
    "sums": {"kind": "cispo", "aggregation": "seq-mean-token-sum"},
    "reinforce": {"kind": "reinforce"},
}


def embeddings_alone():
    """A model whose last hidden states are its embeddings, which compiles in no time."""
    model = make_model(ModelConfig(**SIZE, max_length=T, tie_embeddings=False))
    specs = {name: spec for name, spec in model.specs.items() if name in ("embed", "head")}
    return model._replace(specs=specs, hidden=lambda params, batch: params["embed"][batch["tokens"]])


MODEL = embeddings_alone()
VALUES = params.init({"policy": MODEL.specs}, jax.random.PRNGKey(0))
VALUES["policy"]["head"] *= 20


def log_probs(tokens):
    """Of each position's next token and the entropy there, by numpy."""
    embed, head = (np.asarray(VALUES["policy"][name], np.float64) for name in ("embed", "head"))
    logits = (embed[tokens] @ head)[..., :KNOWN] / TEMPERATURE
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    following = np.roll(tokens, -1, axis=1)
    return np.take_along_axis(log_p, following[..., None], 2)[..., 0], -(np.exp(log_p) * log_p).sum(-1)


def counted(batch):
    """[B, T]: 1 where an answer's token is predicted."""
    real = (batch["segment_ids"][:, 1:] > 0) * batch["loss_mask"][:, 1:]
    return np.pad(real, ((0, 0), (0, 1)))


@functools.cache
def rollout(on_policy=False):
    """Rows with one answer each, of different lengths; the last row's is masked, and what stands outside of answers is
    no number. The sampler's and the trainer's log-probs are near the policy's, or those."""
    batch = fields.fake(fields.spec(NAMES, B, {"time": T}), KNOWN, packed=False, seed=1)
    rng = np.random.default_rng(0)
    for row, end in enumerate((16, 9, 12, 14, 7, 16, 10, 13)):
        for name in fields.group("text"):
            batch[name][row, end:] = 0
    batch["loss_mask"][-1] = 0
    batch["source"] = (np.arange(B, dtype=np.int32)[:, None] % 2) * np.ones((1, T), np.int32)
    policy, _ = log_probs(batch["tokens"])
    for name, spread in (("sampler_log_prob", 0.25), ("old_log_prob", 0.2), ("reference_log_prob", 0.5)):
        batch[name] = policy + (0 if on_policy else spread) * rng.standard_normal((B, T))
    here = counted(batch) > 0
    return {
        name: np.where(here, x, np.nan).astype(np.float32) if x.dtype.kind == "f" and name != "loss_mask" else x
        for name, x in batch.items()
    }


def terms_of(sampler=SAMPLER, **terms):
    spec = {name: {"objective": "policy_gradient", **options} for name, options in terms.items()}
    return objectives.load({"terms": spec}, sampler=sampler)


def losses(terms, values, batch, microbatches=1):
    """The gradient of the terms' sum, and what each gives."""
    step = train.TrainStep(terms, {"policy": MODEL}, optax.sgd(0.1), lambda t: t, microbatches, sources=("even", "odd"))
    inputs = Inputs(jax.random.PRNGKey(0), jnp.zeros((), jnp.int32), row_numbers(batch), {})
    return step.gradients(values, {}, batch, inputs)


of_batch = jax.jit(functools.partial(losses, terms_of(**TERMS)))


@functools.cache
def whole():
    return of_batch(VALUES, rollout())


def close(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **({"rtol": 2e-4, "atol": 1e-5} | tolerance)), a, b)


def test_losses_and_metrics_by_hand():
    batch, (_, outs) = rollout(), whole()
    here = counted(batch) > 0
    (policy, entropy), advantage = log_probs(batch["tokens"]), np.where(here, batch["advantage"], 0)
    gap = lambda name: np.where(here, policy - batch[name], 0)  # noqa: E731
    lengths, tokens = here.sum(1), here.sum()
    ratio = np.exp(gap("sampler_log_prob"))
    clipped = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    clipped = np.where(advantage < 0, np.maximum(clipped, 3 * advantage), clipped)
    away = gap("reference_log_prob")
    kl = ratio * (np.exp(-away) - 1 + away)
    ppo = outs["ppo"]
    close(ppo.loss_sum, np.sum((-clipped + 0.1 * kl - 0.05 * entropy)[here]))
    assert float(ppo.weight) == tokens
    means = {name: total / weight for name, (total, weight) in ppo.metrics.items()}
    close(means["kl"], kl[here].mean())
    close(means["entropy"], entropy[here].mean())
    close(means["ratio"], ratio[here].mean())
    close(means["old_kl"], -np.log(ratio)[here].mean())
    close(means["clip_high"], ((ratio > 1.2) & (advantage > 0))[here].mean())
    close(means["clip_low"], ((ratio < 0.8) & (advantage < 0))[here].mean())
    assert 0.02 < means["clip_high"] + means["clip_low"] < 0.8

    weights = np.exp(np.where(here, batch["old_log_prob"] - batch["sampler_log_prob"], 0))
    kept = np.where((weights >= 0.5) & (weights <= 1.5), weights, 0)
    ratio = np.exp(gap("old_log_prob"))
    clipped = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    close(outs["budget"].loss_sum, np.sum((-kept * clipped)[here]))
    assert float(outs["budget"].weight) == B * 12  # a masked answer takes its share of the budget
    assert np.sum(kept[here] == 0) > 0
    close(outs["budget"].metrics["correction"][0], kept[here].sum())

    mean_gap = gap("sampler_log_prob").sum(1) / np.maximum(lengths, 1)
    ratio = np.exp(mean_gap)[:, None]
    clipped = np.minimum(ratio * advantage, np.clip(ratio, 0.9, 1.1) * advantage)
    high = entropy >= np.quantile(entropy[here], 0.5)
    near = (advantage >= 0) | (-mean_gap[:, None] <= 0.02)
    by_row = np.where(here & high & near, -clipped, 0).sum(1) / np.maximum(lengths, 1)
    close(outs["gspo"].loss_sum, by_row.sum())
    assert float(outs["gspo"].weight) == (lengths > 0).sum() == B - 1
    close(outs["gspo"].metrics["near_policy"][0], near[here].sum())
    assert 0 < near[here].mean() < 1

    close(outs["reinforce"].loss_sum, np.sum(-advantage * np.where(here, policy, 0)))
    close(outs["sums"].loss_sum, np.sum((-np.minimum(np.exp(gap("sampler_log_prob")), 5) * advantage * policy)[here]))
    answers = np.exp(np.where(here, batch["old_log_prob"] - batch["sampler_log_prob"], 0).sum(1)).clip(0, 2)
    held = np.where(advantage > 0, np.minimum(gap("old_log_prob"), 0.4), np.maximum(gap("old_log_prob"), -0.4))
    mean_advantage = advantage.sum(1) / np.maximum(lengths, 1)
    gmpo = -mean_advantage * np.exp(held.sum(1) / np.maximum(lengths, 1)) * answers
    kl = 0.3 * np.square(away).sum(1) / 2 / np.maximum(lengths, 1)
    close(outs["gmpo"].loss_sum, (gmpo + kl)[:-1].sum())


def test_a_loss_of_single_tokens_is_one_pass_over_the_head():
    """Three products with the head and its gradient, where a loss of whole answers takes four."""

    def products(**term):
        program = jax.make_jaxpr(functools.partial(losses, terms_of(only=term)))(VALUES, rollout())
        return str(program).count("dot_general")

    tokens = [{"kind": kind} for kind in ("reinforce", "ppo", "cispo", "sapo")]
    tokens.append({"old": "trainer", "correction": "sequence", "kl_coef": 0.1, "entropy_coef": 0.1})
    whole = {products(kind="gspo"), products(off_policy_mask=0.1)}
    assert {products(**term) + 1 for term in tokens} == whole


def test_microbatches_change_nothing():
    close(jax.jit(functools.partial(losses, terms_of(**TERMS), microbatches=4))(VALUES, rollout()), whole())


def test_a_mesh_changes_nothing():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        values = jax.device_put(VALUES, params.shardings({"policy": MODEL.specs}, mesh))
        batch = jax.device_put(rollout(), fields.shardings(mesh, fields.spec((*NAMES, "source"), B, {"time": T})))
        close(jax.jit(functools.partial(losses, terms_of(**TERMS)))(values, batch), whole())


ON_POLICY = {"token": {}, "answer": {"kind": "gspo"}, "fixed": BUDGET, "trainer": {"old": "trainer"}}


def test_on_policy_the_loss_is_minus_the_advantages_and_teaches():
    batch = rollout(on_policy=True)
    grads, outs = jax.jit(functools.partial(losses, terms_of(**ON_POLICY)))(VALUES, batch)
    here = counted(batch) > 0
    advantage = np.where(here, batch["advantage"], 0)
    close(outs["token"].loss_sum, -advantage.sum())
    close(outs["trainer"].loss_sum, -advantage.sum())
    close(outs["fixed"].loss_sum, -advantage.sum())
    close(outs["answer"].loss_sum, -(advantage.sum(1) / np.maximum(here.sum(1), 1)).sum())
    for out in outs.values():
        np.testing.assert_allclose(float(out.metrics["ratio"][0]) / here.sum(), 1, rtol=1e-5)
        assert float(out.metrics["clip_low"][0] + out.metrics["clip_high"][0]) == 0
    assert float(optax.tree.norm(grads)) > 0.01


def test_the_loss_of_a_source_is_what_its_tokens_add():
    for out in whole()[1].values():
        parts = [out.metrics[f"loss/{name}"][0] for name in ("even", "odd")]
        close(sum(parts), out.loss_sum)
        assert all(np.abs(parts) > 1e-3)


def test_where_all_answers_are_masked_there_is_nothing_to_divide_by():
    """So that the step is skipped, with a fixed budget too."""
    batch = {**rollout(), "loss_mask": np.zeros((B, T), np.float32)}
    _, outs = of_batch(VALUES, batch)
    for out in outs.values():
        assert float(out.weight) == 0
        assert float(out.loss_sum) == 0


def test_padding_of_the_token_that_ends_answers_changes_nothing():
    """An answer's own end counts; the same token in the padding behind it does not."""
    batch = rollout()
    padded = {**batch, "tokens": np.where(batch["segment_ids"] > 0, batch["tokens"], KNOWN - 1)}
    close(of_batch(VALUES, padded), whole())


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOSSES)
def test_a_policy_learns_which_answer_is_right(kind):
    """The right token is the one after the last, and a third of the reward. Four updates a rollout, so
    that ratios leave 1; the bounds hold the tokens of answers that the policy has left."""
    prompts, answers, length, steps = 8, 8, 3, 40
    term = terms_of(Sampler(), it={"kind": kind} | ({"clip_low": 0.2, "clip_high": 0.2} if kind == "gspo" else {}))
    step = train.TrainStep(term, {"policy": MODEL}, optax.rmsprop(0.02), lambda t: t)
    rows = prompts * answers
    prompt = jnp.repeat(jnp.arange(prompts), answers)
    ones = jnp.ones((rows, length + 1))
    text = {"segment_ids": ones.astype(int), "positions": jnp.tile(jnp.arange(length + 1), (rows, 1))}
    text["loss_mask"] = ones.at[:, 0].set(0)

    def sample(values, key):
        tokens, log_probs = [prompt], []
        for part in jax.random.split(key, length):
            logits = values["policy"]["embed"][tokens[-1]] @ values["policy"]["head"]
            tokens.append(jax.random.categorical(part, logits))
            log_probs.append(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[-1][:, None], 1))
        log_probs = jnp.pad(jnp.concatenate(log_probs, axis=1), ((0, 0), (0, 1)))
        return jnp.stack(tokens, axis=1), log_probs

    @jax.jit
    def rollout_and_updates(values, moments, key):
        tokens, log_probs = sample(values, key)
        right = jnp.mean((tokens[:, 1:] == (tokens[:, :-1] + 1) % V).astype(jnp.float32), axis=1)
        advantage = jnp.repeat((right - jnp.mean(right.reshape(prompts, -1), 1).repeat(answers))[:, None], 4, 1)
        batch = {**text, "tokens": tokens, "sampler_log_prob": log_probs, "advantage": advantage}
        inputs = Inputs(key, jnp.zeros((), jnp.int32), row_numbers(batch), {})
        for _ in range(4):
            gradient, _ = step.gradients(values, {}, batch, inputs)
            updates, moments = step.optimizer.update(gradient, moments)
            values = optax.apply_updates(values, updates)
        return values, moments, jnp.mean(right)

    values, moments, scores = VALUES, step.optimizer.init(VALUES), []
    for key in jax.random.split(jax.random.PRNGKey(1), steps):
        values, moments, right = rollout_and_updates(values, moments, key)
        scores.append(float(right))
    assert np.mean(scores[:3]) < 0.2
    assert np.mean(scores[-3:]) > 0.7, scores


def test_the_first_update_says_so_where_sampler_and_trainer_differ():
    assert notices({"ratio": 1.04}, True) == {}
    assert notices({"ratio": 1.3}, False) == {}
    assert "sampler and trainer" in notices({"ratio": 1.3}, True)["ratio"]


def test_fields_are_those_that_the_options_need():
    read = {name: term.objective.fields[4:] for name, term in terms_of(**TERMS).items()}
    assert read["reinforce"] == ("advantage", "sampler_log_prob")
    assert read["budget"] == ("advantage", "sampler_log_prob", "old_log_prob")
    assert read["ppo"] == ("advantage", "sampler_log_prob", "reference_log_prob")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pppo"}, r"kind = 'pppo': no such loss\. Did you mean 'ppo'"),
        ({"kind": "sapo", "clip_low": 0.2}, r"clip_low = 0\.2: is of ppo, ppo_sequence, gspo, cispo, gmpo"),
        ({"kind": "ppo", "tau_pos": 1.0}, r"tau_pos = 1\.0: is of sapo\."),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": 0.0}, "clip_high"),
        ({"dual_clip": 1.1}, r"dual_clip = 1\.1: must be above 1 \+ clip_high = 1\.2"),
        ({"aggregation": "token_mean"}, r"aggregation = 'token_mean'.*'token-mean'"),
        (
            {"kind": "gmpo", "aggregation": "token-mean"},
            "aggregation = 'token-mean': an answer has one loss of kind = 'gmpo'",
        ),
        ({"aggregation": "seq-mean-token-sum-norm"}, r"budget = None.*Set it, to rollout\.max_new_tokens"),
        ({"budget": 10}, "budget = 10.*Leave it out"),
        ({**BUDGET, "budget": 0}, "budget = 0: must be at least 1"),
        ({"kl": "k1", "kl_coef": 0.1}, "kl = 'k1': as a part of the loss it teaches nothing"),
        ({"kl": "k4", "kl_coef": 0.1}, "kl = 'k4': must be one of"),
        ({"kl": "k2"}, "kl = 'k2': has no effect with kl_coef = 0"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"entropy_coef": -1.0}, "entropy_coef"),
        ({"top_entropy": 0.0}, "top_entropy"),
        ({"kind": "gmpo", "top_entropy": 0.5}, "top_entropy.*one loss"),
        ({"off_policy_mask": 0.0}, "off_policy_mask"),
        ({"old": "teacher"}, "old = 'teacher'"),
        ({"drop": True}, "drop = True: is of a correction"),
        ({"bounds": (0.0, 3.0)}, "bounds.*is of a correction"),
        ({"correction": "token"}, "correction = 'token': is the ratio of trainer to sampler"),
        ({"correction": "tokens", "old": "trainer"}, "correction = 'tokens'.*Did you mean 'token'"),
        ({"correction": "token", "old": "trainer", "bounds": (2.0, 1.0)}, "bounds"),
        ({"correction": "token", "old": "trainer", "bounds": 3.0}, "bounds"),
        (
            {"correction": "token", "old": "trainer", "kind": "gmpo"},
            "correction.*one weight with kind = 'gmpo'. Take 'sequence'",
        ),
        ({"correction": "token", "old": "trainer", "kind": "vespo"}, "correction.*Take old = 'sampler'"),
        ({"old": "trainer", "kind": "reinforce", "kl": "k2", "kl_coef": 0.1}, "old = 'trainer'.*reads no ratio"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(options, message):
    with pytest.raises(InputError, match=rf"objective\.terms\.it\.{message}"):
        terms_of(it=options)


def test_what_takes_the_policy_for_the_sampler_is_refused_where_answers_are_drawn_ahead():
    ahead = Sampler(ahead=True)
    for options, message in (
        ({"kind": "reinforce"}, r"kind = 'reinforce': has no ratio, and with rollout\.ahead"),
        ({"old": "trainer"}, r"old = 'trainer': isn't who answered"),
        ({"kl": "k3", "kl_coef": 0.1}, r"kl = 'k3': has the right gradient only"),
        ({"old": "trainer", "correction": "token", "kl_coef": 0.1}, r"kl = 'k3_ratio': has the right gradient only"),
    ):
        with pytest.raises(InputError, match=rf"objective\.terms\.it\.{message}"):
            terms_of(ahead, it=options)
    terms_of(ahead, it={"kl_coef": 0.1}, other={"kind": "reinforce", "old": "trainer", "correction": "token"})


def test_a_ratio_to_a_distribution_that_was_cut_short_is_refused():
    """Unless it is against the trainer's own."""
    short = Sampler(truncated="rollout.top_k = 5")
    for options in ({}, {"kind": "reinforce", "kl_coef": 0.1}, {"old": "trainer", "off_policy_mask": 0.1}):
        with pytest.raises(InputError, match=r"rollout\.top_k = 5 leaves tokens out"):
            terms_of(short, it=options)
    terms_of(
        short, it={"kind": "reinforce"}, other={"old": "trainer"}, kl={"kind": "reinforce", "kl": "k2", "kl_coef": 1}
    )
