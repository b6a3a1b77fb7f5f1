"""Records that say which answers are better: pairs, ranked or scored lists, and answers with a verdict or a score.

Formats, and the spellings of other libraries and data sets that are read as such:
  preference  prompt, chosen, rejected, margin: TRL's, with the prompt apart or as the common beginning of two whole
              conversations; UltraFeedback binarized (score_chosen, score_rejected); Anthropic-HH, two transcripts of
              "\\n\\nHuman: ..." and "\\n\\nAssistant: ...".
  ranked      prompt, responses best to worst, or with scores; UltraFeedback (instruction, completions with
              overall_score); answers with a rank.
  unpaired    prompt, response, and label (true or false) or score; TRL's prompt, completion, label.
Prompts and answers are texts or lists of messages.

Where the options name a column of rewards, which `understudy score --reward` writes, these say which answer of a pair
is the better one, and how probably, whatever the record says: they are a model's labels.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from research.sources.records import SHOWN, BadRecord, Turn, conversation, kind_of, text_of, tools_of, value_of

FORMATS = ("preference", "ranked", "unpaired")

# The columns of other data sets for our fields.
_SPELLINGS = {
    "prompt": ("prompt", "instruction"),
    "response": ("response", "completion"),
    "responses": ("responses", "completions", "answers"),
}
_ANSWER_KEYS = ("response", "answer", "text", "content")  # of an answer that is an object
_SCORE_KEYS = ("score", "overall_score", "rank")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}

Messages = list[dict[str, Any]]


class Comparison(NamedTuple):
    """Answers to one prompt, and what is said of them.

    Attributes:
      prompt: its turns, of which none is to be learned.
      answers: the turns of each answer, the best first; one alone where nothing is compared.
      scores: of each answer; NaN where nobody says it.
      margin: by how much the first is better than the second; NaN where nobody says it.
      desirable: whether the only answer is; None where nobody says it.
      ties: some answers have equal scores; which of them comes first is a matter of chance.
      probability: how probably the first of two is the better one; NaN where nobody says it.
    """

    prompt: list[Turn]
    answers: list[list[Turn]]
    scores: list[float]
    margin: float = math.nan
    desirable: bool | None = None
    ties: bool = False
    probability: float = math.nan

    @property
    def identical(self) -> bool:
        """Whether two or more of the answers are the same."""
        return any(a == b for a, b in itertools.combinations(self.answers, 2))


def detect(record: Mapping[str, Any], fields: Mapping[str, str]) -> str:
    """The one of FORMATS whose fields a record has; "" where it has those of none."""
    if all(_column(record, name, fields) in record for name in ("chosen", "rejected")):
        return "preference"
    prompted = _column(record, "prompt", fields) in record
    if prompted and isinstance(record.get(_column(record, "responses", fields)), list | tuple):
        return "ranked"
    if not prompted or _column(record, "response", fields) not in record:
        return ""
    label, score = (record.get(fields.get(name, name)) for name in ("label", "score"))
    judged = isinstance(label, bool) or _is_number(score) or "label" in fields or "score" in fields
    return "unpaired" if judged else ""


def read(record: Mapping[str, Any], format: str, fields: Mapping[str, str]) -> Comparison:
    """What a record says.

    Args:
      record: column -> value.
      format: one of FORMATS. A pair may be read as "unpaired": see `read_all`.
      fields: field -> the column that holds it, where the names differ.

    Raises:
      BadRecord: a field is missing, of a wrong type or empty; the conversations have no common beginning; nothing says
        which answer is better.
    """
    if format == "preference":
        return _read_pair(record, fields)
    if format == "ranked":
        return _read_list(record, fields)
    return _read_unpaired(record, fields)


def read_all(record: Mapping[str, Any], format: str, fields: Mapping[str, str]) -> list[Comparison]:
    """What a record says; of a pair that is to be read as unpaired, a desirable answer and one that isn't.

    Args and errors: see `read`.
    """
    if format != "unpaired" or detect(record, fields) != "preference":
        return [read(record, format, fields)]
    pair = _read_pair(record, fields)
    return [
        Comparison(pair.prompt, [answer], [score], desirable=side == 0)
        for side, (answer, score) in enumerate(zip(pair.answers, pair.scores, strict=True))
    ]


def best_turns(record: Mapping[str, Any], format: str) -> list[Turn]:
    """The turns of a record's prompt and of its best answer, where it has one of FORMATS. Raises BadRecord."""
    comparison = read_all(record, format, {})[0]
    return [*comparison.prompt, *comparison.answers[0]]


def _column(record: Mapping[str, Any], name: str, fields: Mapping[str, str]) -> str:
    """The column of a field: the one that `fields` names, or the first of its spellings that the record has."""
    if name in fields:
        return fields[name]
    return next((column for column in _SPELLINGS.get(name, ()) if column in record), name)


