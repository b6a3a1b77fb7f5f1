"""Tokenizers of others whose files hold something else than is due: errors that name the file."""

import json
import shutil
from pathlib import Path

import goldens
import pytest

from research.errors import InputError
from research.sources.tokenizers import reading

PLAIN = Path(goldens.__file__).parent / "golden/runs/plain"


@pytest.fixture
def folder(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PLAIN / name, tmp_path)
    return tmp_path


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"eos_token": {"content": 5}}),
        ("tokenizer_config.json", {"eos_token": ["</s>"]}),
        ("tokenizer_config.json", {"pad_token": 5}),
        ("tokenizer_config.json", {"bos_token": {"content": None, "x": 1}, "add_bos_token": "yes", "unk_token": 1}),
        ("tokenizer_config.json", {"chat_template": 5}),
        ("tokenizer_config.json", {"chat_template": {"name": 5}}),
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}, "added_tokens": []}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
        ("tokenizer.json", {"model": {"type": "Unknown"}}),
        ("tokenizer.json", {"decoder": 5}),
    ],
)
def test_fields_of_other_types_are_named(folder, name, fields):
    change(folder / name, **fields)
    with pytest.raises(InputError) as caught:
        reading.load_pretrained(folder)
    assert str(folder) in str(caught.value) or name in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[]", "5", "{", "", "\ud800"])
def test_files_that_are_no_objects_are_named(folder, name, text):
    (folder / name).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match=name):
        reading.load_pretrained(folder)


@pytest.mark.parametrize("ends", ["2", [-1], [10**30], [1.5], {"a": 1}, [True], ["</s>"]])
def test_ends_that_are_no_tokens_are_named(folder, ends):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id"):
        reading.load_pretrained(folder)


def test_a_template_that_never_ends_is_named(folder):
    (folder / "chat_template.jinja").write_text(
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(InputError, match=rf"{folder}: the model's chat template takes more than .* steps"):
        reading.load_pretrained(folder)


def test_a_regular_expression_over_its_limit_of_steps_is_an_error(folder):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "</s>": 2}, "merges": []}
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"][0] | {"id": 2, "content": "</s>"}
    content = {"version": "1.0", "model": model, "pre_tokenizer": split, "added_tokens": [added]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = reading.load_pretrained(folder)
    assert tokenizer.encode("aab") == [0, 0, 1]
    with pytest.raises(InputError, match=r"tokenizer\.json: the tokenizer can't encode 'aaa.* retry-limit"):
        tokenizer.encode("a" * 60)
