"""The tab: panels to forget, evaluate and stack on the left, the jobs on the right."""

from __future__ import annotations

import gradio as gr

from .panel import QUIET
from .panel_evaluate import evaluate_panel
from .panel_forget import forget_panel
from .panel_stack import stack_panel
from .status import report_html, status_html
from .tasks import JOBS

TITLE, ID = "Forget-Me-Not", "forget_me_not"


def make_tab() -> list[tuple[gr.Blocks, str, str]]:
    """What `on_ui_tabs` wants: the tab's Blocks, its title and its id."""
    with gr.Blocks(analytics_enabled=False) as tab:
        with gr.Row():
            with gr.Column(scale=3):
                with gr.Tabs(elem_id="fmn_panels"):
                    with gr.Tab("Forget", elem_id="fmn_panel_forget"):
                        submits = [forget_panel()]
                    with gr.Tab("Evaluate", elem_id="fmn_panel_evaluate"):
                        submits.append(evaluate_panel())
                        report = gr.HTML(elem_id="fmn_report")
                    with gr.Tab("Stack", elem_id="fmn_panel_stack"):
                        submits += stack_panel()
            with gr.Column(scale=2, elem_id="fmn_jobs"):
                with gr.Row():
                    interrupt = gr.Button("Interrupt", elem_id="fmn_interrupt", size="sm", min_width=80)
                    clear = gr.Button("Empty the queue", elem_id="fmn_clear", size="sm", min_width=80)
                    refresh = gr.Button("Refresh", elem_id="fmn_refresh", size="sm", min_width=80)
                status = gr.HTML(status_html(()), elem_id="fmn_status")
        shown = gr.State("")  # the id of the evaluation that is in the report
        refresh.click(current, [shown], [status, report, shown], **QUIET)
        interrupt.click(interrupt_running, [], [status], **QUIET)
        clear.click(empty_queue, [], [status], **QUIET)
        for button, submit, inputs, message in submits:
            button.click(submit, inputs, [message], **QUIET).then(jobs_html, [], [status], **QUIET)
    for block in tab.blocks.values():
        block.do_not_save_to_config = True  # the host would store defaults by label, and two panels have `Steps`
    return [(tab, TITLE, ID)]


def jobs_html() -> str:
    return status_html(JOBS)


def current(shown: str):
    """The jobs, and the last evaluation if it is not the one shown."""
    done = [job for job in JOBS if job.kind == "evaluate" and job.state == "done"]
    if not done or done[-1].id == shown:
        return jobs_html(), gr.update(), gr.update()
    return jobs_html(), report_html(done[-1]), done[-1].id


def interrupt_running() -> str:
    """Stops the job at work, or the next one where none is."""
    unfinished = [job for job in JOBS if not job.over]
    for job in sorted(unfinished, key=lambda job: job.state != "running")[:1]:
        JOBS.interrupt(job.id)
    return jobs_html()


def empty_queue() -> str:
    """Takes out what waits."""
    for job in JOBS:
        if job.state == "queued":
            JOBS.interrupt(job.id)
    return jobs_html()
