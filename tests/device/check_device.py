"""The core on a device that is not the CPU: without hardware, with float64 and without, and a real one where there is one.

What they compute in full precision is what the CPU computes, to rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import second_device
import torch
from graphs import Graphs
from presets import config_for, probe_little

from fmn_core.attention.from_image import FromImageConfig, record_pictures
from fmn_core.attention.recorder import RecordingConfig
from fmn_core.convert.config import ImportConfig
from fmn_core.convert.importer import import_patch
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.evaluation.config import EvaluationConfig
from fmn_core.evaluation.evaluate import evaluate
from fmn_core.inversion.config import InversionConfig
from fmn_core.inversion.textual_inversion import invert_pictures
from fmn_core.patch.file import read_patch, save_patch
from fmn_core.patch.patch import DOWN, UP
from fmn_core.patch.stack import stack
from fmn_core.patch.weighted import WeightedPatch
from fmn_core.training.checkpoint import Checkpoint

pytestmark = pytest.mark.device

ROOT = Path(__file__).resolve().parents[2]
PATCH = ROOT / "demo/loras/forget-cat.safetensors"
QUICK = {"steps": 1, "num_images": 1, "num_inference_steps": 1, "resolution": 64, "batch_size": 1, "attack_rounds": 1}
IMAGES = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
MASK = torch.nn.functional.pad(torch.ones(1, 32, 32), (16, 16, 16, 16))
SAME = 0.02  # by which results may differ
REAL = os.environ.get("FMN_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
WITHOUT_FLOAT64 = {"FMN_WITHOUT_FLOAT64": "1"}
IN_DIFFUSERS = {"second without float64": WITHOUT_FLOAT64} | ({REAL: {}} if REAL else {})
IN_COMFYUI = {"second": {}} | ({REAL: {}} if REAL else {})  # without float64 its server is
DEVICES = IN_DIFFUSERS | IN_COMFYUI
COMFYUI_JOBS = "fast paper balanced robust inversion evaluation patched recorded cast scaled mixed".split()
PRESETS = [
    make_config(),
    config_for("paper", **QUICK),
    config_for("paper", backprop="skip_connections", visual_loss_weight=0.1, **QUICK),
    config_for("paper", train_layers="whole_unet", **QUICK),
    config_for("balanced", mode="replace", target="dog", **QUICK),
    config_for("robust", **QUICK),
]


def require_whole(patch) -> None:
    """A patch is on the CPU and finite wherever it was made."""
    assert patch.modules and all(t.device.type == "cpu" and t.isfinite().all() for t in patch.values())


def device_of(name: str) -> str:
    """The torch device that a test is for; the test is skipped where torch has none of that kind."""
    if not name.startswith("second"):
        return name
    if reason := second_device.register(double=not DEVICES[name]):
        pytest.skip(reason)
    return second_device.NAME


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions in fp32 on a GPU as on the CPU: a first step of Adam turns TF32's rounding into signs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module", params=IN_DIFFUSERS)
def pipelines(comfy, request):
    """The demo model as two diffusers pipelines, on the CPU and on a device."""
    from demo.export import make_pipeline

    return make_pipeline(), make_pipeline().to(device_of(request.param))


@pytest.fixture
def hosts(pipelines, monkeypatch):
    """Both as hosts, which measure little."""
    from fmn_core.hosts.diffusers.model import DiffusersHost

    probe_little(monkeypatch.setattr)
    both = [DiffusersHost(pipeline, progress_bar=False) for pipeline in pipelines]
    for host in both:
        host.resolution = 64
    return both


def assert_same_patch(made, expected) -> None:
    require_whole(made)
    assert made.keys() == expected.keys()
    for module in expected.modules:
        ours, theirs = (patch[module + UP].float() @ patch[module + DOWN].float() for patch in (made, expected))
        assert (ours - theirs).norm() <= SAME * theirs.norm(), module


def numbers(report) -> list[float]:
    """All the numbers in a report, in order."""
    if isinstance(report, dict | list):
        return [n for own in (report.values() if isinstance(report, dict) else report) for n in numbers(own)]
    return [report] if isinstance(report, int | float) else []


@pytest.mark.parametrize(
    "settings",
    PRESETS,
    ids=lambda c: "-".join(str(getattr(c, name, "")) for name in ("preset", "backprop", "train_layers", "mode")),
)
def test_a_patch_is_that_of_the_cpu(hosts, settings):
    expected, made = (forget(host, "cat", settings)[0] for host in hosts)
    assert_same_patch(made, expected)


def test_a_patch_from_given_pictures_is_that_of_the_cpu(hosts):
    """Wherever these are: ComfyUI's --gpu-only leaves them on the device."""
    expected, made = (
        forget(host, "cat", PRESETS[1], images=IMAGES.to(host.device), mask=MASK.to(host.device))[0] for host in hosts
    )
    assert_same_patch(made, expected)


