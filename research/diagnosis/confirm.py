"""Counterfactuals: one change of the config or of the batches, some steps with it and without, and whether it helps."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research import optim
from research.config import Config
from research.diagnosis import trial
from research.diagnosis.probes import perturb
from research.diagnosis.subject import Batch, Params, Subject
from research.diagnosis.types import Diagnosis, Finding, number
from research.errors import InputError

STEPS = 30
_ALREADY = 1e-9  # losses that differ by less are the same
_BETTER = 0.02  # a loss must be lower by this share of itself, and by twice its noise, to count as lower
_MOVING = 1e-5  # of the parameters, that an update must be at least, for a twin to say something
TWIN = "inputs_exchanged"  # the change of CHANGES that is of the batches


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of a config.

    Attributes:
      text: what is changed, after "with".
      make: the config with the change; the same config where it changes nothing.
    """

    text: str
    make: Callable[[Config], Config]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a counterfactual gave.

    Attributes:
      helps: whether the loss is lower with the change.
      without, changed: the losses that were compared.
      text: a sentence.
    """

    helps: bool
    without: float
    changed: float
    text: str


def _optimizer(**fields) -> Callable[[Config], Config]:
    return lambda config: dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **fields))


def _in_float32(config: Config) -> Config:
    """Compute, and parameters that are trained, in float32."""
    model = dataclasses.replace(config.model, dtype="float32")
    optimizer = dataclasses.replace(config.optimizer, rounding="nearest")
    return dataclasses.replace(config, model=model, optimizer=optimizer, trained_dtype="float32")


def _times(factor: float) -> Callable[[Config], Config]:
    """All learning rates times a factor."""

    def make(config: Config) -> Config:
        own = config.optimizer
        groups = {
            name: {**group, "learning_rate": group["learning_rate"] * factor} if "learning_rate" in group else group
            for name, group in own.groups.items()
        }
        return _optimizer(learning_rate=own.learning_rate * factor, groups=groups)(config)

    return make


def _constant(config: Config) -> Config:
    """The highest learning rate at every step."""
    fresh = optim.OptimizerSpec()
    fields = {name: getattr(fresh, name) for name in ("decay_fraction", "decay_shape", "timescale", "cycles")}
    groups = {
        name: {field: value for field, value in group.items() if field not in ("delay_steps", "warmup_steps")}
        for name, group in config.optimizer.groups.items()
    }
    return _optimizer(schedule="constant", warmup_steps=0, delay_steps=0, groups=groups, **fields)(config)


def _other_order(config: Config) -> Config:
    return dataclasses.replace(config, seed=config.seed + 1, data=dataclasses.replace(config.data, shuffle=True))


def _without_dropout(config: Config) -> Config:
    return dataclasses.replace(config, adapter={k: v for k, v in config.adapter.items() if k != "dropout"})


def _option(name: str, change: Callable[[float], float]) -> Callable[[Config], Config]:
    """An option of the objective's terms, wherever a term sets it."""

    def changed(options: Mapping) -> dict:
        return {k: change(v) if k == name and isinstance(v, int | float) else v for k, v in options.items()}

    def make(config: Config) -> Config:
        made = {key: changed(value) for key, value in config.objective.items() if key != "terms"}
        terms = {
            term: changed(value) if isinstance(value, Mapping) else value
            for term, value in config.objective["terms"].items()
        }
        return dataclasses.replace(config, objective={**made, "terms": terms})

    return make


def exchanged(batch: Batch) -> Batch:
    """The batch with the tokens of its prompts exchanged by chance; of plain text, with all but the first of each
    document."""
    real = batch["segment_ids"] > 0
    prompts = real & (batch["loss_mask"] == 0) & (batch["positions"] > 0)
    shown = jnp.where(jnp.any(prompts), prompts, real & (batch["positions"] > 0))
    return {**batch, "tokens": perturb.letters(batch, shown)}


CHANGES: Mapping[str, Change] = {
    "learning_rate_up": Change("learning rates 10 times higher", _times(10)),
    "learning_rate_far_up": Change("learning rates 1000 times higher", _times(1000)),
    "learning_rate_down": Change("learning rates 10 times lower", _times(0.1)),
    "learning_rate_far_down": Change("learning rates 100 times lower", _times(0.01)),
    "constant_schedule": Change("the highest learning rate at every step", _constant),
    "no_clipping": Change("optimizer.clip_norm=0", _optimizer(clip_norm=0.0)),
    "no_weight_decay": Change("optimizer.weight_decay=0", _optimizer(weight_decay=0.0)),
    "standard_eps": Change("optimizer.eps=1e-8", _optimizer(eps=1e-8)),
    "adamw": Change("optimizer.name=adamw", _optimizer(name="adamw")),
    "float32_moments": Change("optimizer.mu_dtype=float32", _optimizer(mu_dtype="float32")),
    "float32": Change("model.dtype=float32 and trained_dtype=float32", _in_float32),
    "no_dropout": Change("no dropout in the adapter", _without_dropout),
    "all_trained": Change(
        "everything trained", lambda config: dataclasses.replace(config, trainable="", adapter={}, frozen_dtype="auto")
    ),
    "other_batches": Change("the data in another, random order", _other_order),
    "no_label_smoothing": Change("label_smoothing=0", _option("label_smoothing", lambda value: 0.0)),
    "beta_x0.1": Change("beta 10 times lower", _option("beta", lambda value: value / 10)),
    "beta_x10": Change("beta 10 times higher", _option("beta", lambda value: value * 10)),
}

_STRONGER = {"learning_rate_up": ("learning_rate_far_up",), "learning_rate_down": ("learning_rate_far_down",)}


