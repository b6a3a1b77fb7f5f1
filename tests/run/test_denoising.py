"""A prefix LM that denoises one source and reads another from left to right, in one run that can be stopped."""

import json

import pytest
from runs import check_resumed, load

from research import config
from research.errors import InputError
from research.run import run
from research.sources import special_tokens
from research.sources.tokenizers import load_tokenizer


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_that_denoises_one_source_and_continues_another(tmp_path):
    values = config.to_dict(load("sft", steps=2, **{"eval.generate": 0, "data.path": "builtin:python_docs"}))
    docs = {"path": "builtin:python_docs", "max_records": 12}
    sources = {"hidden": docs | {"view": {"kind": "denoise", "mixture": "ul2r", "draws": 2}}, "plain": docs}
    terms = {
        "prefix_lm": {"split": "given", "sources": ["hidden"], "weight": 0.5},
        "next_token": {"sources": ["plain"]},
    }
    values["data"] |= {"path": "", "max_records": 0, "sources": sources}
    values["model"] |= {"prefix": True}
    values |= {"objective": {"terms": terms}}
    values["checkpoint"] |= {"every": 1, "keep_last": 2}
    final = run.run(config.parse(values), str(tmp_path / "whole"))
    for part in ("train", "eval"):
        assert final[f"{part}/prefix_lm/loss"] > 0
        assert final[f"{part}/next_token/loss"] > 0
        assert 0.05 < final[f"{part}/prefix_lm/prefix_share"] < 0.95
        assert min(final[f"{part}/tokens/{name}"] for name in sources) > 0
    tokenizer = load_tokenizer(tmp_path / "whole")
    special_tokens.mode_tokens(tokenizer)
    assert special_tokens.sentinel_count(tokenizer) > 10

    again = check_resumed(config.parse(values), tmp_path / "whole", tmp_path / "cut")
    assert again["eval/loss"] == final["eval/loss"]


@pytest.mark.parametrize("way", ["given", "prompt"])
def test_a_prefix_lm_of_texts_without_prompts_is_refused(way, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"this is text {i} of twelve"}) + "\n" for i in range(12)))
    values = config.to_dict(load("sft", steps=2, **{"eval.generate": 0, "data.path": str(path)}))
    values["model"] |= {"prefix": True}
    values["objective"] = {"terms": {"prefix_lm": {"split": "given"}} if way == "given" else {"next_token": 1.0}}
    if way == "prompt":
        view = {"path": str(path), "view": {"kind": "prompt"}}
        values["data"] |= {"path": "", "sources": {"a": view}}
    with pytest.raises(InputError, match=r"model.prefix = True: the data is plain text, which has no prompts"):
        run.run(config.parse(values), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
