"""The pack in a ComfyUI that lacks something it needs: it says so when it is loaded, and adds no nodes."""

from __future__ import annotations

import re

import pytest

from fmn_core.hosts.comfy import needs as comfy_needs


@pytest.fixture
def older(comfyui, tmp_path):
    """The folder of the real ComfyUI, by links, with one function fewer."""
    folder = tmp_path / "ComfyUI"
    folder.mkdir()
    for entry in comfyui.iterdir():
        if entry.name not in ("custom_nodes", "folder_paths.py", "comfyui_version.py", "user", "output", "temp", "input"):
            (folder / entry.name).symlink_to(entry)
    (folder / "custom_nodes").mkdir()
    code = (comfyui / "folder_paths.py").read_text()
    (folder / "folder_paths.py").write_text(re.sub(r"def get_system_user_directory\b", "def of_later", code))
    (folder / "comfyui_version.py").write_text('__version__ = "0.3.64"\n')
    return folder


def test_an_older_server_gets_no_nodes_and_one_sentence(older, tmp_path):
    from demo.server import ComfyServer

    with ComfyServer(older, tmp_path / "work") as server:
        nodes = server.get("object_info")
        log = server.log.read_text()
    assert not any(name.startswith("FMN") for name in nodes) and "KSampler" in nodes
    (said,) = [line for line in log.splitlines() if "Forget-Me-Not" in line]
    assert said == (
        "Forget-Me-Not needs ComfyUI 0.3.75 or later and adds no nodes to this one: it is 0.3.64 and has no "
        "folder_paths.get_system_user_directory: update ComfyUI."
    )
    assert not [line for line in log.splitlines() if "forget-me-not" in line and ("FAILED" in line or "lack of" in line)]


def test_what_is_missing_is_named_wherever_it_is(monkeypatch):
    names = ("Path", "Path.read_text", "Path.later")
    monkeypatch.setattr(comfy_needs, "NEEDED", {"pathlib": names, "no_such_module_of_comfy": ("one", "two", "three")})
    said = comfy_needs.refusal()
    assert "has no pathlib.Path.later, no_such_module_of_comfy.one, no_such_module_of_comfy.two and 1 more: update" in said
    monkeypatch.setattr(comfy_needs, "NEEDED", {"pathlib": names[:2]})
    assert comfy_needs.refusal() == ""
