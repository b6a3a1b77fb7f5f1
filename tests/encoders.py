"""A tiny encoder over bytes, and its tokenizer with a mask token."""

from research.models.config import ModelConfig
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(())).with_tokens(["<|mask|>"])
MASK = TOKENIZER.special("<|mask|>")
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.size, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=16, causal=False
)
