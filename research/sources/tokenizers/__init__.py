"""Text to token ids and back."""

from research.sources.tokenizers.tokenizer import *  # noqa: F403