def _read_pair(record: Mapping[str, Any], fields: Mapping[str, str]) -> Comparison:
    columns = {name: _column(record, name, fields) for name in ("prompt", "chosen", "rejected")}
    sides = [_messages(record, name, columns[name], "assistant") for name in ("chosen", "rejected")]
    has_prompt = record.get(columns["prompt"]) is not None
    prompt = _messages(record, "prompt", columns["prompt"], "user") if has_prompt else []
    whole = [side[0].get("role") not in ("assistant", "tool") for side in sides]
    if all(whole):
        beginning = _common_beginning(*sides)
        _check_prompt(prompt, beginning, columns["prompt"])
        prompt, sides = beginning, [side[len(beginning) :] for side in sides]
    elif any(whole):
        raise BadRecord(
            "one side a conversation",
            f"{columns['chosen']!r} and {columns['rejected']!r}: one is a whole conversation and the other an answer. "
            "Write both the same way.",
        )
    elif not has_prompt:
        raise BadRecord(
            "no prompt",
            f"has no field {columns['prompt']!r}, and {columns['chosen']!r} isn't a conversation that begins with one.",
            "Rename the column.",
            ("fields", 'Name the column in %s: {"prompt": ...}.'),
        )
    names = ("score_chosen", "score_rejected", "margin")
    scores, margin = [_number(record, name, fields) for name in names[:2]], _number(record, "margin", fields)
    if scores[0] < scores[1]:
        raise BadRecord(
            "chosen has the lower score",
            f"{names[0]} = {scores[0]} is less than {names[1]} = {scores[1]}. Swap the answers, or drop the record.",
        )
    margin = scores[0] - scores[1] if math.isnan(margin) else margin
    pair = Comparison(*_turns(record, prompt, sides), scores, margin)
    return _by_rewards(pair, _rewards(record, fields["rewards"])) if "rewards" in fields else pair


def _rewards(record: Mapping[str, Any], column: str) -> tuple[float, float]:
    """The rewards of the chosen answer and of the rejected one."""
    values = value_of(record, "rewards", column)
    if not isinstance(values, list | tuple) or len(values) != 2 or not all(map(_is_number, values)):
        raise BadRecord(
            "wrong rewards",
            f"field {column!r} must have two numbers, of the chosen answer and of the rejected one. Write them with "
            "understudy score --reward.",
        )
    return float(values[0]), float(values[1])


def _by_rewards(pair: Comparison, rewards: tuple[float, float]) -> Comparison:
    """The pair as rewards have it: the answer of the higher one first, which is the better one with the probability
    that the model of Bradley and Terry gives it. Which of two equal ones is first is a matter of chance."""
    difference = rewards[0] - rewards[1]
    swapped = difference < 0 or (difference == 0 and _chance(pair.answers[0]) > _chance(pair.answers[1]))
    order = [1, 0] if swapped else [0, 1]
    answers, scores = ([values[i] for i in order] for values in (pair.answers, pair.scores))
    probability = 1 / (1 + math.exp(-abs(difference)))
    return Comparison(pair.prompt, answers, scores, ties=difference == 0, probability=probability)


def _chance(answer: Any) -> bytes:
    """What orders answers that nothing else orders."""
    return hashlib.blake2b(repr(answer).encode("utf-8", "replace")).digest()


def _read_list(record: Mapping[str, Any], fields: Mapping[str, str]) -> Comparison:
    if "rewards" in fields:
        remedy = f'{{"scores": "{fields["rewards"]}"}}'
        raise BadRecord(
            "rewards, and no pair",
            "is a list of answers: its rewards are scores.",
            option=("fields", f"Name them so in %s: {remedy}."),
        )
    prompt = _messages(record, "prompt", _column(record, "prompt", fields), "user")
    column = _column(record, "responses", fields)
    values = value_of(record, "responses", column)
    if not isinstance(values, list | tuple) or len(values) < 2:
        raise BadRecord(
            "nothing to compare", f"field {column!r} must be a list of two or more answers, best to worst. Mend it."
        )
    answers, scores = _answers(values, column), _scores(record, values, fields, column)
    if scores is None:
        return Comparison(*_turns(record, prompt, answers), [math.nan] * len(answers))
    if len(set(scores)) == 1:
        raise BadRecord("all answers tie", f"all {len(scores)} answers have the score {scores[0]}. Drop the record.")
    chance = [_chance(answer) for answer in answers]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], chance[i]))
    prompt, answers = _turns(record, prompt, [answers[i] for i in order])
    ranked = "rank" in values[0] if isinstance(values[0], dict) else False
    kept = [math.nan if ranked else scores[i] for i in order]
    return Comparison(prompt, answers, kept, ties=len(set(scores)) < len(scores))


