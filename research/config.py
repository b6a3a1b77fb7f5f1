"""What a config holds, and the checks that need neither data nor a compiler.

Experiments build an ml_collections.ConfigDict from `defaults()`; `parse` turns it, or the JSON of an earlier run, into
the dataclasses below. Every error names the field as it is spelt on the command line, its value and the remedy.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from research import optim, options
from research.devices import sharding
from research.errors import MOST_SEED, InputError, did_you_mean
from research.models import adapters, added_rows
from research.models.config import ModelConfig
from research.ops import quantized
from research.ranges import Count, Fraction, NotNegative, Part, Range, Size
from research.rollouts import rewards
from research.rollouts import spec as rollout_spec
from research.rollouts.advantages import AdvantageSpec
from research.rollouts.spec import RolloutSpec
from research.sources import spec
from research.sources.spec import DataSection, DataSpec
from research.sources.tokenizers import TokenizerSpec

Axis = Annotated[int, Range(-1)]  # devices; what is 0 is refused where their number is known


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. One may be -1: what is left.

    Attributes:
      data: splits the batch; the slices of a multi-slice TPU are along it.
      fsdp: batch and parameters (fully sharded data parallelism).
      expert: the batch, and in mixtures of experts the experts.
      sequence: the tokens of a row.
      tensor: heads, MLP and vocabulary.
    """

    data: Axis = -1
    fsdp: Axis = 1
    expert: Axis = 1
    sequence: Axis = 1
    tensor: Axis = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
      every: steps between checkpoints; the last step and a stop by signal are saved always. 0: only these.
      keep_last: how many of the newest stay.
      best_metric: also keep the best by this metric of the evaluation, such as "eval/loss"; "" for none.
      best_mode: "min" or "max".
      patience: end the run after so many evaluations in a row that gave no new best; 0: never.
    """

    every: Count = 200
    keep_last: Size = 2
    best_metric: str = ""
    best_mode: str = "min"
    patience: Count = 0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out data.

    Attributes:
      every: steps between evaluations; there is one before the first and one after the last step too. 0: none at all.
      batches: at most so many batches of held-out rows for the loss; 0 for all.
      generate: how many held-out prompts are answered greedily and judged; 0 for none.
      max_new_tokens: the longest answer.
      show: so many of the answers are printed.
      sets: further data that the objective is measured on, as name -> path, where a path is as in data.path, without
        weights: {"news": "news.jsonl"} gives eval/news/loss and its kin. It is read as the data section says, and
        nothing that it holds is taken out of training.
      tasks: further evaluations, as `understudy evaluate --task=...` takes them: "choice:questions.jsonl".
    """

    every: Count = 200
    batches: Count = 20
    generate: Count = 0
    max_new_tokens: Size = 32
    show: Count = 4
    sets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tasks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics go, beside WORKDIR/metrics.jsonl.

    Attributes:
      every: steps between lines of metrics.
      tensorboard: write them to WORKDIR/tensorboard too.
      wandb: the project at Weights & Biases that they are sent to; "" for none.
      diagnose: steps between looks at the metrics for causes of not learning (docs/diagnosis.md), each of which is said
        once, on a line; 0 for none.
    """

    every: Size = 10
    tensorboard: bool = True
    wandb: str = ""
    diagnose: Count = 0


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What `understudy plan` needs to know.

    Attributes:
      prices: of a chip and hour, by kind of chip, in any currency; 0: not known.
    """

    prices: Mapping[str, NotNegative] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("v4", "v5e", "v5p", "v6e", "A100", "H100", "H200", "B200", "cpu"), 0.0)
    )


