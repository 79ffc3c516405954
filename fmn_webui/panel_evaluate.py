"""The panel that measures a patch."""

from __future__ import annotations

import gradio as gr

from fmn_core.errors import ForgetError
from fmn_core.evaluation.config import EvaluationConfig

from .forms import settings_of
from .jobs import Job
from .names import NONE
from .panel import Submit, patch_dropdown, refresh_button, submitted
from .panel_forget import path_of
from .settings_ui import components
from .tasks import pictures_for, submit_evaluate


def evaluate_panel() -> Submit:
    """Builds the panel; to be called inside Blocks."""
    patch = patch_dropdown("Patch", "evaluate_patch", "It is compared with the model without it, at equal seeds.")
    refresh_button([patch], "evaluate")
    settings = components(EvaluationConfig, "evaluate", advanced=False)
    with gr.Accordion("Advanced", open=False):
        settings |= components(EvaluationConfig, "evaluate", advanced=True)
        files = gr.File(
            label="Pictures of the concept, for the inversion", file_count="multiple", file_types=["image"],
            elem_id="fmn_evaluate_files",
        )  # fmt: skip
    save_as = gr.Textbox(
        "", label="Save a copy with the report in it as", info="Empty: none is saved.", elem_id="fmn_evaluate_save"
    )
    button = gr.Button("Evaluate", variant="primary", elem_id="fmn_evaluate")
    message = gr.HTML(elem_id="fmn_evaluate_message")

    def submit(patch, files, save_as, *values) -> str:
        return submitted(job_of, patch, files, save_as, **dict(zip(settings, values, strict=True)))

    return button, submit, [patch, files, save_as, *settings.values()], message


def job_of(patch: str, files, save_as: str, **settings) -> Job:
    """A job from the panel's values; raises ForgetError for those that cannot work."""
    if patch in (None, "", NONE):
        raise ForgetError("There is no patch to evaluate: choose one.")
    chosen = settings_of(EvaluationConfig, settings)
    images, _ = pictures_for(chosen, [path_of(file) for file in files or []])
    return submit_evaluate(patch, chosen, images, save_as)
