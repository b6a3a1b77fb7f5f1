"""What an objective is, and what it may ask of the models.

An objective is data: a pure loss and the names of what it reads. To add one, write a module in this package with a
function `make(...) -> Objective` and name the module in a config's `objective.terms`. An InputError of `make` or the
loss that begins with an option's name is shown with the name of the term's field: "objective.kd.beta = 2: must be ...".
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research import params as params_lib
from research.errors import InputError
from research.models import kernels, virtual
from research.models.transformer import HEAD
from research.ops.losses import cross_entropy
from research.ops.moe import Routing

Batch = Mapping[str, jax.Array]  # tokens, segment_ids, positions: [B, T] int32; loss_mask: [B, T] float32; ...


class LossOut(NamedTuple):
    """Sums, never means: they add up over microbatches, devices and hosts.

    Attributes:
      loss_sum: the loss summed over what is supervised. Its gradient is taken.
      weight: what to divide by: the number of supervised tokens, usually.
      metrics: name -> (sum, weight), scalars; reported as sum / weight. Of a sum that is a vector, such as that of an
        error in each of some bins, the absolute values are added up after the sums over all batches.
      statistics: pytree of sums, of which an objective with a carry makes its next one.
      per_token: (values, weights), where the loss is a sum over tokens of value times weight. The step reports the loss
        of each source by them; no gradient is taken.
    """

    loss_sum: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, tuple[Float[Array, "*N"], Float[Array, ""]]]
    statistics: Any = ()
    per_token: tuple[Float[Array, "B T"], Float[Array, "B T"]] | None = None


class Context(NamedTuple):
    """What a loss reads besides the models and the batch.

    Attributes:
      key: random key of this step and term, the same in every part of the batch. Draw with `row_keys`.
      step: how many steps came before; 0 in evaluations.
      rows: the number of each of the batch's rows in the whole batch, however it is cut and sharded.
      params: the term's own parameters (see Objective.params); () without any.
      carry: what the term remembers (see Objective.init_carry); () without one.
      gathered: what Objective.gather says of all rows of the whole batch, in order; () without it.
      first: in evaluations, how many rows of the held-out data came before the batch; else 0.
    """

    key: jax.Array
    step: Int[Array, ""]
    rows: Int[Array, " B"]
    params: Any = ()
    carry: Any = ()
    gathered: Any = ()
    first: Int[Array, ""] | int = 0

    def row_keys(self) -> jax.Array:
        """A random key for each row: draws are the same for any number of microbatches, devices and processes. In
        evaluations a row has the same each time, and whatever the size of the batches.

        For example: jax.vmap(lambda key: jax.random.bernoulli(key, 0.15, (T,)))(context.row_keys()).
        """
        return jax.vmap(jax.random.fold_in, (None, 0))(self.key, self.rows + self.first)


class Forward:
    """The models of each role applied to one batch; each pass is made once, however many terms and roles read it.

    Args:
      models: role -> Model. One with the parameters of another (Model.of) that has only a head of its own reads that
        one's hidden states.
      params: role -> its own parameters.
      batch: the batch.
      states: role -> the layers that `hidden_at` will be asked for.
      dropout_keys: uint32 [B, 2], a key for each row, in training: adapters of trained roles then leave out a part of
        their inputs. References and evaluations have none.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        params: Mapping[str, Any],
        batch: Batch,
        states: Mapping[str, tuple[int, ...]] | None = None,
        dropout_keys: jax.Array | None = None,
    ):
        self.models, self.batch, self._own, self._dropout_keys = models, batch, params, dropout_keys
        owners = {role: model.of for role, model in models.items() if model.of}
        whole = {role: self._whole(role, owner) for role, owner in owners.items()}
        self.params = {**params, **whole}
        self._trunks = {role: owner for role, owner in owners.items() if self._shares_passes(role, owner)}
        self.states: dict[str, tuple[int, ...]] = {}
        for role, layers in (states or {}).items():
            trunk = self._trunks.get(role, role)
            self.states[trunk] = tuple(sorted({*self.states.get(trunk, ()), *layers}))
        self._hidden: dict[str, jax.Array] = {}
        self._routing: dict[str, Routing] = {}
        self._at: dict[str, dict[int, jax.Array]] = {}

    def on(self, batch: Batch) -> "Forward":
        """The same models on another batch, such as one with masked tokens. Keep it: its passes are its own."""
        return Forward(self.models, self._own, batch, self.states, self._dropout_keys)

    def _whole(self, role: str, owner: str) -> Any:
        """The parameters of a role that shares those of another: with that one's adapter, or without."""
        shared = self._own[owner]
        if self.models[owner].adapter is not None and self.models[role].adapter is None:
            shared = kernels.bare(shared)
        return params_lib.overlay(shared, self._own.get(role, {}))

    def _shares_passes(self, role: str, owner: str) -> bool:
        same = (self.models[owner].adapter is None) == (self.models[role].adapter is None)
        return same and self._own.get(role, {}).keys() <= set(HEAD)

    def _seen(self, role: str) -> Batch:
        """The batch as a role's pass gets it."""
        model, batch = self.models[role], self.batch
        if "virtual" in batch and not model.virtual_tokens:
            batch = virtual.without(batch, self.models["policy"].virtual_tokens)
        if self._dropout_keys is None or model.of or model.adapter is None or not model.adapter.dropout:
            return batch
        return {**batch, "dropout_keys": self._dropout_keys}

    def seen_by_all(self, roles: Iterable[str]) -> Float[Array, "B T"] | None:
        """1 at the places that are no padding to any of these roles: not at virtual tokens, where one lacks them. None
        where that is all places."""
        if "virtual" not in self.batch or all(self.models[role].virtual_tokens for role in roles):
            return None
        return 1.0 - self.batch["virtual"].astype(jnp.float32)

    def unseen(self, batch: Batch) -> Float[Array, "B T"] | None:
        """1 at the tokens that no model sees before it is to predict them: all but those of a prefix, where one of the
        models is a prefix LM. None where that is all of them."""
        if "prefix" not in batch or not any(model.config.prefix for model in self.models.values()):
            return None
        return 1.0 - batch["prefix"].astype(jnp.float32)

    def hidden(self, role: str = "policy") -> Float[Array, "B T D"]:
        """Last hidden states of `role` on the batch, in its compute dtype."""
        role = self._trunks.get(role, role)
        if role not in self._hidden:
            model, layers = self.models[role], self.states.get(role, ())
            args = self.params[role], self._seen(role), layers
            if model.config.num_experts:
                self._hidden[role], states, self._routing[role] = model.routed(*args)
                self._at[role] = dict(zip(layers, states, strict=True))
            elif layers:
                self._hidden[role], states = model.hidden_at(*args)
                self._at[role] = dict(zip(layers, states, strict=True))
            else:
                self._hidden[role] = model.hidden(self.params[role], self._seen(role))
        return self._hidden[role]

    def made(self, role: str = "policy") -> Float[Array, "B T D"] | None:
        """The last hidden states of `role` where a pass on the batch has been made, else None."""
        return self._hidden.get(self._trunks.get(role, role))

    def routing(self, role: str = "policy") -> Routing:
        """What the routers of each layer did with the batch.

        Raises:
          InputError: the model isn't a mixture of experts.
        """
        if not self.models[role].config.num_experts:
            raise InputError(
                f"{_section(role)}.num_experts = 0: the model has no router, and the objective is about routers. Leave "
                "the term out, or set the number of experts."
            )
        self.hidden(role)
        return self._routing[self._trunks.get(role, role)]

    def hidden_at(self, layer: int, role: str = "policy") -> Float[Array, "B T D"]:
        """The residual stream after a layer that the objective named in `states`."""
        self.hidden(role)
        return self._at[self._trunks.get(role, role)][layer]

    def head(self, role: str = "policy") -> Any:
        """The unembedding of `role` (see ops.head.Head)."""
        return self.models[role].unembed(self.params[role])

    def token_head(self, role: str = "policy") -> Any:
        """The unembedding of `role`, which predicts tokens.

        Raises:
          InputError: its head gives classes.
        """
        where, labels = _section(role), self.models[role].config.num_labels
        if labels:
            raise InputError(
                f"{where}.num_labels = {labels}: the head gives classes, and the objective is about tokens. Set it to "
                "0, or learn classes (objective.terms.classify)."
            )
        return self.head(role)

    def next_token_head(self, role: str = "policy") -> Any:
        """The unembedding of `role`, which predicts the next token.

        Raises:
          InputError: its head gives classes; or it reads in both directions, and so the token that it is to predict.
        """
        if not self.models[role].config.causal:
            raise InputError(
                f"{_section(role)}.causal = False: the model reads in both directions, and so the token that it is to "
                "predict. Use a causal model, or an objective for encoders, such as masked."
            )
        return self.token_head(role)