@dataclasses.dataclass(frozen=True)
class ModelSection(ModelConfig):
    """What a config says of a model: the fields of ModelConfig, and where it begins. See `model_config`.

    Attributes:
      vocab_size: V; 0 is the tokenizer's, rounded up to a multiple of 128.
      dtype: of activations and matmuls: "float32", "bfloat16", or "auto", which is bfloat16 on TPU and GPU and float32
        on CPU.
      init_from: the model to start from: a run's workdir, a folder as transformers saves it, a hub name (NAME/MODEL or
        NAME/MODEL@REVISION) or a .gguf file. It then decides all fields that are left at their defaults.
      prefix: whether it is a prefix LM (arXiv:1910.10683, section 3.2.1): the tokens of a document's prefix see each
        other whole, and those that follow all before them. The batch field `prefix` says which are which, and without
        it the model is causal. What is generated sees its prompt so. None: as what it starts from is; else False.
      new_rows: how tokens begin that the run adds to the tokenizer of init_from: as the "mean" of the model's other
        embeddings, or "random", with their mean and spread.
    """

    vocab_size: Count = 0
    dtype: str = "auto"
    init_from: str = ""
    prefix: bool | None = None
    new_rows: str = "mean"

    def __post_init__(self) -> None:
        """Leaves the checks to the ModelConfig that comes of it, once a checkpoint and the tokenizer have their say."""


@dataclasses.dataclass(frozen=True)
class RoleSection(ModelSection):
    """What a config says of a further model: all fields of `model`, and whose trunk it shares.

    Attributes:
      of: the role whose trunk this one shares; "" for a model of its own.
      adapter: whether it has that role's adapter too; without it, it is what the adapter was put to.
      sync_every: the role begins as that one, keeps what is trained of it, and moves to it every so many steps; 0 for a
        role that doesn't follow.
      sync_weight: how far it moves: 1 takes it over, less is a moving average.
    """

    of: str = ""
    adapter: bool = True
    sync_every: Count = 0
    sync_weight: Part = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
      seed: of parameters, data order and everything random.
      steps: updates.
      epochs: the length of the run in passes over the rows that are trained on, in the place of `steps`, which follows
        from it once the data is read; 0: as steps says. Rows that are drawn by weight have no epochs.
      batch_size: rows in one update, over all devices and microbatches.
      seq_len: T, tokens in a row.
      microbatches: the batch goes through the model in so many parts, one after the other, to save memory.
      ema_decay: keep a moving average of the parameters, and evaluate it; 0 for none.
      max_bad_steps: end the run after so many updates in a row were skipped for a loss or gradient that isn't finite.
      mesh: devices along each axis.
      model: the model that is trained.
      tokenizer: which tokenizer the run uses.
      tokenizer.kind: "auto", that of model.init_from, and without one "byte" (ids 0-255 are the bytes, then the special
        tokens); "bpe" (byte-level byte-pair encoding trained on the run's own training text); or a path: a
        tokenizer.json, a folder with the tokenizer of a model, or a .gguf file.
      data: what the run trains and is evaluated on.
      trainable: which parameters of the policy are trained: a regular expression that their whole names match, such as
        "head", "layers/.*|final_norm/.*" or "layers/3/.*", which is one layer, counted from 0; "" is all. For several
        roles a mapping: {"policy": "head", "value": ""}. The others take no gradient and no optimizer state, and aren't
        in checkpoints: they are read where the run began.
      adapter: how the policy is changed without changing all of it: {"kind": "lora", "rank": 16}; {} trains what
        `trainable` says; {"init_from": DIR} goes on with an adapter of PEFT or of a run. docs/adaptation.md describes
        the kinds.
      frozen_dtype: in which the kernels of what isn't trained are held: "auto" is the compute dtype of their model;
        "float32" or "bfloat16"; "int8" or "nf4" (4 bits) for those of the layers' linear maps, and "auto" for the
        others. docs/adaptation.md describes them.
      trained_dtype: in which kernels that are trained are held, and their gradients: "float32" or "bfloat16", which
        halves them, and wants optimizer.rounding = "stochastic" (docs/models.md). Norms, biases and the optimizer's
        state stay in float32.
      roles: further models that the objective reads, such as {"teacher": {"init_from": NAME}}: each a section like
        `model`. Those that the objective trains are in the run's checkpoints; the others are frozen. A role may be the
        policy's own trunk: {"of": "policy"} is the policy as it began, and shares what isn't trained of it (see
        `trainable`); {"of": "policy", "num_labels": 1} is the policy with another head, and shares its passes.
      objective: what is learned: {"terms": {name: weight or {options}}}. docs/objectives.md describes it.
      optimizer: how the parameters follow the gradient.
      rollout: the policy answers the prompts of the data itself, for on-policy objectives.
      rewards: what judges the policy's answers, for reinforcement learning: {name: weight or {"reward": ..., "weight":
        ..., and options}}. The batches are then answers of the policy, `batch_size` of them in an update, and carry an
        `advantage`. {}: the run learns from the data's answers. docs/rl.md describes it.
      advantage: with `rewards`: how advantages are made of them.
      checkpoint: when to save, and what to keep.
      eval: evaluation on held-out data.
      log: where metrics go.
      plan: what `understudy plan` needs to know.
      rules: logical axis -> mesh axis, where it differs from RULES in research/devices/sharding.py.
      stall_seconds: end a run of several processes when it has made no step for so long; 0: never. With rewards a
        rollout counts as one too, so that it is to be longer than one takes.
      compilation_cache: keep compiled programs on disk, so that the next start is faster.
    """

    seed: Annotated[int, Range(0, MOST_SEED)] = 0
    steps: Size = 1000
    epochs: NotNegative = 0.0
    batch_size: Size = 32
    seq_len: Size = 256
    microbatches: Size = 1
    ema_decay: Fraction = 0.0
    max_bad_steps: Size = 5
    stall_seconds: Count = 1800
    compilation_cache: bool = True
    mesh: MeshConfig = MeshConfig()
    rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: ModelSection = ModelSection()
    trainable: str | Mapping[str, Any] = ""
    adapter: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    frozen_dtype: str = "auto"
    trained_dtype: str = "float32"
    roles: Mapping[str, RoleSection] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerSpec = TokenizerSpec(kind="auto")
    data: DataSection = DataSection()
    objective: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"terms": {"next_token": 1.0}})
    rollout: RolloutSpec = RolloutSpec()
    rewards: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    advantage: AdvantageSpec = AdvantageSpec()
    optimizer: optim.OptimizerSpec = optim.OptimizerSpec()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    plan: PlanConfig = PlanConfig()


FROZEN_DTYPES = ("auto", "float32", "bfloat16", *quantized.KINDS)
TRAINED_DTYPES = ("float32", "bfloat16")


def defaults() -> dict[str, Any]:
    """All fields with their default values, as nested dicts."""
    return dataclasses.asdict(Config())


def parse(values: Mapping[str, Any]) -> Config:
    """Nested mappings -> Config.

    Raises:
      InputError: an unknown field (the nearest is named), or a value of another type or out of its range.
    """
    return options.build(Config, values, "")


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config, for JSON."""
    return dataclasses.asdict(config)


