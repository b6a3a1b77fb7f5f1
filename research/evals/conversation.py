"""A conversation with a model on the terminal."""

import sys
from collections.abc import Callable, Iterator

from research.errors import InputError, printable

Messages = list[dict[str, str]]
Reply = Callable[[Messages, int], Iterator[str]]

_HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(reply: Reply, read: Callable[[], str]) -> None:
    """Holds a conversation.

    Args:
      reply: (messages so far, the last by the user; number of the turn) -> the answer, in pieces.
      read: returns the user's next line, and raises EOFError after the last.
    """
    print(_HELP, file=sys.stderr)
    messages: Messages = []
    turn = 0
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = read().strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages = []
        elif line.startswith("/"):
            print(_HELP, file=sys.stderr)
        elif line:
            question = [*messages, {"role": "user", "content": line}]
            answer = _show_answer(reply, question, turn)
            if answer is None:
                continue
            turn += 1
            if answer.strip():
                messages = [*question, {"role": "assistant", "content": answer}]
            else:
                print("(an empty answer: the question is forgotten)", file=sys.stderr)


def _show_answer(reply: Reply, messages: Messages, turn: int) -> str | None:
    """Prints an answer as it comes, and returns it; None where the model can't answer."""
    answer = ""
    try:
        for piece in reply(messages, turn):
            print(printable(piece), end="", flush=True)
            answer += piece
    except InputError as error:
        print(f"error: {printable(str(error))} /reset forgets the conversation.", file=sys.stderr)
        return None
    except KeyboardInterrupt:
        pass  # what has come so far is the answer
    print(flush=True)
    return answer
