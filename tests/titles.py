"""Nodes of a workflow by their titles, and what a server drew by them."""

from __future__ import annotations

import copy

from demo.run import load_pictures
from demo.workflow import by_title


def titled(workflow):
    return {node["_meta"]["title"]: node["inputs"] for node in workflow.values() if "_meta" in node}


def node_id(workflow, title):
    return by_title(workflow)[title]


def without_pictures(workflow):
    """A copy that draws nothing: what only pictures and heat maps ask for is not run."""
    shown = [id for id, node in workflow.items() if node["class_type"] in ("PreviewImage", "SaveImage")]
    return copy.deepcopy({id: node for id, node in workflow.items() if id not in shown})


def pictures(server, workflow, outputs, title):
    return load_pictures(server, outputs[node_id(workflow, title)]["images"])