def check(config: Config, *, num_devices: int) -> None:
    """Checks values that can't work, alone or together.

    Raises:
      InputError: naming the field, the value and the remedy.
    """
    _check_prices(config.plan.prices)
    _check_best_metric(config)
    shape = dict(zip(sharding.AXES, sharding.mesh_shape(dataclasses.asdict(config.mesh), num_devices), strict=True))
    _check_rules(config.rules)
    _check_roles(config)
    rules = sharding.make_rules(config.rules)
    over = [axis for axis in sharding.AXES if axis in sharding.mesh_axes(rules["batch"])]
    unit = math.prod(shape[axis] for axis in over) * config.microbatches
    if config.batch_size % unit:
        names = " x ".join([*(f"mesh.{axis}" for axis in over), "microbatches"])
        sizes = " x ".join(str(n) for n in [*(shape[axis] for axis in over), config.microbatches])
        raise InputError(
            f"batch_size = {config.batch_size} isn't divisible by {names} = {sizes} = {unit}: each device takes as "
            f"many rows as the next. The next that works: {-(-config.batch_size // unit) * unit}."
        )
    if config.seq_len % shape["sequence"]:
        raise InputError(
            f"seq_len = {config.seq_len} isn't divisible by mesh.sequence = {shape['sequence']}: each device takes as "
            "many tokens of a row as the next. Change either."
        )
    model = model_config(config, vocab_size=config.model.vocab_size or 256)
    if config.seq_len > model.max_length:
        raise InputError(
            f"seq_len = {config.seq_len} is longer than model.max_length = {model.max_length}. Raise the one or "
            "lower the other."
        )
    if adapter := adapters.load(config.adapter):
        _check_ahead(config, adapter, model.max_length)
    spec.check(data_spec(config))
    if not config.epochs:
        optim.make_schedule(config.optimizer, config.steps)
    rewards.load(config.rewards)
    if config.rewards and config.data.annotations:
        raise InputError(
            f"data.annotations = {config.data.annotations!r}: are of the data's answers, and with rewards all answers "
            "are the policy's. Leave it out, or run the model live (roles)."
        )
    rollout_spec.check(config.rollout, config.rewards, config.advantage, config.batch_size, config.data.pack)


