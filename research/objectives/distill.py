"""Distillation: the student's next-token distribution is to be the teacher's (Hinton et al., arXiv:1503.02531)."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.errors import InputError, did_you_mean
from research.objectives.types import Batch, Context, Forward, LossOut, Objective, next_token_targets
from research.ops import divergences
from research.ranges import Fraction, NotNegative, Positive, Share
from research.sources import parallel
from research.sources.tokenizers import Tokenizer

CACHED_FIELDS = ("teacher_ids", "teacher_log_probs", "teacher_rest")
SCOPES = ("supervised", "all")


def make(
    kind: str = "forward_kl",
    temperature: Positive = 1.0,
    teacher_temperature: Positive | None = None,
    scale_by_temperature: bool = False,
    beta: Share = 0.5,
    alpha: Fraction = 0.1,
    on: str = "supervised",
    teachers: Mapping[str, NotNegative] | None = None,
    cached: bool = False,
    tail: str = "bucket",
    tokenizer: Tokenizer | None = None,
) -> Objective:
    """Mean over tokens of a divergence from the teacher, which sees the same batch.

    It composes with a loss on labels as any two terms: {"distill": 0.5, "sft": 0.5}.

    Args:
      kind, temperature, beta, alpha: see ops.divergences.divergence. "uld" compares sorted probabilities, for a teacher
        of another tokenizer (ops.divergences.uld): it reads the same documents in its own tokens, and the two are
        compared where both have read the same text. (The paper pairs the k-th tokens of both, which drift apart.)
      teacher_temperature: of "uld": the teacher's, where it differs from the student's `temperature`.
      scale_by_temperature: multiply by temperature^2, so that gradients keep their size (the paper's section 2).
      on: "supervised", the positions that predict a token of loss_mask, or "all" those that predict one.
      teachers: role -> weight, for several teachers; the loss is their weighted sum. By default {"teacher": 1}.
      cached: no teacher runs: its likeliest tokens come with the batch (data.annotations, by `understudy annotate`).
      tail: of cached ones: what is made of the other tokens; see ops.divergences.topk_divergence.
      tokenizer: the run's: its size says which logits are padding.

    Raises:
      InputError: an option that isn't known or is out of its range, or two that don't go together.
    """
    for name, value, known in (
        ("kind", kind, (*divergences.KINDS, divergences.LOGIT_MSE, "uld")),
        ("on", on, SCOPES),
        ("tail", tail, divergences.TAILS),
    ):
        if value not in known:
            raise InputError(f"{name} = {value!r}: no such choice.{did_you_mean(str(value), known)}")
    divergences.check(kind, temperature, beta, alpha)
    if teacher_temperature is not None and kind != "uld":
        raise InputError(f"teacher_temperature = {teacher_temperature}: is of kind = 'uld'. Leave it out of {kind!r}.")
    if cached and (teachers or kind in ("uld", divergences.LOGIT_MSE)):
        what = f"teachers = {dict(teachers)}" if teachers else f"kind = {kind!r}"
        raise InputError(f"{what}: needs live models, and cached = True. Set it to False, and name them in roles.")
    if cached and tail == "truncate" and kind not in ("forward_kl", "cross_entropy"):
        raise InputError(f"tail = 'truncate': goes with forward_kl and cross_entropy, not {kind}.")
    teachers = dict(teachers or {"teacher": 1.0})
    if not any(teachers.values()):
        raise InputError(f"teachers = {teachers}: all weigh 0, so that nothing would be learned. Raise one.")
    return Distill(
        kind=kind,
        mixture={"temperature": temperature, "beta": beta, "alpha": alpha},
        teacher_temperature=teacher_temperature,
        factor=temperature**2 if scale_by_temperature else 1.0,
        supervised=on == "supervised",
        teachers=teachers,
        tail=tail if cached else None,
        vocab_size=None if tokenizer is None else tokenizer.size,
    ).objective()


@dataclasses.dataclass(frozen=True)
class Distill:
    """A divergence of the policy from its teachers; see `make`.

    Attributes:
      kind: of ops.divergences.divergence, or "uld".
      mixture: its options: temperature, beta and alpha.
      teacher_temperature: of "uld"; None where it is the student's.
      factor: what the divergence is multiplied by.
      supervised: only the positions that predict a token of loss_mask count.
      teachers: role -> weight.
      tail: of ops.divergences.topk_divergence, where the teacher's tokens come with the batch; None for live teachers.
      vocab_size: logits from here on are padding; None where it isn't known.
    """

    kind: str
    mixture: Mapping[str, float]
    teacher_temperature: float | None
    factor: float
    supervised: bool
    teachers: Mapping[str, float]
    tail: str | None
    vocab_size: int | None

    def objective(self) -> Objective:
        """This as an objective."""
        cached, own_tokens = self.tail is not None, self.kind == "uld"
        fields = ("tokens", "segment_ids", "positions") + (("loss_mask",) if self.supervised else ())
        needs = {"temperature": self.mixture["temperature"]} | ({} if self.supervised else {"on": "all"})
        return Objective(
            loss=self.loss,
            fields=fields + (CACHED_FIELDS if cached else parallel.FIELDS if own_tokens else ()),
            frozen=() if cached else tuple(self.teachers),
            own_tokens=tuple(self.teachers) if own_tokens else (),
            annotations=needs if cached else {},
        )

    def loss(self, forward: Forward, batch: Batch, context: Context) -> LossOut:
        """The weighted sum over teachers, and the metrics of each.

        Divergence and entropy of K cached tokens are those of a distribution over these and the rest, and less than
        those over all tokens: the metrics are called divergence_topK and teacher_entropy_topK.
        """
        _, weights = next_token_targets(batch, batch["loss_mask"] if self.supervised else forward.unseen(batch))
        if self.tail is not None and "virtual" in batch:  # no annotation is of a virtual token
            weights = weights * (1.0 - batch["virtual"].astype(jnp.float32))
        elif self.kind != "uld" and (seen := forward.seen_by_all(self.teachers)) is not None:
            weights = weights * seen
        parallel_forward = forward.on(_teacher_batch(batch)) if self.kind == "uld" else None
        if self.kind == "uld":
            weights = jnp.where(batch["teacher_at"] < 0, 0.0, weights)
        total, values, metrics = jnp.zeros(()), jnp.zeros(weights.shape), {}
        for role, share in self.teachers.items():
            if self.tail is not None:
                out = self.from_annotations(forward, batch, weights)
            elif parallel_forward is not None:
                out = self.across_tokenizers(forward, parallel_forward, role, batch["teacher_at"], weights)
            else:
                out = self.from_teacher(forward, role, weights)
            total = total + share * self.factor * out.divergence_sum
            values = values + share * self.factor * out.divergence
            prefix = "" if len(self.teachers) == 1 else f"{role}/"
            of = "" if self.tail is None else f"_top{batch['teacher_ids'].shape[-1]}"
            metrics |= {
                f"{prefix}divergence{of}": (out.divergence_sum, out.weight_sum),
                f"{prefix}teacher_entropy{of}": (out.teacher_entropy_sum, out.weight_sum),
            }
            if out.agreement_sum is not None:
                metrics[f"{prefix}agreement"] = (out.agreement_sum, out.weight_sum)
        return LossOut(total, out.weight_sum, metrics, per_token=(values, weights))

    def from_annotations(self, forward: Forward, batch: Batch, weights: Float[Array, "B T"]) -> divergences.Divergence:
        """From the teacher's likeliest tokens, which come with the batch."""
        stored = (batch[name] for name in CACHED_FIELDS)
        options = {"kind": self.kind, "tail": self.tail, "vocab_size": self.vocab_size, **self.mixture}
        return divergences.topk_divergence(forward.hidden(), forward.next_token_head(), *stored, weights, **options)

    def from_teacher(self, forward: Forward, role: str, weights: Float[Array, "B T"]) -> divergences.Divergence:
        """From a teacher that reads the same tokens."""
        student, teacher = forward.next_token_head(), forward.next_token_head(role)
        size = self.vocab_size or min(student.size, teacher.size)
        options = {"kind": self.kind, "vocab_size": size, **self.mixture}
        return divergences.divergence(forward.hidden(), student, forward.hidden(role), teacher, weights, **options)

    def across_tokenizers(
        self,
        forward: Forward,
        parallel_forward: Forward,
        role: str,
        at: Int[Array, "B T"],
        weights: Float[Array, "B T"],
    ) -> divergences.Divergence:
        """From a teacher that reads the same documents in its own tokens, at its positions `at`; -1 for none."""
        hidden = jnp.take_along_axis(parallel_forward.hidden(role), jnp.maximum(at, 0)[:, :, None], axis=1)
        return divergences.uld(
            forward.hidden(),
            forward.next_token_head(),
            hidden,
            forward.next_token_head(role),
            weights,
            temperature=self.mixture["temperature"],
            teacher_temperature=self.teacher_temperature,
        )


def _teacher_batch(batch: Batch) -> Batch:
    """The documents of a batch in the teacher's own tokens."""
    return {name: batch[f"teacher_{name}"] for name in ("tokens", "segment_ids", "positions")}
