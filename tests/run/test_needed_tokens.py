"""The special tokens that a config asks for, and those that its views and objectives need."""

import json

import pytest

from research import config
from research.commands import annotate
from research.errors import InputError
from research.planning import abstract
from research.run import resolve
from research.run.run import run
from research.sources.tokenizers import TokenizerSpec, load_tokenizer, make_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

MODEL = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "d_ff": 16}
VIEW = """
from research.sources.views import View

def special_tokens(tokenizer, seq_len, count):
    return tuple(f"<|hole {i} of {seq_len}|>" for i in range(count))

def make(seq_len, count=2, tokenizer=None):
    ends = [] if tokenizer is None else [tokenizer.special(n) for n in special_tokens(tokenizer, seq_len, count)]

    def documents(document, rng):
        document.tokens[: len(ends)] = ends
        return [document]

    return View(documents)
"""
OBJECTIVE = """
from research.errors import InputError
from research.objectives import next_token

def special_tokens(tokenizer, name, **options):
    if name == "wrong":
        raise InputError(f"name = {name!r}: is no name.")
    assert options == {"weighed": True}
    return (name,)

def make(tokenizer=None, name="<|named|>", weighed=True):
    assert tokenizer is None or tokenizer.special(name) is not None
    return next_token.make()
"""
NEEDED = ["<|tool|>", "<|hole 0 of 32|>", "<|hole 1 of 32|>", "<|other|>", "<|named|>"]


@pytest.fixture
def values(tmp_path, monkeypatch):
    (tmp_path / "with_holes.py").write_text(VIEW)
    (tmp_path / "naming.py").write_text(OBJECTIVE)
    monkeypatch.syspath_prepend(tmp_path)
    return {
        "steps": 1,
        "batch_size": 8,
        "seq_len": 32,
        "model": MODEL,
        "tokenizer": {"added_tokens": ("<|tool|>",)},
        "data": {
            "path": "",
            "sources": {"b": {"path": "tasks:copy", "examples": 40, "view": {"kind": "with_holes"}}},
            "cache_dir": str(tmp_path / "cache"),
        },
        "objective": {"terms": {"naming": 1.0, "again": {"objective": "naming", "name": "<|other|>"}}},
        "checkpoint": {"every": 1},
        "eval": {"every": 0},
        "log": {"tensorboard": False},
    }


def test_views_and_objectives_add_what_they_need(values, tmp_path):
    run(config.parse(values), str(tmp_path / "w"))
    tokenizer = load_tokenizer(tmp_path / "w")
    assert [tokenizer.special(name) for name in NEEDED] == list(range(261, 266))
    inputs = resolve.resolve(config.parse({**values, "steps": 2}), str(tmp_path / "w"), step=1)
    assert inputs.resumed
    assert inputs.data.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert inputs.source.next(inputs.source.init())[0]["tokens"][0, :2].tolist() == [262, 263]
    described = abstract.describe(config.parse(values))
    assert described.vocab_size == 266
    bpe = {**values, "tokenizer": {**values["tokenizer"], "kind": "bpe", "vocab_size": 300}}
    assert abstract.describe(config.parse(bpe)).vocab_size == 305


def test_a_run_keeps_the_tokens_that_it_began_with(values, tmp_path):
    run(config.parse(values), str(tmp_path / "w"))
    more = {**values, "steps": 2, "tokenizer": {"added_tokens": ("<|tool|>", "<|more|>")}}
    with pytest.raises(InputError, match=r"tokenizer.added_tokens.*can't change in .*w, where the run goes on"):
        resolve.resolve(config.parse(more), str(tmp_path / "w"), step=1)
    terms = {"naming": 1.0, "again": {"objective": "naming", "name": "<|third|>"}}
    more = {**values, "steps": 2, "objective": {"terms": terms}}
    with pytest.raises(InputError, match=r"need the special tokens <\|third\|>, .* Start in a new --workdir"):
        resolve.resolve(config.parse(more), str(tmp_path / "w"), step=1)


def test_an_error_of_what_says_the_tokens_names_the_field(values, tmp_path):
    values["objective"] = {"terms": {"naming": {"name": "wrong"}}}
    with pytest.raises(InputError, match=r"^objective.terms.naming.name = 'wrong': is no name"):
        resolve.resolve(config.parse(values), str(tmp_path / "w"))


def test_a_bpe_of_the_runs_text_is_trained_without_them(values, tmp_path):
    values["tokenizer"] = {**values["tokenizer"], "kind": "bpe", "vocab_size": 270}
    whole = resolve.with_tokenizer(config.parse(values), {})[1]
    values["objective"] = {"terms": {"next_token": 1.0}}
    fewer = resolve.with_tokenizer(config.parse(values), {})[1]
    assert (whole.size - fewer.size, whole.special("<|tool|>")) == (2, fewer.special("<|tool|>"))
    assert whole.encode("copy 12 12") == fewer.encode("copy 12 12")


def test_annotations_are_of_the_tokens_of_the_run(values, tmp_path):
    """`understudy annotate` reads no objective, and has the tokens that the run's objective adds all the same."""
    run(config.parse(values), str(tmp_path / "w"))
    with_teacher = {**values, "roles": {"teacher": {"init_from": str(tmp_path / "w")}}}
    annotate.annotate(config.parse(with_teacher), str(tmp_path / "notes"), k=2)
    meta = json.loads((tmp_path / "notes/meta.json").read_text())
    assert meta["vocab_size"] == 266
    values["data"]["annotations"] = str(tmp_path / "notes")
    resolve.resolve(config.parse(values), str(tmp_path / "v"))


def test_a_config_without_any_has_the_tokenizer_that_it_names():
    given = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
    plain = config.parse({"model": MODEL, "data": {"path": "tasks:copy"}})
    assert resolve.with_special_tokens(plain, given) is given
