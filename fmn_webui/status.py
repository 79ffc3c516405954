"""Jobs and reports as HTML; every text in it is escaped, since concepts and file names are the users'."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable

from PIL import Image

from .jobs import Job, Outcome

SHOWN = 6  # finished jobs
STATES = {"done": "Done", "stopped": "Stopped", "failed": "Failed"}


def status_html(jobs: Iterable[Job]) -> str:
    """The job at work with its progress and preview, what waits, and what was finished last, newest first."""
    jobs = [*jobs]
    running = [job for job in jobs if job.state == "running"]
    queued = [job for job in jobs if job.state == "queued"]
    over = sorted((job for job in jobs if job.over), key=lambda job: -job.ended)[:SHOWN]
    parts = [*map(running_html, running), queue_html(queued), *map(finished_html, over)]
    return f'<div class="fmn-jobs{" fmn-busy" if running or queued else ""}">{"".join(parts) or nothing_html()}</div>'


def nothing_html() -> str:
    return '<p class="fmn-faint">No jobs yet. A job goes on when this page is closed, and is shown here again.</p>'


def running_html(job: Job) -> str:
    share = job.step / job.steps if job.steps else 0.0
    left = f", about {clock(job.seconds / share - job.seconds)} left" if share > 0.1 else ""
    steps = f"step {job.step} of {job.steps}, " if job.steps else ""
    return (
        f'<div class="fmn-job fmn-running"><b>{html.escape(job.title)}</b>'
        f'<div class="fmn-bar"><div style="width:{share:.1%}"></div></div>'
        f"<p>{steps}{clock(job.seconds)}{left}{', stopping' if job.asked_to_stop else ''}</p>"
        f"{picture_html(job.preview, 'preview')}</div>"
    )


def queue_html(queued: list[Job]) -> str:
    if not queued:
        return ""
    waiting = "".join(f"<li>{html.escape(job.title)}</li>" for job in queued)
    return f'<div class="fmn-job fmn-queued"><b>Waiting</b><ol>{waiting}</ol></div>'


def finished_html(job: Job) -> str:
    outcome = job.outcome or Outcome([])
    lines = "".join(f"<p>{marked(line)}</p>" for line in outcome.lines)
    lines += error_html(job.error) if job.error else ""
    picture = "" if job.kind == "evaluate" else picture_html(outcome.picture, "without and with the patch")
    return (
        f'<div class="fmn-job fmn-{job.state}"><b>{html.escape(job.title)}</b> '
        f'<span class="fmn-faint">{STATES[job.state]}, {clock(job.seconds)}</span>{lines}{picture}</div>'
    )


def report_html(job: Job) -> str:
    """An evaluation: its picture, what the figures say, and every figure."""
    outcome = job.outcome
    lines = "".join(f"<p>{marked(line)}</p>" for line in outcome.lines)
    figures = html.escape(json.dumps(outcome.figures, indent=1))
    return (
        f'<div class="fmn-report">{picture_html(outcome.picture, "report", 92)}{lines}'
        f"<details><summary>Every figure</summary><pre>{figures}</pre></details></div>"
    )


def error_html(text: str) -> str:
    """A sentence beside the button that it came from."""
    return f'<p class="fmn-error">{marked(text)}</p>'


def marked(text: str) -> str:
    """A sentence, escaped, with what stands between backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))


def picture_html(picture: Image.Image | None, title: str, quality: int = 85) -> str:
    if picture is None:
        return ""
    data = io.BytesIO()
    picture.convert("RGB").save(data, "jpeg", quality=quality)
    return f'<img alt="{title}" title="{title}" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'


def clock(seconds: float) -> str:
    """`1:05` for 65 seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
