"""Adapters in folders as PEFT writes them: adapter_config.json and adapter_model.safetensors.

modules.py and experts.py say which module of transformers is which map of ours, folder.py opens a folder, reading.py
makes options and parameters of it, and writing.py the reverse.
"""

from research.pretrained.peft.folder import is_folder, open_folder
from research.pretrained.peft.reading import Saved, understand
from research.pretrained.peft.writing import Trained, leaves_of, write

__all__ = ["Saved", "Trained", "is_folder", "leaves_of", "open_folder", "understand", "write"]
