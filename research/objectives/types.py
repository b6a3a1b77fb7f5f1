"""What an objective is, and what it may ask of the models.

An objective is data: a pure loss and the names of what it reads. To add one, write a module in this package with a
function `make(**options) -> Objective` and name the module in a config's `objective.terms`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.errors import InputError
from research.ops.losses import cross_entropy
from research.sources.tokenizers import Tokenizer

Batch = Mapping[str, jax.Array]  # tokens, segment_ids, positions: [B, T] int32; loss_mask: [B, T] float32; ...


class LossOut(NamedTuple):
    """Sums, never means: they add up over microbatches, devices and hosts.

    Attributes:
      loss_sum: scalar float32, the loss summed over what is supervised. Its gradient is taken.
      weight: scalar float32, what to divide by: the number of supervised tokens, usually.
      metrics: name -> (sum, weight), scalars; reported as sum / weight.
      statistics: pytree of sums, of which an objective with a carry makes its next one.
    """

    loss_sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]
    statistics: Any = ()


class Forward:
    """The models of each role applied to one batch; each pass is made once, however many terms read it.

    Args:
      models: role -> Model.
      params: role -> parameters, and under "objectives" those of each term that has some.
      batch: the batch.
      states: role -> the layers that `hidden_at` will be asked for.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        params: Mapping[str, Any],
        batch: Batch,
        states: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self.models, self.params, self.batch, self.states = models, params, batch, states or {}
        self._hidden: dict[str, jax.Array] = {}
        self._at: dict[str, dict[int, jax.Array]] = {}

    def hidden(self, role: str = "policy") -> jax.Array:
        """Last hidden states [B, T, D] of `role` on the batch, in its compute dtype."""
        if role not in self._hidden:
            model, layers = self.models[role], self.states.get(role, ())
            if layers:
                self._hidden[role], found = model.hidden_at(self.params[role], self.batch, layers)
                self._at[role] = dict(zip(layers, found, strict=True))
            else:
                self._hidden[role] = model.hidden(self.params[role], self.batch)
        return self._hidden[role]

    def hidden_at(self, layer: int, role: str = "policy") -> jax.Array:
        """The residual stream [B, T, D] after a layer that the objective named in `states`."""
        self.hidden(role)
        return self._at[role][layer]

    def head(self, role: str = "policy") -> Any:
        """The unembedding of `role` (see ops.losses.Head)."""
        return self.models[role].unembed(self.params[role])


@dataclasses.dataclass(frozen=True)
class Objective:
    """A kind of supervision.

    An objective that remembers something across steps, such as running thresholds, has a carry: a small pytree of
    arrays, the same on every device, saved in checkpoints. The loss reads it, and `update` changes it once per step by
    the statistics of the whole batch, so that microbatches, devices and hosts make no difference. Where a step's update
    is skipped, it stays as it was; an evaluation reads it and changes nothing.

    Attributes:
      loss: (forward, batch, key, step) -> LossOut; pure. `key` differs per step and microbatch. With a carry:
        (forward, batch, key, step, carry).
      fields: the batch fields it reads; checked against the source before anything compiles.
      trainable: roles whose parameters get gradients.
      frozen: roles that are read only.
      own_tokens: those of them that read the fields of sources.parallel, made by their own tokenizer; all others read
        `tokens`.
      states: role -> the layers whose hidden states it reads with Forward.hidden_at.
      params: (models by role) -> ParamSpecs of parameters of its own, which train with the policy and lie in
        forward.params["objectives"][name of the term]; None for none.
      annotations: what those of data.annotations must have been made with, where it reads some.
      batch_coupled: the loss needs the whole batch, so that it can't be cut into microbatches.
      init_carry: (shapes and dtypes of the batch) -> the first carry; None for an objective without one.
      update: (carry, statistics summed over the batch) -> the next carry, of the same shapes and dtypes.
    """

    loss: Callable[..., LossOut]
    fields: tuple[str, ...] = ("tokens", "segment_ids", "positions")
    trainable: tuple[str, ...] = ("policy",)
    frozen: tuple[str, ...] = ()
    own_tokens: tuple[str, ...] = ()
    states: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    params: Callable[[Mapping[str, Any]], Any] | None = None
    annotations: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_coupled: bool = False
    init_carry: Callable[[Mapping[str, jax.ShapeDtypeStruct]], Any] | None = None
    update: Callable[[Any, Any], Any] | None = None

    def __post_init__(self):
        if (self.init_carry is None) != (self.update is None):
            raise ValueError("Objective: init_carry and update come together")


