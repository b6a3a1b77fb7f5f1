"""Text to token ids and back: raw bytes, a BPE trained on the run's own text, or the tokenizer of a model.

tokenizer.py says what a tokenizer is, reading.py reads those of models, and making.py gives a run the one it asks for.
"""

from research.sources.tokenizers.making import TokenizerSpec, load_tokenizer, make_tokenizer
from research.sources.tokenizers.reading import is_there, load_pretrained
from research.sources.tokenizers.tokenizer import BOS, EOS, SPECIALS, Tokenizer, assemble, byte_chars

__all__ = [
    "BOS",
    "EOS",
    "SPECIALS",
    "Tokenizer",
    "TokenizerSpec",
    "assemble",
    "byte_chars",
    "is_there",
    "load_pretrained",
    "load_tokenizer",
    "make_tokenizer",
]
