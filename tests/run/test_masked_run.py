"""A run that learns masked tokens from scratch: its tokenizer gets a mask, and it goes on bit for bit."""

import json

import pytest
from runs import assert_same, load

from research import loading
from research.errors import InputError
from research.models.config import ModelConfig
from research.run import metrics, run


def config(data, steps, **options):
    fields = {
        "objective": {"terms": {"masked": {"whole_word": True}}},
        "model.causal": False,
        "data.path": str(data),
        "data.max_records": 0,
        "eval.generate": 0,
        "checkpoint.every": 1,
        "eval.tasks": (f"pseudo_perplexity,name=pseudo,limit=1:{data}",),
    }
    return load("sft", steps=steps, **{**fields, **options})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"the {n}. cat sat on mat {n}"}) + "\n" for n in range(200)))
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_from_scratch_goes_on_bit_for_bit_and_is_read_back(data, tmp_path):
    whole = run.run(config(data, 2), str(tmp_path / "whole"))
    run.run(config(data, 1, **{"optimizer.warmup_steps": 1}), str(tmp_path / "cut"))
    again = run.run(config(data, 2), str(tmp_path / "cut"))
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert again["eval/nll"] == whole["eval/nll"]
    assert {"eval/nll", "eval/perplexity", "eval/accuracy", "eval/chosen", "eval/pseudo/loss"} <= whole.keys()
    assert "eval/bits_per_byte" not in whole
    assert 0.1 < whole["eval/chosen"] < 0.2
    train = [record for record in metrics.read_metrics(str(tmp_path / "whole")) if "train/nll" in record]
    assert len(train) == 2
    loaded = loading.load_model(str(tmp_path / "whole"), check=ModelConfig.check_masked_language_model)
    assert loaded.tokenizer.special("<|mask|>") == loaded.tokenizer.size - 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model.causal": True}, "model.causal = True: a masked token is to be told from what follows it too"),
        ({"eval.generate": 4}, "eval.generate = 4: the policy is an encoder"),
    ],
)
def test_what_cannot_work_leaves_no_workdir(options, says, data, tmp_path):
    with pytest.raises(InputError) as error:
        run.run(config(data, 1, **{"eval.tasks": (), **options}), str(tmp_path / "w"))
    assert str(error.value).startswith(says)
    assert not (tmp_path / "w").exists()
