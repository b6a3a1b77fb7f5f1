"""Preference optimisation: against TRL and OpenRLHF, and how batches are cut."""

import dataclasses
import functools
import re

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import objectives
from research.errors import InputError
from research.objectives import preference
from research.objectives.answers import Places
from research.objectives.types import Context
from research.ops.head import Head
from research.ops.losses import TargetLogProbs, target_log_probs
from research.ops.preferences import LOSSES, Options

DPO, KTO, CPO = (goldens.load(family) for family in ("dpo", "kto", "orpo_cpo"))
KINDS = {"exo_pair": "exo", "nca_pair": "nca", "bco_pair": "bco", "sppo_hard": "sppo", "ipo": "ipo_mean"}


def named(names):
    """Golden cases; those of the second batch are slow tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] if re.match(r"[a-z_]+_1(_|$)", name) else []) for name in names]


def side_by_side(rows):
    """[2 n, T] of n chosen and n rejected answers -> [n, 2 T], a row for each pair."""
    return np.concatenate(np.split(np.asarray(rows, np.float32), 2), axis=1)


def places_of(mask):
    """Where the answers of pairs lie in such rows; mask [2 n, T] says which positions predict their tokens."""
    counted = side_by_side(mask)
    number = np.broadcast_to(np.arange(counted.shape[1]) // mask.shape[1], counted.shape)
    return Places(jnp.zeros(counted.shape, jnp.int32), jnp.asarray(counted), jnp.asarray(number, jnp.int32), 2)


def objective_of(**options):
    """The Pairs or Verdicts of a preference term."""
    return preference.make(**options).loss.__self__


def of_pairs(pairs, mask, policy, reference, collision=None):
    """The mean loss of a whole batch and its gradient by the policy's log-probs, [2 n, T]; and the metrics."""
    places, collision = places_of(mask), None if collision is None else side_by_side(collision)
    reference = None if reference is None else side_by_side(reference)
    start = pairs.objective().init_carry({})

    def loss(policy):
        said, gathered = TargetLogProbs(policy, collision), ()
        if pairs.sft or pairs.row.matched:
            gathered = jax.lax.stop_gradient(pairs.gathered(pairs.tables(places, said, reference)))
        rows = jnp.arange(policy.shape[0])
        out = pairs.of_answers(places, said, reference, Context(None, 0, rows, carry=start, gathered=gathered))
        return out.loss_sum / out.weight, out

    (value, out), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(side_by_side(policy)))
    values, weights = out.per_token
    np.testing.assert_allclose(jnp.sum(values * weights), out.loss_sum, rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(weights), out.weight, rtol=1e-5)
    metrics = {name: float(total / weight) for name, (total, weight) in out.metrics.items()}
    return value, np.concatenate(np.split(np.asarray(gradient), 2, axis=1)), metrics


def options_of(h):
    """The options of `make` for a case of TRL's DPO."""
    kind = h.get("loss_type", "sigmoid")
    if kind == "sigmoid_norm":
        return {"kind": "sigmoid", "beta": h["beta"], "length_normalized": True}
    options = {"kind": KINDS.get(kind, kind), "beta": h["beta"]}
    if kind in ("exo_pair", "robust", "aot", "aot_unpaired"):
        options["label_smoothing"] = h["label_smoothing"]
    if kind == "discopop":
        options["tau"] = h["discopop_tau"]
    if kind == "bco_pair":
        options["shift_decay"] = 1.0
    if "f_divergence" in h:
        options["divergence"] = h["f_divergence"].removesuffix("_divergence")
        if options["divergence"] == "alpha":
            options["divergence_alpha"] = h["f_alpha_divergence_coef"]
    return options | {name: h[name] for name in ("ld_alpha",) if name in h}


