"""The two ways of weights to servers by a folder that all see: an adapter beside the model, or the whole model."""

import re
from pathlib import Path
from typing import Any

import jax

from research.errors import InputError
from research.models.specs import Params
from research.rollouts.engines import server as http
from research.rollouts.engines.client import Refused, ask, models
from research.rollouts.engines.nccl import NcclWeights
from research.rollouts.engines.policy import Policy
from research.rollouts.engines.staging import Staging
from research.rollouts.engines.weights import ServerError, Weights

NAME = "policy"  # of the model that servers are started with (--served-model-name)


def make_weights(
    policy: Policy, folder: Path, *, transfer: str = "folder", dtype: str = "", seconds: float = 600.0, kept: int = 2
) -> Weights:
    """The way of a policy's weights: the adapter alone where vLLM can put it beside the model, else the whole model.

    Args:
      policy: to be served.
      folder: that the run and all its servers see at the same path.
      transfer: of whole weights: "folder" or "nccl", see nccl.py.
      dtype: of whole weights: float32, bfloat16 or float16; by default that in which the run computes.
      seconds: how long a server may take to read them.
      kept: how many versions stay in the folder, at least 2; one that was removed counts as none of this run's.

    Raises:
      InputError: vLLM can't compute what the policy does.
    """
    policy.check()
    if policy.hot:
        if transfer != "folder":
            raise InputError(
                f"rollout.transfer = {transfer!r}: is of whole weights, and a LoRA goes by a folder. Leave it out."
            )
        return AdapterWeights(policy, Staging(folder, kept), NAME, seconds)
    dtype = dtype or policy.model.config.dtype
    if transfer == "nccl":
        if jax.default_backend() != "gpu":
            raise InputError(
                f"rollout.transfer = 'nccl': is from GPU to GPU, and this run is on {jax.default_backend()}. Take "
                "'folder'."
            )
        return NcclWeights(policy, NAME, dtype, seconds)
    return WholeWeights(policy, Staging(folder, kept), NAME, dtype, seconds)


class AdapterWeights:
    """See weights.Weights. A version is an adapter that servers load beside the model that they began with, and its
    name is in each request, so that answers with two versions may be under way at once."""

    def __init__(self, policy: Policy, staging: Staging, name: str, seconds: float):
        self._policy, self._staging, self._name, self._seconds = policy, staging, name, seconds
        self._own = re.compile(rf"{re.escape(name)}-(\d+-[0-9a-f]{{12}})")
        self._last: dict[str, str] = {}  # server -> the adapter that was committed last

    def stage(self, params: Params, version: int) -> None:
        leaves = self._policy.leaves(params)
        if jax.process_index() == 0:
            self._staging.put(version, lambda path: self._policy.write_adapter(path, leaves))

    def prepare(self, server: str, version: int) -> None:
        stamp = http.stamp(server)
        if stamp != http.START:
            raise ServerError(f"{server}: serves weights {stamp!r} that were changed since its start. Start it anew.")
        name = self.model(version)
        if name not in self._loaded(server):
            body = {"lora_name": name, "lora_path": str(self._staging.path(version))}
            _first(server, "/v1/load_lora_adapter", body, self._seconds)

    def commit(self, server: str, version: int) -> None:
        """Unloads the adapters but this one and that of before it, with which answers may be under way."""
        name = self.model(version)
        loaded = self._loaded(server)
        if name not in loaded:
            raise ServerError(f"{server}: hasn't loaded {name}. It was started anew since.")
        for other in loaded - {name, self._last.get(server)}:
            ask(server, "/v1/unload_lora_adapter", {"lora_name": other}, seconds=http.SHORT)
        self._last[server] = name

    def served(self, server: str) -> int | None:
        stamps = [self._own.fullmatch(name)[1] for name in self._loaded(server)]
        versions = [self._staging.version(stamp) for stamp in stamps]
        return max((version for version in versions if version is not None), default=None)

    def model(self, version: int) -> str:
        return f"{self._name}-{self._staging.path(version).name}"

    def stamp(self, version: int) -> str:
        return http.START

    def _loaded(self, server: str) -> set[str]:
        """The adapters of such names that a server has."""
        return {each["id"] for each in models(server, http.SHORT) if self._own.fullmatch(str(each["id"]))}


class WholeWeights:
    """See weights.Weights. A server checks the files of a version while it answers, and reads them while it doesn't
    (launch/vllm_plugin)."""

    def __init__(self, policy: Policy, staging: Staging, name: str, dtype: str, seconds: float):
        self._policy, self._staging, self._name = policy, staging, name
        self._dtype, self._seconds = dtype, seconds

    def stage(self, params: Params, version: int) -> None:
        values = self._policy.whole(params)
        if jax.process_index() == 0:
            self._staging.put(version, lambda path: self._policy.write_whole(path, values, self._dtype))

    def prepare(self, server: str, version: int) -> None:
        if http.stamp(server) != self.stamp(version):
            body = {"init_info": {"folder": str(self._staging.path(version))}}
            _first(server, "/init_weight_transfer_engine", body, self._seconds)

    def commit(self, server: str, version: int) -> None:
        body = {"update_info": {"folder": str(self._staging.path(version))}}
        read = lambda: ask(server, "/update_weights", body, seconds=self._seconds)  # noqa: E731
        http.change_weights(server, self.stamp(version), read, self._seconds)

    def served(self, server: str) -> int | None:
        return self._staging.version(http.stamp(server))

    def model(self, version: int) -> str:
        return self._name

    def stamp(self, version: int) -> str:
        return self._staging.path(version).name


def _first(server: str, path: str, body: Any, seconds: float) -> None:
    """Posts what a server that wasn't started for it can't do."""
    try:
        ask(server, path, body, seconds=seconds)
    except ServerError as error:
        if not (isinstance(error, Refused) and error.status == 404) and "not configured" not in str(error):
            raise
        raise ServerError(
            f"{error}. It wasn't started to take such weights: launch/servers.py --dry_run prints how it is to be "
            "(SERVER_LORA_RANK for a LoRA)."
        ) from error
