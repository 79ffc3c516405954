"""The options that say which model a command works on, and that model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..host import DiffusionHost
from ..inversion.embedding import add_embedding


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a folder or name of a diffusers model, or a .safetensors checkpoint")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")


def add_embeddings(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--embedding", type=Path, action="append", default=[], help=help)


def cache_folder() -> Path:
    """Where the command line keeps what only saves time: FMN_CACHE, or the user's cache."""
    return Path(
        os.environ.get("FMN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "forget-me-not")
    ).expanduser()


def open_host(options: argparse.Namespace) -> DiffusionHost:
    """The model that the options name, with their learned words, where the command takes any; raises ForgetError where a
    file cannot be loaded."""
    from ..hosts.diffusers.model import DiffusersHost
    from ..hosts.diffusers.pipeline import load_pipeline

    host = DiffusersHost(load_pipeline(options.model, options.device), cache=cache_folder())
    for file in getattr(options, "embedding", ()):
        add_embedding(host, file.stem, file)
    return host
