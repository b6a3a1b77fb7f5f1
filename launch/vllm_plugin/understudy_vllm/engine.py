"""How a worker of vLLM takes weights from a folder: checked when a version is prepared, read when it is committed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from understudy_vllm import folder as folder_lib


@dataclass
class Prepare(WeightTransferInitInfo):
    """What POST /init_weight_transfer_engine takes: the folder of a version."""

    folder: str


@dataclass
class Commit(WeightTransferUpdateInfo):
    """What POST /update_weights takes: the folder of the version that was prepared."""

    folder: str


class FolderEngine(WeightTransferEngine[Prepare, Commit]):
    """Reads whole weights from a folder. Between start and finish of an update it is `update_weights` that does all,
    so that an update that fails leaves nothing begun."""

    init_info_cls = Prepare
    update_info_cls = Commit
    supports_draft_weight_update = False
    _prepared: str | None = None

    def init_transfer_engine(self, init_info: Prepare) -> None:
        """Checks a version: its mark, its digests, and that it is of the model that is served.

        Raises:
          ValueError: it can't be served.
        """
        self._prepared = None
        manifest = folder_lib.check(Path(init_info.folder))
        if Path(self.model_config.model).is_dir():
            folder_lib.check_like(manifest, Path(self.model_config.model))
        self._prepared = init_info.folder

    def start_weight_update(self) -> None:
        """Nothing: see the class."""

    def finish_weight_update(self) -> None:
        """Nothing: see the class."""

    def shutdown(self) -> None:
        """Forgets what was prepared."""
        self._prepared = None

    def update_weights(self, update_info: dict[str, str]) -> None:
        """As vLLM's, which waits for an accelerator that needn't be there."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Commit) -> None:
        """Puts the weights of the version that was prepared in the place of the model's.

        Raises:
          ValueError: another version was prepared, or one of the model's parameters isn't in this one.
        """
        if update_info.folder != self._prepared:
            raise ValueError(f"{update_info.folder}: isn't prepared; {self._prepared} is")
        self._prepared = None
        initialize_layerwise_reload(self.model)
        try:
            loaded = self.model.load_weights(_tensors(Path(update_info.folder)))
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
            _pack_again(self.model)
        names = {name.replace(".base_layer.", ".") for name, _ in self.model.named_parameters()}
        if loaded is not None and (missing := sorted(names - loaded)):
            raise ValueError(f"{update_info.folder}: has no {missing[0]}, nor {len(missing) - 1} others")


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a version, those of a layer together, so that few are held at once."""
    files = sorted(folder.glob("*.safetensors"))
    opened = {file: safe_open(file, framework="pt", device="cpu") for file in files}
    places = [(name, file) for file in files for name in opened[file].keys()]  # noqa: SIM118 it is no dict
    for name, file in sorted(places, key=lambda place: _layer(place[0])):
        yield name, opened[file].get_tensor(name)


def _layer(name: str) -> int:
    """The first number in a name; -1 for none."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else -1


def _pack_again(model: torch.nn.Module) -> None:
    """Has embedding and head packed for the CPU's products as their weights are now.

    A head that is tied shares the embedding's weights but has a packed copy of its own, and vLLM's reload, to which it
    was not loaded, leaves that as it was.
    """
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
            module.quant_method.process_weights_after_loading(module)
