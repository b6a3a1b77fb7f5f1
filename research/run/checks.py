"""What the terms and the rewards of a run read, and whether its models and its batches have that."""

from collections.abc import Mapping

import jax

from research.config import Config
from research.errors import InputError, did_you_mean
from research.models.transformer import Model
from research.objectives.terms import OF_ROLLOUTS, Terms
from research.rollouts import rewards
from research.rollouts import scores as scores_lib
from research.sources import fields

Batch = Mapping[str, jax.ShapeDtypeStruct]

_OF_ANSWERS = ("text", "source", "virtual", "prefix")  # groups of fields that an answer of the policy has too


def trained_roles(terms: Terms) -> set[str]:
    """The roles that the terms train.

    Raises:
      InputError: one term trains a role that another reads as one that stays.
    """
    trained = {role: name for name, term in terms.items() for role in term.objective.trainable}
    for name, term in terms.items():
        for role in term.objective.frozen:
            if role in trained:
                raise InputError(
                    f"objective.terms.{name}: reads the role {role!r} as it is, and objective.terms.{trained[role]} "
                    "trains it. Give one of them a role of its own."
                )
    return set(trained)


def roles_of_updates(terms: Terms, models: Mapping[str, Model]) -> set[str]:
    """The roles that the terms read, with those whose trunk these share. What rollouts alone read isn't among them."""
    read = {role for term in terms.values() for role in term.objective.trainable + term.objective.frozen}
    return read | {models[role].of for role in read & models.keys()}


def scored_fields(config: Config, batch: Batch) -> tuple[str, ...]:
    """The batch fields that models give before a rollout's first update."""
    return tuple(name for name in scores_lib.ROLES if name in batch) if config.rewards else ()


def reward_roles(config: Config) -> dict[str, str]:
    """Reward -> the role whose model gives it."""
    entries = rewards.load(config.rewards)
    return {name: entry.make().role for name, entry in entries.items() if entry.by_model}


def check(config: Config, terms: Terms, models: Mapping[str, Model], batch: Batch) -> None:
    """Checks the parts of a run against each other.

    Args:
      config, terms: of the run.
      models: role -> Model.
      batch: the fields that a run trains on.

    Raises:
      InputError: a term or a reward needs what isn't there, or nothing reads what is.
    """
    of_rewards = reward_roles(config)
    _check_reads(config, terms, models, batch, set(of_rewards.values()))
    _check_classes(config, models["policy"], batch)
    _check_answers(config, models["policy"], batch)
    _check_reward_roles(config, terms, models, of_rewards)
    _check_prefixes(terms, models, batch)


def drawing_term(config: Config, terms: Terms) -> str:
    """The term that decides how probable each source is to be drawn; "" where the data's weights do.

    Raises:
      InputError: there are several, or the sources aren't drawn one by one.
    """
    drawing = [name for name, term in terms.items() if term.objective.chances is not None]
    if not drawing:
        return ""
    field = f"objective.terms.{drawing[0]}"
    if len(drawing) > 1:
        raise InputError(f"{field}: draws the rows, and so does objective.terms.{drawing[1]}. Leave one out.")
    if config.rewards:
        raise InputError(f"{field}: draws rows of data, and with rewards batches are answers. Leave one of them out.")
    if not all("weight" in source for source in config.data.sources.values()):
        raise InputError(f"{field}: draws each source by itself. Give data.sources a weight each, such as 1.0.")
    return drawing[0]


def _check_reads(config: Config, terms: Terms, models: Mapping[str, Model], batch: Batch, of_rewards: set[str]) -> None:
    """Raises InputError where a term reads a role or a batch field that isn't there, or nothing reads a role; the roles
    `of_rewards` are read by rewards."""
    for name, term in terms.items():
        for role in term.objective.trainable + term.objective.frozen:
            if role not in models:
                raise InputError(
                    f"objective.terms.{name}: needs a model in the role {role!r}, and there are {', '.join(models)}. "
                    f'Name one: roles = {{"{role}": {{"init_from": ...}}}}.'
                )
        for field in term.objective.fields:
            if field not in batch:
                raise InputError(
                    f"objective.terms.{name}: reads the batch field {field!r}, {_why_absent(config, field, batch)}"
                )
    read = roles_of_updates(terms, models)
    for field in scored_fields(config, batch):
        role = scores_lib.ROLES[field]
        if role not in models:
            raise InputError(
                f"roles: none is called {role!r}, and the objective reads what it says of answers (the batch field "
                f'{field!r}). Name it: roles = {{"{role}": {{"init_from": ...}}}}.'
            )
        read.add(role)
    read |= of_rewards
    read |= {models[role].of for role in read & models.keys()}  # whose trunk they share
    if unread := [role for role in config.roles if role not in read]:
        what = "no term of the objective, and no reward," if config.rewards else "no term of the objective"
        raise InputError(f"roles.{unread[0]}: {what} reads it. Leave it out, or add the term.")


