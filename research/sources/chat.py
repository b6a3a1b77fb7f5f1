"""A model's own chat template: what it writes around a conversation, and what of that the model is to say.

A template is a Jinja program that came with the model, from whoever made it (template_program.py). It sees what
transformers shows it (https://huggingface.co/docs/transformers/chat_templating), save for the date: `strftime_now` says
26 July 2024 on every day, so that equal conversations are equal tokens, in training, in its cache and in generation.
"""

import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from research.errors import InputError
from research.sources import template_program
from research.sources.template_program import ANSWER, ANSWER_END, HERE, SPELLED, SPELLED_END, Exhausted

Message = Mapping[str, Any]  # role, content and what else it has, as transformers hands it to a template

# What a message may have that the model is to hear. Of a tool's answer, `name` and `tool_call_id` repeat its call's.
HEARD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "name")
_ROLES = ("system", "user", "assistant")
_NO_MARKS = dict.fromkeys(range(0xFDD0, 0xFDD5))


class Unheard(InputError):
    """A conversation has something that the template doesn't write; `name` is that of the column or key."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


class Part(NamedTuple):
    """A stretch of a rendered conversation.

    Attributes:
      text: of it.
      spelled: it spells a special token that was in a message, so it is to be encoded as plain text.
      supervised: the model is to say it.
    """

    text: str
    spelled: bool
    supervised: bool


class ChatTemplate(NamedTuple):
    """A template, with what it takes to tell its special tokens from those that a message spells.

    Attributes:
      source: the Jinja program.
      variables: what it may write by name: bos_token, eos_token and the like.
      special: any special token of the tokenizer.
      spelled: the same between marks.
      beginning: the first character of any.
      end: any token that the tokenizer takes whole, special or not, and white space before it.
      marks_answers: it has {% generation %}.
      parts_of: the roles whose content it wants as a list of parts, [{"type": "text", "text": ...}], and not as text.
      deaf_to: the roles whose content it writes in neither form.
      tools: what may be called in the conversation that is rendered, in JSON's types; None for nothing.
    """

    source: str
    variables: Mapping[str, str]
    special: re.Pattern[str]
    spelled: re.Pattern[str]
    beginning: re.Pattern[str]
    end: re.Pattern[str]
    marks_answers: bool
    parts_of: frozenset[str] = frozenset()
    deaf_to: frozenset[str] = frozenset()
    tools: Any = None


def make_template(
    source: str, variables: Mapping[str, str], special: Sequence[str], added: Sequence[str]
) -> ChatTemplate:
    """Args: the source and variables; the tokenizer's special tokens; all tokens that it takes whole."""
    specials = _any_of(special)
    chat = ChatTemplate(
        source,
        variables,
        special=re.compile(specials),
        spelled=re.compile(f"({SPELLED}{specials}{SPELLED_END})"),
        beginning=re.compile(_any_of([token[:1] for token in special])),
        end=re.compile(rf"\s*{_any_of(added)}"),
        marks_answers=re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None,
    )
    forms = {role: _form(chat, role) for role in _ROLES}
    return chat._replace(
        parts_of=frozenset(role for role, form in forms.items() if form == "parts"),
        deaf_to=frozenset(role for role, form in forms.items() if form == "none"),
    )


def _form(chat: ChatTemplate, role: str) -> str:
    """The form of content in which the template writes what a role says: "text" or "parts"; "none" where it leaves out
    both, and "unknown" where it refuses the conversations that this is tried with."""
    others = frozenset(_ROLES) - {role}
    as_text = [_writes(chat._replace(parts_of=parts), role) for parts in (frozenset(), others)]
    if True in as_text:
        return "text"
    as_parts = [_writes(chat._replace(parts_of=parts | {role}), role) for parts in (frozenset(), others)]
    if True in as_parts:
        return "parts"
    return "none" if False in (*as_text, *as_parts) else "unknown"


