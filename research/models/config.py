"""ModelConfig: everything that decides what a model computes, and the checks of its fields."""

import dataclasses
import functools
from typing import Annotated

import jax

from research import ranges
from research.errors import InputError, did_you_mean
from research.ops import low_precision
from research.ops.attention import IMPLEMENTATIONS
from research.ops.rope import RopeScaling
from research.ranges import Count, NotNegative, Positive, Range, Real, Size

ACTIVATIONS = {  # of ModelConfig.mlp
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=False),
    "geglu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
_GATED = ("swiglu", "geglu", "geglu_tanh")
REMAT = {  # of ModelConfig.remat: what the backward pass keeps
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("linear", "attention"),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}
_CHOICES = {
    "mlp": tuple(ACTIVATIONS),
    "block": ("pre", "post", "sandwich", "parallel", "residual"),
    "norm": ("rmsnorm", "layernorm"),
    "positions": ("rope", "learned"),
    "qk_norm": ("none", "head", "full"),
    "remat": tuple(REMAT),
    "attention": tuple(IMPLEMENTATIONS),
    "precision": ("dtype", *low_precision.KINDS),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides what the model computes.

    Attributes:
      vocab_size: V, rows of the embedding and logits of the head.
      num_layers: L.
      d_model: D, the width of what layers add to.
      num_heads: H, heads of queries.
      num_kv_heads: K, heads of keys and values; it divides num_heads, and each serves as many of these.
      head_dim: h, the width of a head; 0 means d_model / num_heads.
      d_ff: F, the width inside the MLP; with experts, inside each.
      mlp: "swiglu" and "geglu" are gated (Shazeer 2020, arXiv:2002.05202), "gelu" and "relu" plain two-layer MLPs;
        "_tanh" is GELU's approximation.
      num_experts: E; 0 is one dense MLP. Experts have no biases.
      experts_per_token: how many experts each token goes through.
      normalize_router: the chosen experts' probabilities are made to add up to 1.
      block: where the norms of a layer are. "pre": x + f(norm(x)), for attention and then the MLP. "post": x +
        norm(f(x)) (OLMo 2, arXiv:2501.00656). "sandwich": x + norm(f(norm(x))) (Gemma 2, arXiv:2408.00118).
        "parallel": x + attention(norm(x)) + mlp(norm(x)), each with its norm (GPT-NeoX, arXiv:2204.06745).
        "residual": norm(x + f(x)), and no norm at the end (the first transformer, arXiv:1706.03762, and BERT).
      norm: "rmsnorm" or "layernorm".
      norm_eps: added to the mean square or variance that a norm divides by.
      norm_offset: is added to the scale of RMSNorm, which is then stored around 0 (Gemma: 1).
      positions: "rope", or "learned" embeddings, max_length of them.
      rope_theta: the base of RoPE's frequencies.
      rope_scaling: how these frequencies differ, for longer texts.
      rotary_dim: how many dimensions of each head RoPE turns; 0 is all.
      local_rope_theta: of layers with a sliding window, which then aren't stretched by rope_scaling either (Gemma 3,
        arXiv:2503.19786); 0: as the others.
      max_length: the longest sequence that it may be given.
      causal: else every token sees all of its document (an encoder).
      prefix: a prefix LM (arXiv:1910.10683, section 3.2.1): the tokens of a document's prefix see each other whole, and
        those that follow all before them. The batch field `prefix` says which are which, and without it the model is
        causal. What is generated sees its prompt so.
      sliding_window: tokens that each token sees, itself included, in layer i: sliding_window[i % len]; 0 means all.
      attention_bias: whether the query, key and value maps have biases.
      attention_out_bias: whether attention's output map has a bias.
      mlp_bias: whether the MLP's maps have biases.
      head_bias: whether the logits have a bias.
      qk_norm: RMSNorm of queries and keys before RoPE: "head", over each head's dimensions; "full", over all heads'
        together (OLMo 2).
      attention_scale: of scores; 0 means head_dim^-0.5.
      attention_scale_by_layer: scores of layer i, counted from 1, are divided by i too (GPT-2 as Mistral trained it,
        scale_attn_by_inverse_layer_idx in transformers).
      attention_softcap, logit_softcap: cap * tanh(x / cap) on scores and logits (Gemma 2, arXiv:2408.00118); 0 is off.
      tie_embeddings: the head is the embedding transposed.
      embed_scale: multiply embeddings by sqrt(d_model).
      embed_norm: norm of the embeddings (BERT).
      token_types: kinds of segment with an embedding each (BERT): the batch field `token_types`, [B, T] int32, says
        which; without it all tokens are of the first.
      head_transform: a dense layer, the MLP's activation and a norm before the logits (BERT's masked-LM head).
      added_rows: the rows of so many tokens in embedding and head are parameters of their own, embed_added, head_added
        and head_bias_added. A run sets it where it adds tokens to a model.
      added_from: the first of these tokens.
      num_labels: the head gives so many logits and not V: a classifier or reward model. 0 is a language model.
      init_std: standard deviation of the initial kernels and embeddings.
      remat: what the backward pass recomputes in each layer: "none" keeps all activations, "full" only the layer's
        input, "attention" that and attention's output, "dots" also the results of matmuls with weights: what is then
        computed again is element by element, which takes less than storing it.
      attention: an implementation of research/ops/attention.py, such as "reference", or "auto", which takes the one
        for this backend and size.
      dtype: of activations and matmuls: float32 or bfloat16.
      precision: what the linear maps of the layers multiply in: "dtype", or 8 bits: "int8", or "fp8" (e4m3, and e5m2
        for gradients). Embeddings, the head, norms and attention's own products stay in dtype, and so does the gradient
        of kernels (docs/models.md). On a CPU 8 bits are emulated, which takes longer.
    """

    vocab_size: Size
    num_layers: Annotated[int, Range(1, 10_000)] = 4
    d_model: Size = 256
    num_heads: Size = 8
    num_kv_heads: Size = 8
    head_dim: Count = 0
    d_ff: Size = 768
    mlp: str = "swiglu"
    num_experts: Count = 0
    experts_per_token: Size = 2
    normalize_router: bool = True
    block: str = "pre"
    norm: str = "rmsnorm"
    norm_eps: NotNegative = 1e-6
    norm_offset: Real = 0.0
    positions: str = "rope"
    rope_theta: Positive = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    rotary_dim: Count = 0
    local_rope_theta: NotNegative = 0.0
    max_length: Size = 2048
    causal: bool = True
    prefix: bool = False
    sliding_window: tuple[Count, ...] = (0,)
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: str = "none"
    attention_scale: NotNegative = 0.0
    attention_scale_by_layer: bool = False
    attention_softcap: NotNegative = 0.0
    logit_softcap: NotNegative = 0.0
    tie_embeddings: bool = True
    embed_scale: bool = False
    embed_norm: bool = False
    token_types: Count = 0
    head_transform: bool = False
    added_rows: Count = 0
    added_from: Count = 0
    num_labels: Count = 0
    init_std: NotNegative = 0.02
    remat: str = "dots"
    attention: str = "auto"
    dtype: str = "float32"
    precision: str = "dtype"

    def __post_init__(self) -> None:
        self._check_sizes_and_choices()
        self._check_heads()
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise InputError(
                f"model.experts_per_token = {self.experts_per_token}: must be from 1 to model.num_experts = "
                f"{self.num_experts}."
            )
        if self.num_experts and self.mlp_bias:
            raise InputError("model.mlp_bias = True: experts have no biases. Set it to False.")
        if self.num_experts and self.precision != "dtype":
            raise InputError(
                f"model.precision = {self.precision!r}: experts multiply in model.dtype alone, and model.num_experts = "
                f"{self.num_experts}. Set it to 'dtype'."
            )
        self._check_prefix()
        self._check_added_rows()
        if not self.sliding_window:
            raise InputError("model.sliding_window = (): give a size for each of the layers in turn, 0 for all tokens.")

    def _check_added_rows(self) -> None:
        if self.added_from + self.added_rows > self.vocab_size:
            raise InputError(
                f"model.added_rows = {self.added_rows} from model.added_from = {self.added_from} on: aren't among the "
                f"{self.vocab_size} of the vocabulary. Change either."
            )
        if self.added_from and not self.added_rows:
            raise InputError(
                f"model.added_from = {self.added_from}: has no effect while model.added_rows = 0. Set that too."
            )

    @property
    def kind(self) -> str:
        """What sort of model it is, in words."""
        if self.num_labels == 1:
            return "a reward model"
        if self.num_labels:
            return f"a classifier of {self.num_labels} classes"
        return "a language model" if self.causal else "an encoder, which reads in both directions"

    def check_language_model(self, name: str) -> None:
        """Raises InputError, calling the model `name`, where it doesn't predict the next token."""
        if self.num_labels or not self.causal:
            asks = "score --reward asks it for rewards" if self.num_labels == 1 else "label asks it for labels"
            also = f" (understudy {asks})" if self.num_labels else ""
            raise InputError(
                f"{name}: is {self.kind}, and doesn't predict the next token. Name a language model{also}."
            )

    def check_masked_language_model(self, name: str) -> None:
        """Raises InputError, calling the model `name`, where it doesn't tell masked tokens from both sides."""
        if self.num_labels or self.causal:
            what = "has no head for tokens" if self.num_labels else "doesn't see what follows a masked token"
            raise InputError(
                f"{name}: is {self.kind}, and {what}. Name a model that was trained on masked tokens, such as BERT."
            )

    def _check_prefix(self) -> None:
        if self.prefix and not self.causal:
            raise InputError(
                "model.prefix = True: what follows a prefix is causal, and model.causal = False. Set either to its "
                "default."
            )
        if self.prefix and self.num_labels:
            raise InputError(
                f"model.prefix = True: is of language models, and model.num_labels = {self.num_labels} makes this a "
                "classifier, which can't begin with a prefix LM either. Set either to its default."
            )

    def _check_sizes_and_choices(self) -> None:
        ranges.check(self, "model")
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise InputError(f"model.{field} = {value!r}: no such choice.{did_you_mean(value, choices)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"model.dtype = {self.dtype!r}: must be 'float32' or 'bfloat16'.")

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model.num_kv_heads = {self.num_kv_heads} doesn't divide model.num_heads = {self.num_heads}. "
                "Every key/value head serves the same number of query heads: choose a divisor."
            )
        if not self.head_dim and self.d_model % self.num_heads:
            raise InputError(
                f"model.d_model = {self.d_model} isn't divisible by model.num_heads = {self.num_heads}. "
                "Change one of them, or set model.head_dim."
            )
        if self.positions == "rope":
            if self.rotary_size % 2 or self.rotary_size > self.dim_per_head:
                field = "rotary_dim" if self.rotary_dim else "head_dim"
                raise InputError(
                    f"model.{field} = {self.rotary_size}: rotary embeddings turn pairs of at most head_dim = "
                    f"{self.dim_per_head} dimensions. Choose an even number up to that."
                )
            self.rope_scaling.check(self.rotary_size)

    @property
    def dim_per_head(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its activation by a second linear map."""
        return self.mlp in _GATED

    @property
    def rotary_size(self) -> int:
        """How many dimensions of a head RoPE turns."""
        return self.rotary_dim or self.dim_per_head

    @property
    def scale(self) -> float:
        """What attention's scores are multiplied by."""
        return self.attention_scale or self.dim_per_head**-0.5
