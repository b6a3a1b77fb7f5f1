import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import table_models

from research import params
from research.errors import InputError
from research.evals import infill, results, tasks
from research.models.config import ModelConfig
from research.models.generation import Completion
from research.models.transformer import make_model
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

PLAIN = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
NAMES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|mask:0|>", "<|mask:1|>", "<|mask|>")
TOKENIZER = PLAIN.with_tokens(NAMES)
V = TOKENIZER.size
MIDDLE, HOLE, END, MASK = (TOKENIZER.special(name) for name in NAMES[2:])
KEY = jax.random.key(0)
MODEL = table_models.make(V)


def chain(*ids):
    """Parameters of a model that goes on from each id with the next, and ends elsewhere."""
    return table_models.chain(V, ids, last=TOKENIZER.eos)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


GAPS = (
    {"prefix": "the cat", "middle": " sat", "suffix": " here"},
    {"prefix": "a catx", "middle": "ten", "suffix": ""},
    {"prefix": "", "middle": "sat", "suffix": " up"},
)


@pytest.mark.parametrize(
    ("form", "last"),
    [("psm", [MIDDLE]), ("auto", [MIDDLE]), ("sentinel", [END, HOLE])],
)
def test_exact_match_of_middles(tmp_path, form, last):
    path = write(tmp_path / "gaps.jsonl", *GAPS)
    ids = [*last, *b" sat"]
    name, evaluate = tasks.load(f"infill,form={form}:{path}", MODEL, TOKENIZER, "auto")
    values = chain(*ids)
    metrics, samples = evaluate(values, KEY)
    right = [True, False, True]
    assert name == "gaps"
    assert [sample.correct for sample in samples] == right
    assert [sample.expected for sample in samples] == [" sat", "ten", "sat"]
    assert samples[0].completion.startswith(" sat")
    assert metrics["exact_match"] == pytest.approx(2 / 3)
    assert metrics["exact_match_stderr"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert metrics["skipped_too_long"] == 0
    result = results.Result(metrics, [sample._asdict() for sample in samples])
    assert results.interval("exact_match", result) == results.wilson(2, 3)
    assert str(samples[1]).startswith("'a catx' ? '' -> ' sat")


def test_what_a_model_reads_in_each_form(tmp_path, monkeypatch):
    path = write(tmp_path / "gaps.jsonl", {"prefix": "ab", "middle": "x", "suffix": "cd"})
    seen = []

    def generate(made, values, prompts, key, **options):
        seen.append(list(prompts))
        return [Completion([], [])] * len(prompts)

    monkeypatch.setattr(infill, "generate_batches", generate)
    for form in ("psm", "spm", "sentinel", "left"):
        tasks.load(f"infill,form={form}:{path}", MODEL, TOKENIZER, "auto").evaluate(None, KEY)
    prefix, suffix = TOKENIZER.special(NAMES[0]), TOKENIZER.special(NAMES[1])
    bos = TOKENIZER.bos
    assert [row for (row,) in seen] == [
        [bos, prefix, *b"ab", suffix, *b"cd", MIDDLE],
        [bos, prefix, suffix, *b"cd", MIDDLE, *b"ab"],
        [bos, *b"ab", HOLE, *b"cd", END],
        [bos, *b"ab"],
    ]


def test_left_needs_no_end_and_no_token(tmp_path):
    """An answer is right if it begins with the middle, and ends a word where the text does."""
    records = [
        {"prefix": "t", "middle": " sat", "suffix": " here"},
        {"prefix": "t", "middle": " sa", "suffix": "t here"},
        {"prefix": "t", "middle": " sa", "suffix": " here"},
        {"prefix": "t", "middle": "sat", "suffix": ""},
        {"prefix": "t", "middle": "hat", "suffix": ""},
    ]
    path = write(tmp_path / "gaps.jsonl", *records)
    values = chain(*b"t", *b" sa", *b"qzy")
    values = values.at[ord("t")].set(ord(" ")).at[ord("a")].set(ord("t"))
    evaluate = tasks.load(f"infill,form=left,max_new_tokens=4:{path}", MODEL, PLAIN, "auto").evaluate
    metrics, samples = evaluate(values, KEY)
    assert {sample.completion for sample in samples} == {" sat"}
    assert [sample.correct for sample in samples] == [True, True, False, True, False]
    assert metrics["exact_match"] == pytest.approx(0.6)


def test_an_encoder_fills_all_masks_at_once(tmp_path):
    text = [TOKENIZER.bos, *b"the cat sat here", TOKENIZER.eos]
    gaps = [GAPS[0], {"prefix": "the ", "middle": "cat", "suffix": " sat"}, {**GAPS[0], "middle": " set"}]
    path = write(tmp_path / "gaps.jsonl", *gaps)
    knows = jnp.zeros(64, jnp.int32).at[: len(text)].set(jnp.array(text))
    for form in ("mask", "auto"):
        spec = f"infill,form={form},batch_size=2:{path}"
        metrics, samples = tasks.load(spec, table_models.make(V, causal=False), TOKENIZER, "auto").evaluate(knows, KEY)
        assert [sample.completion for sample in samples] == [" sat", "cat", " sat"]
        assert metrics["exact_match"] == pytest.approx(2 / 3)
    # A real one, under a head that has more rows than there are tokens.
    sizes = {"num_layers": 1, "d_model": 8, "num_heads": 2, "num_kv_heads": 2, "d_ff": 8, "max_length": 64}
    model = make_model(ModelConfig(vocab_size=384, causal=False, **sizes))
    metrics, _ = tasks.load(f"infill:{path}", model, TOKENIZER, "auto").evaluate(params.init(model.specs, KEY), KEY)
    assert 0 <= metrics["exact_match"] <= 1


def test_a_drawn_gap_is_a_stretch_of_words_that_depends_on_the_text_alone():
    text = " ".join(f"w{i}" for i in range(200)) + "\n"
    gaps = [infill.draw_gap(f"{i} {text}", (2, 5), 10) for i in range(300)]
    sizes = [len(gap.middle.split()) for gap in gaps]
    assert np.bincount(sizes, minlength=6)[2:].min() > 50
    assert set(sizes) == {2, 3, 4, 5}
    for i, gap in enumerate(gaps):
        assert f"{i} {text}".count(gap.prefix + gap.middle + gap.suffix) == 1
        assert gap.middle[0] == " "  # a middle begins where tokens do
        assert not gap.middle[-1].isspace()
        assert 1 <= len(gap.prefix.split()) <= 10
        assert 1 <= len(gap.suffix.split()) <= 10
    places = sorted(int(gap.middle.split()[0][1:]) for gap in gaps)
    np.testing.assert_allclose(np.quantile(places, (0.25, 0.5, 0.75)), (50, 100, 150), atol=20)
    assert gaps[7] == infill.draw_gap(f"7 {text}", (2, 5), 10)
    assert infill.draw_gap("  a b\tc ", (1, 8), 9) == infill.Gap("  a", " b", "\tc")
    assert infill.draw_gap("one two", (1, 1), 9) is None


def test_texts_become_gaps(tmp_path):
    texts = [{"text": f"the cat {i} sat here and there"} for i in range(20)]
    path = write(tmp_path / "t.jsonl", *texts, {"text": "too short"}, {"text": "long " * 60}, GAPS[0])
    name, evaluate = tasks.load(f"infill,span=1,name=words:{path}", MODEL, TOKENIZER, "auto")
    metrics, samples = evaluate(chain(MIDDLE, *b" cat"), KEY)
    assert name == "words"
    assert (metrics["skipped_too_short"], metrics["skipped_too_long"]) == (1, 1)
    assert [sample.prefix + sample.expected + sample.suffix for sample in samples[:20]] == [t["text"] for t in texts]
    assert [sample.correct for sample in samples] == [sample.expected == " cat" for sample in samples]
    assert 0 < metrics["exact_match"] < 1
    _, samples = tasks.load(f"infill,span=2,context=1,limit=4:{path}", MODEL, TOKENIZER, "auto").evaluate(
        chain(MIDDLE, *b" cat"), KEY
    )
    assert len(samples) == 4
    assert {len(sample.prefix.split()) for sample in samples} == {1}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("infill,form=pms:{}", r"form=pms isn't known. Did you mean 'spm'\?"),
        ("infill,template=chat:{}", "infill has no option 'template'"),
        ("infill,span=3:{}", "span=3: is of records with text, and these have a middle"),
        ("infill,form=mask:{}", "form=mask: the model is a language model. Name an encoder"),
        ("infill,max_new_tokens=0:{}", "max_new_tokens=0: must be a whole number"),
        ("infill,max_new_tokens=60:{}", r"none of 2 gaps fits into 4 tokens"),
        ("infill:{}2", r"x.jsonl2?:1: has no text in 'suffix'"),
        ("infill:{}3", r"x.jsonl3?:1: has a blank middle"),
        ("infill,span=0:{}4", "span=0: must be a number of words"),
        ("infill,span=4-2:{}4", "span=4-2: must be a number of words"),
        ("infill,span=9:{}4", "none of 1 texts has 11 words"),
    ],
)
def test_faults_are_named(tmp_path, spec, message):
    path = write(tmp_path / "x.jsonl", *GAPS[:2])
    write(tmp_path / "x.jsonl2", {"prefix": "a", "middle": "b"}).rename(tmp_path / "2x.jsonl")
    write(tmp_path / "x.jsonl3", {"prefix": "a", "middle": " ", "suffix": "b"}).rename(tmp_path / "3x.jsonl")
    write(tmp_path / "x.jsonl4", {"text": "a b c"}).rename(tmp_path / "4x.jsonl")
    head, _, number = spec.partition("{}")
    with pytest.raises(InputError, match=message.replace("x.jsonl2?", r"2x\.jsonl").replace("x.jsonl3?", r"3x\.jsonl")):
        tasks.load(f"{head}{tmp_path}/{number}x.jsonl" if number else f"{head}{path}", MODEL, TOKENIZER, "auto")


def test_a_model_that_cannot_fill_in_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", *GAPS)
    for model, form, message in [
        (MODEL, "auto", "form = auto: the tokenizer has neither"),
        (table_models.make(V, causal=False), "psm", "form=psm: the model is an encoder. Use form=mask"),
        (table_models.make(V, causal=False), "mask", r"tokenizer: has 0 of the 1 mask tokens"),
        (table_models.make(V, num_labels=2), "auto", "the model is a classifier of 2 classes"),
    ]:
        with pytest.raises(InputError, match=message):
            tasks.load(f"infill,form={form}:{path}", model, PLAIN, "auto")
    with pytest.raises(InputError, match="max_new_tokens: form=mask fills as many"):
        tasks.load(f"infill,max_new_tokens=3:{path}", table_models.make(V, causal=False), TOKENIZER, "auto")


def test_a_runs_record_says_which_gaps_it_was_measured_by(tmp_path):
    path = write(tmp_path / "x.jsonl", *GAPS)
    whole, less = (tasks.identity(f"infill{limit}:{path}") for limit in ("", ",limit=2"))
    assert (whole["records"], less["records"]) == (3, 2)
    assert whole["content"] != less["content"]
