"""The panel that makes one patch of several."""

from __future__ import annotations

import gradio as gr

from .forms import rows_of
from .jobs import Job
from .panel import Submit, patch_dropdown, refresh_button, submitted
from .tasks import submit_stack

ROWS = 6


def stack_panel() -> list[Submit]:
    """Builds the panel, with a button for the report alone and one that saves too; to be called inside Blocks."""
    gr.Markdown("Several patches as one, solved jointly, in which each does what it does alone.")
    patches, strengths = [], []
    for row in range(1, ROWS + 1):
        with gr.Row():
            patches.append(patch_dropdown(f"Patch {row}", f"stack_patch_{row}", ""))
            strengths.append(
                gr.Slider(-2.0, 2.0, value=1.0, step=0.01, label=f"Strength {row}", elem_id=f"fmn_stack_strength_{row}")
            )
    refresh_button(patches, "stack")
    name = gr.Textbox("", label="Name of the stacked patch", info="Empty: made of the concepts.", elem_id="fmn_stack_name")
    with gr.Row():
        report = gr.Button("Report", elem_id="fmn_stack_report")
        save = gr.Button("Stack and save", variant="primary", elem_id="fmn_stack_save")
    message = gr.HTML(elem_id="fmn_stack_message")
    inputs = [name, *patches, *strengths]
    return [
        (report, lambda *values: submitted(job_of, False, *values), inputs, message),
        (save, lambda *values: submitted(job_of, True, *values), inputs, message),
    ]


def job_of(save: bool, name: str, *values) -> Job:
    """A job from the panel's values; raises ForgetError for those that cannot work."""
    rows = zip(values[:ROWS], values[ROWS:], strict=True)
    return submit_stack(rows_of([row for row in rows if row[0] not in (None, "None")]), name, save)
