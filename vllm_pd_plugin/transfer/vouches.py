"""Per attempt: how far a peer has said that what was read from it is valid; pure."""

from __future__ import annotations

_INTERVAL_S = 0.5
"""How often it is asked, so that a later failure keeps what has arrived."""


class Vouches:
    """At most one question is open.

    valid_tokens: how many of the prompt's first tokens were vouched for.
    next_at: the earliest time of the next question.
    """

    def __init__(self, began_at: float) -> None:
        self.valid_tokens = 0
        self.next_at = began_at + _INTERVAL_S
        self._asked_tokens = 0

    def begin(self) -> None:
        """What is there is written anew."""
        self.valid_tokens = self._asked_tokens = 0

    def wants(self, arrived_tokens: int) -> bool:
        """Whether something has arrived that was not asked for, and no answer is due."""
        return self.valid_tokens == self._asked_tokens < arrived_tokens

    def ask(self, arrived_tokens: int, now: float) -> bool:
        """Say whether to ask now; the question is open then."""
        if now < self.next_at or not self.wants(arrived_tokens):
            return False
        self._asked_tokens, self.next_at = arrived_tokens, now + _INTERVAL_S
        return True

    def granted(self) -> None:
        """The answer has come."""
        self.valid_tokens = self._asked_tokens
