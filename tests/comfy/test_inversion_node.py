"""Invert Concept in a real ComfyUI server, and Forget Concept by the words it learns."""

from __future__ import annotations

import copy
import re
import threading
from dataclasses import asdict

import pytest
from conftest import ROOT
from graphs import Graphs

from demo.classifier import Classifier
from demo.run import load_pictures
from demo.server import ServerError
from demo.workflow import by_title, load_workflow
from fmn_core.inversion.config import InversionConfig
from fmn_core.inversion.embedding import read_embedding


@pytest.fixture(scope="module")
def job(server):
    """Invert, forget by the learned words, and pictures of these before and after; with the events of the run."""
    workflow = load_workflow(ROOT / "workflows/forget-a-concept.json", server.get("object_info"))
    ids = by_title(workflow)
    loader, forget = ids["Load Checkpoint"], workflow[ids["Forget Concept"]]["inputs"]
    wired = {key: forget[key] for key in ("model", "clip", "vae")}
    settings = asdict(
        InversionConfig(init_tokens="<rand-1>", steps=50, learning_rate=2e-2, num_images=2, num_inference_steps=10)
    )
    workflow["800"] = {"class_type": "FMN_InvertConcept", "inputs": {**wired, "concept": "cat", **settings}}
    workflow["801"] = {"class_type": "PreviewAny", "inputs": {"source": ["800", 0]}}
    forget |= {"concept": ["800", 0]}
    both = {"string_a": "a photo of ", "string_b": ["800", 0], "delimiter": ""}
    workflow[ids["Prompt"]] = {"class_type": "StringConcatenate", "inputs": both}
    for when, model in (("Before", loader), ("After", ids["Apply FMN Patch"])):
        workflow[ids[when]]["inputs"] |= {"model": [model, 0], "steps": 10}
    for title in ids:  # the rest of the workflow has its own tests
        if re.search("attention|Heat|Save Forget|saved|Plot", title, re.IGNORECASE):
            del workflow[ids[title]]
    events = []
    outputs = server.run(workflow, lambda kind, data: events.append((kind, data)))
    return workflow, ids, outputs, events


def judged(server, job, outputs, when):
    return Classifier.load().accuracy(load_pictures(server, outputs[job[1][f"Pictures {when}"]]["images"]), "cat")


def test_the_node_learns_words_that_forget_concept_forgets(server, job):
    _, _, outputs, events = job
    name = outputs["801"]["text"][0].removeprefix("embedding:")
    assert re.fullmatch(r"learned-cat_0000\d_", name) and "error went from" in outputs["800"]["text"][0]
    assert (server.work / f"embeddings/{name}.safetensors").exists()
    assert judged(server, job, outputs, "before") >= 0.75
    assert judged(server, job, outputs, "after") <= 0.25
    steps = [(data["value"], data["max"]) for kind, data in events if kind == "progress" and data["node"] == "800"]
    assert steps == [(step, 10 + 50) for step in range(1, 61)]
    assert sum(kind == "preview" and data["node"] == "800" for kind, data in events) >= 2


def test_the_preset_that_trains_forgets_the_learned_words(server, job):
    workflow, ids, _, _ = job
    paper = copy.deepcopy(workflow)
    Graphs(server).set_preset(paper, ids["Forget Concept"], "paper", num_inference_steps=10)
    text = server.run(paper)[ids["Forget Concept"]]["text"][0]
    before, after = map(float, re.search(r"Attention to the concept: ([\d.]+) before, ([\d.]+) after", text).groups())
    assert after < 0.5 * before


def test_an_interrupt_keeps_what_was_learned(server, job):
    workflow, _, _, _ = job
    long = copy.deepcopy(workflow)
    long["800"]["inputs"] |= {"steps": 5000, "seed": 3}
    seen = []

    def stop_once(kind, data):
        if kind == "progress" and data["node"] == "800" and data["value"] > 12:  # ten of them make the pictures
            seen.append(data["value"])
            if len(seen) == 1:
                threading.Thread(target=server.interrupt).start()

    before = sorted((server.work / "embeddings").iterdir())
    with pytest.raises(ServerError, match="interrupted"):
        server.run(long, stop_once)
    (new,) = {*(server.work / "embeddings").iterdir()} - {*before}
    assert seen[-1] < 4000 and re.fullmatch(r"learned-cat-unfinished_\d+_.safetensors", new.name)
    assert list(read_embedding(new, {"clip_l": 112})) == ["clip_l"]


def test_the_node_refuses_what_cannot_work(server, job):
    workflow, _, _, _ = job
    for change, message in (({"init_tokens": "hot dog"}, "must be one"), ({"concept": " "}, "The concept is empty")):
        bad = copy.deepcopy(workflow)
        bad["800"]["inputs"] |= change
        with pytest.raises(ServerError, match=message):
            server.run(bad)
