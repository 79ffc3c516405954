"""The one exception users are meant to read."""


class ForgetError(ValueError):
    """Something a user can mend: the message says what is wrong and what to do about it."""