def next_token_targets(batch: Batch, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """What each position is to predict: (targets [B, T] int32, weights [B, T] float32).

    Position t predicts token t + 1 where both belong to one document; its weight is `mask`[t + 1], by default 1.
    """
    segments = batch["segment_ids"]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    weights = same.astype(jnp.float32)
    if mask is not None:
        weights = weights * mask[:, 1:]
    return jnp.roll(batch["tokens"], -1, axis=1), jnp.pad(weights, ((0, 0), (0, 1)))


def token_loss(
    forward: Forward, targets: jax.Array, weights: jax.Array, *, z_loss: float, label_smoothing: float
) -> LossOut:
    """Weighted sum of the policy's cross-entropy, with `nll` (no smoothing, no z-loss) and `accuracy` as metrics."""
    out = cross_entropy(
        forward.hidden(), forward.head(), targets, weights, z_loss=z_loss, label_smoothing=label_smoothing
    )
    metrics = {"nll": (out.nll_sum, out.weight_sum), "accuracy": (out.correct_sum, out.weight_sum)}
    if z_loss:
        metrics["z_loss"] = (z_loss * out.z_sum, out.weight_sum)
    return LossOut(out.loss_sum, out.weight_sum, metrics)


def class_logits(forward: Forward, label_tokens: Sequence[int] | None = None, role: str = "policy") -> jax.Array:
    """Logits [B, T, C] of a few classes at every position, float32.

    Args:
      forward: the models on the batch.
      label_tokens: of a language model, C tokens that stand for the classes: no other logit is computed. None for a
        model whose head has a logit for each class (num_labels).
      role: whose logits.

    Raises:
      InputError: the model's head is of the other kind.
    """
    num_labels, where = forward.models[role].config.num_labels, "model" if role == "policy" else f"roles.{role}"
    if label_tokens is None and not num_labels:
        raise InputError(
            f"{where}.num_labels = 0: the model's head predicts tokens, not classes. Set it to the number of classes, "
            "or let words stand for the classes (head = 'words')."
        )
    if label_tokens is not None and num_labels:
        raise InputError(
            f"{where}.num_labels = {num_labels}: the model's head predicts classes, so that no words can stand for "
            "them. Set it to 0, or use head = 'linear'."
        )
    hidden, head = forward.hidden(role), forward.head(role)
    kernel, bias, softcap = head.kernel, head.bias, head.softcap
    if label_tokens is not None:
        columns = jnp.asarray(label_tokens, jnp.int32)
        kernel, bias = jnp.take(kernel, columns, axis=1), None if bias is None else bias[columns]
    logits = jnp.einsum("btd,dc->btc", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)[None, None, :]
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def label_tokens(words: Sequence[str], tokenizer: Tokenizer, field: str) -> tuple[int, ...]:
    """The first token of each word, as it is where the word goes on from other text.

    Args:
      words: one for each class, with the space before them that the model expects: " yes".
      tokenizer: of the model.
      field: what to call them in an error.

    Raises:
      InputError: fewer than two words, an empty one, or two that begin with the same token.
    """
    if isinstance(words, str) or len(words) < 2 or not all(isinstance(w, str) and w for w in words):
        raise InputError(f"{field} = {words!r}: give a list of words, one for each class, two or more.")
    tokens = tuple(ids[0] for ids in tokenizer.encode_stretches(list(words), special=False, first=False))
    for i, token in enumerate(tokens):
        if token in tokens[:i]:
            raise InputError(
                f"{field} = {list(words)}: {words[tokens.index(token)]!r} and {words[i]!r} begin with the same token "
                f"{tokenizer.decode([token])!r}, and a class is known by its first. Choose other words."
            )
    return tokens
