"""What nodes say, on the nodes themselves in ComfyUI's real web page."""

from __future__ import annotations

import json
import re

import pytest
from comfyui_page import (  # noqa: F401
    PAGES,
    WORKFLOWS,
    browser,
    open_template,
    page,
    run,
    troubles,
    wait_for_frames,
    wait_for_job,
)
from conftest import ROOT

TEXTS = "app.graph._nodes.map(node => [Number(node.id), node.widgets?.find(widget => widget.name == 'result')?.value])"
[GATE] = [path for path in WORKFLOWS if path.stem == "gate-a-patch"]
[LEARN] = [path for path in WORKFLOWS if path.stem == "learn-a-concept"]


def seen_text(page, id):  # noqa: F811
    """What a node's field shows, in Nodes 2.0 or on the canvas, once the node is in sight: the page draws none before."""
    page.evaluate(
        """id => {
            app.canvas.ds.scale = 1
            app.canvas.centerOnNode(app.graph.getNodeById(id))
            app.canvas.setDirty(true, true)
        }""",
        id,
    )
    wait_for_frames(page, 20)
    return page.evaluate(
        """id => {
            const fields = [...document.querySelectorAll(`[data-node-id="${id}"] textarea`)]
            const widget = app.graph.getNodeById(id).widgets.find(widget => widget.name == 'result')
            const field = fields.length ? fields.at(-1) : widget.element
            return field.isConnected ? field.value : null
        }""",
        id,
    )


@pytest.mark.parametrize("page", [PAGES[0], PAGES[-1]], indirect=True, ids="-".join)
def test_what_a_node_said_stays_on_it(page, server):  # noqa: F811
    open_template(page, server, GATE)
    saved = "app.graph.serialize().nodes.map(node => [Number(node.id), node.widgets_values])"
    values = {node["id"]: node.get("widgets_values") for node in json.loads(GATE.read_text())["nodes"]}
    gates = [node["id"] for node in json.loads(GATE.read_text())["nodes"] if node["type"] == "FMN_GatePatch"]
    assert all(values[id] == found for id, found in page.evaluate(saved) if id in gates)
    # Each page asks for something else, or the host takes the pictures from its cache and does not come to the gates.
    end = 0.9 - 0.1 * PAGES.index(page.kind)
    page.evaluate(
        """end => app.graph._nodes.flatMap(node => node.widgets ?? []).forEach(widget => {
            widget.value = { end_strength: end, steps: 1 }[widget.name] ?? widget.value
        })""",
        end,
    )
    job = run(page, server)
    said = {int(id): out["text"][0] for id, out in job["outputs"].items() if "text" in out}
    assert len(said) == 2 and all("the patch of" in text for text in said.values())
    assert {id: text for id, text in page.evaluate(TEXTS) if text} == said
    assert {id: seen_text(page, id) for id in said} == said

    prompt = page.evaluate("app.graphToPrompt()")
    assert "the patch of" not in json.dumps(prompt)
    assert all(found == [*values[id][:2], end, *values[id][3:]] for id, found in page.evaluate(saved) if id in gates)
    page.evaluate("app.loadGraphData(app.graph.serialize())")
    assert {id: seen_text(page, id) for id in said} == said
    open_template(page, server, GATE)  # the page anew
    wait_for_frames(page)
    assert {id: seen_text(page, id) for id in said} == said

    harm, id = '<img src=x onerror="window.harmed = 1"> `b`', min(said)
    page.evaluate("([id, text]) => app.graph.getNodeById(id).onExecuted({ text: [text] })", [id, harm])
    wait_for_frames(page, 20)
    assert seen_text(page, id) == harm
    assert page.evaluate("[window.harmed ?? null, document.querySelector('img[src=x]')]") == [None, None]
    assert not troubles(page), troubles(page)


def test_a_node_that_is_stopped_says_where_its_work_is(page, server):  # noqa: F811
    open_template(page, server, LEARN)
    [id] = page.evaluate("app.graph._nodes.filter(node => node.type == 'FMN_InvertConcept').map(node => Number(node.id))")
    page.evaluate("id => { app.graph.getNodeById(id).widgets.find(w => w.name == 'steps').value = 10000 }", id)
    page.evaluate(
        """id => app.api.addEventListener("progress", ({ detail }) => {
            if (Number(detail.node) == id && detail.max >= 10000 && detail.value > 1) window.training = true
        })""",
        id,
    )
    known = set(server.get("history"))
    page.evaluate("app.queuePrompt(0)")
    page.wait_for_function("window.training")
    server.interrupt()
    wait_for_job(page, server, known)
    stopped = "id => app.graph.getNodeById(id).widgets.find(w => w.name == 'result').value.startsWith('Stopped.')"
    page.wait_for_function(stopped, arg=id)
    assert re.search(r"is in \S+unfinished\S*\.safetensors\. Queue again", seen_text(page, id))


def test_every_node_that_says_something_has_a_place_for_it(server):
    listed = set(re.findall(r'"(FMN_\w+)"', (ROOT / "web/forget_me_not.js").read_text()))
    sources = "\n".join(path.read_text() for path in (ROOT / "nodes").glob("*.py"))
    classes = re.split(r"\nclass ", sources)
    saying = {re.search(r'node_id="(\w+)"', text)[1] for text in classes if "ui.PreviewText(" in text}
    assert listed == saying and listed <= set(server.get("object_info"))
