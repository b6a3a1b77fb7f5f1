"""Records, parsed and checked: a fault is named with its file and line, and what to do about it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from research import files
from research.errors import InputError, did_you_mean
from research.sources import json_limits

SHOWN = "assistant of weight 0"  # the role of an assistant's turn that isn't learned
TOOLS = "tools"  # the role of a turn before all others, which says as JSON what may be called
CALLS = ("tool_calls", "function_call")  # what an assistant's message may have in place of a text
Raw = bytes | dict[str, Any]  # a line of JSON, or a record that its reader has parsed

FORMATS = ("text", "prompt_response", "messages", "labelled", "preference", "ranked", "unpaired")
FIELDS = (
    *("text", "prompt", "response", "messages", "label", "probs", "chosen", "rejected", "margin"),
    *("score_chosen", "score_rejected", "responses", "scores", "score", "rewards"),
)
ROLES = ("system", "user", "assistant", "tool")
# What other libraries hand to a chat template or take for a mask, and no template is given here.
_UNHEARD_COLUMNS = ("functions", "chat_template_kwargs")
_UNHEARD_KEYS = ("images", "audio", "train", "training")
_MOST_CLASSES = 10_000  # a greater number is an id, not a class


class BadRecord(InputError):
    """A record that can't be used.

    Attributes:
      reason: short, and the same for all with that fault: it is counted.
      fault: what is wrong.
      remedy: what to do about it in the data; "" where `fault` says it.
      option: the name of a setting that would help, and what to do there, with %s in the place of its spelling.
      place: file and line, or the like; "" where it isn't known yet.
    """

    def __init__(
        self, reason: str, fault: str, remedy: str = "", option: tuple[str, str] = ("", ""), place: str = "", **settings
    ):
        self.reason, self.fault, self.remedy, self.option, self.place = reason, fault, remedy, option, place
        name, advice = option
        advice = advice.replace("%s", settings[name]) if name in settings else remedy
        parts = (f"{place}: {fault}" if place else fault, advice, settings.get("skip", ""))
        super().__init__(" ".join(part for part in parts if part))

    def at(self, place: str, **settings: str) -> "BadRecord":
        """The same with its place, where one is given, and with advice that fits who reads the record.

        Args:
          place: file and line.
          settings: option -> how it is spelt there: fields="--fields"; in `skip` what to do to read on.
        """
        return BadRecord(self.reason, self.fault, self.remedy, self.option, place or self.place, **settings)


CONFIG_SETTINGS = {
    "fields": "data.fields",
    "labels": "data.labels",
    "skip": "Or set data.on_bad_record='skip'.",
}


class Turn(NamedTuple):
    """A part of an example: what one role says. A plain document is one turn of the role "text".

    Attributes:
      role: one of ROLES, SHOWN, TOOLS or "text".
      text: what it says; "" of a message that only calls tools, or of a tool that returned nothing.
      more: what else the message has, for a chat template: tool_calls, name and the like; "content", where it is empty.
    """

    role: str
    text: str
    more: Mapping[str, Any] = {}


class Classes(NamedTuple):
    """How records of the format "labelled" are read.

    Attributes:
      names: of the classes in their order, where labels are names; they may be numbers from 0 on instead.
      prompt: what the model reads, with {text} where the record's text goes.
      known: records have labels; False where they are to get them.
    """

    names: tuple[str, ...] = ()
    prompt: str = "{text}"
    known: bool = True


NUMBERED = Classes()


def check_columns(fields: Mapping[str, str]) -> None:
    """Raises InputError where --fields names a field that no record has."""
    for name in fields:
        if name not in FIELDS:
            raise InputError(f"--fields: there is no field {name!r} to rename a column to.{did_you_mean(name, FIELDS)}")


def parse(raw: Raw) -> dict[str, Any]:
    """Returns the record that `raw` holds. Raises BadRecord where it is not one JSON object in UTF-8."""
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode(), object_pairs_hook=files.unique_names)
        except UnicodeDecodeError as e:
            raise BadRecord("invalid UTF-8", f"not valid UTF-8 at byte {e.start}. Save the file as UTF-8.") from e
        except json.JSONDecodeError as e:
            what = f"{e.msg} at column {e.colno}"
            raise BadRecord("invalid JSON", f"invalid JSON ({what}). Write one JSON object a line.") from e
        except RecursionError as e:
            raise _too_deep() from e
        except ValueError as e:
            if "twice" in str(e):
                raise BadRecord("name twice", f"{e}. Leave one out.") from e
            raise BadRecord(
                "number too long", "holds a number of more than 4,300 digits. Shorten it, or write it in quotes."
            ) from e
    if json_limits.deeper_than(raw, json_limits.MOST_NESTED):
        raise _too_deep()
    if not isinstance(raw, dict):
        raise BadRecord("not an object", f'holds {kind_of(raw)}, not an object. Write {{"text": ...}} or the like.')
    return raw


def _too_deep() -> BadRecord:
    most = json_limits.MOST_NESTED
    return BadRecord("nested too deep", f"holds lists or objects more than {most} deep in each other. Flatten it.")


def detect_format(record: Mapping[str, Any], fields: Mapping[str, str]) -> str:
    """Returns the format whose fields `record` has: messages, else prompt_response, else text.

    Raises:
      BadRecord: it has those of none.
    """
    has = {name for name in FIELDS if fields.get(name, name) in record}
    if "messages" in has:
        return "messages"
    if {"prompt", "response"} <= has:
        return "prompt_response"
    if "text" in has:
        return "text"
    raise BadRecord(
        "unknown format",
        f"has the fields {', '.join(map(repr, record)) or 'none'}, but needs 'text', or 'prompt' and 'response', or "
        "'messages', or 'chosen' and 'rejected'.",
        "Rename its columns.",
        ("fields", 'Name its columns, as in %s={"prompt": "question", "response": "answer"}.'),
    )


def check(record: dict[str, Any], format: str, fields: Mapping[str, str]) -> list[Turn]:
    """Returns the record's turns: a document, those of its conversation, or what the user says, which has a label.

    Args:
      record: column -> value.
      format: one of FORMATS.
      fields: field -> the column that holds it, where the names differ.

    Raises:
      BadRecord: a field is missing, of a wrong type or empty; a role is unknown or out of order; or there is something
        that no template is given, such as images.
    """
    if format == "text":
        return [Turn("text", text_of(record, "text", fields.get("text", "text")))]
    if format == "labelled":
        return [Turn("user", text_of(record, "text", fields.get("text", "text")))]
    _refuse_unheard(record, _UNHEARD_COLUMNS, "")
    if format == "prompt_response":
        return [
            *tools_of(record),
            Turn("user", text_of(record, "prompt", fields.get("prompt", "prompt"))),
            Turn("assistant", text_of(record, "response", fields.get("response", "response"))),
        ]
    column = fields.get("messages", "messages")
    messages = value_of(record, "messages", column)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord("wrong type", f"field {column!r} must be a list of objects with role and content.")
    return [*tools_of(record), *conversation(messages)]


def label(record: Mapping[str, Any], fields: Mapping[str, str], names: Sequence[str]) -> int | list[float]:
    """Returns a record's class: its number, or the probability of each.

    Args:
      record: column -> value. It has `label` (a number from 0 on, or one of `names`) or `probs` (a list).
      fields: field -> the column that holds it. Where a record has both, it says which is meant.
      names: of the classes.

    Raises:
      BadRecord: there is neither or both, or the value is no class or no distribution.
    """
    columns = {name: fields.get(name, name) for name in ("label", "probs")}
    present = {name for name in columns if name in fields} or {
        name for name, column in columns.items() if column in record
    }
    if len(present) != 1:
        raise BadRecord(
            "no label" if not present else "two labels",
            f"has {'neither' if not present else 'both'} of 'label' and 'probs'.",
            option=("fields", 'Name the column in %s: {"label": ...} or {"probs": ...}.'),
        )
    (name,) = present
    value = value_of(record, name, columns[name])
    if name == "probs":
        numbers = isinstance(value, list | tuple) and all(
            isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1 for p in value
        )
        if not numbers or len(value) < 2 or abs(sum(value) - 1) > 1e-3 or (names and len(value) != len(names)):
            wanted = f"{len(names)} probabilities" if names else "two or more probabilities"
            raise BadRecord(
                "not a distribution",
                f"field {columns[name]!r} must be {wanted} that add up to 1, but is {value!r:.80}.",
            )
        return [float(p) for p in value]
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, str) and value in names:
        return list(names).index(value)
    if isinstance(value, int) and 0 <= value < (len(names) or _MOST_CLASSES):
        return value
    seen = f"field {columns[name]!r} is {value!r:.80}, and"
    if names:
        advice = ("labels", f"Mend it, or %s = {tuple(names)}.")
        raise BadRecord("unknown label", f"{seen} none of the classes {', '.join(names)}.", "Mend it.", advice)
    advice = ("labels", "Name the classes in %s.")
    raise BadRecord("unknown label", f"{seen} must be the number of a class, from 0 on.", "Mend it.", advice)


def canonical(record: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Returns `record` with the columns that `fields` names under their field's own name."""
    return {**record, **{name: record[column] for name, column in fields.items() if column in record}}


