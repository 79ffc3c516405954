"""An installed webui, started with the extension in it: FMN_A1111_DIR or FMN_FORGE_DIR names its folder, in which there is
a checkpoint of SD1.x, SD2.x or SDXL; FMN_A1111_PYTHON or FMN_FORGE_PYTHON an interpreter that is not in its venv."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .gradio_page import ROOT, WebuiPage, free_port

NAMES = {"webui": "A1111", "forge": "FORGE"}
OFFLINE = ["--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-version-check", "--skip-python-version-check"]
CPU = {"webui": ["--use-cpu", "all", "--no-half", "--precision", "full"], "forge": ["--always-cpu", "--all-in-fp32"]}
START = 300  # seconds


def installed_folder(flavour: str) -> Path:
    """The webui's folder; skips where none is named."""
    name = f"FMN_{NAMES[flavour]}_DIR"
    if not os.environ.get(name):
        pytest.skip(f"{name} names no installed webui, with a checkpoint in it: the test in the real one is left out")
    return Path(os.environ[name]).resolve()


class InstalledWebui(WebuiPage):
    """An installed webui on the CPU, without its page, with an empty LoRA folder."""

    def __init__(self, flavour: str, loras: Path):
        self.folder, self.port, self.loras = installed_folder(flavour), free_port(), loras
        self.url, self.log = f"http://127.0.0.1:{self.port}", loras.parent / f"{loras.name}.log"
        loras.mkdir(exist_ok=True)
        own = self.folder / ("venv/Scripts/python.exe" if os.name == "nt" else "venv/bin/python")
        python = os.environ.get(f"FMN_{NAMES[flavour]}_PYTHON") or (own if own.exists() else sys.executable)
        self.link = self.folder / "extensions/forget-me-not"
        self.linked = not os.path.lexists(self.link)
        if self.linked:
            self.link.symlink_to(ROOT, target_is_directory=True)
        command = [str(python), "launch.py", *OFFLINE, *CPU[flavour], "--no-download-sd-model", "--api", "--nowebui"]
        command += ["--server-name", "127.0.0.1", "--port", str(self.port), "--lora-dir", str(loras)]
        with self.log.open("w") as log:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self):
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.answers() and self.ask("/fmn/jobs")[0] == 200:
                return self
            time.sleep(0.5)
        self.__exit__()
        raise AssertionError(self.log.read_text()[-6000:])

    def __exit__(self, *_):
        self.process.kill()  # the webui waits for its threads when it is asked to end
        self.process.wait(20)
        if self.linked:
            self.link.unlink()
