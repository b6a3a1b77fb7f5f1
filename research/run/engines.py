"""What writes the answers of a run with rewards: its own devices, or servers."""

import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from research import loading
from research.devices import distributed
from research.files import read_json
from research.models.transformer import Model
from research.rollouts import spec as rollout_spec
from research.rollouts.engines import probe
from research.rollouts.engines.local import Local
from research.rollouts.engines.policy import Policy
from research.rollouts.engines.pool import Limits
from research.rollouts.engines.sending import make_weights
from research.rollouts.engines.served import Served
from research.rollouts.engines.types import Engine
from research.rollouts.engines.vllm import Vllm
from research.run.resolve import Inputs

WEIGHTS = "weights"  # in a workdir: the versions that servers read


def make_engine(inputs: Inputs, policy: Model, stopped: Callable[[], bool] = lambda: False) -> Engine:
    """The engine that config.rollout names. Servers have been checked when this returns, and one of them is there.

    Args:
      inputs: of a run with rewards.
      policy: its model.
      stopped: whether answers of servers that are under way are to be given up, since the run is to end.

    Raises:
      InputError: servers can't do what the config says, or have another model.
      Unavailable: no server answers.
    """
    spec, prompts = inputs.config.rollout, inputs.prompts
    tokenizer = prompts.tokenizer
    if spec.engine == "local":
        count = rollout_spec.sizes(spec, inputs.config.batch_size).prompts
        return Local(policy, tokenizer.size, prompts=count, longest=prompts.longest, slots=spec.slots)
    limits = Limits(spec.in_flight, spec.answer_seconds, spec.outage_seconds)
    served = Served(policy, tokenizer.size, limits, _say)
    served.check_kind("rollout.engine = 'vllm'")
    first = prompts.read(0, 1)[0].tokens
    prober = probe.make_probe(policy, tokenizer.size, spec.sampling(tokenizer.stop), first)
    # A server may lag behind by so many versions, each of which must stay to be known as the run's.
    folder, kept = Path(inputs.workdir) / WEIGHTS, spec.staleness + 2
    weights = make_weights(_policy(inputs, policy), folder, transfer=spec.transfer, kept=kept)
    urls = [url.rstrip("/") for url in spec.servers]
    engine = Vllm(urls, weights, served, prober, staleness=spec.staleness, stopped=stopped)
    engine.check(prompts.longest + spec.max_new_tokens)
    return engine


def _policy(inputs: Inputs, model: Model) -> Policy:
    config, base = inputs.config, inputs.bases.get("policy")
    origin = base.origin if base is not None else read_json(Path(inputs.workdir) / loading.ORIGIN, {})
    return Policy(model, config.adapter, origin.get("config", {}), config.model.init_from, config.frozen_dtype)


def _say(line: str) -> None:
    """Prints above the bar of progress, if any."""
    if distributed.main():
        tqdm.write(line, file=sys.stderr)
