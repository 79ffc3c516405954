"""ComfyUI's real web page in headless Chromium: its own version and the newest, on the classic canvas and in Nodes 2.0.
FMN_SCREENSHOTS names a folder to keep screenshots in, FMN_FRONTEND the static files of the newest page."""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import ROOT
from waiting import STALLED, while_changing

PATIENCE = 1000 * STALLED  # milliseconds for what comes in a moment where the machine is idle
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync "
    "--disable-features=LocalNetworkAccessChecks"  # a page whose files `serve` gives may then still open its websocket
).split()
PAGES = [(version, rendering) for version in ("own", "newest") for rendering in ("classic", "nodes-2")]
# What the page says in its console whatever packs there are: here no network, a new user, and for the newest page an old
# server.
HOSTS_OWN = re.compile(
    r"status of 404 .*(/user\.css|/favicon\.ico|/api/userdata|/api/jobs\?|/templates/)"
    r"|^Error loading core workflow templates"
    r"|JobsApiError: Failed to fetch jobs: 404"
    r"|https://(api\.comfy\.org|huggingface\.co)/"
    r"|^TypeError: Cannot read properties of undefined \(reading 'id'\)\s+at onChange \(\S+/assets/index-"  # of 1.32.9
)


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = os.environ.get("FMN_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium is installed: the page tests need one (or FMN_CHROMIUM with its path)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=FLAGS)


@pytest.fixture
def screenshots(tmp_path):
    folder = Path(os.environ.get("FMN_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def page(request, browser, server):
    """A page of the server; parametrized with a version and a rendering, or its own on the classic canvas."""
    kind = version, rendering = getattr(request, "param", PAGES[0])
    settings = {"Comfy.VueNodes.Enabled": rendering == "nodes-2", "Comfy.TutorialCompleted": True}
    body, headers = json.dumps(settings).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/settings", body, headers, method="POST")
    urllib.request.urlopen(request, timeout=STALLED).close()
    page = browser.new_page(viewport={"width": 1900, "height": 1300})
    page.set_default_timeout(PATIENCE)
    page.kind, page.said = kind, []
    page.on("console", lambda m: page.said.append((m.type, f"{m.text} {m.location.get('url', '')}")))
    page.on("pageerror", lambda error: page.said.append(("error", f"{error} {error.stack}")))
    if version == "newest":
        serve(page, server, newest_frontend())
    yield page
    page.close()


def newest_frontend() -> Path:
    """The static files that `python install.py test` set up, or FMN_FRONTEND; skips the test where there are none."""
    own = ROOT / ".venv/frontend/comfyui_frontend_package/static"
    folder = Path(os.environ.get("FMN_FRONTEND", own))
    if not (folder / "index.html").exists():
        pytest.skip(f"the newest page is not in {folder}: run `python install.py test`, or set FMN_FRONTEND")
    return folder


def serve(page, server, frontend: Path) -> None:
    """Gives a page these static files in place of the server's own; all else is the server's answer."""

    def answer(route):
        name = urlsplit(route.request.url).path.lstrip("/") or "index.html"
        if (frontend / name).is_file():
            route.fulfill(path=frontend / name)
        else:
            route.continue_()

    page.route(f"{server.url}/**", answer)


def open_page(page, server, query=""):
    page.goto(f"{server.url}/{query}")
    page.wait_for_function("window.app?.graph && window.app.vueAppReady")
    page.wait_for_load_state("networkidle")


def open_template(page, server, path: Path):
    """Opens a workflow as an example, until the page shows its nodes: by type, since the page's own default graph may
    have as many."""
    open_page(page, server, f"?template={path.stem}&source=forget-me-not")
    wait_for_nodes(page, path)


def wait_for_nodes(page, path: Path):
    wanted = sorted(node["type"] for node in json.loads(path.read_text())["nodes"])
    shown = "wanted => JSON.stringify(app.graph._nodes.map(node => node.type).sort()) == JSON.stringify(wanted)"
    page.wait_for_function(shown, arg=wanted)


def wait_for_frames(page, count: int = 5):
    """Until the page has drawn what it knows."""
    frames = "n => new Promise(done => { const step = () => n-- ? requestAnimationFrame(step) : done(); step() })"
    page.evaluate(frames, count)


def run(page, server):
    """Runs the page's graph; returns the job's history."""
    known = set(server.get("history"))
    page.evaluate("app.queuePrompt(0)")
    return wait_for_job(page, server, known)


def wait_for_job(page, server, known):
    """The history of the job that is not among those known, once it has ended and the page has heard of it."""

    def look():
        page.wait_for_timeout(200)  # in which the page does its own work
        return {id: job for id, job in server.get("history").items() if id not in known}, server.log.stat().st_size

    for new, _ in while_changing(look):
        if new:
            wait_for_frames(page, 30)
            return list(new.values())[0]
    raise AssertionError(f"The job does not end: {server.log.read_text()[-3000:]}")


def overview(page):
    """Shows the whole graph: the page draws no fields of what is out of sight."""
    page.evaluate("Object.assign(app.canvas.ds, { scale: 0.4, offset: [200, 200] }); app.canvas.setDirty(true, true)")
    wait_for_frames(page, 20)


def troubles(page) -> list[str]:
    """What the console said that is ours to mend: errors that are not the page's own, and warnings that name the pack."""
    ours = re.compile(r"FMN_|forget-me-not|ForgetMeNot", re.IGNORECASE)
    errors = [text for kind, text in page.said if kind == "error" and not HOSTS_OWN.search(text)]
    return errors + [text for kind, text in page.said if kind == "warning" and ours.search(text)]
