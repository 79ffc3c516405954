"""How much strangers may ask of the server at once, and the refusals of what is more."""

from __future__ import annotations

from fmn_core.errors import ForgetError

MOST_BODY = 64 << 20  # bytes of a request: some forty photographs as base64
MOST_RECEIVED = 2 * MOST_BODY  # of all requests that are being read or worked at
MOST_REQUESTS = 8  # that are
MOST_REQUEST_VALUES = 250_000  # commas and brackets of a request, each of which may become an object of Python's
MOST_REQUEST_TEXT = 100_000  # letters of one text
MOST_PICTURES = 200  # of a request, masks among them
MOST_READ = 1_000_000_000  # pixels of these as they come, which take seconds to decode
MOST_KEPT = 512 << 20  # bytes of these at the size in which a job keeps them
MOST_PATCHES = 100  # patches of a stack
MOST_JOBS = 100  # that wait or run
MOST_WAITING = 1 << 30  # bytes of the pictures of all of these


class TooLarge(ForgetError):
    """More than the server takes in one request."""

    status = 413


class Busy(ForgetError):
    """More than the server takes now: later it may."""

    status = 429