def _why_absent(config: Config, field: str, batch: Batch) -> str:
    """Why a batch lacks a field that a term reads, and what to do about it; ends a sentence."""
    if config.rewards:
        return "and with rewards batches are answers of the policy, of which nothing says that. Leave the term out."
    if field in OF_ROLLOUTS:
        return 'which is made of rewards, and there are none. Name some, such as rewards = {"exact_match": 1.0}.'
    return f"which data.path = {config.data.path!r} doesn't give.{did_you_mean(field, batch)}"


def _check_classes(config: Config, policy: Model, batch: Batch) -> None:
    """Raises InputError where the head's classes aren't those of the data."""
    labels, num_labels = batch.get("label_probs"), policy.config.num_labels
    if labels is not None and num_labels and num_labels != labels.shape[-1]:
        raise InputError(
            f"model.num_labels = {num_labels}, and the labels of data.path = {config.data.path!r} have "
            f"{labels.shape[-1]} classes. Set model.num_labels to that."
        )


def _check_answers(config: Config, policy: Model, batch: Batch) -> None:
    """Raises InputError where the policy is to write answers, and can't, or the batch would speak of others."""
    generate = config.eval.generate if config.eval.every else 0
    for field, value, remedy in (
        ("rollout.share", config.rollout.share, "Set it to 0."),
        ("eval.generate", generate, "Set it to 0."),
        ("rewards", dict(config.rewards), "Leave them out."),
    ):
        if value and (policy.config.num_labels or not policy.config.causal):
            raise InputError(
                f"{field} = {value}: the policy is {policy.config.kind}, and can't write answers. {remedy}"
            )
    about = [name for name in batch if fields.find(name).group not in _OF_ANSWERS]
    if config.rollout.share and about:
        raise InputError(
            f"rollout.share = {config.rollout.share}: the batch field {about[0]!r} is about the data's answers, and "
            "would stand beside those of the policy. Set it to 0, or take data without it."
        )


def _check_reward_roles(
    config: Config, terms: Terms, models: Mapping[str, Model], of_rewards: Mapping[str, str]
) -> None:
    """Raises InputError where a model that is to give a reward can't."""
    for name, role in of_rewards.items():
        where = f"rewards.{name}.role = {role!r}"
        if role not in config.roles:
            raise InputError(
                f'{where}: there is no such role. Name its model: roles = {{"{role}": {{"init_from": ...}}}}.'
            )
        model = models[role]
        if model.of or role in trained_roles(terms):
            raise InputError(f"{where}: is trained, or shares {model.of or role!r}. A reward model is one of its own.")
        if not model.config.num_labels:
            raise InputError(
                f"{where}: is {model.config.kind}, and no reward model. Name a run of the objective reward, or a "
                "...ForSequenceClassification of transformers."
            )
        if config.seq_len > model.max_length:
            raise InputError(f"{where}: takes {model.max_length} tokens, and seq_len = {config.seq_len}. Lower that.")


def _check_prefixes(terms: Terms, models: Mapping[str, Model], batch: Batch) -> None:
    """Raises InputError where a prefix LM would never be shown a prefix, and yet decode with one."""
    own_tokens = {role for term in terms.values() for role in term.objective.own_tokens}
    there = "prefix" in batch or any("prefix" in term.objective.gives for term in terms.values())
    for role, model in models.items():
        if model.config.prefix and (role in own_tokens or not there):
            where = "model" if role == "policy" else f"roles.{role}"
            raise InputError(
                f"{where}.prefix = True: nothing says what a document's prefix is, so that the model would read from "
                "left to right here, and show prompts to itself whole when it generates. Train with the objective "
                "prefix_lm, or give the data a view that marks prefixes: data.sources.NAME.view = {'kind': 'prompt'}. "
                f"(What begins with a prefix LM stays one, but for {where}.prefix = False.)"
            )
