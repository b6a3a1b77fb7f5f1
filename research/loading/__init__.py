"""Models by name, wherever they come from: a run of ours, a Hugging Face folder or hub name, a .gguf file."""

from research.loading.start import *  # noqa: F403
