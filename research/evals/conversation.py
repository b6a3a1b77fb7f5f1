"""A conversation with a model on the terminal: turns, and commands that begin with a slash."""

import dataclasses
import os
import sys
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

from research import files
from research.errors import InputError, did_you_mean, printable
from research.evals.line_reader import SignOfLife
from research.evals.prompts import TooLong

Message = Mapping[str, str]
# (messages, the last by the user; number of the turn; temperature) -> the answer in pieces; returns whether it was cut.
Reply = Callable[[list[Message], int, float], Generator[str, None, bool]]

_HINT = "/help lists what can be done here; Ctrl-C stops an answer, Ctrl-D leaves"


@dataclasses.dataclass(frozen=True)
class Talk:
    """A conversation so far.

    Attributes:
      messages: the user's and the model's, in turn.
      system: the message before them; "" for none.
      temperature: of the draws.
      turn: how many answers there were, those that were dropped too: each is drawn by its number.
      forgotten: so many of the first messages aren't shown to the model, for want of room.
      ended: the user has left.
    """

    messages: tuple[Message, ...] = ()
    system: str = ""
    temperature: float = 0.0
    turn: int = 0
    forgotten: int = 0
    ended: bool = False

    @property
    def whole(self) -> list[Message]:
        """All messages, the system's first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    @property
    def shown(self) -> list[Message]:
        """What the model is shown of them."""
        return dataclasses.replace(self, messages=self.messages[self.forgotten :]).whole


class Speaker(NamedTuple):
    """Who answers: `reply`, and the most tokens that an answer gets."""

    reply: Reply
    most: int


def chat(reply: Reply, read: Callable[[], str], talk: Talk | None = None, most: int = 0) -> None:
    """Holds a conversation.

    Args:
      reply: answers.
      read: returns the user's next turn, and raises EOFError after the last.
      talk: what there is already.
      most: how many tokens an answer gets at most, which a line says of one that was cut.
    """
    _say(_HINT)
    talk, speaker = talk or Talk(), Speaker(reply, most)
    while not talk.ended:
        try:
            said = read()
        except EOFError:
            return
        try:
            if said.startswith("/"):
                talk = _do(talk, said, speaker)
            elif said.strip():
                message = {"role": "user", "content": said.strip()}
                talk = _ask(dataclasses.replace(talk, messages=(*talk.messages, message)), speaker)
        except InputError as error:
            _say(f"error: {error}")


def _ask(talk: Talk, speaker: Speaker) -> Talk:
    """Has the last message answered. What there is no room for is forgotten, from the beginning.

    Raises:
      InputError: the model can't answer.
    """
    before = talk.forgotten
    while True:
        try:
            answer, cut = _show_answer(talk, speaker.reply)
            break
        except TooLong:
            if len(talk.messages) - talk.forgotten < 2:
                raise
            talk = dataclasses.replace(talk, forgotten=_next_question(talk))
    if talk.forgotten > before:
        _say(f"(there is no room for all: the first {talk.forgotten} messages are forgotten)")
    if cut:
        _say(f"(cut at {speaker.most} tokens: --max_new_tokens)")
    talk = dataclasses.replace(talk, turn=talk.turn + 1)
    if not answer.strip():
        _say("(an empty answer: the question is forgotten)")
        return dataclasses.replace(talk, messages=talk.messages[:-1], forgotten=min(talk.forgotten, before))
    return dataclasses.replace(talk, messages=(*talk.messages, {"role": "assistant", "content": answer}))


def _next_question(talk: Talk) -> int:
    """The number of the first message by the user after those that are forgotten, and the one after these."""
    numbers = range(talk.forgotten + 1, len(talk.messages))
    return next(i for i in numbers if talk.messages[i]["role"] == "user")


def _show_answer(talk: Talk, reply: Reply) -> tuple[str, bool]:
    """Prints an answer as it comes; returns it, and whether it was cut off for its length."""
    answer, pieces = "", reply(talk.shown, talk.turn, talk.temperature)
    try:
        with SignOfLife("reading, and compiling what is new,") as sign:
            while True:
                piece = next(pieces)
                sign.end()
                print(printable(piece), end="", flush=True)
                answer += piece
    except StopIteration as end:
        cut = bool(end.value)
    except KeyboardInterrupt:
        cut = False  # what has come so far is the answer
    print(flush=True)
    return answer, cut


def _do(talk: Talk, said: str, speaker: Speaker) -> Talk:
    """What a command makes of the conversation.

    Raises:
      InputError: there is no such command, or it can't be done.
    """
    name, _, argument = said.removeprefix("/").partition(" ")
    name = name.strip()
    if name not in _COMMANDS:
        hint = did_you_mean(f"/{name}", [f"/{known}" for known in _COMMANDS])
        raise InputError(f"/{name}: no such command.{hint} A space before the slash makes it a message.")
    return _COMMANDS[name].work(talk, argument.strip(), speaker)


def _help(talk: Talk, argument: str, speaker: Speaker) -> Talk:
    width = max(len(command.spelling) for command in _COMMANDS.values()) + 2
    _say("\n".join(f"{command.spelling:<{width}}{command.help}" for command in _COMMANDS.values()))
    return talk


def _set_system(talk: Talk, argument: str, speaker: Speaker) -> Talk:
    talk = dataclasses.replace(talk, system=argument)
    _say(f"system message: {argument}" if argument else "no system message")
    return talk


def _set_temperature(talk: Talk, argument: str, speaker: Speaker) -> Talk:
    try:
        value = float(argument)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise InputError(f"/temperature {argument}: must be a number from 0 to 100; it is {talk.temperature:g}.")
    _say(f"temperature {value:g}")
    return dataclasses.replace(talk, temperature=value)


def _retry(talk: Talk, argument: str, speaker: Speaker) -> Talk:
    last = next((i for i in reversed(range(len(talk.messages))) if talk.messages[i]["role"] == "user"), None)
    if last is None:
        raise InputError("/retry: nothing was asked yet.")
    if not talk.temperature:
        _say("(nothing is drawn at temperature 0, and a whole answer would be the same: /temperature 0.7)")
    forgotten = min(talk.forgotten, last)
    return _ask(dataclasses.replace(talk, messages=talk.messages[: last + 1], forgotten=forgotten), speaker)


def _reset(talk: Talk, argument: str, speaker: Speaker) -> Talk:
    return dataclasses.replace(talk, messages=(), forgotten=0)


def _save(talk: Talk, argument: str, speaker: Speaker) -> Talk:
    path = _path("save", argument)
    if os.path.exists(path):
        raise InputError(f"/save {argument}: is there already. Name another file.")
    try:
        files.write_bytes(path, files.json_line({"messages": talk.whole}))
    except OSError as error:
        raise InputError(f"/save {argument}: can't be written ({error.strerror}).") from error
    _say(f"{len(talk.whole)} messages: {path}")
    return talk


def _load(talk: Talk, argument: str, speaker: Speaker) -> Talk:
    path = _path("load", argument)
    messages = files.read_json(path, name=f"/load {argument}", remedy="Name a file of /save.").get("messages")
    if not _is_conversation(messages):
        raise InputError(f'/load {argument}: holds no {{"messages": [{{"role": ..., "content": ...}}, ...]}} of texts.')
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    messages = messages[1:] if system else messages
    for message in messages:
        _say(f"{'> ' if message['role'] == 'user' else ''}{message['content']}")
    return dataclasses.replace(talk, messages=tuple(messages), system=system, forgotten=0)


def _is_conversation(messages: Any) -> bool:
    """Whether it is a list of messages by the user and the model in turn, perhaps after one of the system's."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    if not all(isinstance(message.get("content"), str) and message["content"] for message in messages):
        return False
    roles = [message.get("role") for message in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    return roles == [("user", "assistant")[i % 2] for i in range(len(roles))]


def _path(command: str, argument: str) -> str:
    if not argument:
        raise InputError(f"/{command}: names no file. Write /{command} FILE.")
    return os.path.expanduser(argument)


def _quit(talk: Talk, argument: str, speaker: Speaker) -> Talk:
    return dataclasses.replace(talk, ended=True)


class _Command(NamedTuple):
    """How a command is written, what it does in a few words, and its work."""

    spelling: str
    help: str
    work: Callable[[Talk, str, Speaker], Talk]


_COMMANDS = {
    "system": _Command("/system [TEXT]", "begin the conversation with this system message, or with none", _set_system),
    "temperature": _Command("/temperature X", "draw at this temperature; 0 takes the likeliest", _set_temperature),
    "retry": _Command("/retry", "answer the last question anew", _retry),
    "save": _Command("/save FILE", "write the conversation to a file, as a record of messages", _save),
    "load": _Command("/load FILE", "go on with a conversation that was saved", _load),
    "reset": _Command("/reset", "forget the conversation", _reset),
    "help": _Command("/help", "this list", _help),
    "quit": _Command("/quit", "leave, as Ctrl-D does", _quit),
}


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
