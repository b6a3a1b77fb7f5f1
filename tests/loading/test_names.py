"""Models by name, from wherever."""

import json
from pathlib import Path

import goldens
import pytest

from research import loading
from research.errors import InputError

TINY = Path(goldens.__file__).parent / "golden/hf_tiny"


def test_a_folder_is_found_with_all_that_an_export_writes_again():
    source = loading.find(str(TINY / "llama_bf16"))
    assert (source.config.dtype, source.config.num_layers, source.template) == ("float32", 2, "auto")
    assert not source.has_tokenizer
    assert source.origin["config"] == json.loads((TINY / "llama_bf16/config.json").read_text())
    assert set(source.origin["dtypes"].values()) == {"bfloat16"}
    assert json.loads(json.dumps(source.origin)) == source.origin
    with pytest.raises(InputError, match=r"llama_bf16: comes without a tokenizer\. Copy its tokenizer\.json"):
        source.tokenizer()


def test_names_and_flags_that_can_not_be(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "metrics.jsonl").touch()
    (tmp_path / "empty").mkdir()
    for name, options, words in (
        (tmp_path / "run", {}, "run: is the workdir of a run that has saved no checkpoint yet"),
        (tmp_path / "started", {}, "started: is the workdir of a run that has saved no checkpoint yet"),
        (tmp_path / "empty", {}, r"empty: holds no config\.json"),
        (tmp_path / "none", {}, "none: no such file or folder"),
        (TINY / "llama", {"step": 100}, r"--step: .*llama isn't the workdir of a run.* Leave it out"),
        (TINY / "llama", {"ema": True}, r"--ema: .*llama isn't the workdir of a run.* Leave it out"),
    ):
        with pytest.raises(InputError, match=words):
            loading.find(str(name), **options)
