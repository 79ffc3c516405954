"""What the tab's panels share."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from . import webui
from .escaping import Markup, markup
from .jobs import Job
from .status import error_html
from .tasks import patches

# A panel's button, what it calls, its inputs, and where a sentence about them goes.
Submit = tuple[gr.Button, Callable[..., str], list, gr.HTML]

QUIET = {"queue": False, "show_progress": "hidden"}  # for events that answer at once


def patch_dropdown(label: str, id: str, info: str) -> gr.Dropdown:
    """A choice between the patches in the LoRA folder; names that came since are taken too."""
    names = ["None", *patches()]
    return gr.Dropdown(choices=names, value="None", label=label, info=info, elem_id=f"fmn_{id}", allow_custom_value=True)


def refresh_button(dropdowns: list, id: str) -> gr.Button:
    """A button that refreshes the list of patches."""
    button = gr.Button("Refresh the list", elem_id=f"fmn_{id}_refresh", size="sm")
    button.click(
        lambda: one_or_all([gr.update(choices=["None", *patches()]) for _ in dropdowns]), [], dropdowns, queue=False
    )
    return button


def one_or_all(updates: list):
    """What Gradio takes for one output or for several."""
    return updates[0] if len(updates) == 1 else updates


def submitted(submit: Callable[..., Job], *arguments, **named) -> Markup:
    """What a panel says beside its button: where the job stands, or why there is none."""
    try:
        job = submit(*arguments, **named)
    except Exception as error:  # what nobody foresaw is told like the rest
        return error_html(webui.error_sentence(error))
    return markup('<p class="fmn-faint">Queued: {}. It continues when this page is closed.</p>', job.kind)
