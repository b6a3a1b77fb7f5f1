"""Whole weights from GPU to GPU, by vLLM's own NCCL backend. Not tried: no GPU was there.

A server is started with --weight-transfer-config '{"backend": "nccl"}'. The run's process 0 and the workers of a server
form a group of NCCL, whose rank 0 the run is; torch, which the run hasn't, isn't needed for it (see vLLM's
NCCLWeightTransferInitInfo). NCCL is called through its C library, which jax brings for GPUs.
"""

import base64
import concurrent.futures
import contextlib
import ctypes
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from research.models.specs import Params
from research.pretrained import save
from research.rollouts.engines import server as http
from research.rollouts.engines.client import ask, field
from research.rollouts.engines.policy import Policy
from research.rollouts.engines.weights import ServerError

_ID_BYTES = 128
_TYPES = {"float16": 6, "float32": 7, "bfloat16": 9}  # ncclDataType_t
_SUM = 0  # ncclRedOp_t


class NcclWeights:
    """See weights.Weights. Nothing is written: what is staged lies in process 0's memory.

    Args:
      policy: to be served.
      name: of the model that servers are started with.
      dtype: of the weights: float32, bfloat16 or float16.
      seconds: how long servers may take; a group that takes longer is given up.
      make_group: (ncclUniqueId, size) -> the group, joined as rank 0.
    """

    def __init__(
        self, policy: Policy, name: str, dtype: str, seconds: float, make_group: "Callable[..., Group] | None" = None
    ):
        self._policy, self._name, self._dtype, self._seconds = policy, name, dtype, seconds
        self._make_group = make_group or Group
        self._run = secrets.token_hex(6)  # its versions are no other run's
        self._tensors: list[tuple[str, np.ndarray]] = []
        self._version = -1
        self._groups: dict[str, Group] = {}
        self._lock = threading.Lock()  # groups of one device aren't used at once

    def stage(self, params: Params, version: int) -> None:
        values = self._policy.whole(params)
        if jax.process_index() == 0:
            family, _ = save.choose(self._policy.config, dict(self._policy.origin))
            tensors = save.tensors(family, self._policy.config, values)
            self._tensors = [(name, np.ascontiguousarray(x.astype(self._dtype))) for name, x in tensors]
            self._version = version

    def prepare(self, server: str, version: int) -> None:
        """Forms the group with a server, anew where the server was started anew."""
        if server in self._groups and http.stamp(server) != http.START:
            return
        size = 1 + int(field(server, "/get_world_size", "world_size", seconds=http.SHORT))
        try:
            number = unique_id() if self._make_group is Group else bytes(_ID_BYTES)
        except OSError as error:
            raise ServerError(f"NCCL: {error}") from error
        body = {"nccl_unique_id_b64": base64.b64encode(number).decode(), "rank_offset": 1, "world_size": size}
        body["packed"] = False
        with self._lock:
            self._groups.pop(server, None)
            self._groups[server] = self._together(
                lambda: ask(server, "/init_weight_transfer_engine", {"init_info": body}, seconds=self._seconds),
                lambda: self._make_group(number, size),
            )

    def commit(self, server: str, version: int) -> None:
        if version != self._version or server not in self._groups:
            raise ServerError(f"{server}: version {version} isn't prepared; {self._version} is staged")
        body = {
            "names": [name for name, _ in self._tensors],
            "dtype_names": [self._dtype] * len(self._tensors),
            "shapes": [list(x.shape) for _, x in self._tensors],
        }

        def read() -> None:
            with self._lock:
                self._together(
                    lambda: ask(server, "/update_weights", {"update_info": body}, seconds=self._seconds),
                    lambda: self._groups[server].broadcast([x for _, x in self._tensors]),
                )

        try:
            http.change_weights(server, self.stamp(version), read, self._seconds)
        except ServerError:
            self._groups.pop(server, None)  # its state isn't known
            raise

    def served(self, server: str) -> int | None:
        match = re.fullmatch(rf"(\d+)-{self._run}", http.stamp(server))
        return int(match[1]) if match else None

    def model(self, version: int) -> str:
        return self._name

    def stamp(self, version: int) -> str:
        return f"{version}-{self._run}"

    def _together(self, of_server: Callable[[], Any], own: Callable[[], Any]) -> Any:
        """What `own` gives; both sides of a group must be under way at once.

        Raises:
          ServerError: one of them failed, or took too long. A thread may be left behind, which waits in NCCL.
        """
        pool = concurrent.futures.ThreadPoolExecutor(2)
        try:
            asked, given = pool.submit(of_server), pool.submit(own)
            first = concurrent.futures.FIRST_EXCEPTION
            done, waiting = concurrent.futures.wait((given, asked), self._seconds, return_when=first)
            for future in done:
                future.result()
            if waiting:
                raise ServerError(f"NCCL didn't end within {self._seconds:g} s")
            return given.result()
        except OSError as error:
            raise ServerError(f"NCCL: {error}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Group:
    """A group of NCCL of which this process is rank 0, on its first GPU.

    Args:
      number: its ncclUniqueId.
      size: how many ranks it has.

    Raises:
      OSError: there is no NCCL, or it fails.
    """

    def __init__(self, number: bytes, size: int):
        self._nccl, self._cuda = _library("nccl", 2), _library("cudart", 13, 12)
        self._call(self._cuda.cudaSetDevice, 0)
        self._group = ctypes.c_void_p()
        self._call(self._nccl.ncclCommInitRank, ctypes.byref(self._group), size, _UniqueId.from_buffer_copy(number), 0)
        # vLLM's workers begin with a sum of one number, which all ranks must take part in.
        one = jax.device_put(np.zeros(1, np.float32)).block_until_ready()
        at = ctypes.c_void_p(one.unsafe_buffer_pointer())
        self._call(self._nccl.ncclAllReduce, at, at, ctypes.c_size_t(1), _TYPES["float32"], _SUM, self._group, None)
        self._call(self._cuda.cudaStreamSynchronize, None)

    def broadcast(self, tensors: Sequence[np.ndarray]) -> None:
        """Sends tensors to all ranks, one after the other.

        Raises:
          OSError: NCCL fails.
        """
        self._call(self._cuda.cudaSetDevice, 0)  # of this thread
        for x in tensors:
            there = jax.device_put(x).block_until_ready()
            at = ctypes.c_void_p(there.unsafe_buffer_pointer())
            count, kind = ctypes.c_size_t(x.size), _TYPES[x.dtype.name]
            self._call(self._nccl.ncclBroadcast, at, at, count, kind, 0, self._group, None)
            self._call(self._cuda.cudaStreamSynchronize, None)

    @staticmethod
    def _call(function: Any, *arguments: Any) -> None:
        if status := function(*arguments):
            raise OSError(f"{function.__name__} gave status {status}")


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * _ID_BYTES),)


def unique_id() -> bytes:
    """The ncclUniqueId of a new group.

    Raises:
      OSError: there is no NCCL.
    """
    number = _UniqueId()
    if status := _library("nccl", 2).ncclGetUniqueId(ctypes.byref(number)):
        raise OSError(f"ncclGetUniqueId gave status {status}")
    return bytes(number)


def _library(name: str, *versions: int) -> ctypes.CDLL:
    """A library of CUDA, in one of these versions.

    Raises:
      OSError: there is none. jax loads those that it brings when it first needs them.
    """
    for version in versions:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(f"lib{name}.so.{version}")
    raise OSError(f"lib{name} isn't there")
