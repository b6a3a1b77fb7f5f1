"""Distillation as an objective: which tokens, which teachers, cached ones, and what is rejected."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context
from runs import load
from test_train import INITIAL, MODEL, adamw, make_batch

from research import config, loading, objectives, params, train
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.objectives import distill
from research.objectives.types import Forward
from research.ops import divergences
from research.run import run
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

TEACHER = make_model(
    ModelConfig(256, num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, d_ff=64, max_length=32, init_std=0.3)
)
MODELS = {"policy": MODEL, "teacher": TEACHER, "second": TEACHER}
TEACHERS = {
    role: jax.jit(lambda key: params.init(TEACHER.specs, key))(jax.random.PRNGKey(i))
    for i, role in enumerate(("teacher", "second"))
}
TOKENIZER = types.SimpleNamespace(size=120)  # of the student's 128 logits and the teachers' 256, the others are padding


@functools.cache
def logits():
    """Of each role, over real tokens."""
    values = {"policy": INITIAL, **TEACHERS}
    f = jax.jit(lambda p, b: {r: MODELS[r].hidden(p[r], b) @ MODELS[r].unembed(p[r]).kernel for r in p})
    return {role: x[..., : TOKENIZER.size] for role, x in f(values, make_batch()).items()}


def loss(batch=None, tokenizer=TOKENIZER, **options):
    """(the mean, the metrics) of the initial policy."""
    batch = make_batch() if batch is None else batch
    made = distill.make(tokenizer=tokenizer, **options)
    forward = Forward(MODELS, {"policy": INITIAL, **TEACHERS}, batch)
    out = made.loss(forward, batch, context(batch))
    return float(out.loss_sum / out.weight), {k: float(s / w) for k, (s, w) in out.metrics.items()}


def mean_kl(role="teacher", temperature=1.0, on="supervised"):
    batch = make_batch()
    p, q = (jax.nn.log_softmax(logits()[r] / temperature) for r in (role, "policy"))
    kl = np.asarray(jnp.sum(jnp.exp(p) * (p - q), axis=-1))[:, :-1]
    segments = np.asarray(batch["segment_ids"])
    weights = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    if on == "supervised":
        weights = weights * np.asarray(batch["loss_mask"])[:, 1:]
    return np.sum(kl * weights) / np.sum(weights)


@pytest.mark.parametrize("on", distill.SCOPES)
def test_the_mean_is_over_the_tokens_that_predict(on):
    found, metrics = loss(on=on, temperature=2.0, scale_by_temperature=True)
    np.testing.assert_allclose(found, 4 * mean_kl(temperature=2.0, on=on), rtol=1e-4)
    np.testing.assert_allclose(metrics["divergence"], mean_kl(temperature=2.0, on=on), rtol=1e-4)
    assert 0 <= metrics["agreement"] < 1 < metrics["teacher_entropy"]


def test_several_teachers_are_weighted():
    found, metrics = loss(teachers={"teacher": 0.25, "second": 0.75})
    each = {role: mean_kl(role) for role in ("teacher", "second")}
    np.testing.assert_allclose(found, 0.25 * each["teacher"] + 0.75 * each["second"], rtol=1e-4)
    assert each["second"] != pytest.approx(each["teacher"], rel=1e-2)
    for role, value in each.items():
        np.testing.assert_allclose(metrics[f"{role}/divergence"], value, rtol=1e-4)


def test_without_a_tokenizer_the_smaller_model_says_what_is_padding():
    """Where options are only checked none is known; a test of the whole run has one."""
    found, _ = loss(tokenizer=None)
    assert np.isfinite(found)
    assert found != pytest.approx(loss()[0], rel=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_cache_of_all_tokens_is_the_live_teacher(kind):
    batch, temperature = make_batch(), 1.5
    hidden = TEACHER.hidden(TEACHERS["teacher"], batch)
    head = TEACHER.unembed(TEACHERS["teacher"])
    top = divergences.top_k(hidden, head, TOKENIZER.size, temperature=temperature, vocab_size=TOKENIZER.size)
    cached = batch | dict(zip(distill.CACHED_FIELDS, top, strict=True))
    options = {"kind": kind, "beta": 0.3, "temperature": temperature}
    found, metrics = loss(cached, cached=True, **options)
    live, of_live = loss(**options)
    np.testing.assert_allclose(found, live, rtol=1e-5)
    assert metrics.keys() == {f"divergence_top{TOKENIZER.size}", f"teacher_entropy_top{TOKENIZER.size}", "agreement"}
    np.testing.assert_allclose([metrics[k] for k in sorted(metrics)], [of_live[k] for k in sorted(of_live)], rtol=1e-5)
    few = batch | dict(zip(distill.CACHED_FIELDS, (top.ids[..., :4], top.log_probs[..., :4], top.rest), strict=True))
    of_few, metrics = loss(few, cached=True, tail="renormalize", **options)
    assert 0 < of_few != pytest.approx(live, rel=1e-2)
    assert metrics["divergence_top4"] == pytest.approx(of_few)  # beside a live one it is called another thing


def test_a_student_learns_its_teacher():
    spec, batch = {"terms": {"distill": 1.0}, "distill": {"on": "all"}}, make_batch()
    optimizer = adamw()
    step = train.TrainStep(
        objectives.load(spec), MODELS, optimizer, schedule=lambda t: jnp.asarray(1.0), microbatches=2
    )
    step, found = jax.jit(step), []
    state = train.init_state({"policy": INITIAL}, optimizer, jax.random.PRNGKey(1))
    for _ in range(12):
        state, metrics = step(state, TEACHERS, batch)
        found.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert found[-1] < 0.7 * found[0]
    assert state.params.keys() == {"policy"}


def test_across_tokenizers_positions_are_compared_where_the_text_is_the_same():
    """With the batch itself as the teacher's, at the same places, ULD is that of the two models."""
    batch = make_batch()
    own = {f"teacher_{name}": jnp.roll(batch[name], 1, axis=0) for name in ("tokens", "segment_ids", "positions")}
    T = batch["tokens"].shape[1]
    places = np.broadcast_to(np.arange(T, dtype=np.int32), batch["tokens"].shape).copy()
    places[:, ::3] = -1
    places[:, 1::3] -= 1
    found, metrics = loss(batch | own | {"teacher_at": jnp.asarray(places)}, kind="uld")
    teacher = jnp.roll(TEACHER.hidden(TEACHERS["teacher"], batch), 1, axis=0)
    teacher = jax.nn.softmax(
        jnp.take_along_axis(teacher, jnp.maximum(places, 0)[..., None], axis=1)
        @ TEACHER.unembed(TEACHERS["teacher"]).kernel
    )
    student = jax.nn.softmax(MODEL.hidden(INITIAL, batch) @ MODEL.unembed(INITIAL).kernel)
    student = np.pad(student, ((0, 0), (0, 0), (0, 128)))
    gap = np.abs(np.sort(student) - np.sort(teacher)).sum(-1)[:, :-1]
    segments = np.asarray(batch["segment_ids"])
    weights = (segments[:, 1:] == segments[:, :-1]) * np.asarray(batch["loss_mask"])[:, 1:] * (places[:, :-1] >= 0)
    np.testing.assert_allclose(found, np.sum(gap * weights) / weights.sum(), rtol=1e-4)
    assert "agreement" not in metrics
    made = distill.make(kind="uld")
    assert made.own_tokens == ("teacher",)
    assert {"teacher_at", "teacher_tokens"} <= set(made.fields)


