"""The examples' patches where every pack looks for LoRAs, not the host's own loaders alone."""

from __future__ import annotations

from conftest import ROOT

from demo.run import place_patches
from demo.server import ComfyServer

PATCHES = sorted((ROOT / "demo/loras").glob("*.safetensors"))


def test_the_demo_copies_the_patches_into_the_hosts_folder_and_takes_nothing_over(comfyui, tmp_path):
    folder = tmp_path / "ComfyUI"
    (folder / "custom_nodes").mkdir(parents=True)
    for entry in comfyui.iterdir():
        if entry.name not in ("custom_nodes", "models", "folder_paths.py", "user", "output", "temp", "input"):
            (folder / entry.name).symlink_to(entry)
    (folder / "folder_paths.py").write_bytes((comfyui / "folder_paths.py").read_bytes())  # its place is the host's own
    loras = folder / "models/loras"
    loras.mkdir(parents=True)
    (loras / PATCHES[0].name).write_bytes(b"the user's own")
    for _ in range(2):
        place_patches(folder)
    assert sorted(file.name for file in loras.iterdir()) == [file.name for file in PATCHES]
    assert (loras / PATCHES[0].name).read_bytes() == b"the user's own"
    assert all((loras / file.name).read_bytes() == file.read_bytes() for file in PATCHES[1:])
    with ComfyServer(folder, tmp_path / "work") as server:
        assert {file.name for file in PATCHES} <= set(server.get("models/loras"))
        (listed,) = server.get("object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0:1]
    assert sorted(name for name in listed if name.startswith("forget-")) == [file.name for file in PATCHES]  # each once