def confirm(subject: Subject, diagnosis: Diagnosis, steps: int = STEPS) -> Diagnosis:
    """The diagnosis with its findings tried: each cause that names a change is confirmed where that change helps, and
    stands behind the confirmed ones where it doesn't.

    Args:
      subject: that was diagnosed; it stays as it is.
      diagnosis: of it.
      steps: how many are taken with the change, and without.
    """
    tried = [_tried(subject, finding, steps) for finding in diagnosis.findings]
    confirmed = [finding for finding in tried if finding.level == "confirmed"]
    others = [finding for finding in tried if finding.level != "confirmed"]
    return dataclasses.replace(diagnosis, findings=(*confirmed, *others))


def _tried(subject: Subject, finding: Finding, steps: int) -> Finding:
    """The finding after its change was tried, and where that doesn't help a stronger one."""
    named = finding.cause.counterfactual
    if subject.stage == "rl" and (named in CHANGES or named == TWIN):
        text = f"nothing: of reinforcement learning {steps} steps say too little. Change one thing, and run it again."
        return dataclasses.replace(finding, confirmation=text)
    if named == TWIN:
        outcome = twin(subject, steps)
        level = "confirmed" if outcome.helps else finding.level
        return dataclasses.replace(finding, level=level, confirmation=outcome.text)
    if named not in CHANGES:
        return finding
    for name in (named, *_STRONGER.get(named, ())):
        outcome = compare(subject, CHANGES[name], steps)
        if outcome.helps:
            return dataclasses.replace(finding, level="confirmed", confirmation=outcome.text)
    return dataclasses.replace(finding, confirmation=outcome.text)


def compare(subject: Subject, change: Change, steps: int = STEPS) -> Outcome:
    """Takes steps with a change and without, from the same beginning and on the same data."""
    changed_config = change.make(subject.config)
    if changed_config == subject.config:
        return Outcome(False, math.nan, math.nan, f"with {change.text}: that is what the config says already.")
    try:
        other = Subject.of(
            changed_config,
            change_parts=subject.change_parts,
            change_batch=subject.change_batch,
            devices=tuple(subject.mesh.devices.flat),
        )
    except InputError as error:
        return Outcome(False, math.nan, math.nan, f"with {change.text}: can't be tried ({error})")
    with jax.set_mesh(subject.mesh):
        own = restarted(subject)
        other = restarted(other, subject)
    without, noise = _result(trial.train(own, steps)[1])
    changed, _ = _result(trial.train(other, steps)[1])
    helps = _is_lower(changed, without, noise)
    text = (
        f"with {change.text}, {steps} steps end at a loss of {number(changed)}, and without at {number(without)}: "
        f"{'the change helps' if helps else 'the change does not help'}."
    )
    return Outcome(helps, without, changed, text)


def twin(subject: Subject, steps: int = STEPS) -> Outcome:
    """Takes steps from where the run is with inputs exchanged by chance, and without: where that costs nothing, targets
    don't follow from inputs, which is what `helps` then says. Zhang et al. 2017, arXiv:1611.03530, exchange labels."""
    own = subject.change_batch

    def change(batch: Batch) -> Batch:
        return exchanged(batch if own is None else own(batch))

    with jax.set_mesh(subject.mesh):
        here = begun(subject, subject.state.params)
    records = trial.train(here, steps)[1]
    moved = [record["train/update_ratio"] for record in records if "train/update_ratio" in record]
    if not moved or float(np.median(moved)) < _MOVING:
        text = f"with inputs exchanged by chance: {steps} steps at this learning rate change too little to tell."
        return Outcome(False, math.nan, math.nan, text)
    without, noise = _result(records)
    changed, _ = _result(trial.train(dataclasses.replace(here, change_batch=change), steps)[1])
    same = math.isfinite(changed) and not _is_lower(without, changed, noise)
    text = (
        f"with inputs exchanged by chance, {steps} steps end at a loss of {number(changed)}, and without at "
        f"{number(without)}: {'the targets do not follow from the inputs' if same else 'the inputs matter'}."
    )
    return Outcome(same, without, changed, text)


def restarted(subject: Subject, like: Subject | None = None) -> Subject:
    """The subject before its first step: with the first parameters of `like`, by default its own, where these are the
    same arrays, and a new optimizer."""
    source = like or subject
    params = source.initial()
    own = jax.tree.structure(subject.state.params)
    if jax.tree.structure(params) != own:  # the change trains something else
        params = subject.state.params
    return begun(subject, params)


def begun(subject: Subject, params: Params) -> Subject:
    """The subject before a first step from some parameters, with a new optimizer and the beginning of the data."""
    key = jax.device_put(np.asarray(subject.state.key), subject.parts.state.key.sharding)
    state = subject.parts.init_state(jax.tree.map(lambda x: x.copy(), params), key)
    with subject.experience() as experience:
        place = experience.init()
    return dataclasses.replace(subject, state=state, place=place, records=())


def _result(records: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """The loss at the end, and how much it varies: held out where there is an evaluation, else of the last third."""
    held_out = [record["eval/loss"] for record in records if "eval/loss" in record]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    last = losses[-max(len(losses) // 3, 1) :]
    skipped = [record["train/nonfinite"] for record in records if "train/nonfinite" in record]
    if sum(skipped[-len(last) :]) == len(last):  # nothing but skipped updates
        return math.nan, 0.0
    noise = float(np.std(last)) / math.sqrt(len(last))
    return (held_out[-1] if len(held_out) > 1 else float(np.mean(last))), noise


def _is_lower(changed: float, without: float, noise: float) -> bool:
    if not math.isfinite(changed):
        return False
    if not math.isfinite(without):
        return True
    margin = max(_BETTER * abs(without), 2 * noise if math.isfinite(noise) else 0, _ALREADY)
    return without - changed > margin
