"""The panel that has a concept forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from modules import shared

from fmn_core.erasure.config import CONCEPT_HELP, PRESET_HELP, PRESETS, ForgetConfig

from .forms import converted, folder_pictures, forget_config
from .jobs import Job
from .panel import QUIET, Submit, submitted
from .settings_ui import component
from .tasks import ForgetRequest, pictures_for, submit_forget


def forget_panel() -> Submit:
    """Builds the panel; to be called inside Blocks."""
    concept = gr.Textbox("", label="Concept", info=CONCEPT_HELP, lines=2, placeholder="cat", elem_id="fmn_concept")
    preset = gr.Radio(
        choices=[*PRESETS], value="fast", label="Preset", info=PRESET_HELP.replace("`", ""), elem_id="fmn_forget_preset"
    )
    settings: dict = {}
    for row in (("mode", "concept_type"), ("target", "preserve")):
        with gr.Row():
            settings |= {name: component(FORM_FIELDS[name], "forget") for name in row}
    files, masks, folder = picture_fields()
    more: dict = {}
    for title, advanced in (("Settings", False), ("Advanced", True)):
        with gr.Accordion(title, open=False, elem_id=f"fmn_{title.lower()}"):
            names = [name for name, f in FORM_FIELDS.items() if f.metadata["advanced"] == advanced and name not in settings]
            more |= {
                name: component(fields_of("fast").get(name, FORM_FIELDS[name]), "forget", visible=name in fields_of("fast"))
                for name in names
            }
    preset.change(lambda preset: shown_for(preset, [*more]), [preset], [*more.values()], **QUIET)
    settings |= more
    with gr.Row():
        name = gr.Textbox(
            "",
            label="Name of the patch",
            info="Of the LoRA file, as prompts call it. Empty: made of the concept. An existing file is never overwritten.",
            elem_id="fmn_name",
        )
        card = gr.Checkbox(
            label="Picture for its card",
            info="Draws the concept without and with the patch; two pictures' time.",
            value=True,
            elem_id="fmn_card",
        )
    button = gr.Button("Forget", variant="primary", elem_id="fmn_forget")
    message = gr.HTML(elem_id="fmn_forget_message")

    inputs = {"concept": concept, "name": name, "card": card, "files": files, "folder": folder, "masks": masks}
    inputs |= {"preset": preset, **settings}

    def submit(*values) -> str:
        named = dict(zip(inputs, values, strict=True))
        read = fields_of(named["preset"])
        named = {key: value for key, value in named.items() if key in read or key not in settings}
        if shared.cmd_opts.hide_ui_dir_config:
            named["folder"] = ""
        return submitted(job_of, **named)

    return button, submit, [*inputs.values()], message


def picture_fields() -> tuple[gr.File, gr.File, gr.Textbox]:
    """The fields for pictures, their masks, and a folder of pictures; to be called inside Blocks."""
    with gr.Accordion("Pictures of the concept", open=False):
        gr.Markdown(
            "For all presets but `fast`. Without them the model makes its own. Of several concepts as many each, in the "
            "order of their lines. A mask is white where the concept is: one for all pictures, or one for each in their "
            "order."
        )
        with gr.Row():
            files = gr.File(label="Pictures", file_count="multiple", file_types=["image"], elem_id="fmn_pictures")
            masks = gr.File(label="Masks", file_count="multiple", file_types=["image"], elem_id="fmn_masks")
        folder = gr.Textbox(
            "",
            label="Or a folder on the server",
            info="Its pictures are used where none are uploaded.",
            elem_id="fmn_folder",
            visible=not shared.cmd_opts.hide_ui_dir_config,
        )
    return files, masks, folder


def fields_of(preset: str) -> dict[str, dataclasses.Field]:
    """The settings that a preset reads, by name."""
    return {f.name: f for f in dataclasses.fields(PRESETS.get(preset, ForgetConfig))}


FORM_FIELDS = {name: f for preset in PRESETS for name, f in fields_of(preset).items()}


def shown_for(preset: str, names: Sequence[str]) -> list[dict]:
    """Updates of these settings' components: those that the preset does not read are hidden, the others have its choices and
    its help."""
    fields, updates = fields_of(preset), []
    for name in names:
        f, update = fields.get(name), {"visible": name in fields}
        if f and f.metadata["choices"]:
            update |= {"choices": [*f.metadata["choices"]], "value": f.default}
        if f:
            update["info"] = f.metadata["help"].replace("`", "")
        updates.append(gr.update(**update))
    return updates


def job_of(concept: str, name: str, *, card: bool, files, folder: str, masks, preset: str, **settings) -> Job:
    """A job from the panel's values; raises ForgetError for those that cannot work."""
    config = forget_config(preset, settings)
    sources = [path_of(file) for file in files or []] or folder_pictures(folder)
    images, mask = pictures_for(config, sources, [path_of(file) for file in masks or []])
    return submit_forget(ForgetRequest(converted("concept", concept, ""), config, name, images, mask, card))


def path_of(file) -> Path:
    """An uploaded file: a path in Gradio 4, an object with a name before."""
    return Path(getattr(file, "name", file))
