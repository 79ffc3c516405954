"""Bodies of requests: read no further than there is room for, and made into plain values."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fmn_core.config import require_text
from fmn_core.errors import ForgetError
from fmn_core.text.bounds import texts_in

from .limits import MOST_BODY, MOST_RECEIVED, MOST_REQUEST_VALUES, MOST_REQUESTS, Busy, TooLarge

if TYPE_CHECKING:
    from fastapi import Request

MOST_REQUEST_DIGITS = 400  # of a number; more are more than any float


class NotJSON(ForgetError):
    """A body that says to be something else: a page of another server's may send that unasked, and JSON not."""

    status = 415


class Receiver:
    """Takes bodies in as long as those that are held together leave room; for one event loop."""

    def __init__(self):
        self.requests = self.held = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """Context in which a request's body is held; raises TooLarge, Busy or NotJSON as soon as that is known."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not re.fullmatch(r"application/([\w.-]+\+)?json", kind):
            raise NotJSON("The request has to be a JSON object, with the header Content-Type: application/json.")
        if int(request.headers.get("content-length", 0)) > MOST_BODY:
            raise too_large()
        if self.requests >= MOST_REQUESTS:
            raise busy()
        body = bytearray()
        self.requests += 1
        try:
            async for chunk in request.stream():
                body += chunk
                self.held += len(chunk)
                if len(body) > MOST_BODY:
                    raise too_large()
                if self.held > MOST_RECEIVED:
                    raise busy()
            yield bytes(body)
        finally:
            self.requests -= 1
            self.held -= len(body)


RECEIVER = Receiver()


def too_large() -> TooLarge:
    return TooLarge(f"The request has more than {MOST_BODY >> 20} MB: send fewer or smaller pictures.")


def busy() -> Busy:
    return Busy("The server has as many requests as it has room for: try again in a moment.")


def parsed(body: bytes) -> dict:
    """The JSON object of a body, in which every text is whole and every number is one; raises ForgetError for all else."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MOST_REQUEST_VALUES:
        raise TooLarge(f"The request has more than {MOST_REQUEST_VALUES:,} values: send fewer.")
    try:
        value = json.loads(body.decode(), parse_constant=no_number, parse_int=whole_number)
        require_text(*texts_in(value))
    except ForgetError:
        raise
    except (ValueError, RecursionError):
        raise ForgetError("The request is not JSON in UTF-8: send a JSON object.") from None
    if not isinstance(value, dict):
        raise ForgetError('The request has to be a JSON object, such as {"concept": "cat"}.')
    return value


def no_number(constant: str):
    raise ForgetError(f"{constant} is not a number: send one, or leave that value out.")


def whole_number(digits: str) -> int:
    if len(digits) > MOST_REQUEST_DIGITS:
        raise ForgetError(f"A number has {len(digits):,} digits: send one that is smaller.")
    return int(digits)