def test_a_training_goes_on_where_it_was(hosts, tmp_path):
    """Its optimiser's state comes back to the device."""
    host, settings = hosts[1], replace(PRESETS[1], steps=2)
    undisturbed = forget(host, "cat", settings)[0]
    steps = []

    def stop(step, total, preview):
        steps.append(step)
        if len(steps) == 2:  # the picture's, and the first of the training
            raise KeyboardInterrupt

    host.show_progress = stop
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path) as checkpoint:
        forget(host, "cat", settings, checkpoint=checkpoint)
    assert [*tmp_path.iterdir()]
    host.show_progress = lambda step, total, preview: steps.append(step)
    with Checkpoint(tmp_path) as checkpoint:
        resumed = forget(host, "cat", settings, checkpoint=checkpoint)[0]
    assert checkpoint.resumed == 1
    assert_same_patch(resumed, undisturbed)


def test_learned_words_are_those_of_the_cpu(hosts):
    settings = InversionConfig(steps=2, batch_size=1)
    expected, learned = (invert_pictures(host, settings, images=IMAGES, mask=MASK).vectors for host in hosts)
    for name, vectors in learned.items():
        assert vectors.device.type == "cpu"
        torch.testing.assert_close(vectors, expected[name], rtol=SAME, atol=SAME)


def test_an_evaluation_is_that_of_the_cpu(hosts):
    settings = EvaluationConfig(prompts=1, num_inference_steps=1, resolution=64, inversion=True, inversion_steps=1)
    expected, found = (evaluate(host, read_patch(PATCH), settings).report for host in hosts)
    assert json.loads(json.dumps(found)).keys() == expected.keys()
    assert numbers(found) == pytest.approx(numbers(expected), rel=SAME, abs=SAME)


@pytest.mark.parametrize("granularity", ["heads", "steps"])
def test_a_recording_is_that_of_the_cpu(hosts, granularity):
    from fmn_core.hosts.diffusers.attention import record_attention

    recordings = []
    for host in hosts:
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(host.device)
        host.pipeline.set_progress_bar_config(disable=True)
        with record_attention(host, "a cat", RecordingConfig(granularity=granularity)) as recording:
            host.pipeline("a cat", num_inference_steps=2, latents=latents, height=64, width=64, output_type="latent")
        looked = record_pictures(
            host, IMAGES.to(host.device), "a cat", FromImageConfig(num_samples=1), RecordingConfig(granularity=granularity)
        )
        recordings.append((recording, looked))
    for expected, found in zip(*recordings, strict=True):
        assert found.mass().device.type == "cpu" and found.layers == expected.layers
        torch.testing.assert_close(found.mass(), expected.mass(), rtol=SAME, atol=SAME)


def test_a_made_patch_is_stacked_and_comes_in_from_a_file(hosts, tmp_path):
    host = hosts[1]
    made = forget(host, "dog", make_config())[0]
    require_whole(stack([WeightedPatch(patch) for patch in (read_patch(PATCH), made)]))
    save_patch(made, tmp_path / "dog.safetensors")
    require_whole(import_patch(host, tmp_path / "dog.safetensors", ImportConfig(), "dog"))


