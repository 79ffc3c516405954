"""Every command in the README, run."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, comfyui, tmp_path):
    words = shlex.split(command)
    assert words[:2] == ["python", "install.py"]
    run = [sys.executable, *words[1:]]
    if words[2:] == ["test"]:  # this very run, so only that it reaches pytest
        run += ["--collect-only", "-q", "tests/unit/test_losses.py"]
    elif words[2:] == ["demo"]:
        run += ["--quick", "--output", str(tmp_path)]  # fewer pictures, and all else
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    if words[2:] == ["demo"]:
        check_demo(tmp_path)


def test_the_demo_takes_an_installed_comfyui_another_concept_and_serves(comfyui, tmp_path):
    """`--comfyui`, `--python`, `--serve`, `--quick` and `--concept rose`, in one run."""
    options = [
        "--concept",
        "rose",
        "--quick",
        "--comfyui",
        str(comfyui),
        "--python",
        sys.executable,
        "--serve",
        "--output",
        str(tmp_path),
    ]
    command = [sys.executable, "install.py", "demo", *options]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl+C
    )  # fmt: skip
    try:
        url = next(re.search(r"Open (\S+)", line)[1] for line in process.stdout if line.startswith("Open "))
        base, query = url.split("/?")
        assert query == "template=forget-a-concept&source=forget-me-not"
        with urllib.request.urlopen(f"{base}/api/workflow_templates/forget-me-not/forget-a-concept.json") as answer:
            assert json.load(answer) == json.loads((ROOT / "workflows/forget-a-concept.json").read_text())
    finally:
        os.killpg(process.pid, signal.SIGINT)  # Ctrl+C in a terminal
        assert process.wait(60) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(base, timeout=5)
    accuracy = json.loads((tmp_path / "report.json").read_text())["accuracy"]
    assert accuracy["before"] >= 0.75 and accuracy["after"] <= 0.25 and accuracy["kept_after"] >= 0.9


def check_demo(out):
    """What the README says of the demo, on what it wrote."""
    report = json.loads((out / "report.json").read_text())
    accuracy = report["accuracy"]
    assert report["host"]["name"] == "ComfyUI" and report["concept"] == "cat"
    assert accuracy["before"] >= 0.9 and accuracy["after"] <= 0.1
    assert accuracy["kept_before"] >= 0.9 and accuracy["kept_after"] >= 0.9
    patch = report["patch"]
    assert Path(patch["path"]).stat().st_size == patch["bytes"] < 100_000
    assert patch["keys"] == 60 and patch["unloaded_keys"] == 0
    assert report["strength_zero_identical"] is True
    assert min(report["seconds"].values()) > 0
    assert (out / "before-after.png").exists() and (out / "attention.png").exists()
