"""What the checks of the script and of the API share: the stand-in with the extension loaded, and a folder of two patches.

A plugin of pytest's (`-p webui.ui.fixtures`), imported before anything of the webui's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from webui.ui import host_page

host_page.import_standin(forge=any(Path(path).name == "forge" for path in sys.path))

import gradio as gr  # noqa: E402
import standin  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from modules import script_callbacks  # noqa: E402

from fmn_core.erasure.config import make_config  # noqa: E402
from fmn_core.erasure.forget import forget  # noqa: E402
from fmn_core.hosts.webui.model import current_host  # noqa: E402
from fmn_core.patch.file import save_patch  # noqa: E402

NOTHING = ("None", 1.0) * 3 + (True, False, "", "overlay", 0.6, "inferno", False)


@pytest.fixture(scope="session")
def loras(tmp_path_factory):
    """The LoRA folder, with two patches in it."""
    folder = tmp_path_factory.mktemp("Lora")
    host_page.set_options(folder, api=True)
    host = current_host()
    for name in ("cat", "dog"):
        save_patch(forget(host, name, make_config(resolution=64))[0], folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="session")
def script(loras):
    made = host_page.load_extension()
    host_page.set_options(loras, api=True)
    with gr.Blocks():
        assert [control.value for control in made.ui(False)] == [*NOTHING]
    return made


@pytest.fixture(autouse=True)
def reaches_for_nothing_else():
    standin.REACHED.clear()
    yield
    assert not standin.REACHED, standin.REACHED


def client(app) -> TestClient:
    """A client of the app with the extension's routes in it."""
    for callback in script_callbacks.app_started[-1:]:
        callback(None, app)
    return TestClient(app)
