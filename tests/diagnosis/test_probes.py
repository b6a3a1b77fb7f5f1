"""What some probes say of data and of the first gradients, beside what was planted there."""

import dataclasses

import jax
import numpy as np
import pytest
import subjects

from research.diagnosis import confirm, ranking
from research.diagnosis.probes import data, loss, tokens
from research.diagnosis.types import Evidence
from research.sources.tokenizers import TokenizerSpec
from research.sources.tokenizers.making import make_tokenizer

BYTES = make_tokenizer(TokenizerSpec(kind="byte"), lambda: iter(()))
END = BYTES.stop[0]


def row(*documents):
    """A row of documents: (text of the prompt, tokens that follow, which of these are targets)."""
    ids, segments, counted = [], [], []
    for number, (prompt, answer, targets) in enumerate(documents, 1):
        own = [*BYTES.encode(prompt), *answer]
        ids, segments = [*ids, *own], [*segments, *[number] * len(own)]
        counted += [False] * (len(own) - len(answer)) + list(targets)
    return {"tokens": np.array([ids]), "segment_ids": np.array([segments])}, np.array([counted])


@pytest.mark.parametrize(
    ("answer", "targets", "expected"),
    [
        ("ab$", "111", (4, True)),
        ("ab$\n", "1110", (4, True)),  # what the template writes between turns isn't a target
        ("ab$\n", "1111", (4, True)),
        ("ab$", "110", (4, False)),
        ("ab$\n", "1100", (4, False)),
        ("ab", "11", (-1, False)),
        ("a$b", "111", (-1, False)),  # it goes on behind the end
    ],
)
def test_ends_of_answers(answer, targets, expected):
    ids = [END if letter == "$" else ord(letter) for letter in answer]
    batch, counted = row(("Q:", ids, [each == "1" for each in targets]), ("?", [ord("x"), END], [True, True]))
    first, second = tokens._answers(BYTES, batch, counted)
    assert first == (0, *expected)
    assert second == (0, batch["tokens"].shape[1] - 1, True)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Of a run whose held-out records are those to train on but for their spaces, and whose answers are masked."""
    folder = tmp_path_factory.mktemp("data")
    path = subjects.write(folder / "answers.jsonl", subjects.answers())
    near = [{**each, "prompt": each["prompt"].replace(" ", "  ").upper()} for each in subjects.answers()[:8]]
    held_out = subjects.write(folder / "near.jsonl", near)

    def silent(batch):
        return {**batch, "loss_mask": batch["loss_mask"] * 0}

    config = subjects.config(path, data={"path": path, "eval_path": held_out})
    return subjects.subject(config, change_batch=silent)


def test_held_out_records_that_differ_by_spaces_and_case_are_seen(subject):
    measured = data.measure(subject)
    assert measured.signals["data/overlap"] == 1
    assert "REPEAT" in measured.rows["data/overlap"][0]
    assert subject.inputs.data.report["train"]["dropped_as_in_eval_path"] == 0


def test_the_first_gradients_show_a_mask_before_a_run(subject):
    with jax.set_mesh(subject.mesh):
        signals = loss.measure(subject).signals
    assert signals["supervised_fraction.max"] == 0
    assert signals["grad_norm.max"] == 0
    found = ranking.diagnose(Evidence("sft", False, signals)).findings
    assert found[0].cause.name == "all_labels_masked"


@pytest.mark.slow
def test_a_twin_with_exchanged_inputs(tmp_path):
    """Of texts that repeat themselves the inputs matter; where they are exchanged already, nothing is lost."""
    texts = [{"text": f"{chr(97 + i % 26)}{chr(97 + i * 7 % 26)}" * 30} for i in range(64)]
    path = subjects.write(tmp_path / "texts.jsonl", texts)
    optimizer = {"learning_rate": 1e-2, "warmup_steps": 1, "schedule": "constant"}
    fields = {"objective": {"terms": {"next_token": 1.0}}, "optimizer": optimizer}
    clean = subjects.subject(subjects.config(path, **fields))
    assert not confirm.twin(clean, steps=25).helps
    spoilt = dataclasses.replace(clean, change_batch=confirm.exchanged)
    outcome = confirm.twin(spoilt, steps=25)
    assert outcome.helps
    assert "do not follow" in outcome.text