def tools_of(record: Mapping[str, Any]) -> list[Turn]:
    """What a record says of the tools that may be called: a turn, or none. As text it is JSON, as columns have it."""
    tools = record.get("tools")
    if tools in (None, [], {}, ""):
        return []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as e:
            raise BadRecord("wrong type", f"field 'tools' is text that is no JSON ({e}). Write a list.") from e
    _check_objects(tools, "field 'tools'")
    return [Turn(TOOLS, json.dumps(tools, ensure_ascii=False, default=str))]


def _check_objects(value: Any, name: str) -> None:
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise BadRecord("wrong type", f"{name} must be a list of objects, but is {kind_of(value)}. Mend it.")


def conversation(messages: list[dict[str, Any]]) -> list[Turn]:
    turns: list[Turn] = []
    for i, message in enumerate(messages, start=1):
        role = value_of(message, "role", "role")
        if role not in ROLES:
            raise BadRecord(
                "unknown role", f"message {i} has role {role!r}.{did_you_mean(str(role), ROLES)} Rename it."
            )
        before = speaker(turns[-1].role) if turns else None
        allowed = {
            None: ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("tool", "user") if turns and calls(turns[-1]) else ("user",),
            "tool": ("assistant", "tool"),
        }[before]
        if role not in allowed:
            after = f"follows {before!r}" if before else "comes first"
            raise BadRecord(
                "roles out of order",
                f"message {i}, of role {role!r}, {after}; allowed there: {' or '.join(allowed)}. Mend it.",
            )
        turns.append(_turn(message, i))
    if not turns or turns[-1].role not in ("assistant", SHOWN):
        raise BadRecord(
            "no assistant turn at the end",
            f"the conversation of {len(turns)} messages must end with an assistant turn. Add or drop one.",
        )
    return turns


