"""The one exception users are meant to read."""

from .log import displayable


class ForgetError(ValueError):
    """Something a user can mend: the message says what is wrong and what to do about it.

    It may quote a file or a request, and hosts write it to logs, terminals and sockets: it is made displayable here.
    """

    def __init__(self, message: object):
        super().__init__(displayable(message))


def brief(value: object) -> str:
    """What a file or a library says, in a sentence of ours: no more than fits there."""
    text = str(value)
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]}"