def _writes(chat: ChatTemplate, role: str) -> bool | None:
    """Whether the rendering of a conversation, or of its beginning up to `role`, holds what `role` says in it; None
    where the template refuses both."""
    roles = _ROLES if role == "system" else _ROLES[1:]
    messages = [{"role": each, "content": HERE if each == role else "?"} for each in roles]
    written = []
    for part in (messages, messages[: roles.index(role) + 1]):
        try:
            written.append(HERE in _render(chat, part, False))
        except Exhausted:
            raise
        except InputError:
            continue  # it wants content of another kind, or has no such role
    return any(written) if written else None


def render_parts(
    chat: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    unlearned: Collection[int] = (),
    tools: Any = None,
) -> list[Part]:
    """Renders a conversation.

    What the model is to say is what the template marks with {% generation %}, or, where it marks nothing: of each
    assistant's turn, everything from where the model takes over in generation up to the token that ends the turn, calls
    of tools and thoughts included.
    Joined, the parts are what transformers' apply_chat_template renders; a part begins or ends only where supervision
    does, or where a message spells a special token.

    Args:
      chat: the template.
      messages: with role and content, and what else the template may write of them.
      add_generation_prompt: end with what comes before the model's answer.
      unlearned: numbers, from 0, of messages that the model is not to say, whoever says them.
      tools: what may be called, a list of objects.

    Raises:
      Unheard: the template leaves out the tools, or what a message has beside role and content.
      InputError: the template refuses the conversation, or fails; or the messages make it write a special token.
    """
    messages, tools = (_with_texts(chat, value, lambda text: text.translate(_NO_MARKS)) for value in (messages, tools))
    spell = functools.partial(chat.special.sub, rf"{SPELLED}\g<0>{SPELLED_END}")
    marked = _with_texts(chat, messages, spell)
    plain, chat = chat._replace(tools=tools), chat._replace(tools=_with_texts(chat, tools, spell))
    text = _render(chat, marked, add_generation_prompt)
    _refuse_unheard(chat, marked, text, add_generation_prompt)
    unread = [message["role"] for message in messages if message["role"] in chat.deaf_to - {"assistant"}]
    if unread:
        raise InputError(
            f"the model's chat template leaves out what a {unread[0]} message says, of {_describe(messages)}. Drop the "
            "message, mend the template, or use another: 'chat' or 'plain'."
        )
    _refuse_forgery(plain, messages, text, add_generation_prompt)
    if chat.marks_answers:
        text = _unmark(chat, marked, text, add_generation_prompt, unlearned)
    else:
        spans = _answers(chat, marked, text, add_generation_prompt)
        for start, end in reversed([span for i, span in spans.items() if i not in unlearned]):
            text = f"{text[:start]}{ANSWER}{text[start:end]}{ANSWER_END}{text[end:]}"
    parts: list[Part] = []
    supervised = False
    for stretch in re.split(f"([{ANSWER}{ANSWER_END}])", text):
        if stretch in (ANSWER, ANSWER_END):
            supervised = stretch == ANSWER
            continue
        for piece in chat.spelled.split(stretch):
            is_spelled = chat.spelled.fullmatch(piece) is not None
            # A template that cuts a text up may leave a mark alone: what lies beside it isn't joined either.
            for bare in [piece[1:-1]] if is_spelled else re.split(f"[{SPELLED}{SPELLED_END}]", piece):
                if bare:
                    parts.append(Part(bare, is_spelled, supervised))
    return parts


