"""A real webui, installed by its user, as a server on a loopback port with this pack in it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUIETLY = ["--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-version-check", "--skip-python-version-check"]
STALLED = 300  # seconds in which a server that starts says nothing


@dataclass(frozen=True)
class Webui:
    """One of the webuis: the environment variable that names its folder, its name, its flags for a CPU, its settings."""

    variable: str
    name: str
    flags: tuple[str, ...]
    settings: dict[str, str] = field(default_factory=dict)


NO_DOWNLOAD = "--no-download-sd-model"  # neo downloads none, and refuses flags that it does not know
FORGE_ON_CPU = ("--skip-install", "--always-cpu", "--all-in-fp32", NO_DOWNLOAD)
WEBUIS = {
    "a1111": Webui(
        "FMN_A1111_DIR", "AUTOMATIC1111 webui (1.10.1)",
        ("--use-cpu", "all", "--no-half", "--precision", "full", NO_DOWNLOAD),
    ),
    "forge": Webui("FMN_FORGE_DIR", "Forge", FORGE_ON_CPU),
    # reForge fetches a model for any other kind of preview.
    "reforge": Webui("FMN_REFORGE_DIR", "reForge", FORGE_ON_CPU, {"show_progress_type": "Approx cheap"}),
    "neo": Webui("FMN_NEO_DIR", "Forge neo", ("--skip-install", "--cpu", "--force-fp32")),
}  # fmt: skip


class ServerError(RuntimeError):
    """The server did not start, or refused: the message is the server's own."""


class WebuiServer:
    """The webui in `folder` with all that it writes below `work`, as a context manager.

    Models are looked for in work/models/Stable-diffusion and work/models/Lora; the pack is the only extension beside the
    built-in ones. With `page` the page is served too, else the API alone.
    """

    def __init__(self, kind: str, folder: Path, work: Path, page: bool = False):
        self.kind, self.folder, self.work = kind, folder, work
        self.log = work / "webui.log"
        self.flags = ["--api", *([] if page else ["--nowebui"]), *WEBUIS[kind].flags, *QUIETLY]

    def __enter__(self) -> WebuiServer:
        (self.work / "models/Stable-diffusion").mkdir(parents=True, exist_ok=True)
        (self.work / "extensions").mkdir(exist_ok=True)
        if WEBUIS[self.kind].settings:  # neo takes a file without its own entries for that of an old version
            (self.work / "config.json").write_text(json.dumps(WEBUIS[self.kind].settings))
        link = self.work / "extensions/forget-me-not"
        if not link.exists():
            link.symlink_to(ROOT, target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        own = next((p for p in ("venv/bin/python", "venv/Scripts/python.exe") if (self.folder / p).exists()), None)
        python = str(self.folder / own) if own else sys.executable
        places = ["--data-dir", str(self.work), "--server-name", "127.0.0.1", "--port", str(port)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}  # the .yaml names the pack's TAESD
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [python, "launch.py", *self.flags, *places], cwd=self.folder, stdout=log, stderr=log, env=environment
            )
        try:
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait(self) -> None:
        """Returns when the API answers; raises ServerError with the end of the log where it stops before, or says nothing
        for long."""
        said, since = -1, time.monotonic()
        while time.monotonic() - since < STALLED:
            if self.process.poll() is not None:
                raise ServerError(f"The webui stopped while starting:\n{self.log.read_text()[-3000:]}")
            if (now := self.log.stat().st_size) != said:
                said, since = now, time.monotonic()
            try:
                self.get("sdapi/v1/sd-models")  # not cmd-flags, of which Forge makes an error: the port is no text
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        raise ServerError(f"The webui said nothing for {STALLED} s and does not answer:\n{self.log.read_text()[-3000:]}")

    def get(self, path: str):
        """The JSON at a path of the API."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=60) as response:
            return json.loads(response.read())

    def post(self, path: str, **values):
        """What the API answers to these values; raises ServerError with its words where it refuses them."""
        request = urllib.request.Request(
            f"{self.url}/{path}", json.dumps(values).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise ServerError(f"{error.code}: {error.read().decode()}") from error


def installed(kind: str) -> Path:
    """The folder of an installed webui; skips a test where its environment variable names none."""
    webui = WEBUIS[kind]
    folder = Path(os.environ.get(webui.variable) or "")
    if not os.environ.get(webui.variable) or not (folder / "launch.py").exists():
        pytest.skip(f"{webui.variable} names no installed {webui.name}: set it to the folder that holds its launch.py.")
    return folder.resolve()