def test_what_a_cached_teacher_must_have_been_made_with():
    made = distill.make(cached=True, temperature=2.0, on="all")
    assert made.annotations == {"temperature": 2.0, "on": "all"}
    assert made.frozen == ()
    assert set(distill.CACHED_FIELDS) <= set(made.fields)
    assert distill.make(cached=True).annotations == {"temperature": 1.0}
    assert distill.make().annotations == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, r"objective\.distill\.kind = 'kl'"),
        ({"kind": "jsd", "beta": 2.0}, r"objective\.distill\.beta = 2\.0"),
        ({"temperature": 0.0}, r"objective\.distill\.temperature = 0\.0"),
        ({"on": "answers"}, r"objective\.distill\.on = 'answers'"),
        ({"teachers": {"teacher": -1.0}}, r"objective\.distill\.teachers\.teacher = -1\.0: must be at least 0"),
        ({"cached": True, "teachers": {"a": 1.0}}, "teachers = {'a': 1.0}: needs live models"),
        ({"teacher_temperature": 2.0}, "teacher_temperature = 2.0: is of kind = 'uld'"),
        ({"teacher_temperature": 0.0, "kind": "uld"}, "teacher_temperature = 0.0: must be above 0"),
        ({"cached": True, "kind": "uld"}, "kind = 'uld': needs live models"),
        ({"cached": True, "tail": "truncate", "kind": "jsd"}, "'truncate': goes with forward_kl"),
        ({"tail": "bukcet"}, "Did you mean 'bucket'"),
    ],
)
def test_options_that_can_not_be(options, message):
    with pytest.raises(InputError, match=message):
        objectives.load({"terms": {"distill": 1.0}, "distill": options})


def test_a_teacher_with_other_tokens_is_an_error():
    tokenizer = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
    other = make_tokenizer(TokenizerSpec("bpe", 300), lambda: iter(["the cat sat on the mat " * 20]), texts_id="mat")

    def found(tokenizer, size):
        config = types.SimpleNamespace(vocab_size=size)
        return types.SimpleNamespace(
            name="models/teacher", has_tokenizer=tokenizer is not None, tokenizer=lambda: tokenizer, config=config
        )

    loading.check_reads("roles.teacher", found(tokenizer, 261), tokenizer)
    loading.check_reads("roles.teacher", found(None, 261), tokenizer)
    with pytest.raises(InputError, match=r"roles\.teacher\.init_from = models/teacher: has another tokenizer.*uld"):
        loading.check_reads("roles.teacher", found(other, 300), tokenizer)
    with pytest.raises(InputError, match=r"its tokenizer has 261 tokens, and its embedding 200"):
        loading.check_reads("roles.teacher", found(None, 200), tokenizer)


@pytest.mark.slow
def test_a_run_across_tokenizers(tmp_path):
    """The teacher reads pieces of words, the student bytes; any other kind of loss is refused."""
    few = {"steps": 1, "eval.every": 0, "checkpoint.best_metric": "", "data.path": "tasks:copy"}
    run.run(load("sft", **few, **{"tokenizer.kind": "bpe", "tokenizer.vocab_size": 300}), str(tmp_path / "teacher"))
    values = config.to_dict(load("sft", **(few | {"steps": 2})))
    values |= {"roles": {"teacher": {"init_from": str(tmp_path / "teacher")}}}
    values["objective"] = {"terms": {"distill": 1.0}, "distill": {"kind": "uld"}}
    final = run.run(config.parse(values), str(tmp_path / "student"))
    assert 0 < final["train/divergence"] <= 2
    assert 0 < final["train/supervised_fraction"] < 1
    values["objective"] = {"terms": {"distill": 1.0}}
    with pytest.raises(InputError, match=r"roles\.teacher\.init_from = .*: has another tokenizer than the policy"):
        run.run(config.parse(values), str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
