"""Faults of the loss of a run, in training and in evaluations."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.objectives.terms import Term
from research.objectives.types import Batch, Context, Forward, LossOut, next_token_targets, token_loss
from research.run.assemble import Parts
from research.studies.faults.changes import ChangeParts, with_step


def with_loss(change: Callable[[Callable[..., LossOut]], Callable[..., LossOut]]) -> ChangeParts:
    """Changes the loss of all terms, in training and in evaluations."""

    def with_terms(terms: Any) -> Any:
        def one(term: Term) -> Term:
            objective = dataclasses.replace(term.objective, loss=change(term.objective.loss))
            return dataclasses.replace(term, objective=objective)

        return {name: one(term) for name, term in terms.items()}

    def change_parts(parts: Parts) -> Parts:
        terms, evaluate = with_terms(parts.terms), inspect.unwrap(parts.evaluate)
        evaluate = dataclasses.replace(evaluate, terms=with_terms(evaluate.terms))
        parts = with_step(parts, lambda step: dataclasses.replace(step, terms=with_terms(step.terms)))
        return parts._replace(terms=terms, evaluate=jax.jit(evaluate))

    return change_parts


def scaled(factor: float) -> ChangeParts:
    """The loss is multiplied by a factor."""

    def change(loss: Callable[..., LossOut]) -> Callable[..., LossOut]:
        def other(forward: Forward, batch: Batch, context: Context) -> LossOut:
            out = loss(forward, batch, context)
            return out._replace(loss_sum=out.loss_sum * factor)

        return other

    return with_loss(change)


def entropy_lowered(weight: float) -> ChangeParts:
    """The entropy of the policy's predictions is added to the loss: a bonus with the wrong sign."""

    def change(loss: Callable[..., LossOut]) -> Callable[..., LossOut]:
        def other(forward: Forward, batch: Batch, context: Context) -> LossOut:
            out = loss(forward, batch, context)
            logits = forward.token_head("policy").logits(forward.hidden("policy")).astype(jnp.float32)
            log_probs = jax.nn.log_softmax(logits, axis=-1)
            entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
            weights = next_token_targets(batch, batch["loss_mask"])[1]
            return out._replace(loss_sum=out.loss_sum + weight * jnp.sum(entropy * weights))

        return other

    return with_loss(change)


def targets_at(offset: int) -> ChangeParts:
    """Each position is to predict the token so many places on."""

    def change(_: Callable[..., LossOut]) -> Callable[..., LossOut]:
        def other(forward: Forward, batch: Batch, context: Context) -> LossOut:
            segments = batch["segment_ids"]
            same = (jnp.roll(segments, -offset, axis=1) == segments) & (segments > 0)
            mask = jnp.roll(batch["loss_mask"], -offset, axis=1) if "loss_mask" in batch else 1.0
            inside = jnp.arange(segments.shape[1])[None] < segments.shape[1] - offset
            weights = jnp.where(same & inside, mask, 0.0)
            return token_loss(
                forward, jnp.roll(batch["tokens"], -offset, axis=1), weights, z_loss=0.0, label_smoothing=0.0
            )

        return other

    return with_loss(change)


def chance_targets(parts: Parts) -> Parts:
    """The targets of a batch are exchanged by chance."""

    def change(_: Callable[..., LossOut]) -> Callable[..., LossOut]:
        def other(forward: Forward, batch: Batch, context: Context) -> LossOut:
            real = batch["segment_ids"] > 0
            tokens = batch["tokens"]
            order = jnp.argsort(jnp.where(real, jax.random.uniform(context.key, tokens.shape), 2.0), axis=1)
            weights = jnp.where(real, 1.0, 0.0)
            targets = jnp.take_along_axis(tokens, order, axis=1)
            return token_loss(forward, targets, weights, z_loss=0.0, label_smoothing=0.0)

        return other

    return with_loss(change)(parts)


def padding_too(parts: Parts) -> Parts:
    """All positions count, padding too."""

    def change(_: Callable[..., LossOut]) -> Callable[..., LossOut]:
        def other(forward: Forward, batch: Batch, context: Context) -> LossOut:
            targets = jnp.roll(batch["tokens"], -1, axis=1)
            return token_loss(forward, targets, jnp.ones(targets.shape), z_loss=0.0, label_smoothing=0.0)

        return other

    return with_loss(change)(parts)
