"""A run with two named terms of one kind and named sources: its metrics, and that stopping it loses nothing."""

import numpy as np
import pytest
from runs import check_resumed, load, parameters

from research import config
from research.run import run

TERMS = {
    "first": {"objective": "match", "layers": [[1, -1]], "sources": ["copy"], "weight": 0.5},
    "second": {"objective": "match", "layers": [[1, -1]], "distance": "cosine"},
    "sft": 1.0,
}


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_with_two_terms_of_a_kind_and_two_sources(tmp_path):
    few = {"eval.every": 0, "checkpoint.best_metric": "", "data.path": "tasks:copy"}
    run.run(load("sft", steps=1, **few), str(tmp_path / "teacher"))
    values = config.to_dict(load("sft", steps=2, **few))
    sources = {"copy": {"path": "tasks:copy"}, "reverse": {"path": "tasks:reverse"}}
    values["data"] |= {"path": "", "sources": sources}
    values |= {"objective": {"terms": TERMS}, "roles": {"teacher": {"init_from": str(tmp_path / "teacher")}}}
    values["eval"] |= {"every": 2}
    values["checkpoint"] |= {"every": 1, "keep_last": 2}
    final = run.run(config.parse(values), str(tmp_path / "whole"))
    for part in ("train", "eval"):
        losses = [final[f"{part}/sft/loss/{name}"] for name in sources]
        assert min(losses) < final[f"{part}/sft/loss"] < max(losses)
        assert min(final[f"{part}/tokens/{name}"] for name in sources) > 0
    np.testing.assert_allclose(
        final["train/loss"],
        0.5 * final["train/first/loss"] + final["train/second/loss"] + final["train/sft/loss"],
        rtol=1e-4,
    )
    own = {name: x for name, x in parameters(tmp_path / "whole").items() if "['params']['objectives']" in name}
    first, second = (x for name, x in sorted(own.items()))
    assert not np.allclose(first, second)

    again = check_resumed(config.parse(values), tmp_path / "whole", tmp_path / "cut")
    assert again["eval/loss"] == final["eval/loss"]