def _turn(message: dict[str, Any], number: int) -> Turn:
    """A message of a known role, as what it says and what else it has."""
    _refuse_unheard(message, _UNHEARD_KEYS, f"message {number} ")
    role, content = message["role"], message.get("content")
    known = ("role", "content", "weight", *_UNHEARD_KEYS)
    more = {k: v for k, v in message.items() if k not in known and v not in (None, [], {}, "")}
    if "tool_calls" in more:
        _check_objects(more["tool_calls"], f"message {number}: tool_calls")
    if content in (None, "") and (role == "tool" or (role == "assistant" and any(name in more for name in CALLS))):
        text, more = "", more | {name: message[name] for name in ("content",) if name in message}
    else:
        text = text_of(message, "response" if role == "assistant" else f"{role} message", "content")
    return Turn(role if _weight(message, number) else SHOWN, text, more)


def calls(turn: Turn) -> bool:
    """Whether a turn calls tools."""
    return any(name in turn.more for name in CALLS)


def speaker(role: str) -> str:
    """The role of a turn as templates know it."""
    return "assistant" if role == SHOWN else role


def _refuse_unheard(record: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if record.get(name) not in (None, [], {}, "", name.startswith("train")):
            raise BadRecord(
                f"has {name}",
                f"{where}has {name!r} ({str(record[name])[:40]}), which no template is given here: the model would "
                f"never see it. Write what it says into the content, and drop {name!r}; or drop the record.",
            )


def _weight(message: Mapping[str, Any], number: int) -> bool:
    """Whether a message is to be learned, as far as its `weight` says: 1, or no weight."""
    role, weight = message["role"], message.get("weight")
    if weight is None:
        return True
    if role != "assistant" and weight == 0:
        return True  # nobody learns it
    if weight not in (0, 1) or role != "assistant":
        allowed = "an assistant's is 1, to be learned, or 0, to be read only" if role == "assistant" else "it must be 0"
        raise BadRecord(
            "unknown weight", f"message {number}, of role {role!r}, has weight {weight!r:.40}; {allowed}. Change it."
        )
    return weight == 1


def value_of(record: Mapping[str, Any], name: str, column: str) -> Any:
    if column not in record:
        hint = did_you_mean(column, map(str, record)) if record else " It is empty."
        advice = ("fields", f'Name the column in %s: {{"{name}": ...}}.') if name in FIELDS else ("", "")
        remedy = "Rename the column." if name in FIELDS else "Add it."
        raise BadRecord("missing field", f"has no field {column!r}.{hint}", remedy, advice)
    return record[column]


def text_of(record: Mapping[str, Any], name: str, column: str) -> str:
    value = value_of(record, name, column)
    try:
        value = value.decode() if isinstance(value, bytes) else value
        if not isinstance(value, str):
            raise BadRecord("wrong type", f"field {column!r} must be text, but is {kind_of(value)}. {_remedy(value)}")
        value.encode()  # JSON can hold half of a surrogate pair, which no UTF-8 can
    except UnicodeError as e:
        raise BadRecord("invalid UTF-8", f"field {column!r} is not valid UTF-8 ({e.reason}). Repair or drop it.") from e
    if not value.strip():
        raise BadRecord(f"empty {name}", f"field {column!r} is an empty {name}. Fill or drop the record.")
    return value


def _remedy(value: Any) -> str:
    """What to do about a value that should be text."""
    if value is None:
        return "Write a text, or drop the record."
    if isinstance(value, list | dict):
        return "Write its text alone, or drop the record."
    return "Write it in quotes."


def kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    shown = "" if value is None else f" ({str(value)[:40]})"
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__) + shown
