"""The code of docs/python.md runs, one piece after the other, and does what the page says."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from research import params
from research.models import transformer
from research.models.config import ModelConfig
from research.pretrained import export
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

PAGE = (Path(__file__).parents[1] / "docs/python.md").read_text()
PIECES = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with the tokenizer of bytes."""
    config = ModelConfig(vocab_size=264, num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, d_ff=64, max_length=128)
    values = params.init(transformer.make_model(config).specs, jax.random.key(0))
    output = tmp_path_factory.mktemp("page") / "model"
    export.export(output, config, values, {}, make_tokenizer(TokenizerSpec("byte"), lambda: iter(())))
    return output


@pytest.mark.slow
def test_the_pieces_run_one_after_the_other(folder, capsys):
    names = {}
    for piece in PIECES:
        assert len([line for line in piece.splitlines() if line.strip()]) <= 20
        with jax.numpy_dtype_promotion("standard"):  # as a notebook has it; optax's Adam needs it
            exec(piece.replace("runs/sft", str(folder)), names)
    shown = capsys.readouterr().out
    log_p = np.asarray(jax.nn.log_softmax(names["logits"], axis=-1))
    assert names["values"].shape == (1, 5)
    assert log_p[0, int(names["ids"][0, 0])] == log_p.max()
    # The mean of the page is the loss of its first step.
    mean = float(re.search(r"nats a token: (\S+)", shown)[1])
    np.testing.assert_allclose(names["losses"][0], mean, rtol=1e-5)
    assert all(a > b for a, b in zip(names["losses"], names["losses"][1:], strict=False))
    far, near = map(float, re.search(r"nats from the teacher: (\S+) and from itself: (\S+)", shown).groups())
    assert far > 1e-3 > abs(near)
