"""What can be told of the data from some of its examples."""

from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np

from research.diagnosis import examples
from research.diagnosis.examples import Example
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject

_COMPARED = 4000  # examples of the training data that held-out ones are looked for among
_SHOWN = 3


def measure(subject: Subject) -> Measured:
    """
    data/examples, data/eval_examples: how many there are to train on, and held out.
    data/duplicates: the share of examples that are the same as an earlier one, among those that were looked at.
    data/conflicts: the share of examples with a prompt whose prompt has another answer too.
    data/constant_targets: the share of examples with a prompt that have the most frequent answer.
    data/empty: the share of examples with a prompt whose answer has nothing that can be seen.
    data/cut: the share of examples of which the rows hold a part alone.
    data/overlap: the share of held-out examples that are among those to train on, but for case and white space; a run
      takes out of its training data what is the same letter by letter.
    data/prompt_trained: the share of targets that are of prompts.
    """
    first = [each for each in subject.examples if each.side <= 0]
    prompted = [each for each in first if not each.plain and each.label is None]
    signals = {
        "data/examples": float(sum(examples.count(rows) for rows, _ in subject.inputs.data.train)),
        "data/eval_examples": float(examples.count(subject.inputs.data.held_out)),
    }
    rows: dict[str, tuple[str, ...]] = {}
    if len(first) > 1:
        keys = [_whole(each, subject.examples) for each in first]
        again = _repeated(keys)
        signals["data/duplicates"] = len(again) / len(first)
        rows["data/duplicates"] = _shown([first[i] for i in again])
    if prompted:
        signals |= _answers(subject, prompted, rows)
    if subject.held_out and not subject.config.rewards:
        seen = _seen(subject)
        signals["data/overlap"] = len(seen) / len(subject.held_out)
        rows["data/overlap"] = _shown(seen)
    if (share := _prompt_trained(subject)) is not None:
        signals["data/prompt_trained"] = share
    return Measured(signals, rows)


def _answers(subject: Subject, prompted: Sequence[Example], rows: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """What is told of prompts and their answers; fills in the rows that show it."""
    special = set(subject.tokenizer.special_ids.tolist()) | set(subject.tokenizer.stop)
    answers = [tuple(t for t in each.response_tokens.tolist() if t not in special) for each in prompted]
    signals = {}
    if all(each.side < 0 for each in prompted):
        by_prompt: dict[bytes, set[tuple[int, ...]]] = {}
        prompts = [each.prompt_tokens.tobytes() for each in prompted]
        for prompt, answer in zip(prompts, answers, strict=True):
            by_prompt.setdefault(prompt, set()).add(answer)
        against = [i for i, prompt in enumerate(prompts) if len(by_prompt[prompt]) > 1]
        signals["data/conflicts"] = len(against) / len(prompted)
        rows["data/conflicts"] = _shown(sorted((prompted[i] for i in against), key=lambda each: each.prompt))
        (common, times), *_ = Counter(answers).most_common(1)
        signals["data/constant_targets"] = times / len(prompted)
        rows["data/constant_targets"] = _shown([e for e, a in zip(prompted, answers, strict=True) if a == common])
    empty = [i for i, each in enumerate(answers) if _says_nothing(subject.tokenizer.decode(list(each)))]
    signals["data/empty"] = len(empty) / len(prompted)
    rows["data/empty"] = _shown([prompted[i] for i in empty])
    cut = [each for each in prompted if each.kept < len(each.tokens)]
    signals["data/cut"] = len(cut) / len(prompted)
    rows["data/cut"] = _shown(cut)
    return signals


def _says_nothing(text: str) -> bool:
    """Whether nothing of a text can be seen: there are spaces and marks of no width at most."""
    return not any(letter.isprintable() and not letter.isspace() for letter in text)


def _whole(example: Example, every: Sequence[Example]) -> bytes:
    """What tells an example from others: its tokens, and those of the answers that it is compared with."""
    if example.unit < 0:
        return example.tokens.tobytes()
    return b"|".join(each.tokens.tobytes() for each in every if each.unit == example.unit)


def _repeated(keys: Sequence[bytes]) -> list[int]:
    """The places of keys that were there before."""
    seen: set[bytes] = set()
    again = []
    for i, key in enumerate(keys):
        if key in seen:
            again.append(i)
        seen.add(key)
    return again


def _seen(subject: Subject) -> list[Example]:
    """The held-out examples that are among those to train on."""
    parts = subject.inputs.data.train
    most = max(_COMPARED // len(parts), 1)
    known = {_plain(each) for rows, _ in parts for each in examples.read(rows, subject.tokenizer, most)}
    return [each for each in subject.held_out if _plain(each) in known]


def _plain(example: Example) -> str:
    """Prompt and response without case, and with single spaces."""
    return " ".join(f"{example.prompt}{example.response}".casefold().split())


def _prompt_trained(subject: Subject) -> float | None:
    """None where terms read what is to be predicted, or nothing is a prompt."""
    fields = {field for term in subject.terms.values() for field in term.objective.fields}
    if fields & {"loss_mask", "pair", "label_probs", "advantage"}:
        return 0.0
    batches = jax.device_get(
        [{name: batch[name] for name in ("loss_mask", "segment_ids")} for batch in subject.batches]
    )
    real = np.concatenate([batch["loss_mask"][batch["segment_ids"] > 0] for batch in batches])
    return float(np.mean(real == 0)) if real.size else None


def _shown(chosen: Sequence[Example]) -> tuple[str, ...]:
    return tuple(each.shown() for each in chosen[:_SHOWN])