def _read_unpaired(record: Mapping[str, Any], fields: Mapping[str, str]) -> Comparison:
    if "rewards" in fields:
        remedy = "Leave them out of %s."
        raise BadRecord("rewards, and no pair", "has one answer: rewards are of pairs.", option=("fields", remedy))
    prompt = _messages(record, "prompt", _column(record, "prompt", fields), "user")
    answer = _messages(record, "response", _column(record, "response", fields), "assistant")
    score, column = _number(record, "score", fields), fields.get("label", "label")
    label = value_of(record, "label", column) if "label" in fields else record.get(column)
    if label is None and math.isnan(score):
        raise BadRecord(
            "no label",
            f"has neither {column!r}, true or false, nor a score.",
            option=("fields", 'Name the column in %s: {"label": ...} or {"score": ...}.'),
        )
    if not (label is None or isinstance(label, bool) or (isinstance(label, int) and label in (0, 1))):
        raise BadRecord(
            "unknown label", f"field {column!r} is {label!r:.40}, and must be true (desirable) or false. Mend it."
        )
    return Comparison(*_turns(record, prompt, [answer]), [score], desirable=None if label is None else bool(label))


def _turns(
    record: Mapping[str, Any], prompt: Messages, answers: Sequence[Messages]
) -> tuple[list[Turn], list[list[Turn]]]:
    """The turns of the prompt, of which none is learned, and of each answer."""
    tools = tools_of(record)
    whole = [conversation([*prompt, *answer]) for answer in answers]
    shown = [turn._replace(role=SHOWN) if turn.role == "assistant" else turn for turn in whole[0][: len(prompt)]]
    return [*tools, *shown], [turns[len(prompt) :] for turns in whole]


def _messages(record: Mapping[str, Any], name: str, column: str, role: str) -> Messages:
    """The messages of a field: a list of them, one alone, a transcript, or a text that `role` says."""
    value = value_of(record, name, column)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list | tuple):
        if not value or not all(isinstance(message, dict) for message in value):
            raise BadRecord("wrong type", f"field {column!r} must be text, or a list of objects with role and content.")
        return list(value)
    text = text_of(record, name, column)
    return _transcript(text) or [{"role": role, "content": text}]


def _transcript(text: str) -> Messages:
    """The messages of an Anthropic-HH transcript, or of its beginning; none where the text isn't one.

    The last message is left out where it is an assistant's without a word: it is where an answer is to stand.
    """
    if not re.match(r"\s*Human:", text) or "\n\nAssistant:" not in text:
        return []
    _, *parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", text)
    messages = [
        {"role": _SPEAKERS[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages


def _common_beginning(chosen: Messages, rejected: Messages) -> Messages:
    """What two conversations have in common, up to the last place where an assistant answers in both."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    most = min(len(list(same)), len(chosen) - 1, len(rejected) - 1)
    for size in range(most, 0, -1):
        if chosen[size].get("role") == rejected[size].get("role") == "assistant":
            return chosen[:size]
    raise BadRecord(
        "no common prompt",
        "the chosen and the rejected conversation don't begin with the same messages. Drop the record.",
    )


def _check_prompt(prompt: Messages, beginning: Messages, column: str) -> None:
    """Raises BadRecord where a prompt beside whole conversations isn't what they begin with."""
    contents = {str(message.get("content")).strip() for message in beginning}
    if any(str(message.get("content")).strip() not in contents for message in prompt):
        raise BadRecord(
            "prompt differs",
            f"field {column!r} isn't in what both conversations begin with. Drop it, or mend the record.",
        )


def _answers(values: Sequence[Any], column: str) -> list[Messages]:
    """The messages of each answer of a list."""
    answers = []
    for number, value in enumerate(values, start=1):
        where = f"{column}[{number - 1}]"
        if isinstance(value, dict) and "role" not in value:
            key = next((key for key in _ANSWER_KEYS if key in value), "response")
            where, value = f"{where}.{key}", value.get(key)
        answers.append(_messages({where: value}, "response", where, "assistant"))
    return answers


def _scores(
    record: Mapping[str, Any], values: Sequence[Any], fields: Mapping[str, str], column: str
) -> list[float] | None:
    """The score of each answer, the best of which has the greatest; None where the list is in order."""
    scored = fields.get("scores", "scores")
    if record.get(scored) is not None or "scores" in fields:
        scores = value_of(record, "scores", scored)
        if not isinstance(scores, list | tuple) or len(scores) != len(values) or not all(map(_is_number, scores)):
            raise BadRecord("wrong scores", f"field {scored!r} must have a number for each of {len(values)} answers.")
        return [float(score) for score in scores]
    keys = {next((key for key in _SCORE_KEYS if key in value), "") for value in values if isinstance(value, dict)}
    if keys <= {""}:
        return None
    key = keys.pop()
    if keys or not all(isinstance(value, dict) and _is_number(value.get(key)) for value in values):
        raise BadRecord("wrong scores", f"field {column!r}: some answers have a {key or 'score'}, and others none.")
    return [-float(value[key]) if key == "rank" else float(value[key]) for value in values]


def _number(record: Mapping[str, Any], name: str, fields: Mapping[str, str]) -> float:
    """The number in a field; NaN where the record has none, and `fields` doesn't name its column."""
    column = fields.get(name, name)
    value = value_of(record, name, column) if name in fields else record.get(column)
    if value is None:
        return math.nan
    if not _is_number(value):
        raise BadRecord(f"wrong {name}", f"field {column!r} must be a number, but is {kind_of(value)}. Mend it.")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
