"""Forgetting by the API of each webui that is installed (FMN_A1111_DIR, FMN_FORGE_DIR, FMN_REFORGE_DIR, FMN_NEO_DIR)."""

from __future__ import annotations

import base64
import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webui_server import WEBUIS, WebuiServer, installed

from demo.export import export_forge, export_webui

PICTURE = {"prompt": "a photo of a cat", "seed": 1, "steps": 4, "width": 128, "height": 128, "cfg_scale": 3}
SMALL = {"resolution": 128, "num_inference_steps": 2, "num_images": 1}


@pytest.fixture(scope="module", params=WEBUIS)
def webui(request, comfyui, tmp_path_factory):
    """An installed webui as a server with the pack and the demo model in it, in the sizes that it takes."""
    folder, work = installed(request.param), tmp_path_factory.mktemp(request.param)
    models = work / "models/Stable-diffusion"
    with torch.no_grad():
        if request.param == "a1111":
            export_webui(models, autoencoder="fmn_core.hosts.webui.taesd.TAESD")
        else:
            export_forge(models)
    (checkpoint,) = models.glob("*.safetensors")
    with WebuiServer(request.param, folder, work) as server:
        server.checkpoint = checkpoint
        yield server


@pytest.fixture(scope="module")
def draw(webui):
    """draw(key=value, ...) -> pictures as arrays, and the first one's infotext."""

    def draw(**options):
        made = webui.post("sdapi/v1/txt2img", **PICTURE | options)
        opened = [Image.open(io.BytesIO(base64.b64decode(image))) for image in made["images"]]
        return [np.asarray(image) for image in opened], made["info"]

    return draw


def changed(before, after):
    """How far one picture is from another, on average."""
    return np.abs(before.astype(float) - after).mean()


def finished(webui, job):
    """The job, once it is over."""
    while (now := webui.get(f"fmn/jobs/{job['id']}"))["state"] in ("queued", "running"):
        time.sleep(0.2)
    return now


def script(*arguments):
    return {"alwayson_scripts": {"Forget-Me-Not": {"args": arguments}}}


def test_it_starts_without_an_error_and_lists_one_checkpoint(webui):
    assert [Path(each["filename"]).name for each in webui.get("sdapi/v1/sd-models")] == [webui.checkpoint.name]
    ours = re.findall(r'File ".*(?:forget-me-not|fmn_webui|fmn_core)/.*', webui.log.read_text())  # in a traceback
    assert not ours, ours


def test_a_concept_is_forgotten_and_the_model_left_as_it_was(webui, draw):
    before, _ = draw()
    job = finished(webui, webui.post("fmn/forget", concept="cat", name="no cat", **SMALL))
    assert job["state"] == "done" and "no cat.png" in job["files"], job["error"] or job["lines"]
    after, _ = draw()
    assert np.array_equal(before, after)

    patched, _ = draw(prompt="a photo of a cat <lora:no cat:1>")
    outside, info = draw(**script("no cat", 1.0))
    assert np.array_equal(patched, outside) and not np.array_equal(before, patched) and "FMN patches" in info
    kept = {"prompt": "a photo of a house"}
    house, with_patch = draw(**kept)[0], draw(**kept, **script("no cat", 1.0))[0]
    assert changed(before[0], patched[0]) > 5 * changed(house[0], with_patch[0]), "the patch is on other layers"

    again, info = draw()
    assert np.array_equal(before, again) and "FMN patches" not in info
    assert "no cat" in [each["name"] for each in webui.get("sdapi/v1/loras")]


def test_training_can_be_stopped_and_leaves_the_model_as_it_was(webui, draw):
    before, _ = draw()
    wanted = {"name": "stopped", "preset": "paper", "steps": 500, "card": False}
    job = webui.post("fmn/forget", concept="dog", **wanted, **SMALL)
    while (now := webui.get(f"fmn/jobs/{job['id']}"))["step"] < 4 and now["state"] in ("queued", "running"):
        time.sleep(0.05)
    webui.post(f"fmn/jobs/{job['id']}/interrupt")
    job = finished(webui, job)
    assert job["state"] == "stopped" and "stopped-unfinished.safetensors" in job["files"], job["error"]
    models = webui.work / "models"
    assert [*(models / "forget-me-not").glob("*.checkpoint")]
    assert not [path.name for path in (models / "Lora").iterdir() if path.is_dir()], (
        "the page of LoRAs has a button for each"
    )
    assert np.array_equal(before, draw()[0])


def test_heat_maps_come_with_the_picture_and_do_not_change_it(draw):
    plain, _ = draw()
    with_maps, info = draw(**script("None", 1, "None", 1, "None", 1, True, True, "cat"))
    assert len(with_maps) == len(plain) + 1 and np.array_equal(plain[0], with_maps[0])
    assert with_maps[-1].shape == plain[0].shape and "FMN heat map words: cat" in info
