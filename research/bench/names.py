"""Names of what can be measured, for flags: importing this takes no time."""

# Of parts.PARTS, in the order in which they run.
PARTS = ("train", "loop", "decode", "data", "loading", "checkpoint", "startup")

# Name of a peer -> the packages that it needs.
PEERS = {"hf": ("torch", "transformers"), "hf_compile": ("torch", "transformers"), "jax": ("jax",)}
