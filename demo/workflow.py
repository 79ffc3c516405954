"""Saved workflows as the API takes them."""

from __future__ import annotations

import json
from pathlib import Path

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def load_workflow(path: Path, object_info: dict) -> dict[str, dict]:
    """A workflow file (UI format 0.4) in API format, as the page would queue it.

    `object_info` is the server's; it names each node's widgets in the order in which the file lists their values.
    Raises ValueError for a node that the server does not have.
    """
    workflow = json.loads(path.read_text())
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        if node["type"] not in object_info:
            raise ValueError(f"{path.name} uses the node {node['type']}, which this server does not have.")
        inputs = dict(zip(widget_names(object_info[node["type"]]), node.get("widgets_values", []), strict=False))
        inputs.pop(None, None)
        inputs |= {i["name"]: sources[i["link"]] for i in node.get("inputs", []) if i.get("link") is not None}
        title = node.get("title", node["type"])
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


def by_title(prompt: dict[str, dict]) -> dict[str, str]:
    """Title of a node -> its id in an API-format prompt."""
    return {node["_meta"]["title"]: id for id, node in prompt.items()}


def widget_names(info: dict) -> list[str | None]:
    """A node's widgets in order; None stands for the page's own control after a seed."""
    names: list[str | None] = []
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, *options = info["input"][group][name]
            options = options[0] if options else {}
            if (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput"):
                names.append(name)
                if options.get("control_after_generate", name in ("seed", "noise_seed")):
                    names.append(None)
    return names