def _section(role: str) -> str:
    """Where the config describes a role's model."""
    return "model" if role == "policy" else f"roles.{role}"


class Sampler(NamedTuple):
    """What the answers that a run's policy samples were drawn from: the softmax of logits / temperature over the ids
    below `vocab_size`. A loss that compares log-probabilities with theirs computes its own in the same way.

    Attributes:
      temperature: 1 where the policy samples none.
      vocab_size: ids from here on are never drawn; None where it isn't known.
      truncated: how the config cuts the distribution short, such as "rollout.top_k = 5"; "" where it doesn't. The
        answers' log-probabilities are then of the shorter one.
      ahead: whether answers are written by the policy as it was before the rollout before theirs was learned from.
    """

    temperature: float = 1.0
    vocab_size: int | None = None
    truncated: str = ""
    ahead: bool = False


@dataclasses.dataclass(frozen=True)
class Objective:
    """A kind of supervision.

    An objective that remembers something across steps, such as running thresholds, has a carry: a small pytree of
    arrays, the same on every device, saved in checkpoints. The loss reads it, and `update` changes it once per step by
    the statistics of the whole batch, so that microbatches, devices and hosts make no difference. Where a step's update
    is skipped, it stays as it was; an evaluation reads it and changes nothing.

    Some losses need the whole batch: a threshold that is a quantile of all rows, or a mean to compare with. `gather`
    makes numbers of each row, without a gradient. They are collected over microbatches and devices before any loss is
    computed, and every part's loss reads those of all rows in `context.gathered`.

    Attributes:
      loss: (forward, batch, context) -> LossOut; pure. Where the term is tied to sources, the tokens of others are
        padding in `batch`, and forward.batch has them all.
      fields: the batch fields it reads; checked against the source before anything compiles.
      trainable: roles whose parameters get gradients.
      frozen: roles that are read only.
      gives: the batch fields that it makes for passes of its own (Forward.on), such as "prefix".
      own_tokens: those of them that read the fields of sources.parallel, made by their own tokenizer; all others read
        `tokens`.
      states: role -> the layers whose hidden states it reads with Forward.hidden_at.
      params: (models by role) -> ParamSpecs of parameters of its own, which train with the policy and are handed to the
        loss in context.params; None for none.
      annotations: what those of data.annotations must have been made with, where it reads some.
      gather: (forward, batch) -> pytree of arrays [B, ...]; None for an objective without it.
      bits_per_byte: whether bits per byte are made of its `nll`: it is of each supervised token, given those before.
      notices: (metrics of the term, whether they are of the first step alone, before any update) -> lines for the log,
        by a name each. A run says each once. None for an objective that has nothing to say.
      sources: the names that data.sources must have, where it knows something of each; () where any will do.
      chances: (carry) -> [S], how probable each of `sources` is to be drawn for a row of the next batch; None where the
        data's weights say that.
      labels: how many numbers it wants of the policy's head (model.num_labels) at least, where the data doesn't say it.
      hides: (batch, key of each row) -> what the model reads in the place of `tokens`, and [B, T] above 0 where tokens
        are to be told; for people to look at. None where the model reads the batch as it is.
      init_carry: (shapes and dtypes of the batch) -> the first carry; None for an objective without one.
      update: (carry, statistics summed over the batch) -> the next carry, of the same shapes and dtypes.
    """

    loss: Callable[[Forward, Batch, Context], LossOut]
    fields: tuple[str, ...] = ("tokens", "segment_ids", "positions")
    trainable: tuple[str, ...] = ("policy",)
    frozen: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    own_tokens: tuple[str, ...] = ()
    states: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    params: Callable[[Mapping[str, Any]], Any] | None = None
    annotations: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gather: Callable[[Forward, Batch], Any] | None = None
    bits_per_byte: bool = True
    hides: Callable[[Batch, jax.Array], tuple[jax.Array, jax.Array]] | None = None
    sources: tuple[str, ...] = ()
    chances: Callable[[Any], Any] | None = None
    labels: int = 0
    notices: Callable[[Mapping[str, float], bool], Mapping[str, str]] | None = None
    init_carry: Callable[[Mapping[str, jax.ShapeDtypeStruct]], Any] | None = None
    update: Callable[[Any, Any], Any] | None = None

    def __post_init__(self):
        if (self.init_carry is None) != (self.update is None):
            raise ValueError("Objective: init_carry and update come together")
        if self.chances is not None and (self.init_carry is None or not self.sources):
            raise ValueError("Objective: chances are of `sources`, and of what init_carry begins")