def _check_ahead(config: Config, adapter: adapters.Adapter, max_length: int) -> None:
    """Raises InputError where what an adapter puts in front of documents leaves these no room."""
    if config.seq_len - adapter.virtual_tokens < 2:
        raise InputError(
            f"adapter.tokens = {adapter.virtual_tokens}: count in seq_len = {config.seq_len}, and leave less than two "
            "tokens of a document. Lower the one or raise the other."
        )
    if config.seq_len + adapter.prefix > max_length:
        raise InputError(
            f"adapter.tokens = {adapter.prefix}: positions begin after them, and seq_len = {config.seq_len} more are "
            f"beyond model.max_length = {max_length}. Lower either."
        )


def trainable_pattern(config: Config, role: str) -> str:
    """Which parameters of a role are trained, where the objective trains it; "" is all."""
    if isinstance(config.trainable, str):
        return config.trainable if role == "policy" else ""
    return config.trainable.get(role, "")


_RESERVED_ROLES = {
    "policy": "the model of the section `model`",
    "objectives": "where parameters of terms lie",
    "layers": "what names of layers begin with",
}


def _check_roles(config: Config) -> None:
    """Raises InputError for `trainable`, dtypes and roles of another's trunk that can't be."""
    names = ("policy", *config.roles)
    for field, choices in (("frozen_dtype", FROZEN_DTYPES), ("trained_dtype", TRAINED_DTYPES)):
        if (value := getattr(config, field)) not in choices:
            raise InputError(f"{field} = {value!r}: no such choice.{did_you_mean(value, choices)}")
    if config.optimizer.rounding == "stochastic" and config.trained_dtype == "float32":
        raise InputError(
            f"optimizer.rounding = {config.optimizer.rounding!r}: is of parameters in bfloat16, and trained_dtype = "
            "'float32'. Set that to 'bfloat16', or leave it out."
        )
    unread = "init_from" in config.adapter and "kind" not in config.adapter  # what it begins with says the options
    if (unread or adapters.load(config.adapter)) and trainable_pattern(config, "policy"):
        raise InputError(
            f"trainable = {config.trainable!r}: the adapter says what of the policy is trained. Leave it out; what is "
            "trained besides is adapter.also."
        )
    if config.adapter.get("init") == "loftq" and config.frozen_dtype not in quantized.KINDS:
        raise InputError(
            f"adapter.init = 'loftq': makes up for what quantising loses, and frozen_dtype = {config.frozen_dtype!r}. "
            "Set that to 'nf4' or 'int8', or choose another init."
        )
    for where, section in (model_section(config, role) for role in names):
        if section.precision != "dtype" and config.frozen_dtype in quantized.KINDS:
            raise InputError(
                f"{where}.precision = {section.precision!r}: rounds kernels to 8 bits for each product, and "
                f"frozen_dtype = {config.frozen_dtype!r} holds them rounded already. Set either to its default."
            )
    for role, pattern in {} if isinstance(config.trainable, str) else config.trainable.items():
        if role not in names:
            raise InputError(f"trainable.{role}: no such role.{did_you_mean(role, names)}")
        if not isinstance(pattern, str):
            raise InputError(f"trainable.{role} = {pattern!r}: must be a regular expression on names.")
    added_rows.check(config.model.new_rows, "model.new_rows")
    for role, section in config.roles.items():
        owner, where = section.of, f"roles.{role}"
        if section.new_rows != RoleSection.new_rows:
            raise InputError(f"{where}.new_rows = {section.new_rows!r}: only the policy's tokens grow. Leave it out.")
        if role in _RESERVED_ROLES or not re.fullmatch(r"[\w-]+", role):
            raise InputError(
                f"{where}: {role!r} is {_RESERVED_ROLES.get(role, 'no name of a role')}. Use another name."
            )
        if not section.adapter and not (owner == "policy" and config.adapter):
            raise InputError(
                f"{where}.adapter = False: is for a role of the policy (of) that has an adapter. Leave it out."
            )
        _check_sync(where, section, config.trained_dtype)
        if not owner:
            continue
        if owner not in names or owner == role or (owner in config.roles and config.roles[owner].of):
            raise InputError(f"{where}.of = {owner!r}: must be a role with a model of its own, such as 'policy'.")
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if (
                field.name not in ("of", "num_labels", "adapter", "sync_every", "sync_weight")
                and value != field.default
            ):
                raise InputError(
                    f"{where}.{field.name} = {value!r}: the role is the model of {owner!r} (of), but for its head "
                    "(num_labels). Leave it out."
                )


