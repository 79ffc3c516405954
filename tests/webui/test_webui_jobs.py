"""The webui's jobs: a queue that no browser has to wait for."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from fmn_webui.jobs import KEPT_JOBS, Job, JobResult, Jobs
from fmn_webui.limits import MOST_JOBS, MOST_WAITING, Busy
from fmn_webui.shown import Shown
from fmn_webui.status import report_html, status_html

SECONDS = 10


class Host:
    """A lock, and the wish to stop, as a webui has them."""

    def __init__(self):
        self.lock, self.interrupted = threading.Lock(), threading.Event()

    @contextmanager
    def turn(self, job):
        with self.lock:
            self.interrupted.clear()
            yield


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def jobs(host):
    return Jobs(host.turn, host.interrupted.set, lambda error: f"told: {error}")


def waited(jobs, job, seconds):
    with jobs.changed:
        jobs.changed.wait_for(lambda: job.over, seconds)
    return job


def over(jobs, *several):
    for job in several:
        assert waited(jobs, job, SECONDS).over
    return [job.state for job in several]


def test_two_jobs_run_one_after_the_other(jobs):
    begun, go, order = threading.Event(), threading.Event(), []

    def first(job):
        begun.set()
        assert go.wait(SECONDS)
        order.append("first")
        return JobResult(["done"])

    one, two = (
        jobs.submit("forget", "one", first),
        jobs.submit("forget", "two", lambda job: order.append("second") or JobResult([])),
    )
    assert begun.wait(SECONDS) and (one.state, two.state) == ("running", "queued")
    assert waited(jobs, two, 0.05).state == "queued"
    go.set()
    assert over(jobs, one, two) == ["done", "done"] and order == ["first", "second"]


def test_a_job_waits_for_a_generation_and_can_be_taken_out_meanwhile(jobs, host):
    ran = []
    with host.lock:  # a generation
        job = jobs.submit("forget", "it", lambda job: ran.append(1) or JobResult([]))
        assert waited(jobs, job, 0.05).state == "queued"
        jobs.interrupt(job.id)
        assert not host.interrupted.is_set(), "the generation would have been stopped"
    assert over(jobs, job, jobs.submit("forget", "next", lambda job: JobResult([]))) == ["stopped", "done"]
    assert not ran and "queue" in job.error


def test_an_interrupt_keeps_what_the_work_returns(jobs, host):
    begun = threading.Event()

    def work(job):
        begun.set()
        assert host.interrupted.wait(SECONDS)
        return JobResult(["kept after 3 steps"], [Path("forget-cat.safetensors")], stopped=True)

    job = jobs.submit("forget", "cat", work)
    assert begun.wait(SECONDS)
    jobs.interrupt(job.id)
    assert over(jobs, job) == ["stopped"]
    assert job.result.files and "kept after 3 steps" in status_html(jobs)


class Interrupted(BaseException):
    """As the webui's InterruptedException, which is no Exception."""


@pytest.mark.parametrize("error, asked, state", [
    (ValueError("the concept is empty"), False, "failed"),
    (Interrupted(), False, "failed"),
    (Interrupted(), True, "stopped"),
])  # fmt: skip
def test_an_error_shows_its_sentence_and_the_next_job_runs(jobs, error, asked, state):
    def work(job):
        job.asked_to_stop = asked
        raise error

    job = jobs.submit("forget", "cat", work)
    assert over(jobs, job, jobs.submit("forget", "next", lambda job: JobResult([]))) == [state, "done"]
    assert job.error == (f"told: {error}" if state == "failed" else "Stopped before there was anything to keep.")
    assert job.error in status_html(jobs)


def test_an_error_of_the_host_itself_ends_the_job(host):
    @contextmanager
    def broken(job):
        raise RuntimeError("no model")
        yield

    jobs = Jobs(broken, host.interrupted.set, str)
    job = jobs.submit("forget", "cat", lambda job: JobResult([]))
    assert over(jobs, job) == ["failed"] and job.error == "no model"


def test_a_page_that_comes_back_finds_its_job(jobs):
    begun, go = threading.Event(), threading.Event()

    def work(job):
        job.step, job.steps, job.preview = 12, 35, Shown(Image.new("RGB", (8, 8)))
        begun.set()
        assert go.wait(SECONDS)
        return JobResult(["It is done."], picture=Shown(Image.new("RGB", (8, 8))), figures={"ua": 1.0})

    job = jobs.submit("evaluate", "Evaluate <b>cat</b>", work)
    assert begun.wait(SECONDS)
    shown = status_html(jobs)
    assert "step 12 of 35" in shown and "data:image/jpeg;base64," in shown and "fmn-busy" in shown and "<b>cat" not in shown
    go.set()
    assert over(jobs, job) == ["done"]
    assert "It is done." in status_html(jobs) and "fmn-busy" not in status_html(jobs)
    assert "&quot;ua&quot;: 1.0" in report_html(job) and jobs.find(job.id) is job and job.work is None


def test_a_picture_is_encoded_once_for_all_pages_and_anew_when_it_changes(jobs, monkeypatch):
    encoded, save = [], Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda image, *args, **kwargs: encoded.append(image) or save(image, *args, **kwargs)
    )
    done = [jobs.submit("forget", "it", lambda job: JobResult([], picture=Shown(Image.new("L", (8, 8))))) for _ in range(3)]
    over(jobs, *done)
    running = Job("forget", "cat", None, state="running", preview=Shown(Image.new("RGB", (8, 8))))
    pages = [status_html([*jobs, running]) for _ in range(6)]
    assert len(encoded) == 4 and len(set(pages)) == 1 and pages[0].count("data:image/jpeg;base64,") == 4
    running.preview = Shown(Image.new("RGB", (8, 8), "red"))
    assert {status_html([*jobs, running]) for _ in range(6)}.isdisjoint(pages) and len(encoded) == 5


def test_old_jobs_are_forgotten_and_unfinished_ones_never(jobs, host):
    with host.lock:
        waiting = jobs.submit("forget", "it", lambda job: JobResult([]))
        for _ in range(KEPT_JOBS + 5):
            jobs.interrupt(jobs.submit("forget", "other", lambda job: JobResult([])).id)
        assert jobs.find(waiting.id) and len([*jobs]) <= KEPT_JOBS + 2
    assert over(jobs, waiting) == ["done"]
    assert jobs.find("nonsense") is None and jobs.interrupt("nonsense") is None


def test_the_queue_has_an_end_and_takes_more_when_some_are_done(jobs, host):
    with host.lock:
        waiting = [jobs.submit("forget", "it", lambda job: JobResult([])) for _ in range(MOST_JOBS)]
        with pytest.raises(Busy, match="100 jobs wait"):
            jobs.submit("forget", "one too many", lambda job: JobResult([]))
        assert len([*jobs]) == MOST_JOBS
        jobs.interrupt(waiting[-1].id)
        last = jobs.submit("forget", "it", lambda job: JobResult([]))
    assert set(over(jobs, *waiting[:-1], last)) == {"done"}


def test_what_waits_holds_no_more_pictures_than_there_is_room_for(jobs, host):
    with host.lock:
        one = jobs.submit("forget", "it", lambda job: JobResult([]), MOST_WAITING // 2)
        two = jobs.submit("forget", "it", lambda job: JobResult([]), MOST_WAITING // 2)
        with pytest.raises(Busy, match="pictures"):
            jobs.submit("forget", "one too many", lambda job: JobResult([]), 1)
        without = jobs.submit("forget", "without pictures", lambda job: JobResult([]))
    assert over(jobs, one, two, without) == ["done"] * 3
    jobs.require_room(MOST_WAITING)
