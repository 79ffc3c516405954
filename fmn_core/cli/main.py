"""Forgetting without a graph: `python -m fmn_core forget --model FOLDER --concept cat`, `... evaluate FILE --model
FOLDER`, `... convert FILE --to peft --output FILE`, `... inspect FILE`."""

from __future__ import annotations

import argparse
import logging
import sys

from ..errors import ForgetError
from ..log import say
from ..training.memory import out_of_memory_told, ran_out
from . import commands
from .convert import add_convert
from .settings import add_settings


def show_any_letter() -> None:
    """Lets the streams write letters that the terminal's encoding lacks as their numbers."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a caller reads along
            stream.reconfigure(errors="backslashreplace")


def main(arguments: list[str] | None = None) -> int:
    show_any_letter()
    parser = argparse.ArgumentParser(prog="python -m fmn_core", description=__doc__)
    parser.add_argument(
        "--verbose", action="store_true", help="one line to stderr for each phase: what, how long, its figures"
    )
    parsers = parser.add_subparsers(dest="command", required=True)
    commands.add_forget(parsers)
    commands.add_invert(parsers)
    commands.add_run_config(parsers)
    commands.add_evaluate(parsers)
    commands.add_stack(parsers)
    commands.add_unstack(parsers)
    add_convert(parsers, add_settings)
    commands.add_inspect(parsers)
    commands.add_doctor(parsers)
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("forget_me_not").setLevel(logging.INFO if options.verbose else logging.WARNING)
    try:
        with out_of_memory_told():
            options.run(options)
    except KeyboardInterrupt:
        say("Stopped.", file=sys.stderr)
        return 130
    except (ForgetError, OSError) as error:  # OSError: diffusers' answer to a model that is not there
        say(error, file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not ran_out(error):
            raise
        say(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