def next_token_targets(
    batch: Batch, mask: Float[Array, "B T"] | None = None
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """What each position is to predict: (targets, weights).

    Position t predicts token t + 1 where both belong to one document; its weight is `mask`[t + 1], by default 1.
    Virtual tokens are no targets, and the last of them predicts the first of its document.
    """
    segments, tokens = batch["segment_ids"], batch["tokens"]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    if "virtual" in batch:
        same &= batch["virtual"][:, 1:] == 0
        tokens = jnp.where(batch["virtual"] > 0, 0, tokens)
    weights = same.astype(jnp.float32)
    if mask is not None:
        weights = weights * mask[:, 1:]
    return jnp.roll(tokens, -1, axis=1), jnp.pad(weights, ((0, 0), (0, 1)))


def good_answers(batch: Batch) -> Float[Array, "B T"]:
    """`loss_mask` of what is worth imitating: without answers to which another was preferred, or that aren't
    desirable, where the data says that of some."""
    mask = batch["loss_mask"]
    if "side" in batch:
        mask = jnp.where(batch["side"] > 0, 0, mask)
    return jnp.where(batch["desirable"] == 0, 0, mask) if "desirable" in batch else mask


def token_loss(
    forward: Forward, targets: Int[Array, "B T"], weights: Float[Array, "B T"], *, z_loss: float, label_smoothing: float
) -> LossOut:
    """Weighted sum of the policy's cross-entropy, with `nll` (no smoothing, no z-loss) and `accuracy` as metrics.

    Raises:
      InputError: the policy doesn't predict the next token; or label_smoothing or z_loss is out of its range.
    """
    if not 0 <= label_smoothing < 1:
        raise InputError(f"label_smoothing = {label_smoothing}: must be in [0, 1).")
    if not 0 <= z_loss < math.inf:
        raise InputError(f"z_loss = {z_loss}: must be 0 or more, and finite.")
    out = cross_entropy(
        forward.hidden(), forward.next_token_head(), targets, weights, z_loss=z_loss, label_smoothing=label_smoothing
    )
    metrics = {"nll": (out.nll_sum, out.weight_sum), "accuracy": (out.correct_sum, out.weight_sum)}
    if z_loss:
        metrics["z_loss"] = (z_loss * out.z_sum, out.weight_sum)
    return LossOut(out.loss_sum, out.weight_sum, metrics, per_token=(out.loss, weights))
