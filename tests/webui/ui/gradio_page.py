"""The Gradio of each webui, in folders beside the tests' environment, and a page that runs in one."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from waiting import while_changing

ROOT = Path(__file__).resolve().parents[3]
VERSIONS = {"webui": "3", "forge": "4"}  # as AUTOMATIC1111's 1.10.1 and Forge pin it
STANDINS = {"webui": ["tests/webui/a1111"], "forge": ["tests/webui/forge", "tests/webui/a1111"]}


def gradio_folder(flavour: str) -> Path:
    """Where `python install.py test` put the Gradio of that webui; skips where it is not."""
    version = VERSIONS[flavour]
    folder = Path(os.environ.get(f"FMN_GRADIO{version}") or ROOT / f".venv/gradio{version}")
    if not (folder / "gradio").is_dir():
        pytest.skip(
            f"Gradio {version} is not in {folder}: `python install.py test` puts it there (or set FMN_GRADIO{version})"
        )
    return folder


def environment(flavour: str, comfyui: Path) -> dict[str, str]:
    """Gradio's own packages come first, then the webui's stand-in, and torch from the tests' environment."""
    path = [gradio_folder(flavour), *(ROOT / folder for folder in STANDINS[flavour]), ROOT / "tests", ROOT]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "FMN_COMFYUI": str(comfyui)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class WebuiPage:
    """A running page with the extension, and its API."""

    def __init__(self, flavour: str, comfyui: Path, loras: Path, *flags: str):
        self.port = free_port()
        self.url, self.loras, self.log = f"http://127.0.0.1:{self.port}", loras, loras.parent / f"{loras.name}.log"
        loras.mkdir(exist_ok=True)
        more = ["--forge"] if flavour == "forge" else []
        command = [sys.executable, "tests/webui/ui/host_page.py", str(self.port), str(loras), *more, *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(flavour, comfyui), stdout=log, stderr=subprocess.STDOUT
            )

    def __enter__(self):
        for _ in while_changing(self.log.read_text):
            if self.process.poll() is not None:
                break
            if "ready" in self.log.read_text() and self.answers():
                return self
        self.__exit__()
        raise AssertionError(self.log.read_text()[-4000:])

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)

    def answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        except OSError:
            return False

    def ask(self, path: str, body=None, *, user: str = "") -> tuple[int, object]:
        """Status and answer of a GET, or of a POST of JSON where there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        if user:
            request.add_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            return error.code, json.loads(text) if text.startswith(("{", "[")) else text

    def finished(self, id: str) -> dict:
        """The job, once it is over."""
        job = {}

        def told():
            _, now = self.ask(f"/fmn/jobs/{id}")
            job.update(now)
            return now["state"], now["step"]

        for state, _ in while_changing(told):
            if state in ("done", "stopped", "failed"):
                return job
        raise AssertionError(f"{job}\n{self.log.read_text()[-4000:]}")
