"""The API in a webui's process: run by tests/webui/test_webui_script.py, once in each flavour with its Gradio."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import math
import re

import gradio as gr
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import call_queue
from PIL import Image, ImageChops
from presets import probe_little
from webui.ui import host_page
from webui.ui.fixtures import client

from fmn_core import log
from fmn_core.erasure.config import PRESETS, make_config
from fmn_core.erasure.forget import forget
from fmn_core.evaluation.config import EvaluationConfig
from fmn_core.inversion.config import InversionConfig
from fmn_core.inversion.textual_inversion import invert_pictures
from fmn_core.log import ProgressBar
from fmn_core.patch.file import read_patch, save_patch
from fmn_core.patch.patch import Patch
from fmn_webui import forms, jobs, names, receiving, webui
from fmn_webui.api import ROUTES
from fmn_webui.limits import MOST_BODY
from fmn_webui.status import status_html
from fmn_webui.tasks import JOBS, patches_in


@pytest.fixture
def at_work():
    """A job that has begun, and the host that works on it."""
    job = jobs.Job("forget", "Forget cat", lambda job: None, state="running")
    JOBS.jobs.append(job)
    yield job, webui.host_for(job)
    JOBS.jobs.remove(job)


@pytest.mark.parametrize("look", ["page", "API", "nobody"])
def test_previews_are_made_while_somebody_looks_at_the_job(script, loras, at_work, monkeypatch, look):
    host_page.set_options(loras, api=True)
    (job, host), asked, made = at_work, client(FastAPI()), []
    preview = lambda: made.append(1) or torch.ones(8, 8, 3)  # noqa: E731
    bar = ProgressBar(host, 3)
    bar.update(preview)
    assert not made and job.step == 1
    answer = {"page": lambda: status_html(JOBS), "API": lambda: asked.get(f"/fmn/jobs/{job.id}").text}
    answer.get(look, lambda: asked.get("/fmn/jobs"))()
    bar.update(preview)
    assert len(made) == (look != "nobody") and (job.preview is None) == (look == "nobody")
    monkeypatch.setattr(jobs, "WATCHED", 0.0)  # nobody has looked for so long
    bar.update(preview)
    assert len(made) == (look != "nobody") and job.step == 3


QUICK = {"steps": 2, "batch_size": 1, "num_images": 1, "num_inference_steps": 2, "resolution": 64}


@pytest.mark.parametrize("kind", ["paper", "balanced", "inversion"])
def test_who_looks_late_sees_what_who_looked_from_the_start_sees(script, loras, at_work, monkeypatch, kind):
    """The picture under the heat map, or the decoder of the guess, is made before the training."""
    monkeypatch.setattr(log, "PREVIEW_EVERY", 0.0)  # at each step, however busy the machine is
    monkeypatch.setattr(log, "PREVIEW_SHARE", 1.0)
    probe_little(monkeypatch.setattr)
    (job, host), shown = at_work, []
    tell = host.show_progress
    for late in (False, True):
        job.looked, job.preview = -math.inf if late else math.inf, None

        def look(step, total, preview):
            tell(step, total, preview)
            if step == total - 1:
                assert (job.preview is None) == late  # noqa: B023
                job.looked = math.inf

        host.show_progress = look
        if kind == "inversion":
            invert_pictures(host, InversionConfig(**QUICK), concept="cat")
        else:
            forget(host, "cat", make_config(kind, **QUICK))
        shown.append(job.preview.image)
    assert shown[0].size == shown[1].size and ImageChops.difference(*shown).getbbox() is None


def test_the_folder_is_walked_once_for_a_request_of_several_patches(script, loras, monkeypatch):
    walks, walk = [], names.lora_files
    monkeypatch.setattr(names, "lora_files", lambda folder: walks.append(folder) or walk(folder))
    host_page.set_options(loras, api=True)
    assert {"cat", "dog"} <= {each["name"] for each in client(FastAPI()).get("/fmn/patches").json()} and len(walks) == 1
    assert len([*patches_in([("cat", 1.0), ("dog", 0.5), ("cat", 0.5)])]) == 3 and len(walks) == 2


def routes():
    return [(method, path.replace("{id}", "none")) for method, path, _ in ROUTES]


@pytest.mark.parametrize("api, nowebui", [*itertools.product([True, False], repeat=2)])
@pytest.mark.parametrize("flag", ["api_auth", "gradio_auth", "gradio_auth_path", "both", "no user", "a page's own"])
def test_every_route_asks_for_the_password_that_is_set(script, loras, tmp_path, api, nowebui, flag):
    file = tmp_path / "users.txt"
    file.write_text("eve:x, ada:se:cret\n\nbob:y\n")
    users = "eve:x,ada:se:cret"
    flags = {
        "gradio_auth_path": {"gradio_auth_path": str(file)}, "both": {"api_auth": users, "gradio_auth": "mallory:m"},
        "no user": {"gradio_auth": " , nobody"}, "a page's own": {},
    }.get(flag, {flag: users})  # fmt: skip
    host_page.set_options(loras, api=api, nowebui=nowebui, **flags)
    app = FastAPI()
    if flag == "a page's own":
        app.auth = {"ada": "se:cret"}
    asked = client(app)
    if not (api or nowebui):
        assert {asked.request(method, path, json={}).status_code for method, path in routes()} == {404}
        return
    for wrong in (None, ("ada", "x"), ("eve", "se:cret"), ("", ""), ("nobody", ""), ("mallory", "m")):
        for method, path in routes():
            assert asked.request(method, path, json={}, auth=wrong).status_code == 401, (method, path, wrong)
    found = {asked.request(method, path, json={}, auth=("ada", "se:cret")).status_code for method, path in routes()}
    assert found == ({401} if flag == "no user" else {200, 404, 422})


def test_a_file_of_users_that_is_gone_leaves_no_route_open(script, loras):
    host_page.set_options(loras, nowebui=True, gradio_auth_path="/nowhere")
    app = FastAPI()
    with pytest.raises(OSError):  # which the webui logs
        client(app)
    assert TestClient(app).get("/fmn/jobs").status_code == 404


def test_the_routes_are_there_with_the_api_and_take_a_pages_users(script, loras):
    host_page.set_options(loras, api=False)
    assert client(FastAPI()).get("/fmn/jobs").status_code == 404
    host_page.set_options(loras, api=False, nowebui=True)
    assert client(FastAPI()).get("/fmn/jobs").json() == []
    host_page.set_options(loras, api=True)
    with gr.Blocks() as page:
        gr.Markdown("locked")
    page.queue()
    app, *_ = page.launch(prevent_thread_lock=True, auth=[("ada", "se:cret")], quiet=True, show_api=False)
    guarded = client(app)
    for wrong in (None, ("ada", "x"), ("eve", "se:cret"), ("", "")):
        for path in ("/fmn/jobs", "/fmn/patches"):
            assert guarded.get(path, auth=wrong).status_code == 401
        assert guarded.post("/fmn/forget", json={"concept": "cat"}, auth=wrong).status_code == 401
    assert guarded.get("/fmn/jobs", auth=("ada", "se:cret")).json() == []
    assert [each["name"] for each in guarded.get("/fmn/patches", auth=("ada", "se:cret")).json()] == ["cat", "dog"]
    page.close()


@pytest.fixture
def api(script, loras):
    """The API, without a password; what it queues never runs."""
    host_page.set_options(loras, api=True)
    with call_queue.queue_lock:
        yield client(FastAPI())
        for job in JOBS:
            JOBS.interrupt(job.id)


def settings_and(kind, **own):
    return {field.name: field.default for field in dataclasses.fields(kind)} | own


BODIES = {
    "/fmn/forget": settings_and(PRESETS["robust"], concept="cat", preset="robust", name="", images=[], masks=[], card=True),
    "/fmn/evaluate": settings_and(EvaluationConfig, patch="cat", save_as="", images=[]),
    "/fmn/stack": {"patches": [["cat", 1.0]], "save": True, "name": ""},
}
FIELDS = [(path, key) for path, body in BODIES.items() for key in body]
WRONG = [
    "null",
    "NaN",
    "-Infinity",
    "1" + 3999 * "0",
    '"cat\\ud800"',
    "[[[]]]",
    '{"x": 1}',
    '["x"]',
    '[["cat", NaN]]',
    "1e999",
]


@pytest.mark.parametrize("path, key", FIELDS)
def test_every_field_is_checked_and_refused_in_a_sentence(api, path, key):
    before = [*JOBS]
    for wrong in WRONG:
        rest = json.dumps({each: value for each, value in BODIES[path].items() if each != key})
        body = f'{rest[:-1]}, "{key}": {wrong}}}'
        answer = api.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422 and re.search(r"[a-z]{2,} .*\.$", answer.json()["detail"], re.S), (
            wrong,
            answer.text,
        )
    assert [*JOBS] == before


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FIELDS), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6,
))  # fmt: skip
def test_no_value_ends_in_a_traceback(script, loras, field, value):
    host_page.set_options(loras, api=True)
    path, key = field
    with call_queue.queue_lock:
        body = json.dumps(BODIES[path] | {key: value})
        answer = client(FastAPI()).post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (202, 413, 422) and answer.json(), answer.text
        for job in JOBS:
            JOBS.interrupt(job.id)


def test_what_is_too_much_is_refused_before_it_is_read(api, monkeypatch):
    as_json = {"Content-Type": "application/json"}
    large = api.post("/fmn/forget", content=b"{}", headers=as_json | {"Content-Length": str(MOST_BODY + 1)})
    assert large.status_code == 413 and "64 MB" in large.json()["detail"]
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert api.post("/fmn/stack", content=b"{}", headers={"Content-Type": kind}).status_code == 415
    monkeypatch.setattr(receiving, "MOST_BODY", 1000)
    assert api.post("/fmn/forget", content=iter([b" " * 600] * 2), headers=as_json).status_code == 413
    monkeypatch.setattr(receiving, "MOST_RECEIVED", 500)
    assert api.post("/fmn/forget", content=b" " * 600, headers=as_json).status_code == 429
    monkeypatch.setattr(receiving, "MOST_REQUESTS", 0)
    assert api.post("/fmn/forget", content=b"{}", headers=as_json).status_code == 429
    assert (receiving.RECEIVER.requests, receiving.RECEIVER.held) == (0, 0)


def test_a_full_queue_refuses_before_pictures_are_decoded(api, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_JOBS", 1)
    monkeypatch.setattr(forms, "read_pictures", None)
    data = io.BytesIO()
    Image.new("L", (8000, 7999)).save(data, "png")
    body = {"concept": "cat", "images": [base64.b64encode(data.getvalue()).decode()] * 3, "card": False}
    first = api.post("/fmn/forget", json=body)
    assert first.status_code == 202 and JOBS.find(first.json()["id"]).holds == 0
    full = api.post("/fmn/forget", json=body | {"preset": "paper"})
    assert full.status_code == 429 and "jobs wait" in full.json()["detail"]


def test_a_job_holds_its_pictures_as_training_can_use_them(api):
    data = io.BytesIO()
    Image.new("RGB", (3000, 2000)).save(data, "jpeg")
    body = {"concept": "cat", "images": [base64.b64encode(data.getvalue()).decode()] * 2, "preset": "paper"}
    job = JOBS.find(api.post("/fmn/forget", json=body | {"resolution": 128}).json()["id"])
    assert 0.9 * 2 * 3 * 256**2 < job.holds <= 2 * 3 * 256**2


def test_half_a_character_in_a_file_or_a_job_takes_no_route_away(api, loras):
    patch = read_patch(loras / "cat.safetensors")
    file = loras / "half.safetensors"
    save_patch(Patch(dict(patch), patch.info | {"concept": "cat\ud800"}), file)
    JOBS.submit("forget", "Forget cat\ud800", lambda job: jobs.JobResult([]))
    assert {"cat", "dog", "half"} == {each["name"] for each in api.get("/fmn/patches").json()}
    assert api.get("/fmn/jobs").json()[-1]["title"].startswith("Forget cat")
    assert status_html(JOBS).encode()
    file.unlink()