@pytest.mark.parametrize("name", named(n for n in DPO if "openrlhf" not in n))
def test_dpo_and_its_kin_of_trl(name):
    case = DPO[name]
    h, inputs = case.hparams, case.inputs
    mask = inputs["completion_mask"][:, 1:]
    policy, reference = inputs["policy_per_token_logps"], inputs["ref_per_token_logps"]
    run = functools.partial(of_pairs, mask=mask, policy=policy, reference=reference)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    sft = -np.sum(policy[: len(policy) // 2]) / np.sum(mask[: len(mask) // 2])
    if h.get("loss_type") == "sft":
        value, gradient, metrics = run(objective_of(beta=h["beta"], sft=1.0))
        pairs, pairs_gradient, _ = run(objective_of(beta=h["beta"]))
        close(metrics["sft_nll"], sft)
        value, gradient = value - pairs, gradient - pairs_gradient
    elif "loss_types" in h:
        first, second, third = h["loss_weights"]
        value, gradient, _ = run(objective_of(beta=h["beta"], sft=third / first))
        other, other_gradient, _ = run(objective_of(kind="bco", beta=h["beta"], shift_decay=1.0))
        value, gradient = first * value + second * other, first * gradient + second * other_gradient
    else:
        wpo = {"wpo": True} if "log_sum_sq_probs" in inputs else {}
        value, gradient, metrics = run(objective_of(**options_of(h), **wpo), collision=inputs.get("log_sum_sq_probs"))
        if "reward_accuracy" in case.outputs and not LOSSES[options_of(h)["kind"]].mean:
            close(metrics["accuracy"], case.outputs["reward_accuracy"])
            close(metrics["reward_chosen"], case.outputs["rewards_chosen_mean"], rtol=1e-4)
            close(metrics["reward_rejected"], case.outputs["rewards_rejected_mean"], rtol=1e-4)
    close(value, case.outputs["loss"])
    close(gradient, np.where(mask > 0, case.outputs["grad_policy_logps"], 0))  # TRL sums what is masked too, as 0


@pytest.mark.parametrize("name", [n for n in DPO if "openrlhf" in n])
def test_cdpo_and_ipo_of_openrlhf(name):
    case = DPO[name]
    sums = [
        jnp.asarray(case.inputs[f"{model}_{side}"]) for model in ("policy", "ref") for side in ("chosen", "rejected")
    ]
    kind = "ipo" if "ipo" in name else "cdpo"
    options = Options(case.hparams["beta"], label_smoothing=case.hparams.get("label_smoothing", 0.0))

    def loss(chosen, rejected):
        return jnp.mean(LOSSES[kind].function(chosen - sums[2], rejected - sums[3], options))

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(*sums[:2])
    np.testing.assert_allclose(value, case.outputs["loss"], rtol=1e-5)
    for gradient, side in zip(gradients, ("chosen", "rejected"), strict=True):
        if f"grad_{side}" in case.outputs:
            np.testing.assert_allclose(gradient, case.outputs[f"grad_{side}"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", named(KTO))
def test_kto_of_trl(name):
    case, h = KTO[name], KTO[name].hparams
    weights = {name: h[name] for name in ("desirable_weight", "undesirable_weight")}
    term = objective_of(kind=h["loss_type"], beta=h["beta"], **weights)
    sums = {k: np.sum(case.inputs[f"{k}_per_token_logps"], axis=1) for k in ("kl_policy", "kl_ref")}
    kl = max(0.0, np.mean(sums["kl_policy"] - sums["kl_ref"])) if h["loss_type"] == "kto" else 0.0
    policy = jnp.asarray(case.inputs["policy_per_token_logps"], jnp.float32)
    counted = jnp.ones(policy.shape)
    places = Places(jnp.zeros(policy.shape, jnp.int32), counted, jnp.zeros(policy.shape, jnp.int32), 1)
    judged = jnp.asarray(case.inputs["label"], jnp.float32)[:, None]
    context = Context(None, 0, jnp.arange(len(policy)), carry=term.objective().init_carry({}))

    def loss(policy):
        reference = jnp.asarray(case.inputs["ref_per_token_logps"], jnp.float32)
        out = term.of_answers(places, judged, jnp.float32(kl), (policy, reference), context)
        return out.loss_sum / out.weight

    value, gradient = jax.value_and_grad(loss)(policy)
    np.testing.assert_allclose(value, case.outputs["loss"], rtol=1e-5)
    np.testing.assert_allclose(kl, case.outputs["kl"], rtol=1e-5)
    np.testing.assert_allclose(gradient, case.outputs["grad_policy_logps"], rtol=2e-5, atol=1e-7)


def reference_free(h, name):
    """The options of `make` for a case of TRL's CPO or ORPO; the kinds hinge and ipo are functions alone here."""
    if name.startswith("orpo"):
        return {"kind": "orpo", "beta": h["beta"]}
    kind = "alphapo" if h["alpha"] else name.split("_")[1].replace("sigmoid", "cpo")
    options = {"kind": kind, "beta": h["beta"], "sft": h["cpo_alpha"], "label_smoothing": h["label_smoothing"]}
    return options | {"cpo": {}, "simpo": {"gamma": h["simpo_gamma"]}}.get(
        kind, {"gamma": h["simpo_gamma"], "alpha": h["alpha"]}
    )


@pytest.mark.parametrize("name", named(CPO))
def test_orpo_cpo_simpo_and_alphapo_of_trl(name):
    case, h = CPO[name], CPO[name].hparams
    labels, logits = case.inputs["labels"][:, 1:], jnp.asarray(case.inputs["logits"], jnp.float32)
    mask, ids = labels != -100, case.inputs["input_ids"][:, 1:]
    bare = next((kind for kind in ("hinge", "ipo") if f"cpo_{kind}" in name), None)
    options = {"kind": "cpo", "beta": h["beta"], "sft": h["cpo_alpha"]} if bare else reference_free(h, name)
    term = objective_of(**options)
    if bare:
        kind = "ipo_mean" if bare == "ipo" else bare
        term = dataclasses.replace(term, kind=kind, reference="")
    all_tokens = np.asarray(case.inputs["attention_mask"][:, 1:], np.float32)
    if name.startswith("orpo"):  # TRL's cross-entropy there is that of prompts too
        term = dataclasses.replace(term, sft=0.0)

    def loss(logits):
        head = Head(jnp.eye(logits.shape[-1]), None, 0.0)
        policy = target_log_probs(logits[:, :-1], head, jnp.asarray(ids), chunk=3).target
        value = of_answers(term, places_of(mask), policy)
        if name.startswith("orpo"):
            n = len(policy) // 2
            value -= jnp.sum(policy[:n] * all_tokens[:n]) / np.sum(all_tokens[:n])
        return value

    def of_answers(term, places, policy):
        said = TargetLogProbs(jnp.concatenate(jnp.split(policy, 2), axis=1))
        gathered = jax.lax.stop_gradient(term.gathered(term.tables(places, said, None)))
        context = Context(
            None, 0, jnp.arange(len(policy) // 2), carry=term.objective().init_carry({}), gathered=gathered
        )
        out = term.of_answers(places, said, None, context)
        return out.loss_sum / out.weight

    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, case.outputs["loss"], rtol=2e-5)
    np.testing.assert_allclose(gradient, case.outputs["grad_logits"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_label_smoothing_is_taken_or_refused(kind):
    if "label_smoothing" in LOSSES[kind].takes:
        assert objective_of(kind=kind, label_smoothing=0.1).options.label_smoothing == 0.1
        return
    with pytest.raises(InputError, match=rf"label_smoothing = 0.1: is of sigmoid, .*Leave it out of kind = '{kind}'"):
        preference.make(kind=kind, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sigmod"}, r"kind = 'sigmod'.*sigmoid"),
        ({"gamma": 1.0}, r"gamma = 1.0: is of simpo, alphapo. Leave it out of kind = 'sigmoid'"),
        ({"tau": 1.0}, "tau = 1.0: is of discopop"),
        ({"kind": "simpo", "alpha": 0.1}, "alpha = 0.1: is of alphapo"),
        ({"kind": "nca", "shift_decay": 0.9}, "shift_decay = 0.9: is of bco"),
        ({"desirable_weight": 2.0}, "desirable_weight = 2.0: is of kto, apo_zero_unpaired"),
        ({"kind": "cdpo"}, "label_smoothing = 0: .*above 0"),
        ({"kind": "exo"}, "label_smoothing = 0: .*above 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing = 0.5: must be in \[0, 0.5\)"),
        ({"beta": 0.0}, "beta = 0.0: must be above 0"),
        ({"divergence": "kl"}, "divergence = 'kl'"),
        ({"kind": "sppo", "divergence": "js"}, "divergence = 'js': isn't of kind = 'sppo'"),
        ({"divergence": "js", "divergence_alpha": 0.5}, "divergence_alpha = 0.5: is of divergence = 'alpha'"),
        ({"kind": "ipo_mean", "length_normalized": True}, "length_normalized = True: .*means already"),
        ({"kind": "simpo", "ld_alpha": 0.5}, "ld_alpha = 0.5: isn't of kind = 'simpo'"),
        ({"ld_alpha": 1.5}, r"ld_alpha = 1.5: must be in \[0, 1\]"),
        ({"kind": "aot", "wpo": True}, "wpo = True: isn't of kind = 'aot'"),
        ({"kind": "kto", "sft": 1.0}, "sft = 1.0: is about chosen answers"),
        ({"sft": -1.0}, "sft = -1.0: must be at least 0"),
        ({"kind": "orpo", "cached": True}, "cached = True: kind = 'orpo' has no reference"),
        ({"kind": "kto", "cached": True}, "cached = True: kind = 'kto' asks about answers to other prompts"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        objectives.load({"terms": {"preference": options}})


def metrics_of(**values):
    return {"log_prob_chosen": -40.0, "log_prob_rejected": -50.0, **values}


@pytest.mark.parametrize(
    ("values", "first", "about"),
    [
        (
            {"preference_loss": 0.80, "start_loss": 0.693},
            True,
            {"start": "begins at 0.8, and is 0.693 where the policy"},
        ),
        ({"preference_loss": 0.693, "start_loss": 0.693}, True, {}),
        ({"preference_loss": 0.80, "start_loss": 0.693}, False, {}),
        (
            {"change_chosen": -3.0, "change_rejected": -9.0},
            False,
            {"displacement": r"fallen by 3 nats.*by 9 .*sft = 0.1"},
        ),
        ({"change_chosen": 3.0, "change_rejected": -9.0}, False, {}),
        ({"change_chosen": -0.1, "change_rejected": -9.0}, False, {}),
        ({"identical": 0.25}, False, {"identical": "25.0% of the pairs have one answer on both sides"}),
        ({"unused": 0.5}, False, {"unused": "50.0% of the answers are third or worse"}),
    ],
)
def test_what_goes_wrong_is_said(values, first, about):
    lines = preference.make().notices(metrics_of(**values), first)
    assert lines.keys() == about.keys()
    assert all(re.search(text, lines[name]) for name, text in about.items())


def test_equal_answers_are_no_matter_to_a_loss_of_rewards():
    assert not preference.make(kind="nca").notices(metrics_of(identical=0.25), False)


def test_equal_answers_are_known_by_their_tokens():
    tokens = jnp.array([[1, 2, 3, 1, 2, 3, 0], [1, 2, 3, 3, 2, 1, 0], [4, 4, 0, 4, 4, 4, 0]])
    number = jnp.array([[0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 1, 2], [0, 0, 2, 1, 1, 1, 2]])
    hashes = Places(tokens, (number < 2).astype(jnp.float32), number, 2).hashes()
    np.testing.assert_array_equal(hashes[:, 0] == hashes[:, 1], [True, False, False])
