"""Recording several samplings with one node in the real server: each picture is shown with its own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from graphs import Graphs

from demo.server import ServerError


@pytest.fixture(scope="module")
def graphs(server):
    return Graphs(server)


@pytest.fixture
def two_passes(graphs):
    """two_passes(recorders of the first and the second pass, ...) -> a graph of two passes, the second of which draws the
    first's picture anew at twice the size."""

    def two_passes(first="record", second="record", seed=0, passes=("first", "second"), prefix="attention", **changed):
        sampler = {
            "positive": ["asked", 0], "negative": ["empty", 0], "seed": seed, "steps": 2, "cfg": 3.0,
            "sampler_name": "euler", "scheduler": "normal",
        }  # fmt: skip
        graph = {
            "load": graphs.node("CheckpointLoaderSimple", ckpt_name="emoji-sd-128.safetensors"),
            "asked": graphs.node("CLIPTextEncode", clip=["load", 1], text="a photo of a cat"),
            "empty": graphs.node("CLIPTextEncode", clip=["load", 1], text=""),
            "latent": graphs.node("EmptyLatentImage", width=64, height=64, batch_size=1),
            "first": graphs.node("KSampler", model=[first, 0], latent_image=["latent", 0], denoise=1.0, **sampler),
            "larger": graphs.node("LatentUpscaleBy", samples=["first", 0], upscale_method="bilinear", scale_by=2.0),
            "second": graphs.node("KSampler", model=[second, 0], latent_image=["larger", 0], denoise=0.5, **sampler),
        }
        for name in {first, second} - {"load"}:
            graph[name] = graphs.node("FMN_RecordAttention", model=["load", 0], clip=["load", 1], text="a photo of a cat")
        for which in passes:
            recording = [first if which == "first" or second == "load" else second, 1]
            graph[f"decode {which}"] = graphs.node("VAEDecode", samples=[which, 0], vae=["load", 2])
            seen = {"recording": recording, "image": [f"decode {which}", 0]}
            graph[f"save {which}"] = graphs.node(
                "FMN_SaveTokenAttention", **seen, format="npz", filename_prefix=f"{prefix}-{which}"
            )
            graph[f"look {which}"] = graphs.node("FMN_VisualizeTokenAttention", **seen, **changed)
            graph[f"show {which}"] = graphs.node("PreviewImage", images=[f"look {which}", 0])
        return graph

    return two_passes


def saved(server, name):
    """The maps of the newest file of that name, without the facts."""
    file = sorted((server.output / "attention").glob(f"{name}*.npz"))[-1]
    data = np.load(file)
    return {key: data[key] for key in data.files if key != "facts"}, json.loads(data["facts"].item())


def told(outputs, which):
    return " ".join(outputs[f"look {which}"]["text"])


def test_each_of_two_passes_has_its_own_recording(server, two_passes):
    """One recorder for both passes gives what one for each gives; which one is shown is said on the node."""
    outputs = server.run(two_passes(prefix="one"))
    server.run(two_passes("record", "another", prefix="two"))
    for which, size in (("first", 8), ("second", 16)):
        (maps, facts), (wanted, _) = (saved(server, f"{prefix}-{which}") for prefix in ("one", "two"))
        assert max(facts["layers"].values()) == [size, size]
        assert maps.keys() == wanted.keys() and all(np.array_equal(maps[name], wanted[name]) for name in wanted)
        assert told(outputs, which) == f"Recorded in KSampler #{which}."


def test_a_pass_from_the_hosts_cache_keeps_its_recording(server, two_passes):
    """In a job of its own the second pass records after the first, whose picture the host has from the job before."""
    server.run(two_passes(seed=5, passes=("first",), prefix="alone"))
    outputs = server.run(two_passes(seed=5, words="cat", prefix="both"))
    assert [told(outputs, which) for which in ("first", "second")] == [
        "Recorded in KSampler #first.", "Recorded in KSampler #second."
    ]  # fmt: skip
    (maps, _), (wanted, _) = saved(server, "both-first"), saved(server, "alone-first")
    assert all(np.array_equal(maps[name], wanted[name]) for name in wanted)


def test_a_pass_that_was_not_recorded_is_told(server, two_passes):
    """The recording of the first pass, shown over the picture of a second one by the plain model."""
    outputs = server.run(two_passes("record", "load", seed=1))
    assert told(outputs, "first") == "Recorded in KSampler #first."
    assert "sampled again in KSampler #second, which was not recorded" in told(outputs, "second")


def test_pictures_of_a_sampler_that_did_not_record_are_refused(server, two_passes):
    """The picture of the first pass, by the plain model, with the recording of the second."""
    graph = two_passes("load", "record", seed=2, passes=("second",))
    graph["decode"] = graph["decode second"] | {"inputs": {"samples": ["first", 0], "vae": ["load", 2]}}
    graph["wait"] = {"class_type": "ImageBatch", "inputs": {"image1": ["decode second", 0], "image2": ["decode", 0]}}
    server.run(graph)
    graph["look second"]["inputs"] |= {"image": ["decode", 0], "words": "cat"}
    with pytest.raises(ServerError, match="are not of a sampler that recorded"):
        server.run(graph)


def test_recordings_of_samplers_that_are_gone_are_dropped(comfy):
    """Those of the job at hand stay, and of earlier ones those whose samplers would sample the same again."""
    from fmn_core.attention.frames import Origin
    from fmn_core.attention.recorder import AttentionRecording
    from fmn_core.hosts.comfy.graph import drop_stale, inputs_of

    def prompt(seed):
        first = {"class_type": "KSampler", "inputs": {"seed": seed}}
        return {"first": first, "second": {"class_type": "KSampler", "inputs": {"latent_image": ["first", 0]}}}

    recording = AttentionRecording("a cat", ())
    for job, sampler, seed in (("one", "gone", 0), ("one", "second", 0), ("two", "first", 1), ("two", "made by a node", 1)):
        recording.begin(Origin(job, sampler, inputs_of(prompt(seed), sampler)))
    assert [*recording.earlier] == ["gone", "second", "first"]
    drop_stale(recording, prompt(1))
    assert [*recording.earlier] == ["first"]
    recording.begin(Origin("three", "third", None))
    drop_stale(recording, prompt(1))
    assert [*recording.earlier] == ["first"]


def test_pictures_of_several_samplers_and_of_a_changed_one_are_refused(comfy):
    from fmn_core.attention.frames import Origin
    from fmn_core.attention.recorder import AttentionRecording
    from fmn_core.errors import ForgetError
    from fmn_core.hosts.comfy.graph import inputs_of, recording_of

    prompt = {
        "one": {"class_type": "KSampler", "inputs": {"seed": 1}},
        "two": {"class_type": "KSampler", "inputs": {"seed": 2}},
        "both": {"class_type": "ImageBatch", "inputs": {"image1": ["one", 0], "image2": ["two", 0]}},
        "look": {"class_type": "FMN_VisualizeTokenAttention", "inputs": {"image": ["both", 0]}},
    }
    recording = AttentionRecording("a cat", ())
    for sampler in ("one", "two"):
        recording.begin(Origin("job", sampler, inputs_of(prompt, sampler)))
    with pytest.raises(ForgetError, match="come from KSampler #one and KSampler #two"):
        recording_of(recording, prompt, "look", "image")
    prompt["look"]["inputs"]["image"] = ["one", 0]
    assert recording_of(recording, prompt, "look", "image")[0] is recording.earlier["one"]
    prompt["one"]["inputs"]["seed"] = 3
    with pytest.raises(ForgetError, match="come from the cache"):
        recording_of(recording, prompt, "look", "image")
