"""The settings dataclasses as Gradio components: label, help, default and bounds of each field."""

from __future__ import annotations

import dataclasses

import gradio as gr

SLIDES = 1000  # a range beyond it is typed
RADIO = 4  # choices that are shown side by side


def component(field: dataclasses.Field, id: str, visible: bool = True):
    """One component for a field; to be called inside Blocks."""
    limits = field.metadata
    common = {
        "label": field.name.replace("_", " ").capitalize(),
        "info": limits["help"].replace("`", ""),
        "value": field.default,
        "elem_id": f"fmn_{id}_{field.name}",
        "visible": visible,
    }
    if limits["choices"] and len(limits["choices"]) <= RADIO:
        return gr.Radio(choices=[*limits["choices"]], **common)
    if limits["choices"]:
        return gr.Dropdown(choices=[*limits["choices"]], **common)
    if isinstance(field.default, bool):
        return gr.Checkbox(**common)
    if isinstance(field.default, str):
        return gr.Textbox(lines=2 if limits["multiline"] else 1, **common)
    whole = isinstance(field.default, int)
    if limits["max"] <= SLIDES and limits["step"] != 1e-6:
        return gr.Slider(minimum=limits["min"], maximum=limits["max"], step=limits["step"] or 1, **common)
    return gr.Number(precision=0 if whole else None, **common)


def components(kind: type, id: str, *, advanced: bool, without: tuple[str, ...] = ()) -> dict:
    """Name -> component of the settings for every day, or of the advanced ones."""
    fields = [f for f in dataclasses.fields(kind) if f.metadata["advanced"] == advanced and f.name not in without]
    return {field.name: component(field, id) for field in fields}