@pytest.fixture(scope="session")
def comfyui_jobs(comfyui):
    """comfyui_jobs(name of a device) -> job -> what a ComfyUI that computes there told of it."""
    done: dict[str, dict[str, dict[str, str]]] = {}

    def jobs(name: str) -> dict[str, dict[str, str]]:
        if name not in done:
            kind = device_of(name)
            option = "directml" if kind == second_device.NAME else ""
            command = [sys.executable, str(ROOT / "tests/device/comfyui_device.py"), option]
            result = subprocess.run(command, env=environment(comfyui, name), capture_output=True, text=True)
            told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"job"')]
            assert {one["job"] for one in told} == {*COMFYUI_JOBS}, result.stderr
            assert all(one["device"].startswith(kind) for one in told)
            done[name] = {one["job"]: one for one in told}
        return done[name]

    return jobs


def environment(comfyui: Path, name: str) -> dict[str, str]:
    """What a process has to be told that computes on a device."""
    tests = ROOT / "tests"
    folders = [
        *map(str, (tests / "device/directml", tests / "device", tests)),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    return {**os.environ, "FMN_COMFYUI": str(comfyui), "PYTHONPATH": os.pathsep.join(folders), **DEVICES[name]}


@pytest.mark.parametrize("job", COMFYUI_JOBS)
@pytest.mark.parametrize("name", IN_COMFYUI)
def test_in_comfyui(comfyui_jobs, name, job):
    told = comfyui_jobs(name)[job]
    if told["skipped"]:
        pytest.skip(told["skipped"])
    assert not told["error"]


def test_nodes_in_a_server(comfyui, tmp_path):
    """Where even pictures, masks and conditionings are on the device, which has no float64."""
    from demo.server import ComfyServer

    name = REAL or "second without float64"
    options = ["--gpu-only", *(["--directml"] if device_of(name) == second_device.NAME else [])]
    with ComfyServer(comfyui, tmp_path, device=options, environment=environment(comfyui, name)) as server:
        graphs = Graphs(server)
        node, loaded = graphs.node, {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2]}
        graph = graphs.forget("cat", record=True)
        pictures = {
            "looked": node("FMN_RecordPictureAttention", **loaded, image=["decode", 0], text="a cat", num_samples=1),
            "gated": node("FMN_GatePatch", conditioning=["asked", 0], lora=["forget", 0]),
            "paper": node("FMN_ForgetConcept", **loaded, concept="cat", images=["decode", 0], mask=["look", 1]),
            "both": node("FMN_StackPatches", model=["load", 0], clip=["load", 1], lora_1=["forget", 0], lora_2=["paper", 0]),
            "again": {**graph["sample"], "inputs": {**graph["sample"]["inputs"], "positive": ["gated", 0]}},
        }
        pictures["again"]["inputs"]["model"] = ["both", 0]
        graphs.set_preset(pictures, "paper", "paper", **{k: v for k, v in QUICK.items() if k != "attack_rounds"})
        shown = {
            "compared": node(
                "FMN_CompareTokenAttention", first=["record", 1], second=["looked", 0],
                first_image=["decode", 0], second_image=["looked", 1],
            ),
            "measured": node(
                "FMN_EvaluatePatch", **loaded, lora=["both", 2], prompts=1, num_inference_steps=1, resolution=64
            ),
            "redrawn": node("VAEDecode", samples=["again", 0], vae=["load", 2]),
        }  # fmt: skip
        outputs = {"compared": ["compared", 0], "measured": ["measured", 1], "redrawn": ["redrawn", 0]}
        seen = {f"see {name}": node("PreviewImage", images=image) for name, image in outputs.items()}
        saved = {
            "saved": node("FMN_SavePatch", lora=["both", 2], filename_prefix="both"),
            "data": node("FMN_SaveTokenAttention", recording=["looked", 0], image=["looked", 1]),
        }
        answer = server.run({**graph, **pictures, **shown, **seen, **saved})
    assert {*seen, *saved, "show", "map"} <= {*answer}
