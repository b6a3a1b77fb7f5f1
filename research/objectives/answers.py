"""The answers in a batch: where they lie, and what models say of them. What objectives of preferences share."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt

from research.objectives.types import Batch, Forward, next_token_targets
from research.ops import documents, losses
from research.ops.preferences import LOSSES

SIDES = 2  # of a comparison: chosen and rejected
TEXT = ("tokens", "segment_ids", "positions", "loss_mask")
_OFF_START = 0.02  # of the loss before the first update: so far from theory it may be
_FALLEN = 0.05  # of the log-probs: so much both may fall before it is said


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Where the answers of a batch lie. N is how many a row has room for.

    Attributes:
      targets: [B, T], the token that each position is to predict.
      counted: [B, T], 1 at positions that predict a token of an answer, else 0.
      number: [B, T], of the answer in its row; N at tokens of none.
      count: N.
    """

    targets: Int[Array, "B T"]
    counted: Float[Array, "B T"]
    number: Int[Array, "B T"]
    count: int

    def sums(self, values: Shaped[Array, "B T"]) -> Shaped[Array, "B N"]:
        """Of each answer's tokens. What isn't counted isn't read."""
        return documents.sums(jnp.where(self.counted > 0, values, 0), self.number, self.count)

    def spread(self, values: Shaped[Array, "B N"]) -> Shaped[Array, "B T"]:
        """Each answer's value at its tokens."""
        return documents.spread(values, self.number)

    @functools.cached_property
    def lengths(self) -> Float[Array, "B N"]:
        """How many tokens each answer has."""
        return self.sums(self.counted)

    @functools.cached_property
    def order(self) -> Float[Array, "B T"]:
        """How manieth token of its answer each position predicts, from 1."""
        return documents.order(self.counted, self.number, self.count)

    def hashes(self) -> UInt[Array, "B N"]:
        """A number of each answer, by which answers of the same tokens are known."""
        mixed = (self.targets.astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B1)
        mixed ^= self.order.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
        return self.sums(mixed ^ (mixed >> 13))


