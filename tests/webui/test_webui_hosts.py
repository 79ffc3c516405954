"""The webui and Forge as hosts, each on its stand-in in a process of its own (a1111/README.md)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import CHECKPOINT, ROOT
from safetensors.torch import save_file

TESTS = ROOT / "tests"
STANDIN = TESTS / "webui/a1111"
FLAVOURS = {"webui": [STANDIN], "forge": [TESTS / "webui/forge", STANDIN]}
ALONE = {"webui": ["check_webui.py", "check_xl.py"], "forge": ["check_forge.py"]}
EVERYWHERE = ["check_contract.py", "check_host.py", "check_attention.py"]


@pytest.fixture(scope="module")
def given(comfy, tmp_path_factory):
    """Environment variables: the demo model as the webui gets it, and a file of what ComfyUI makes of the same."""
    from fmn_core.hosts.comfy.model import ComfyHost

    sys.path.insert(0, str(STANDIN))
    try:
        from reference import reference
        from standin import export
    finally:
        sys.path.remove(str(STANDIN))
    model, file = tmp_path_factory.mktemp("webui-model"), tmp_path_factory.mktemp("reference") / "comfyui.safetensors"
    export(model)
    with torch.inference_mode():
        loaded = comfy.sd.load_checkpoint_guess_config(str(model / CHECKPOINT.name))[:3]
    save_file(reference(ComfyHost(*loaded)), file)
    return {"FMN_WEBUI_MODEL": str(model), "FMN_REFERENCE": str(file)}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_checks_pass_in_the_webuis_process(given, flavour):
    path = os.pathsep.join(map(str, [*FLAVOURS[flavour], TESTS, ROOT]))
    environment = {**os.environ, **given, "PYTHONPATH": path}
    checks = [STANDIN / name for name in EVERYWHERE] + [FLAVOURS[flavour][0] / name for name in ALONE[flavour]]
    options = ["-q", "-p", "webui_fixtures", "-p", "no:cacheprovider", "--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, checks)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
