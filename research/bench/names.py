"""Names of what can be measured, for flags: importing this takes no time."""

# Of parts.PARTS, in the order in which they run.
PARTS = ("train", "loop", "decode", "data", "loading", "checkpoint", "startup")

# Name of a peer -> the packages that it needs.
PEERS = {
    "hf": ("torch", "transformers"),
    "hf_compile": ("torch", "transformers"),
    "peft": ("torch", "transformers", "peft"),
    "peft_compile": ("torch", "transformers", "peft"),
    "trl": ("torch", "transformers", "trl"),
    "trl_compile": ("torch", "transformers", "trl"),
    "jax": ("jax",),
}
MKL = ("intel", "own")  # which of its kernels MKL takes in torch; see mkl.py