def _check_sync(where: str, section: RoleSection, trained_dtype: str) -> None:
    """Raises InputError where a role can't follow another."""
    every, weight = section.sync_every, section.sync_weight
    if weight != RoleSection.sync_weight and not every:
        raise InputError(f"{where}.sync_weight = {weight}: is of a role that follows another. Set {where}.sync_every.")
    if every and weight < 1 and trained_dtype != "float32":
        raise InputError(
            f"{where}.sync_weight = {weight}: is a moving average, whose small moves are lost in trained_dtype = "
            f"{trained_dtype!r}. Leave it out, or set trained_dtype = 'float32'."
        )
    if every and not section.of:
        raise InputError(f"{where}.sync_every = {every}: follows no role. Name it: {where}.of = 'policy'.")
    if every and (section.num_labels or not section.adapter):
        field = "num_labels" if section.num_labels else "adapter"
        raise InputError(
            f"{where}.sync_every = {every}: the role is {section.of!r} as it was a while ago, with head and adapter. "
            f"Leave out {where}.{field}."
        )


def _check_prices(prices: Mapping[str, float]) -> None:
    for chip in prices:
        if chip not in PlanConfig().prices:
            raise InputError(f"plan.prices.{chip}: no such chip.{did_you_mean(chip, PlanConfig().prices)}")


def _check_best_metric(config: Config) -> None:
    if config.checkpoint.best_mode not in ("min", "max"):
        raise InputError(f"checkpoint.best_mode = {config.checkpoint.best_mode!r}: must be 'min' or 'max'.")
    if config.checkpoint.best_metric and not config.checkpoint.best_metric.startswith("eval/"):
        raise InputError(
            f"checkpoint.best_metric = {config.checkpoint.best_metric!r}: must be a metric of the evaluation, such as "
            "'eval/loss', or '' for none."
        )
    if config.checkpoint.best_metric and config.checkpoint.every and config.checkpoint.every % (config.eval.every or 1):
        raise InputError(
            f"checkpoint.best_metric = {config.checkpoint.best_metric!r} needs an evaluation at every checkpoint, and "
            f"checkpoint.every = {config.checkpoint.every} isn't a multiple of eval.every = {config.eval.every}. "
            "Change either, or set checkpoint.best_metric to ''."
        )
    if config.checkpoint.patience and not config.checkpoint.best_metric:
        raise InputError(
            f"checkpoint.patience = {config.checkpoint.patience}: waits for a better checkpoint.best_metric, and there "
            "is none. Name it, such as 'eval/loss', or set checkpoint.patience = 0."
        )
    if config.checkpoint.best_metric and not config.eval.every:
        raise InputError(
            f"checkpoint.best_metric = {config.checkpoint.best_metric!r} needs evaluations, and eval.every = 0 turns "
            "them off. Set eval.every, or checkpoint.best_metric=''."
        )


def _check_rules(rules: Mapping[str, Any]) -> None:
    for name, axes in rules.items():
        if name not in sharding.RULES:
            raise InputError(f"rules.{name}: no such logical axis.{did_you_mean(name, sharding.RULES)}")
        if not (axes is None or isinstance(axes, str | list | tuple)):
            raise InputError(f"rules.{name} = {axes!r}: must be a mesh axis, a list of them, or None.")
        for axis in sharding.mesh_axes(axes):
            if axis not in sharding.AXES:
                raise InputError(f"rules.{name} = {axes!r}: no such mesh axis.{did_you_mean(axis, sharding.AXES)}")


def model_section(config: Config, role: str) -> tuple[str, ModelSection]:
    """Where the config describes the model of a role, and what it says."""
    return ("model", config.model) if role == "policy" else (f"roles.{role}", config.roles[role])


