"""Models by name, wherever they come from: a run of ours, a Hugging Face folder or hub name, a .gguf file.

names.py says what a name stands for, start.py what a role of a run begins with, frozen.py whether that is still the
same, runs.py reads a run's parameters, run_adapters.py its adapter, and loaded.py makes models ready to run.
"""

from research.loading.frozen import FILE as FROZEN
from research.loading.frozen import note_frozen
from research.loading.loaded import LoadedModel, check_reads, check_vocabulary, load_model
from research.loading.names import ORIGIN, adapter_options, find, identity, make_start, name_adapters, open_adapter
from research.loading.runs import read_run, read_untrained
from research.loading.start import Start, adapted, initial_keys
from research.loading.types import AdapterSource, Base, ModelSource

__all__ = [
    "FROZEN",
    "ORIGIN",
    "AdapterSource",
    "Base",
    "LoadedModel",
    "ModelSource",
    "Start",
    "adapted",
    "adapter_options",
    "check_reads",
    "check_vocabulary",
    "find",
    "identity",
    "initial_keys",
    "load_model",
    "make_start",
    "name_adapters",
    "note_frozen",
    "open_adapter",
    "read_run",
    "read_untrained",
]
