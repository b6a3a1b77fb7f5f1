"""What all experiments share: the defaults, the variants after the colon, and `debug`."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from research import config as config_lib
from research.errors import InputError, did_you_mean


def get_config() -> ConfigDict:
    """All fields with their defaults (see research/config.py), locked: an unknown name is an error."""
    config = ConfigDict(config_lib.defaults())
    config.model.prefix = config_dict.placeholder(bool)  # None, which a command line may set
    config.lock()
    return config


def variants(arg: str, *known: str) -> set[str]:
    """What stands after the colon of --config=experiments/x.py:a,b; every experiment has `debug`.

    Raises:
      InputError: a variant that isn't known.
    """
    chosen = set(filter(None, (arg or "").split(",")))
    for name in chosen - {"debug", *known}:
        raise InputError(f"--config=...:{name}: no such variant.{did_you_mean(name, ('debug', *known))}")
    return chosen


DEBUG_MODEL = {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 0, "d_ff": 128}


def debug(config: ConfigDict) -> ConfigDict:
    """Shrinks model, data and steps so that everything runs once in seconds. Comes last, after all else is set."""
    config.update(steps=2, epochs=0.0)
    config.batch_size = 8 * config.microbatches
    config.seq_len = min(config.seq_len, 128)
    config.model.update(DEBUG_MODEL)
    config.tokenizer.vocab_size = min(config.tokenizer.vocab_size, 512)
    config.data.examples = 200
    config.data.max_records = 50
    config.optimizer.update(warmup_steps=1, warmup_share=0.0)
    if config.rewards:
        prompts = config.batch_size if config.rollout.pairs else 2 * config.microbatches
        config.rollout.update(prompts=prompts, answers=4, max_new_tokens=8)
    config.checkpoint.every = 1
    config.eval.update(every=1, batches=2, generate=min(config.eval.generate, 4), max_new_tokens=8, show=1)
    config.log.every = 1
    return config


def finish(config: ConfigDict, arg: str, overrides: Mapping[str, Any]) -> None:
    """What an experiment has to say once the command line is read: `finish` in its module, called with its config.

    In the debug form of a run that begins with a model, that model decides the shape, and not `debug`.

    Args:
      config: with the overrides.
      arg: the variants, as get_config has them.
      overrides: dotted field -> value, of the command line.
    """
    if "debug" in variants(arg, *arg.split(",")) and config.model.init_from:
        defaults = config_lib.defaults()["model"]
        config.model.update({name: defaults[name] for name in DEBUG_MODEL if f"model.{name}" not in overrides})
