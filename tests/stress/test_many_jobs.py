"""Many jobs at one real server: short versions of clients.py and soak.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clients import KINDS, two_clients
from graphs import Graphs
from soak import soak


def test_two_clients_get_their_own_answers(server):
    assert two_clients(Graphs(server), 4, 0, KINDS[3:6]) == (4, 0)


def test_cycles_hold_their_memory(server):
    sizes = soak(Graphs(server), 4)
    assert sizes[-1] - sizes[1] < 60, sizes


def test_two_servers_with_one_output_folder_refuse_nothing(server, tmp_path):
    from demo.server import ComfyServer

    jobs, wired = 20, {}
    for row in range(1, 7):
        wired |= {f"patch_{row}": "from the lora input", f"strength_{row}": 1.0, f"enabled_{row}": True}

    def workflow(first):
        nodes = {}
        for job in range(first, first + jobs):
            strength = {"patch_1": "forget-cat.safetensors", "strength_1": 0.01 * (job + 1)}  # none is the cached other
            nodes[f"s{job}"] = ("FMN_StackPatches", wired | strength)
            nodes[f"p{job}"] = ("FMN_SavePatch", {"lora": [f"s{job}", 2], "filename_prefix": "both/patch"})
            export = {"lora": [f"s{job}", 2], "format": "peft", "filename_prefix": "both/export"}
            nodes[f"e{job}"] = ("FMN_ExportPatch", export)
        return {id: {"class_type": kind, "inputs": inputs, "_meta": {"title": id}} for id, (kind, inputs) in nodes.items()}

    (tmp_path / "output").symlink_to(server.output, target_is_directory=True)
    with ComfyServer(server.folder, tmp_path) as other, ThreadPoolExecutor(2) as pool:
        done = [pool.submit(one.run, workflow(first)) for one, first in ((server, 0), (other, jobs))]
        outputs = [one.result() for one in done]
    for kind in ("patch", "export"):
        said = [node["text"][0].split()[-1] for one in outputs for id, node in one.items() if id[0] == kind[0]]
        files = list((server.output / "loras/both").glob(f"{kind}_*.safetensors"))
        assert len(said) == 2 * jobs and {Path(name).name for name in said} == {file.name for file in files}
        assert len(files) == 2 * jobs
