"""A model's own chat template: what it writes around a conversation, and what of that the model is to say.

A template is a Jinja program that came with the model, from whoever made it. It runs in Jinja's sandbox and sees what
transformers shows it (https://huggingface.co/docs/transformers/chat_templating), save for the date: `strftime_now` says
26 July 2024 on every day, so that equal conversations are equal tokens, in training, in its cache and in generation.
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from research.errors import InputError

Message = Mapping[str, str]

_ROLES = ("system", "user", "assistant")
# Marks in a rendered text. Unicode keeps these code points for use inside a program; texts are rid of them.
_SPELLED, _SPELLED_END, _ANSWER, _ANSWER_END, _HERE = map(chr, range(0xFDD0, 0xFDD5))
_NO_MARKS = dict.fromkeys(range(0xFDD0, 0xFDD5))
_NOW = datetime.datetime(2024, 7, 26)


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


def make_template(
    source: str, variables: Mapping[str, str], special: Sequence[str], added: Sequence[str]
) -> ChatTemplate:
    """Args: the source and variables; the tokenizer's special tokens; all tokens that it takes whole."""
    specials = _any_of(special)
    chat = ChatTemplate(
        source,
        variables,
        special=re.compile(specials),
        spelled=re.compile(f"({_SPELLED}{specials}{_SPELLED_END})"),
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
    messages = [{"role": each, "content": _HERE if each == role else "?"} for each in roles]
    written = []
    for part in (messages, messages[: roles.index(role) + 1]):
        try:
            written.append(_HERE in _render(chat, part, False))
        except InputError:
            continue  # it wants content of another kind, or has no such role
    return any(written) if written else None


def render_parts(
    chat: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    unlearned: Collection[int] = (),
) -> list[Part]:
    """Renders a conversation.

    What the model is to say is what the template marks with {% generation %}, or, where it marks nothing: of each
    assistant's turn, everything from where the model takes over in generation up to the token that ends the turn.
    Joined, the parts are what transformers' apply_chat_template renders; a part begins or ends only where supervision
    does, or where a message spells a special token.

    Args:
      chat: the template.
      messages: with role and content.
      add_generation_prompt: end with what comes before the model's answer.
      unlearned: numbers, from 0, of messages that the model is not to say, whoever says them.

    Raises:
      InputError: the template refuses the conversation, or fails; or the messages make it write a special token.
    """
    messages = [{**message, "content": message["content"].translate(_NO_MARKS)} for message in messages]
    marked = [
        {**message, "content": chat.special.sub(rf"{_SPELLED}\g<0>{_SPELLED_END}", message["content"])}
        for message in messages
    ]
    text = _render(chat, marked, add_generation_prompt)
    unread = [message["role"] for message in messages if message["role"] in chat.deaf_to - {"assistant"}]
    if unread:
        raise InputError(
            f"the model's chat template leaves out what a {unread[0]} message says, of {_describe(messages)}. Drop the "
            "message, mend the template, or use another: 'chat' or 'plain'."
        )
    _refuse_forgery(chat, messages, text, add_generation_prompt)
    if chat.marks_answers:
        text = _unmark(chat, marked, text, add_generation_prompt, unlearned)
    else:
        spans = _answers(chat, marked, text, add_generation_prompt)
        for start, end in reversed([span for i, span in spans.items() if i not in unlearned]):
            text = f"{text[:start]}{_ANSWER}{text[start:end]}{_ANSWER_END}{text[end:]}"
    parts: list[Part] = []
    supervised = False
    for stretch in re.split(f"([{_ANSWER}{_ANSWER_END}])", text):
        if stretch in (_ANSWER, _ANSWER_END):
            supervised = stretch == _ANSWER
            continue
        for piece in chat.spelled.split(stretch):
            is_spelled = chat.spelled.fullmatch(piece) is not None
            # A template that cuts a text up may leave a mark alone: what lies beside it isn't joined either.
            for bare in [piece[1:-1]] if is_spelled else re.split(f"[{_SPELLED}{_SPELLED_END}]", piece):
                if bare:
                    parts.append(Part(bare, is_spelled, supervised))
    return parts


def end_of_turn(chat: ChatTemplate) -> str | None:
    """Returns the token that the template writes right after an assistant's last answer, or None."""
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _HERE}]
    try:
        _, _, tail = _render(chat, asked, False).rpartition(_HERE)
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

    return re.sub(f"{_ANSWER}[^{_ANSWER_END}]*{_ANSWER_END}", unmarked, text)


def _answers(chat: ChatTemplate, messages: list[Message], text: str, prompting: bool) -> dict[int, tuple[int, int]]:
    """Finds where in `text`, the rendered `messages`, each assistant's turn begins and ends, by number of message."""
    spans: dict[int, tuple[int, int]] = {}
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # The same with a mark for this one answer: what differs is the answer, however the template trims or cuts it.
        other = _render(chat, [*messages[:i], {**message, "content": _HERE}, *messages[i + 1 :]], prompting)
        head, mark, tail = other.partition(_HERE)
        start, end = len(head), len(text) - len(tail)
        if not (mark and start <= end and text.startswith(head) and text.endswith(tail)):
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


def _common(a: str, b: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _refuse_forgery(chat: ChatTemplate, messages: Sequence[Message], text: str, prompting: bool) -> None:
    """Raises where a template that cuts texts up joins the ends of one to a special token.

    The template must write the same special tokens when no beginning of one in a message is followed by its end.
    """
    if not any(chat.beginning.search(message["content"]) for message in messages):
        return
    broken = [
        {**message, "content": chat.beginning.sub(rf"\g<0>{_SPELLED}", message["content"])} for message in messages
    ]
    expected = chat.special.findall(_render(chat, broken, prompting))
    written = chat.special.findall(chat.spelled.sub(_SPELLED, text))
    if written != expected:
        raise InputError(
            f"the chat template makes special tokens of what {_describe(messages)} says: it writes "
            f"{' '.join(written) or 'none'}, and {' '.join(expected) or 'none'} when they can't be spelled. Change "
            "the text."
        )


def _render(chat: ChatTemplate, messages: Sequence[Message], prompting: bool) -> str:
    template = _compile(chat.source)
    shown = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if message["role"] in chat.parts_of
        else message
        for message in messages
    ]
    try:
        return template.render(
            messages=shown, tools=None, documents=None, add_generation_prompt=prompting, **chat.variables
        )
    except Exception as e:  # a template is a program, and can fail in any way
        raise InputError(
            f"the model's chat template can't write {_describe(messages)}: {e}. Change the messages (some templates "
            "take no system message), or use another template: 'chat' or 'plain'."
        ) from e


def _describe(messages: Sequence[Message]) -> str:
    roles = ", ".join(message["role"] for message in messages)
    begins = messages[0]["content"].translate(_NO_MARKS)[:40] if messages else ""
    return f"the conversation ({roles}) that begins {begins!r}"


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _NOW.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise InputError(f"the chat template is no valid Jinja: line {e.lineno}: {e.message}. Mend it.") from e


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: writes its body, between marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_ANSWER}{caller()}{_ANSWER_END}"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes what HTML would read."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
