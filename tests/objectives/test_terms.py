"""Several terms on one batch: each has its own options, parameters, carry, draws and sources."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from contexts import context
from test_train import CONFIG, INITIAL, MODEL, SMALL, close, make_batch

from research import objectives, params, train
from research.devices import sharding
from research.errors import InputError
from research.models.transformer import make_model
from research.objectives import distill, terms
from research.objectives.types import Forward, LossOut, Objective, good_answers, next_token_targets
from research.sources import fields, tokenizers

ROWS, LENGTH, D = 8, 24, SMALL.config.d_model
RATE = lambda step: jnp.asarray(0.1)  # noqa: E731


def make_masked(share=0.5, shift=0.0):
    """Hidden states at positions drawn at random are to be a learned vector, less a running mean of the gathered row
    means. Its carry has the draws of the last batch. It needs everything that a term may have."""

    def gather(forward, batch):
        return jnp.mean(forward.hidden(), axis=(1, 2)) + shift

    def loss(forward, batch, context):
        draws = jax.vmap(lambda key: jax.random.bernoulli(key, share, (LENGTH,)))(context.row_keys())
        weights = ((batch["segment_ids"] > 0) & draws).astype(jnp.float32)
        center = context.carry["mean"] + jnp.mean(context.gathered)
        each = jnp.mean(jnp.square(forward.hidden() - context.params["vector"][None, None] - center), axis=-1)
        whole = jnp.zeros((ROWS, LENGTH)).at[context.rows].set(draws.astype(jnp.float32))
        statistics = {"draws": whole, "sum": jnp.sum(weights * each), "count": jnp.sum(weights)}
        return LossOut(jnp.sum(weights * each), jnp.sum(weights), {}, statistics)

    def update(carry, sums):
        return {"mean": 0.5 * carry["mean"] + 0.1 * sums["sum"] / sums["count"], "draws": sums["draws"]}

    return Objective(
        loss=loss,
        gather=gather,
        params=lambda models: {"vector": params.ParamSpec((D,), ("embed",), jax.nn.initializers.ones)},
        init_carry=lambda batch: {"mean": jnp.zeros(()), "draws": jnp.zeros((ROWS, LENGTH))},
        update=update,
    )


@pytest.fixture(scope="module")
def two_of_a_kind():
    kinds = {"first": (0.5, make_masked()), "second": (1.0, make_masked(share=0.3, shift=1.0))}
    return {
        name: terms.Term(objective, lambda step, weight=weight: jnp.asarray(weight), name=name)
        for name, (weight, objective) in kinds.items()
    }


def begin(loaded, batch, mesh=None):
    specs = {"policy": SMALL.specs, "objectives": {name: term.specs({}) for name, term in loaded.items()}}
    values = params.init(specs, jax.random.PRNGKey(0))
    values = values if mesh is None else jax.device_put(values, params.shardings(specs, mesh))
    carry = terms.init_carry(loaded, batch)
    return train.init_state(values, optax.sgd(0.1), jax.random.PRNGKey(1), carry=carry)


def stepper(loaded, microbatches=1):
    return jax.jit(train.TrainStep(loaded, {"policy": SMALL}, optax.sgd(0.1), RATE, microbatches))


def run_steps(loaded, microbatches=1, mesh=None, count=2):
    batches = [make_batch(seed=seed) for seed in range(count)]
    if mesh is not None:
        batches = jax.device_put(batches, sharding.named(mesh, ("batch", "time")))
    state, step = begin(loaded, batches[0], mesh), stepper(loaded, microbatches)
    for batch in batches:
        state, metrics = step(state, {}, batch)
    return state, metrics


@pytest.fixture(scope="module")
def whole(two_of_a_kind):
    return run_steps(two_of_a_kind)


def assert_same(one, two):
    for name in ("first", "second"):
        np.testing.assert_array_equal(one.carry[name]["draws"], two.carry[name]["draws"])
    close((one.params, one.carry), (two.params, two.carry), rtol=1e-3, atol=1e-5)


def test_two_terms_of_a_kind_have_their_own_parameters_carries_and_draws(whole):
    state, metrics = whole
    own, carry = state.params["objectives"], state.carry
    for name in ("first", "second"):
        assert np.abs(np.asarray(own[name]["vector"]) - 1).max() > 1e-4
    assert not np.allclose(own["first"]["vector"], own["second"]["vector"])
    assert float(carry["first"]["mean"]) != float(carry["second"]["mean"])
    draws = {name: np.asarray(carry[name]["draws"]) for name in carry}
    assert 0.4 < draws["first"].mean() < 0.6
    assert 0.2 < draws["second"].mean() < 0.4
    assert len({row.tobytes() for row in draws["first"]}) == ROWS  # each row has its own
    loss, first, second = (float(metrics[k][0] / metrics[k][1]) for k in ("loss", "first/loss", "second/loss"))
    np.testing.assert_allclose(loss, 0.5 * first + second, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_change_no_draw_and_no_update(two_of_a_kind, whole, microbatches):
    assert_same(run_steps(two_of_a_kind, microbatches)[0], whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_nor_does_a_mesh(two_of_a_kind, whole, microbatches):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2} if microbatches == 1 else {"data": 4, "sequence": 2})
    with jax.set_mesh(mesh):
        sharded, _ = run_steps(two_of_a_kind, microbatches, mesh)
    assert_same(sharded, whole[0])


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, two_of_a_kind, whole):
    step, batches = stepper(two_of_a_kind), [make_batch(seed=seed) for seed in range(2)]
    first, _ = step(begin(two_of_a_kind, batches[0]), {}, batches[0])
    restored = runs.restored(first, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, step(restored, {}, batches[1])[0], whole[0])


def test_what_is_gathered_is_of_all_rows_in_order():
    whole = make_batch()
    first = lambda batch: batch["tokens"][:, 0].astype(jnp.float32)  # noqa: E731

    def loss(forward, batch, context):
        one = jnp.ones(())
        metrics = {
            "rows": (jnp.sum(context.rows).astype(jnp.float32), one),
            "wrong": (jnp.sum(jnp.abs(context.gathered - first(whole))), one),
            "misplaced": (jnp.sum(jnp.abs(context.gathered[context.rows] - first(batch))), one),
        }
        return LossOut(jnp.sum(forward.hidden()), one, metrics)

    loaded = {"mine": terms.Term(Objective(loss=loss, gather=lambda forward, batch: first(batch)), RATE)}
    assert len(set(np.asarray(first(whole)))) > 2
    step = train.TrainStep(loaded, {"policy": SMALL}, optax.sgd(0.1), RATE, microbatches=4)
    values = {"policy": params.init(SMALL.specs, jax.random.PRNGKey(0))}
    _, metrics = jax.jit(step)(train.init_state(values, step.optimizer, jax.random.PRNGKey(1)), {}, whole)
    sums = {name: float(metrics[name][0]) for name in ("rows", "wrong", "misplaced")}
    assert sums == {"rows": sum(range(ROWS)), "wrong": 0, "misplaced": 0}


def test_a_whole_batch_is_gathered_in_the_pass_that_the_loss_makes():
    """Traced once, and with one microbatch no product more than without gathering."""
    spec = {"weak_to_strong": {"loss": "auxiliary_confidence", "own_labels": "argmax"}}
    by_batch = {"weak_to_strong": {"loss": "auxiliary_confidence", "own_labels": "batch"}}
    model = make_model(CONFIG.__class__(**{**vars(SMALL.config), "num_labels": 3}))
    labels = jnp.asarray(np.random.default_rng(0).dirichlet([1, 1, 1], (ROWS, LENGTH)).astype(np.float32))
    batch, products = make_batch() | {"label_probs": labels}, []
    values = {"policy": params.init(model.specs, jax.random.PRNGKey(0))}
    for options in (spec, by_batch):
        calls = []
        counted = model._replace(hidden=lambda *a, calls=calls: calls.append(1) or model.hidden(*a))
        step = train.TrainStep(objectives.load({"terms": options}), {"policy": counted}, optax.sgd(0.1), RATE)
        state = train.init_state(values, step.optimizer, jax.random.PRNGKey(1))
        text = jax.jit(step).lower(state, {}, batch).compile().as_text()
        assert len(calls) == 1
        products.append(text.count(" dot(") + text.count("custom-call("))
    assert products[0] > 0
    assert products[1] == products[0]


def test_a_forward_on_another_batch_makes_its_passes_once_and_leaves_the_first_alone():
    calls, batch = [], make_batch()
    counted = MODEL._replace(hidden=lambda p, b: calls.append(1) or MODEL.hidden(p, b))
    forward = Forward({"policy": counted}, {"policy": INITIAL}, batch)
    other = {**batch, "tokens": jnp.where(batch["loss_mask"] > 0, 5, batch["tokens"])}
    masked = forward.on(other)
    first, again = masked.hidden(), masked.hidden()
    assert first is again
    assert len(calls) == 1
    np.testing.assert_array_equal(first, MODEL.hidden(INITIAL, other))
    assert not np.allclose(first, forward.hidden())
    np.testing.assert_array_equal(forward.hidden(), MODEL.hidden(INITIAL, batch))
    np.testing.assert_array_equal(masked.head().kernel, forward.head().kernel)


KD = {"terms": {"kd": {"objective": "distill", "weight": 0.5, "kind": "jsd", "beta": 0.3}, "sft": 1.0}}


def test_named_terms_and_the_old_spelling_are_the_same():
    old = {"terms": {"distill": 0.5, "sft": 1.0}, "distill": {"kind": "jsd", "beta": 0.3}}
    beside = {"terms": {"kd": {"objective": "distill", "weight": 0.5}, "sft": {}}, "kd": {"kind": "jsd", "beta": 0.3}}
    batch = make_batch()
    models = {"policy": MODEL, "teacher": MODEL}
    values = {"policy": INITIAL, "teacher": jax.tree.map(lambda x: 1.1 * x, INITIAL)}
    sums = []
    for spec in (KD, old, beside):
        loaded = objectives.load(spec)
        outs = terms.losses(loaded, Forward(models, values, batch), inputs_of(batch))
        sums.append(float(terms.weighted_sum(loaded, outs, jnp.zeros((), jnp.int32))))
    assert sums[0] == sums[1] == sums[2] > 0


def test_two_distillations_have_two_teachers():
    spec = {"terms": {name: {"objective": "distill", "teachers": {name: 1.0}} for name in ("small", "large")}}
    loaded, batch = objectives.load(spec), make_batch()
    assert [term.objective.frozen for term in loaded.values()] == [("small",), ("large",)]
    values = {"policy": INITIAL} | {
        name: jax.tree.map(lambda x, scale=scale: scale * x, INITIAL)
        for name, scale in (("small", 1.1), ("large", 1.5))
    }
    forward = Forward(dict.fromkeys(values, MODEL), values, batch)
    outs = terms.losses(loaded, forward, inputs_of(batch))
    metrics = terms.metrics(loaded, outs, jnp.zeros((), jnp.int32))
    each = {
        name: float(distill.make(teachers={name: 1.0}).loss(forward, batch, context(batch)).loss_sum)
        for name in spec["terms"]
    }
    assert each["small"] < each["large"]
    for name, total in each.items():
        np.testing.assert_allclose(metrics[f"{name}/loss"][0], total, rtol=1e-6)


def inputs_of(batch):
    return terms.Inputs(jax.random.PRNGKey(0), jnp.zeros((), jnp.int32), terms.row_numbers(batch), {})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"terms": {"kd": {"objective": "distil"}}},
            r"objective\.terms\.kd\.objective = 'distil': .*Did you mean 'distill'",
        ),
        (
            {"terms": {"kd": {"objective": "distill", "kind": "jds"}}},
            r"objective\.terms\.kd\.kind = 'jds': .*Did you mean 'jsd'",
        ),
        ({"terms": {"kd": {"objective": "distill"}}, "kd": {"kind": "jds"}}, r"objective\.kd\.kind = 'jds'"),
        (
            {"terms": {"kd": {"objective": "distill", "wieght": 1.0}}},
            r"objective\.terms\.kd\.wieght: .*Did you mean 'weight'",
        ),
        ({"terms": {"kd": {"objective": "distill", "kind": "jsd"}}, "kd": {"kind": "jsd"}}, "Leave one out"),
        ({"terms": {"kd": {"objective": "distill", "weight": "big"}}}, r"objective\.terms\.kd\.weight = 'big'"),
        (
            {"terms": {"kd": {"objective": "distill", "weight": {"start": 1}}}},
            r"objective\.terms\.kd\.weight = {'start': 1}",
        ),
        ({"terms": {"sft": float("nan")}}, r"objective\.terms\.sft = nan: a weight is a finite number"),
        (
            {"terms": {"sft": {"weight": {"start": "0", "end": 1.0, "steps": 9}}}},
            r"objective\.terms\.sft\.weight\.start = '0': a weight is a finite number",
        ),
        (
            {"terms": {"sft": {"start": 0.0, "end": 1.0, "steps": 0}}},
            r"objective\.terms\.sft\.steps = 0: must be a whole number, at least 1",
        ),
        ({"terms": {"sft": {"start": 1.0}}}, r"objective\.terms\.sft = {'start': 1.0}: a schedule has the fields"),
        ({"terms": {"kd": 1.0}}, r"objective\.terms\.kd: no module research/objectives/kd\.py"),
        ({"terms": {"types": 1.0}}, r"objective\.terms\.types: .* has no function make"),
        ({"terms": {"sft": {"sources": 3}}}, r"objective\.terms\.sft\.sources = 3"),
        ({"terms": {"sft": {"sources": [3]}}}, r"objective\.terms\.sft\.sources = \[3\]"),
        ({"terms": {"sft": 1.0}, "sft": 2.0}, r"objective\.sft = 2\.0: is a section"),
        ({"terms": {"sft": 1.0}, "stf": {}}, "Did you mean 'sft'"),
        (
            {"terms": {"w": {"objective": "weak_to_strong", "radios": 1.0}}},
            r"objective\.terms\.w\.radios: .*Did you mean 'radius'",
        ),
    ],
)
def test_errors_name_the_field_as_it_is_spelt(spec, message):
    with pytest.raises(InputError, match=message):
        objectives.load(spec)


def test_a_make_with_an_option_of_a_reserved_name_is_an_error_for_its_author(tmp_path, monkeypatch):
    (tmp_path / "heavy.py").write_text("def make(weight=1.0):\n    return None\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"heavy\.py has an option 'weight', which is a field of every term"):
        objectives.load({"terms": {"heavy": 1.0}})


def test_a_make_that_needs_a_tokenizer_is_checked_with_a_stand_in(tmp_path, monkeypatch):
    lines = (
        "def special_tokens(tokenizer, name):",
        "    return (name,)",
        "def make(tokenizer, name='<|gap|>'):",
        "    return tokenizer.special(name)",
    )
    (tmp_path / "gaps.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    byte = tokenizers.make_tokenizer(tokenizers.TokenizerSpec(), lambda: iter(()))
    stood_in = objectives.load({"terms": {"gaps": {"name": "<|hole|>"}}})["gaps"].objective
    assert stood_in == byte.size  # the first free id
    ours = byte.with_tokens(["<|tool|>", "<|hole|>"])
    assert objectives.load({"terms": {"gaps": {"name": "<|hole|>"}}}, ours)["gaps"].objective == byte.size + 1


SOURCES = ("code", "prose", "maths")


def mixed_batch():
    """Rows whose segments are of three sources."""
    batch = make_batch()
    return batch | {"source": (batch["segment_ids"] + jnp.arange(ROWS, dtype=jnp.int32)[:, None]) % 3}


def only(batch, numbers):
    counts = np.isin(np.asarray(batch["source"]), numbers)
    return {k: jnp.where(counts, batch[k], 0) if k in ("segment_ids", "loss_mask") else batch[k] for k in batch}


def evaluated(spec, batch, sources=SOURCES):
    step = train.EvalStep(objectives.load({"terms": spec}), {"policy": MODEL}, sources)
    out = jax.jit(step)({"policy": INITIAL}, {}, batch, jax.random.PRNGKey(0))
    return {name: (float(total), float(weight)) for name, (total, weight) in out.items()}


@pytest.mark.parametrize(("sources", "numbers"), [(("code",), (0,)), ("maths", (2,)), (("code", "maths"), (0, 2))])
def test_a_term_counts_its_own_sources_alone(sources, numbers):
    batch = mixed_batch()
    out = evaluated({"part": {"objective": "sft", "sources": sources}, "next_token": 1.0}, batch)
    # The forward pass sees the true batch: another's loss on the own tokens alone is the same.
    targets, weights = next_token_targets(only(batch, numbers), only(batch, numbers)["loss_mask"])
    log_p = jax.nn.log_softmax(MODEL.hidden(INITIAL, batch) @ MODEL.unembed(INITIAL).kernel)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(out["part/loss"], (jnp.sum(nll * weights), jnp.sum(weights)), rtol=1e-4)
    assert 0 < out["part/loss"][1] < evaluated({"sft": 1.0}, batch)["loss"][1]
    everything = evaluated({"next_token": 1.0}, batch)
    np.testing.assert_allclose(out["next_token/loss"], everything["loss"], rtol=1e-6)


def test_labels_of_other_sources_do_not_count():
    batch = mixed_batch()
    labels = jnp.ones((ROWS, LENGTH, 3)) / 3
    view = terms.Term(Objective(loss=None), RATE, ("prose",), "c").view(batch | {"label_probs": labels}, SOURCES)
    np.testing.assert_array_equal(view["label_probs"].sum(-1) > 0, batch["source"] == 1)
    np.testing.assert_array_equal(view["tokens"], batch["tokens"])
    assert terms.Term(Objective(loss=None), RATE).view(batch, SOURCES) is batch


def test_microbatches_divide_by_the_tokens_of_the_terms_sources():
    spec = {
        "terms": {"a": {"objective": "sft", "sources": ("code",)}, "b": {"objective": "next_token", "sources": "prose"}}
    }
    states = []
    for microbatches in (1, 4):
        step = train.TrainStep(
            objectives.load(spec), {"policy": MODEL}, optax.sgd(1.0), RATE, microbatches, sources=SOURCES
        )
        state = train.init_state({"policy": INITIAL}, step.optimizer, jax.random.PRNGKey(1))
        states.append(jax.jit(step)(state, {}, mixed_batch()))
    close(states[1][0].params, states[0][0].params)
    for name in ("a/loss", "b/loss", "tokens/code"):
        np.testing.assert_allclose(states[1][1][name], states[0][1][name], rtol=1e-4)


def test_an_unknown_source_is_named():
    with pytest.raises(
        InputError, match=r"objective\.terms\.sft\.sources: the data has no source 'cod'.*Did you mean 'code'"
    ):
        evaluated({"sft": {"sources": ("cod",)}}, mixed_batch())
    with pytest.raises(InputError, match=r"no source 'code'\. Name it in data\.sources"):
        evaluated({"sft": {"sources": ("code",)}}, make_batch(), ())
    assert evaluated({"sft": {"sources": ("code",)}}, make_batch(), ("code",)) == evaluated(
        {"sft": 1.0}, make_batch(), ()
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sft", {"z_loss": 0.01, "label_smoothing": 0.1}),
        ("next_token", {}),
        ("distill", {"temperature": 2.0, "scale_by_temperature": True, "teachers": {"teacher": 0.25, "other": 0.75}}),
    ],
)
def test_the_losses_of_the_sources_are_those_of_terms_tied_to_them(name, options):
    batch, models = mixed_batch(), dict.fromkeys(("policy", "teacher", "other"), MODEL)
    frozen = {role: jax.tree.map(lambda x, s=s: s * x, INITIAL) for role, s in (("teacher", 1.2), ("other", 0.7))}
    tied = {source: {"objective": name, **options, "sources": source} for source in SOURCES}
    step = train.EvalStep(objectives.load({"terms": tied | {name: options}}), models, SOURCES)
    out = jax.jit(step)({"policy": INITIAL}, frozen, batch, jax.random.PRNGKey(0))
    for number, source in enumerate(SOURCES):
        assert float(out[f"{name}/loss/{source}"][1]) > 0
        np.testing.assert_allclose(out[f"{name}/loss/{source}"], out[f"{source}/loss"], rtol=1e-4)
        here = np.asarray((batch["segment_ids"] > 0) & (batch["source"] == number))
        assert float(out[f"tokens/{source}"][0]) == here.sum()
    for i in (0, 1):
        parts = sum(float(out[f"{name}/loss/{source}"][i]) for source in SOURCES)
        np.testing.assert_allclose(parts, out[f"{name}/loss"][i], rtol=1e-5)


def test_training_reports_them_by_term_and_one_source_adds_no_metric():
    spec = {"terms": {"a": {"objective": "sft", "sources": ("code", "maths")}, "b": {"objective": "next_token"}}}
    outs = []
    for microbatches in (1, 2):
        step = train.TrainStep(
            objectives.load(spec), {"policy": MODEL}, optax.sgd(1.0), RATE, microbatches, sources=SOURCES
        )
        state = train.init_state({"policy": INITIAL}, step.optimizer, jax.random.PRNGKey(1))
        outs.append(jax.jit(step)(state, {}, mixed_batch())[1])
    assert {name for name in outs[0] if "/loss/" in name} == {f"{t}/loss/{s}" for t in "ab" for s in SOURCES}
    assert float(outs[0]["a/loss/prose"][1]) == 0
    for name in outs[0]:
        if "/loss" in name or name.startswith("tokens"):
            np.testing.assert_allclose(outs[1][name], outs[0][name], rtol=1e-4)
    alone = evaluated({"sft": 1.0}, make_batch(), ("code",))
    assert not [name for name in alone if "/" in name]


@pytest.mark.parametrize(("names", "bad"), [(("pair",), ("side", 1)), (("desirable",), ("desirable", 0)), ((), None)])
def test_answers_that_are_not_to_be_imitated_are_left_out(names, bad):
    batch = fields.fake(fields.spec(fields.read_with(names), 4, {"time": 64}), 50)
    kept = np.array(good_answers(batch))
    out = batch[bad[0]] == bad[1] if bad else np.zeros((4, 64), bool)
    np.testing.assert_array_equal(kept, np.where(out, 0, batch["loss_mask"]))
    assert (kept.sum() < batch["loss_mask"].sum()) == bool(bad)
