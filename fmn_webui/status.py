"""Jobs and reports as HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable

from .escaping import Markup, joined, json_values, markup, sentence
from .jobs import Job, JobResult
from .shown import Shown

SHOWN_JOBS = 6  # finished jobs
STATES = {"done": "Done", "stopped": "Stopped", "failed": "Failed"}


def status_html(jobs: Iterable[Job]) -> Markup:
    """The job at work with its progress and preview, what waits, and what was finished last, newest first."""
    jobs = [*jobs]
    running = [job for job in jobs if job.state == "running"]
    queued = [job for job in jobs if job.state == "queued"]
    for job in running + queued:
        job.look()
    over = sorted((job for job in jobs if job.over), key=lambda job: -job.ended)[:SHOWN_JOBS]
    shown = joined([*map(running_html, running), queue_html(queued), *map(finished_html, over)])
    return markup('<div class="fmn-jobs{}">{}</div>', " fmn-busy" if running or queued else "", shown or nothing_html())


def nothing_html() -> Markup:
    return markup('<p class="fmn-faint">No jobs yet. A job continues when this page is closed, and is shown here again.</p>')


def running_html(job: Job) -> Markup:
    share = job.step / job.steps if job.steps else 0.0
    left = f", about {clock(job.seconds / share - job.seconds)} left" if share > 0.1 else ""
    steps = f"step {job.step} of {job.steps}, " if job.steps else ""
    return markup(
        '<div class="fmn-job fmn-running"><b>{}</b><div class="fmn-bar"><div style="width:{}"></div></div><p>{}</p>{}</div>',
        job.title,
        f"{share:.1%}",
        f"{steps}{clock(job.seconds)}{left}{', stopping' if job.asked_to_stop else ''}",
        picture_html(job.preview, "preview"),
    )


def queue_html(queued: list[Job]) -> Markup:
    if not queued:
        return markup("")
    waiting = joined(markup("<li>{}</li>", job.title) for job in queued)
    return markup('<div class="fmn-job fmn-queued"><b>Waiting</b><ol>{}</ol></div>', waiting)


def finished_html(job: Job) -> Markup:
    result = job.result or JobResult([])
    return markup(
        '<div class="fmn-job fmn-{}"><b>{}</b> <span class="fmn-faint">{}, {}</span>{}{}{}</div>',
        job.state,
        job.title,
        STATES[job.state],
        clock(job.seconds),
        lines_html(result),
        error_html(job.error) if job.error else "",
        markup("") if job.kind == "evaluate" else picture_html(result.picture, "without and with the patch"),
    )


def report_html(job: Job) -> Markup:
    """An evaluation: its picture, what the figures say, and every figure."""
    result = job.result
    return markup(
        '<div class="fmn-report">{}{}<details><summary>Every figure</summary><pre>{}</pre></details></div>',
        picture_html(result.picture, "report"),
        lines_html(result),
        json.dumps(json_values(result.figures), indent=1, ensure_ascii=False),
    )


def lines_html(result: JobResult) -> Markup:
    return joined(markup("<p>{}</p>", sentence(line)) for line in result.lines)


def error_html(text: str) -> Markup:
    """A sentence beside the button that it came from."""
    return markup('<p class="fmn-error">{}</p>', sentence(text))


def picture_html(picture: Shown | None, title: str) -> Markup:
    if picture is None:
        return markup("")
    return markup('<img alt="{}" title="{}" src="{}">', title, title, f"data:image/jpeg;base64,{picture.jpeg}")


def clock(seconds: float) -> str:
    """`1:05` for 65 seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