def _with_texts(chat: ChatTemplate, value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON's types with its texts changed, but for roles, and names that hold no special token."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        names = {name: change(name) if chat.special.search(str(name)) else name for name in value}
        return {
            names[name]: each if name == "role" else _with_texts(chat, each, change) for name, each in value.items()
        }
    return [_with_texts(chat, each, change) for each in value] if isinstance(value, list | tuple) else value


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value of JSON's types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain(map(str, value), *map(_texts, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain(*map(_texts, value))


def _refuse_unheard(chat: ChatTemplate, messages: list[Message], text: str, prompting: bool) -> None:
    """Raises Unheard where the template writes the same without the tools, or without what a message has beside its
    content; unless it would write that elsewhere, as templates leave out thoughts before the last question."""
    if chat.tools is not None and _try_render(chat._replace(tools=None), messages, prompting) == text:
        raise _unheard("tools", messages)
    for name in HEARD:
        having = [message for message in messages if name in message and message["role"] != "tool"]
        if having and not any(_is_heard(chat, message, name) for message in having):
            raise _unheard(name, messages)
    answers = [message for message in messages if message["role"] == "tool" and message.get("content")]
    marked = [{**message, "content": HERE} if message in answers else message for message in messages]
    if answers and HERE not in (_try_render(chat, marked, prompting) or HERE):
        raise _unheard("a message of the role 'tool'", messages)


def _is_heard(chat: ChatTemplate, message: Message, name: str) -> bool:
    """Whether the template writes what a message has under a name, in a conversation that ends with the message."""
    before = [{"role": "user", "content": "?"}] if message["role"] == "assistant" else []
    whole = {**message, "content": message.get("content") or ""}
    rest = {key: value for key, value in whole.items() if key != name}
    return _try_render(chat, [*before, whole], False) != _try_render(chat, [*before, rest], False)


def _try_render(chat: ChatTemplate, messages: Sequence[Message], prompting: bool) -> str | None:
    try:
        return _render(chat, messages, prompting)
    except Exhausted:
        raise
    except InputError:
        return None


def _unheard(name: str, messages: Sequence[Message]) -> Unheard:
    what = name if " " in name else repr(name)
    return Unheard(
        name,
        f"has {what}, which the model's chat template leaves out of {_describe(messages)}: the model would never see "
        f"it. Write what it says into the content, drop it or the record, or use a template that writes it.",
    )


def end_of_turn(chat: ChatTemplate) -> str | None:
    """Returns the token that the template writes right after an assistant's last answer, or None."""
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": HERE}]
    try:
        _, _, tail = _render(chat, asked, False).rpartition(HERE)
    except Exhausted:
        raise
    except InputError:
        return None  # it wants messages of another kind
    closing = chat.end.match(tail)
    return closing and closing[0].strip()


def _unmark(chat: ChatTemplate, messages: list[Message], text: str, prompting: bool, unlearned: Collection[int]) -> str:
    """Takes the marks of {% generation %} away from what isn't to be learned."""
    if not unlearned:
        return text
    spans = [span for i, span in _answers(chat, messages, text, prompting).items() if i in unlearned]

    def unmarked(block: re.Match[str]) -> str:
        hit = any(start < block.end() and block.start() < end for start, end in spans)
        return block[0][1:-1] if hit else block[0]

    return re.sub(f"{ANSWER}[^{ANSWER_END}]*{ANSWER_END}", unmarked, text)


def _answers(chat: ChatTemplate, messages: list[Message], text: str, prompting: bool) -> dict[int, tuple[int, int]]:
    """Finds where in `text`, the rendered `messages`, each assistant's turn begins and ends, by number of message."""
    spans: dict[int, tuple[int, int]] = {}
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if message.keys() - {"role", "content"} and (span := _whole_turn(chat, messages[: i + 1], text)):
            spans[i] = span
            continue
        # The same with a mark for this one answer: what differs is the answer, however the template trims or cuts it.
        marked = {"role": "assistant", "content": HERE}  # in place of all that it says, calls of tools too
        other = _render(chat, [*messages[:i], marked, *messages[i + 1 :]], prompting)
        head, mark, tail = other.partition(HERE)
        start, end = len(head), len(text) - len(tail)
        if not (mark and start <= end and text.startswith(head) and text.endswith(tail)):
            if any(name in message for name in HEARD):
                raise InputError(
                    f"it can't be told which part of what the model's chat template writes of {_describe(messages)} is "
                    f"message {i + 1}. Mark the answers in the template with {{% generation %}}."
                )
            start = _common(text, other)
            end = len(text) - _common(text[start:][::-1], other[start:][::-1])
        if start == end:
            continue  # the template leaves this answer out
        prompt = _render(chat, messages[:i], True)
        if not (text.startswith(prompt) and len(prompt) <= start):
            # What was written before reads otherwise now that more has been said, but the turn opens as it did.
            before = _render(chat, messages[:i], False)
            opening = prompt[len(before) :] if prompt.startswith(before) else ""
            at = text.rfind(opening, max((end for _, end in spans.values()), default=0), start) if opening else -1
            prompt = text[:start] if at < 0 else text[: at + len(opening)]
        closing = chat.end.match(text, end)
        spans[i] = (len(prompt), closing.end() if closing else end)
    return spans


def _whole_turn(chat: ChatTemplate, messages: list[Message], text: str) -> tuple[int, int] | None:
    """Where in `text`, the rendering of a conversation that begins with `messages`, the last of these is; None where
    what is said later changes what is written of them."""
    prompt, whole = _try_render(chat, messages[:-1], True), _try_render(chat, messages, False)
    if prompt is None or whole is None or not (text.startswith(whole) and whole.startswith(prompt)):
        return None
    end = len(whole.rstrip())
    return (len(prompt), end) if len(prompt) < end else None


def _common(a: str, b: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _refuse_forgery(chat: ChatTemplate, messages: Sequence[Message], text: str, prompting: bool) -> None:
    """Raises where a template that cuts texts up joins the ends of one to a special token.

    The template must write the same special tokens when no beginning of one in a message is followed by its end.
    """
    if not any(map(chat.beginning.search, _texts([messages, chat.tools]))):
        return
    cut = functools.partial(chat.beginning.sub, rf"\g<0>{SPELLED}")
    broken = _with_texts(chat, messages, cut)
    chat = chat._replace(tools=_with_texts(chat, chat.tools, cut))
    expected = chat.special.findall(_render(chat, broken, prompting))
    written = chat.special.findall(chat.spelled.sub(SPELLED, text))
    if written != expected:
        raise InputError(
            f"the chat template makes special tokens of what {_describe(messages)} says: it writes "
            f"{' '.join(written) or 'none'}, and {' '.join(expected) or 'none'} when they can't be spelled. Change "
            "the text."
        )


def _render(chat: ChatTemplate, messages: Sequence[Message], prompting: bool) -> str:
    shown = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if message.get("content") and (message["role"] if message["role"] != "tool" else "user") in chat.parts_of
        else message
        for message in messages
    ]
    values = {"messages": shown, "tools": chat.tools, "documents": None, "add_generation_prompt": prompting}
    try:
        return template_program.render(chat.source, {**values, **chat.variables})
    except Exhausted as e:
        raise Exhausted(
            f"the model's chat template {e}, to write {_describe(messages)}. Mend it, or take it out of the folder and "
            "use another template: 'chat' or 'plain'."
        ) from e
    except template_program.InvalidTemplate:
        raise
    except Exception as e:  # a template is a program, and can fail in any way
        raise InputError(
            f"the model's chat template can't write {_describe(messages)}: {e}. Change the messages (some templates "
            "take no system message), or use another template: 'chat' or 'plain'."
        ) from e


def _describe(messages: Sequence[Message]) -> str:
    roles = ", ".join(message["role"] for message in messages)
    begins = str(messages[0].get("content") or "").translate(_NO_MARKS)[:40] if messages else ""
    return f"the conversation ({roles}) that begins {begins!r}"


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of `words`, the longest that fits; where there are none, it finds nothing."""
    return re.compile(_any_of(words))


def _any_of(words: Iterable[str]) -> str:
    """A regular expression for any of `words`, the longest that fits; where there are none, one that fits nothing."""
    words = sorted({word for word in words if word.strip()})
    return f"(?:{_factored(words)})" if words else "(?!)"


def _factored(words: Sequence[str]) -> str:
    """Shares beginnings, so that thousands of words are no slower to look for than one; `words` is sorted."""
    branches = [
        re.escape(first) + _factored([word[1:] for word in group])
        for first, group in itertools.groupby((word for word in words if word), key=lambda word: word[0])
    ]
    pattern = "|".join(branches)
    if "" in words:
        return f"(?:{pattern})?" if branches else ""
    return pattern if len(branches) == 1 else f"(?:{pattern})"
