"""The pack in a real ComfyUI server, over HTTP and websocket, as a page or a script uses it."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from graphs import Graphs
from PIL import Image
from titles import node_id, pictures, titled, without_pictures

from demo.classifier import Classifier
from demo.run import find_python, with_node
from demo.server import ComfyServer, ServerError
from demo.workflow import load_workflow
from fmn_core.patch.file import read_patch


@pytest.fixture(scope="module")
def info(server):
    return server.get("object_info")


@pytest.fixture(scope="module")
def job(server, info):
    """The saved workflow of the whole job, run once: its API form, its outputs and the events it sent."""
    workflow = load_workflow(ROOT / "workflows/forget-a-concept.json", info)
    events = []
    outputs = server.run(workflow, lambda kind, data: events.append((kind, data)))
    return workflow, outputs, events


@pytest.fixture(scope="module")
def paper_job(server, job):
    """The same with the preset that trains."""
    workflow, events = copy.deepcopy(job[0]), []
    titled(workflow)["Forget Concept"]["preset"] = "paper"
    outputs = server.run(workflow, lambda kind, data: events.append((kind, data)))
    return workflow, outputs, events


def test_the_concept_is_no_longer_recognised_and_a_kept_one_is(server, job):
    workflow, outputs, _ = job
    classifier = Classifier.load()
    before, after = (pictures(server, workflow, outputs, f"Pictures {when}") for when in ("before", "after"))
    assert classifier.accuracy(before, "cat") >= 0.75
    assert classifier.accuracy(after, "cat") <= 0.25

    kept = copy.deepcopy(workflow)
    titled(kept)["Prompt"]["value"] = "an emoji of a house"
    for when in ("before", "after"):
        titled(kept)[f"Attention {when}"]["words"] = "house"
    outputs = server.run(kept)
    before, after = (pictures(server, kept, outputs, f"Pictures {when}") for when in ("before", "after"))
    assert classifier.accuracy(before, "house") >= 0.75
    assert classifier.accuracy(after, "house") >= 0.75


def test_less_attention_goes_to_the_concept(server, paper_job):
    """On one scale, since the maximum of the upper node is wired to the lower one."""
    workflow, outputs, _ = paper_job
    heat = {}
    for when in ("before", "after"):
        maps, plain = (pictures(server, workflow, outputs, f"{what} {when}") for what in ("Heat maps", "Pictures"))
        heat[when] = (maps - 0.4 * plain).mean()  # what the overlay of opacity 0.6 added
    assert heat["after"] < 0.5 * heat["before"]


def test_training_reports_every_step_and_shows_previews_of_a_few(paper_job):
    workflow, _, events = paper_job
    forget = node_id(workflow, "Forget Concept")
    steps = [(data["value"], data["max"]) for kind, data in events if kind == "progress" and data["node"] == forget]
    assert steps == [(step, 20 + 35) for step in range(1, 56)]  # the pictures it samples for itself, and the training
    previews = [data["bytes"] for kind, data in events if kind == "preview" and data["node"] == forget]
    assert 2 <= len(previews) < 35, "the first and the last step's, and a few in between"
    Image.open(io.BytesIO(previews[0][previews[0].index(b"\xff\xd8") :])).verify()


def test_the_saved_file_loads_through_the_stock_loader_and_gives_the_same_picture(server, info, job):
    workflow, outputs, _ = job
    name = outputs[node_id(workflow, "The saved patch")]["text"][0]
    assert re.search(r"Saved .*forget-cat_\d+_\.safetensors", outputs[node_id(workflow, "Save Forget Patch")]["text"][0])
    options = server.get("object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
    assert name in options, "the host's loader does not list the new file"
    apply = node_id(workflow, "Apply FMN Patch")
    wired = {key: workflow[apply]["inputs"][key] for key in ("model", "clip")}
    stock = with_node(workflow, apply, "LoraLoader", **wired, lora_name=name, strength_model=1.0, strength_clip=1.0)
    from_file = with_node(workflow, apply, "FMN_ApplyPatch", **wired, patch=name, strength=1.0)
    start = len(server.log.read_text())
    by_loader, by_file = server.run(stock), server.run(from_file)
    log = server.log.read_text()[start:]
    assert "lora key not loaded" not in log and "NOT LOADED" not in log
    by_loader, by_file, by_wire = (
        pictures(server, w, o, "Pictures after") for w, o in ((stock, by_loader), (from_file, by_file), (workflow, outputs))
    )
    assert torch.equal(by_loader, by_file)
    assert torch.equal(by_loader, by_wire), "the wire hands over other numbers than the file holds"


def test_strength_zero_is_the_base(server, job):
    workflow, _, _ = job
    zero = copy.deepcopy(workflow)
    titled(zero)["Apply FMN Patch"]["strength"] = 0.0
    outputs = server.run(zero)
    assert torch.equal(pictures(server, zero, outputs, "Pictures before"), pictures(server, zero, outputs, "Pictures after"))


def test_training_leaves_the_next_picture_as_it_was(server, paper_job):
    """The base pictures sampled anew, after training, by a sampler that is not in the cache."""
    workflow, outputs, _ = paper_job
    again = copy.deepcopy(workflow)
    Graphs(server).set_preset(again, node_id(again, "Forget Concept"), "paper", seed=1, steps=4)
    titled(again)["Before"]["denoise"] = 0.99999  # another cache entry, and the host takes it for 1
    anew = server.run(again)
    assert torch.equal(
        pictures(server, workflow, outputs, "Pictures before"), pictures(server, again, anew, "Pictures before")
    )


def test_the_node_says_what_it_did_and_refuses_what_has_no_effect(server, job):
    workflow, outputs, _ = job
    assert re.match(r"`cat` goes \d+% of the way", outputs[node_id(workflow, "Forget Concept")]["text"][0])
    strict = copy.deepcopy(workflow)
    settings = {"mode": "replace", "target": "cat", "strict": True}
    Graphs(server).set_preset(strict, node_id(strict, "Forget Concept"), "fast", **settings)
    with pytest.raises(ServerError, match="Little effect: prompts of `cat` go 0%"):
        server.run(strict)


@pytest.mark.parametrize(
    "name",
    ["apply-a-saved-patch", "stack-two-patches", "look-at-token-attention", "learn-a-concept", "measure-a-patch"],
)
def test_the_other_workflows_run(server, info, name):
    workflow = load_workflow(ROOT / f"workflows/{name}.json", info)
    outputs = server.run(workflow)
    classifier = Classifier.load()
    if name == "apply-a-saved-patch":
        assert classifier.accuracy(pictures(server, workflow, outputs, "Pictures before"), "cat") >= 0.75
        assert classifier.accuracy(pictures(server, workflow, outputs, "Pictures after"), "cat") <= 0.25
    elif name == "stack-two-patches":
        assert classifier.accuracy(pictures(server, workflow, outputs, "Pictures of cat"), "cat") <= 0.25
        assert classifier.accuracy(pictures(server, workflow, outputs, "Pictures of car"), "car") <= 0.25
        assert classifier.accuracy(pictures(server, workflow, outputs, "Pictures of house"), "house") >= 0.75
    elif name == "learn-a-concept":
        for title in ("Pictures before", "Pictures by the learned words"):
            assert classifier.accuracy(pictures(server, workflow, outputs, title), "cat") >= 0.75
        assert classifier.accuracy(pictures(server, workflow, outputs, "Pictures after"), "cat") <= 0.25
    elif name == "measure-a-patch":
        (says,) = outputs[node_id(workflow, "What the figures say")]["text"]
        assert re.search(r"`cat`: what its prompts do changes by \d{2,}%", says)
        assert pictures(server, workflow, outputs, "The report").shape[0] == 1
        file = next((server.output / "loras").glob("forget-cat-measured*"))
        assert read_patch(file).info["report"]["evaluation"]["summary"] == says
    else:
        (report,) = outputs[node_id(workflow, "Compare Token Attention")]["text"]
        shares = {
            word: [float(x) for x in re.findall(r"([\d.]+) %,", line)] for word, line in re.findall("(.*): (.*)", report)
        }
        assert list(shares) == ["cat", "house", "watercolor"]
        before, after = shares["cat"]
        assert after < 0.5 * before and max(map(max, shares.values())) < 100
        assert pictures(server, workflow, outputs, "Before and after, word by word").shape[0] == 2
        assert pictures(server, workflow, outputs, "All words, before").shape[0] == 2
        assert set(pictures(server, workflow, outputs, "Mask").unique().tolist()) == {0.0, 1.0}


def test_pictures_are_looked_at_and_recordings_saved(server, info):
    """Record Token Attention of Picture and Save Token Attention, after the picture of a sampler."""
    workflow = load_workflow(ROOT / "workflows/look-at-token-attention.json", info)
    loader, decoded, recorder = (
        node_id(workflow, title) for title in ("Load Checkpoint", "Before: decode", "Record: before")
    )
    look = {"noise": 0.5, "num_samples": 3, "seed": 0, "granularity": "steps", "layers": "up", "max_memory_mb": 64}
    view = {"words": "", "view": "over_steps", "vmax": 0.0, "threshold": 0.0, "opacity": 0.6, "color_map": "cividis"}
    save = {"recording": [recorder, 1], "image": [decoded, 0], "filename_prefix": "mine/attention"}
    model = {"model": [loader, 0], "clip": [loader, 1], "vae": [loader, 2], "image": [decoded, 0]}
    added = {
        "look": ("FMN_RecordPictureAttention", model | look | {"text": "a cat"}),
        "view": ("FMN_VisualizeTokenAttention", {"recording": ["look", 0], "image": ["look", 1], **view}),
        "show": ("PreviewImage", {"images": ["view", 0]}),
        "npz": ("FMN_SaveTokenAttention", save | {"format": "npz"}),
        "json": ("FMN_SaveTokenAttention", save | {"format": "json"}),
    }
    workflow |= {id: {"class_type": name, "inputs": inputs, "_meta": {"title": id}} for id, (name, inputs) in added.items()}
    outputs = server.run(workflow)
    assert pictures(server, workflow, outputs, "show").shape[0] == 2 * 3
    folder = server.output / "attention/mine"
    (npz,), (facts,) = folder.glob("*.npz"), folder.glob("*.json")
    data = np.load(npz)
    assert json.loads(data["facts"].item()) == json.loads(facts.read_text())
    assert all(data[name].shape[0] == 2 for name in data.files if name != "facts")
    bad = copy.deepcopy(workflow)
    bad["npz"]["inputs"]["filename_prefix"] = "../../outside"
    with pytest.raises(ServerError, match="leads out of"):
        server.run(bad)


def test_an_interrupt_stops_training_and_the_next_job_runs(server, paper_job):
    workflow, _, _ = paper_job
    long = without_pictures(workflow)
    Graphs(server).set_preset(long, node_id(long, "Forget Concept"), "paper", steps=1000, seed=3, num_inference_steps=4)
    forget, seen = node_id(long, "Forget Concept"), []
    folder = server.work / "user/__forget_me_not/checkpoints"
    others = {*folder.glob("*")}  # of tests that ran before

    def stop_once(kind, data):
        if kind == "progress" and data["node"] == forget and data["value"] > 6:  # four of them make the pictures
            seen.append(data["value"])
            if len(seen) == 1:
                threading.Thread(target=server.interrupt).start()

    with pytest.raises(ServerError, match="interrupted"):
        server.run(long, stop_once)
    assert seen[-1] < 900
    (unfinished,) = (server.output / "loras").glob("forget-cat-unfinished*")
    assert read_patch(unfinished).info["report"]["warnings"][0].startswith("Unfinished: stopped after step")
    seen.clear()
    with pytest.raises(ServerError, match="interrupted"):
        server.run(long, stop_once)
    assert "checkpoint.resumed" in server.log.read_text()
    assert len({*folder.glob("*")} - others) == 1
    short = copy.deepcopy(workflow)
    Graphs(server).set_preset(short, node_id(short, "Forget Concept"), "paper", steps=2, seed=4)
    assert server.run(short)


@pytest.mark.parametrize("prefix", ["", "folder/", "deep/er/x", "forget-%concept%"])
def test_every_save_gets_a_name_that_no_lora_has(server, job, prefix):
    """Not in any of the host's LoRA folders: loaders ask by name and take the first they find."""
    workflow = without_pictures(job[0])
    titled(workflow)["Save Forget Patch"]["filename_prefix"] = prefix
    names = []
    for rank in (2, 3):
        Graphs(server).set_preset(workflow, node_id(workflow, "Forget Concept"), "fast", rank=rank)
        outputs = server.run(workflow)
        names.append(outputs[node_id(workflow, "The saved patch")]["text"][0])
    listed = server.get("object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
    assert len(set(names)) == 2 and all(listed.count(name) == 1 for name in names)


def test_pictures_from_the_graph_train_too(server, paper_job):
    """IMAGE and MASK come out of other nodes as inference tensors."""
    workflow = copy.deepcopy(paper_job[0])
    decode, forget = node_id(workflow, "Before: decode"), node_id(workflow, "Forget Concept")
    workflow["900"] = {
        "class_type": "SolidMask",
        "inputs": {"value": 1.0, "width": 128, "height": 128},
        "_meta": {"title": "mask"},
    }
    workflow[forget]["inputs"] |= {"images": [decode, 0], "mask": ["900", 0]}
    Graphs(server).set_preset(workflow, forget, "paper", steps=3)
    assert server.run(workflow)
    workflow["900"]["inputs"]["width"] = 32
    with pytest.raises(ServerError, match="resize the mask"):
        server.run(workflow)
    del workflow[forget]["inputs"]["vae"]
    workflow["900"]["inputs"]["width"] = 128
    with pytest.raises(ServerError, match="Pictures need a VAE"):
        server.run(workflow)


def test_another_installed_comfyui_runs_the_job(tmp_path):
    """Set FMN_COMFYUI_NEWER to the folder of a newer ComfyUI, with its own environment in it."""
    folder = os.environ.get("FMN_COMFYUI_NEWER")
    if not folder:
        pytest.skip("FMN_COMFYUI_NEWER is not set: it names the folder of a newer ComfyUI to test with")
    with ComfyServer(Path(folder), tmp_path, str(find_python(Path(folder)))) as server:
        workflow = load_workflow(ROOT / "workflows/forget-a-concept.json", server.get("object_info"))
        outputs = server.run(workflow)
        assert Classifier.load().accuracy(pictures(server, workflow, outputs, "Pictures after"), "cat") <= 0.25
