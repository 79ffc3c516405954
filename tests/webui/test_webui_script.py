"""The webuis' script and API, each on its stand-in and in its Gradio, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT
from webui.ui.gradio_page import VERSIONS, environment


@pytest.mark.parametrize("flavour", VERSIONS)
def test_the_checks_pass_in_the_webuis_process(comfyui, flavour):
    plugins = [word for name in ("webui.ui.fixtures", "webui.ui.drawing", "no:cacheprovider") for word in ("-p", name)]
    options = ["-q", *plugins, "--import-mode=importlib", "--noconftest"]
    checks = [f"tests/webui/ui/check_{name}.py" for name in ("script", "refusals", "maps", "api", "states")]
    command = [sys.executable, "-m", "pytest", *options, *checks]
    done = subprocess.run(command, cwd=ROOT, env=environment(flavour, comfyui), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
