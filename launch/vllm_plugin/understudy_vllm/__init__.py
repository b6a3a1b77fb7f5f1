"""Lets a vLLM server take weights from a folder that a run writes and both see.

vLLM finds `register` by the entry point of this package, in each of its processes; a server started with
--weight-transfer-config '{"backend": "understudy"}' then reads weights with engine.FolderEngine. It is installed beside
vLLM, and imports nothing of the run's code.
"""

BACKEND = "understudy"


def register() -> None:
    """Makes the backend known to vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:  # a process may call this twice, and vLLM has no question
        WeightTransferEngineFactory.register_engine(BACKEND, "understudy_vllm.engine", "FolderEngine")