def model_config(config: Config, vocab_size: int, backend: str | None = None, role: str = "policy") -> ModelConfig:
    """A model's section with `auto` values filled in: the vocabulary and the compute dtype of `backend`, by
    default that of the mesh in context or this process.

    Raises:
      InputError: the tokenizer has more tokens than model.vocab_size.
    """
    where, section = model_section(config, role)
    if isinstance(section, RoleSection) and section.of:
        owner = model_config(config, vocab_size, backend, section.of)
        labels = section.num_labels or owner.num_labels
        # A head of its own reads what the owner's trunk makes, whichever way that reads.
        return dataclasses.replace(owner, num_labels=labels, prefix=owner.prefix and not labels)
    if section.vocab_size and section.vocab_size < vocab_size:
        raise InputError(
            f"{where}.vocab_size = {section.vocab_size} is smaller than the tokenizer, which has {vocab_size} "
            "tokens. Set it to 0 to follow the tokenizer."
        )
    values = _values(section, ModelConfig) | {"prefix": bool(section.prefix)}
    values["vocab_size"] = section.vocab_size or -(-vocab_size // 128) * 128  # whole tiles, divisible by any mesh
    if section.dtype == "auto":
        values["dtype"] = "float32" if (backend or sharding.platform()) == "cpu" else "bfloat16"
    return ModelConfig(**values)


# Fields that change neither the parameters' names nor their shapes: a config may set them against a checkpoint.
_FREE = (
    "remat",
    "attention",
    "dtype",
    "precision",
    "init_std",
    "max_length",
    "rope_theta",
    "rope_scaling",
    "local_rope_theta",
)
_FREE += ("prefix", "sliding_window", "norm_eps", "attention_scale", "attention_scale_by_layer")
_FREE += ("attention_softcap", "logit_softcap")


_OF_RUN = ("dtype", "precision", "remat", "attention", "init_from", "new_rows")  # and not of a checkpoint


def with_architecture(config: Config, base: ModelConfig, name: str, role: str = "policy") -> Config:
    """The config with the model of a checkpoint; fields that differ from their defaults stay as they are.

    Args:
      config: its section for the role names a checkpoint.
      base: the checkpoint's.
      name: of the checkpoint, for errors.
      role: whose model.

    Raises:
      InputError: a field asks for other parameters than the checkpoint has.
    """
    (where, section), values = model_section(config, role), {}
    for field in dataclasses.fields(ModelSection):
        if field.name in _OF_RUN:
            continue
        value, stored = getattr(section, field.name), getattr(base, field.name)
        untouched = value == field.default
        learned = field.name == "max_length" and base.positions == "learned"
        if field.name == "num_labels" and not stored:  # a classifier with a new head on a language model's body
            stored = value
        elif field.name == "logit_softcap" and section.num_labels and not base.num_labels:  # of tokens' logits
            stored = field.default
        if not untouched and value != stored and (field.name not in _FREE or learned):
            raise InputError(
                f"{where}.{field.name} = {value!r}, and the checkpoint that it starts from, {name}, has {stored!r}. "
                f"Leave it at its default to take the checkpoint's, or leave {where}.init_from out to start afresh."
            )
        values[field.name] = stored if untouched else value
    section = dataclasses.replace(section, **values)
    if role == "policy":
        return dataclasses.replace(config, model=section)
    return dataclasses.replace(config, roles={**config.roles, role: section})


def with_added_rows(config: Config, rows: int, first: int, stop: int) -> Config:
    """The config of a run that adds tokens to the model that its policy begins with.

    Args:
      config: with that model's architecture.
      rows: of that model's embedding.
      first, stop: sizes of the tokenizer before and after; tokens from `first` to `stop` - 1 are new.
    """
    size = added_rows.grown_size(rows, stop)
    model = dataclasses.replace(config.model, vocab_size=size, added_from=first, added_rows=stop - first)
    return dataclasses.replace(config, model=model)


def data_spec(config: Config) -> DataSpec:
    values = _values(config.data, DataSection)
    values["num_classes"] = config.data.num_classes or config.model.num_labels
    return DataSpec(**values, seq_len=config.seq_len, keep_records=bool(config.rewards))


def _values(section: Any, cls: type) -> dict[str, Any]:
    """The values of those fields that `cls` has too."""
    return {name: getattr(section, name) for name in options.names(cls)}
