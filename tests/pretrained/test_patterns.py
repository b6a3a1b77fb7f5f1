"""Regular expressions of a PEFT folder's config match as Python's do, and never for long."""

import json
import re
import shutil
import time
from pathlib import Path

import goldens
import pytest

from research import loading
from research.errors import InputError
from research.pretrained.peft import patterns

GOLDEN = Path(goldens.__file__).parent / "golden"
GROUPS = [("model.layers.0.self_attn.q_proj", "x"), ("model.layers.11.mlp.up_proj",), ("lm_head",)]
SLOW = "([^!]+)+!"


@pytest.mark.parametrize(
    "expressions",
    [
        ["q_proj", "lm_head"],  # matched here
        [r"(.*\.)?(q_proj|up_proj)", r"(.*\.)?(proj)"],
        [r"^(?!.*head).*(q|up)_proj", r".*\.(1|11)\..*"],
        [r"model\.layers\.\d{2}\..*", ".*"],
    ],
)
def test_the_first_that_matches_is_found(expressions):
    wanted = [
        next((i for i, each in enumerate(expressions) if any(re.fullmatch(each, name) for name in names)), None)
        for names in GROUPS
    ]
    assert patterns.first_matching(expressions, GROUPS, Path("folder")) == wanted
    assert wanted != [None] * 3


def test_one_that_takes_too_long_or_is_none_is_named(monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"folder: its regular expressions .*\(\[\^!\].*take more than 0.2 s"):
        patterns.first_matching([SLOW], [("a" * 60,)], Path("folder"))
    assert time.monotonic() - began < 20
    with pytest.raises(InputError, match=r"folder: '\(a' is no regular expression"):
        patterns.first_matching(["(a"], GROUPS, Path("folder"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lora_qv", {"alpha_pattern": {SLOW: 3}}),
        ("ia3", {"feedforward_modules": SLOW}),
    ],
)
def test_a_folder_with_one_is_refused(name, changes, monkeypatch, tmp_path):
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    shutil.copytree(GOLDEN / "peft_adapters" / name, tmp_path / "folder")
    file = tmp_path / "folder/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match="folder: its regular expressions"):
        loading.open_adapter(str(file.parent), loading.find(str(GOLDEN / "hf_tiny/llama")))


def test_a_pattern_may_speak_of_layers(tmp_path):
    shutil.copytree(GOLDEN / "peft_adapters/ia3", tmp_path / "folder")
    file, source = tmp_path / "folder/adapter_config.json", loading.find(str(GOLDEN / "hf_tiny/llama"))
    listed = loading.open_adapter(str(file.parent), source)
    named = json.loads(file.read_text())["feedforward_modules"]
    pattern = r".*\.layers\.\d+\..*\.?(" + "|".join(named) + ")"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"feedforward_modules": pattern}))
    assert named
    assert loading.open_adapter(str(file.parent), source).options == listed.options
