"""The panel that has a concept forgotten."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gradio as gr
from modules import shared

from fmn_core.erasure.config import CONCEPT_HELP, ForgetSettings

from .forms import converted, folder_pictures, settings_of
from .jobs import Job
from .panel import Submit, submitted
from .settings_ui import component, components
from .work import Asked, pictures_for, submit_forget


def forget_panel() -> Submit:
    """Builds the panel; to be called inside Blocks."""
    concept = gr.Textbox("", label="Concept", info=CONCEPT_HELP, lines=2, placeholder="cat", elem_id="fmn_concept")
    settings: dict = {}
    settings |= some(("preset",))
    for row in (("mode", "concept_type"), ("replacement", "keep")):
        with gr.Row():
            settings |= some(row)
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
    with gr.Accordion("Training", open=False, elem_id="fmn_training"):
        settings |= components(ForgetSettings, "forget", advanced=False, without=(*settings,))
    with gr.Accordion("Advanced", open=False, elem_id="fmn_advanced"):
        settings |= components(ForgetSettings, "forget", advanced=True)
    with gr.Row():
        name = gr.Textbox(
            "",
            label="Name of the patch",
            info="Of the LoRA file, as prompts call it. Empty: made of the concept. A name in use is never taken over.",
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

    def submit(concept, name, card, files, folder, masks, *values) -> str:
        named = dict(zip(settings, values, strict=True))
        folder = "" if shared.cmd_opts.hide_ui_dir_config else folder
        return submitted(asked_of, concept, name, card, files, folder, masks, **named)

    return button, submit, [concept, name, card, files, folder, masks, *settings.values()], message


def some(names: tuple[str, ...]) -> dict:
    """Components of these settings alone, in this order."""
    fields = {field.name: field for field in dataclasses.fields(ForgetSettings)}
    return {name: component(fields[name], "forget") for name in names}


def asked_of(concept: str, name: str, card: bool, files, folder: str, masks, **settings) -> Job:
    """A job from the panel's values; raises ForgetError for those that cannot work."""
    chosen = settings_of(ForgetSettings, settings)
    sources = [path_of(file) for file in files or []] or folder_pictures(folder)
    images, mask = pictures_for(chosen, sources, [path_of(file) for file in masks or []])
    return submit_forget(Asked(converted("concept", concept, ""), chosen, name, images, mask, card))


def path_of(file) -> Path:
    """An uploaded file: a path in Gradio 4, an object with a name before."""
    return Path(getattr(file, "name", file))
