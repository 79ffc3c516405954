"""The one exception users are meant to read."""


class ForgetError(ValueError):
    """Something a user can mend: the message says what is wrong and what to do about it."""


def brief(said: object) -> str:
    """What a file or a library says, in a sentence of ours: no more than fits there."""
    text = str(said)
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]}"
