"""Rows that need no model: each says what its prompt said, as serving.rows.Rows would."""

import time

from research.serving.rows import STEPS, Token


class FakeRows:
    """See serving.rows.Rows. Answers are the prompt's bytes, then `end`.

    Attributes:
      seconds: how long a step takes.
      broken: raised by the next step, if it is set.
      admitted: every ask that got a row.
    """

    def __init__(self, count, longest, end):
        self.count, self.longest, self.end = count, longest, end
        self.seconds, self.broken, self.admitted, self.most = 0.0, None, [], 0
        self.clear()

    def clear(self):
        self._left, self._asks, self._cancelled = {}, {}, set()

    @property
    def used(self):
        return len(self._asks)

    @property
    def free(self):
        return self.count - self.used

    def admit(self, ask):
        row = next(i for i in range(self.count) if i not in self._asks)
        self.admitted.append(ask)
        self._asks[row] = ask
        self._left[row] = [*(i for i in ask.prompt if i < 256), self.end][: ask.most]
        self.most = max(self.most, self.used)
        return row

    def cancel(self, row):
        self._cancelled.add(row)

    def step(self):
        time.sleep(self.seconds)
        if self.broken:
            error, self.broken = self.broken, None
            raise error
        for row in self._cancelled:
            del self._asks[row]
        self._cancelled.clear()
        out = {}
        for row, ask in list(self._asks.items()):
            new, self._left[row] = self._left[row][:STEPS], self._left[row][STEPS:]
            likeliest = ((new[0], -0.5), (65, -1e30)) if ask.shows else ()
            end = "" if self._left[row] else "stop" if new[-1] == self.end else "length"
            if end:
                del self._asks[row]
            out[row] = ([Token(i, -0.5, likeliest) for i in new], end)
        return out