def compared(forward: Forward, batch: Batch, reference: str) -> Places:
    """The answers that are compared in pairs: 2 p is the chosen answer of the row's pair p, 2 p + 1 the rejected one.

    A pair takes four tokens at least: two answers with what each follows. Of a list the two best are taken.

    Args:
      forward: of the batch.
      batch: as the term sees it.
      reference: "role", a model in the role `reference`; "cached", log-probs in the batch; or "" for none.
    """
    pair, side = batch["pair"], batch["side"]
    count = SIDES * max(1, pair.shape[1] // 4)
    number = jnp.where((pair > 0) & (side >= 0) & (side < SIDES), SIDES * (pair - 1) + side, count)
    return _places(forward, batch, batch["loss_mask"], number, count, reference)


def judged(forward: Forward, batch: Batch, reference: str) -> Places:
    """The answers that are judged alone, and those that stand behind another's prompt; by document.

    Args: see `compared`.
    """
    mask = batch["loss_mask"]
    if "mismatched" in batch:
        mask = jnp.maximum(mask, batch["mismatched"].astype(mask.dtype))
    count = max(1, mask.shape[1] // 2)
    number = jnp.where(batch["segment_ids"] > 0, batch["segment_ids"] - 1, count)
    return _places(forward, batch, mask, number, count, reference)


def _places(
    forward: Forward, batch: Batch, mask: Float[Array, "B T"], number: Int[Array, "B T"], count: int, reference: str
) -> Places:
    """The places of the tokens of `mask`, but for those that policy or reference don't predict."""
    targets, counted = next_token_targets(batch, mask)
    if reference == "cached" and "virtual" in batch:  # no annotation is of a virtual token
        counted = counted * (1.0 - batch["virtual"].astype(counted.dtype))
    elif reference == "role" and (seen := forward.seen_by_all(("policy", "reference"))) is not None:
        counted = counted * seen
    return Places(targets, counted, number, count)


def log_probs(
    forward: Forward, places: Places, role: str = "policy", *, collision: bool = False
) -> losses.TargetLogProbs:
    """What a role says of the answers' tokens, [B, T]; with a gradient of the policy's alone.

    Args:
      forward: of the batch.
      places: of the answers.
      role: whose.
      collision: see ops.losses.target_log_probs.
    """
    head = forward.next_token_head(role)
    return losses.target_log_probs(
        forward.hidden(role), head, places.targets, collision=collision, frozen=role != "policy"
    )


def reference_log_probs(forward: Forward, batch: Batch, places: Places, reference: str) -> Float[Array, "B T"] | None:
    """What the reference says of the answers' tokens; None without one. `reference`: see `compared`."""
    if reference == "cached":
        return batch["reference_log_prob"]
    return log_probs(forward, places, "reference").target if reference == "role" else None


def is_synced(forward: Forward, reference: str) -> bool:
    """Whether the reference follows the policy, so that what is apart from it isn't what has changed since step 0."""
    return reference == "role" and forward.models["reference"].synced


def cached_fields(reference: str) -> tuple[str, ...]:
    return ("reference_log_prob",) if reference == "cached" else ()


def no_start(names: tuple[str, ...]) -> dict[str, Array]:
    """The carry before the first step: `seen_NAME` says whether there is a mean of NAME."""
    return {f"{part}{name}": jnp.zeros(()) for name in names for part in ("", "seen_")}


def _count(sums: Mapping[str, Array], name: str) -> Array:
    return sums.get(f"{name}_count", sums.get("count"))


def with_start(carry: dict[str, Array], sums: dict[str, Array], names: tuple[str, ...]) -> dict[str, Array]:
    """The carry with the means of the first batch that has any."""
    new = dict(carry)
    for name in names:
        count, seen = _count(sums, name), carry[f"seen_{name}"] > 0
        new[name] = jnp.where(seen, carry[name], sums[name] / jnp.maximum(count, 1.0))
        new[f"seen_{name}"] = jnp.maximum(carry[f"seen_{name}"], (count > 0).astype(jnp.float32))
    return new


def since_start(carry: Any, sums: dict[str, Array], names: tuple[str, ...]) -> dict[str, tuple[Array, Array]]:
    """`change_NAME`: how far log-probs are from those of the first step; 0 in it."""
    changes = {}
    for name in names:
        count = _count(sums, name)
        change = jnp.where(carry[f"seen_{name}"] > 0, sums[name] - count * carry[name], 0.0)
        changes[f"change_{name}"] = jax.lax.stop_gradient(change), count
    return changes


def notices(kind: str, beta: float, metrics: Mapping[str, float], first: bool) -> dict[str, str]:
    """See Objective.notices."""
    lines = {}
    start, loss = metrics.get("start_loss"), metrics.get("preference_loss", 0.0)
    if first and start is not None and abs(loss - start) > _OFF_START * abs(start):
        lines["start"] = (
            f"the loss of kind = {kind!r} begins at {loss:.4g}, and is {start:.4g} where the policy is the reference: "
            "the two aren't one model at step 0. Look at what roles.reference and model.init_from name, and at an "
            "adapter that doesn't begin as nothing or has dropout."
        )
    if metrics.get("identical") and LOSSES[kind].difference:
        lines["identical"] = (
            f"{metrics['identical']:.1%} of the pairs have one answer on both sides: kind = {kind!r} learns nothing "
            "from them."
        )
    if metrics.get("unused"):
        lines["unused"] = (
            f"{metrics['unused']:.1%} of the answers are third or worse in their lists: only the two best are compared."
        )
    better, worse = ("desirable", "undesirable") if LOSSES[kind].labels else ("chosen", "rejected")
    fallen = [metrics.get(f"change_{name}", 0.0) for name in (better, worse)]
    if all(
        change < -_FALLEN * abs(metrics.get(f"log_prob_{name}", 0.0))
        for name, change in zip((better, worse), fallen, strict=True)
    ):
        remedy = "" if LOSSES[kind].labels else "add the chosen answers' cross-entropy (sft = 0.1 to 1), "
        lines["displacement"] = (
            f"the log-probs of {better} answers have fallen by {-fallen[0]:.3g} nats since step 0, and those of "
            f"{worse} ones by {-fallen[1]:.3g} (likelihood displacement): what rises is neither. To keep them up, "
            f"{remedy}raise beta (now {beta:g}), use kind = 'apo_zero' or 'nca', or lower the learning rate."
        )
    return lines
