"""Jobs: one after the other in a thread of the server's own, so that no browser has to wait for them."""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from .limits import MOST_JOBS, MOST_WAITING, Busy
from .shown import Shown

KEPT_JOBS = 50  # finished jobs that are remembered
WATCHED = 10.0  # seconds for which somebody who looked is thought to look again; a page in view does so every second
ENDS = ("done", "stopped", "failed")


@dataclass
class JobResult:
    """What a job leaves: sentences for people, files, a picture, figures, and whether it was stopped early."""

    lines: list[str]
    files: list[Path] = field(default_factory=list)
    picture: Shown | None = None
    figures: dict | None = None
    stopped: bool = False


@dataclass
class Job:
    """A piece of work: `queued`, `running`, `done`, `stopped` (by the user) or `failed` (with its sentence)."""

    kind: str
    title: str
    work: Callable[[Job], JobResult]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: str = "queued"
    step: int = 0
    steps: int = 0
    preview: Shown | None = None
    result: JobResult | None = None
    error: str = ""
    asked_to_stop: bool = False
    holds: int = 0  # bytes of the pictures that its work has
    started: float = 0.0
    ended: float = 0.0
    looked: float = -math.inf  # when somebody last did, by the monotonic clock

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ENDS

    def look(self) -> Shown | None:
        """The preview, for somebody who looks: while anybody does, new ones are made."""
        self.looked = time.monotonic()
        return self.preview

    @property
    def watched(self) -> bool:
        """Whether somebody has looked lately."""
        return time.monotonic() - self.looked < WATCHED

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return (self.ended or time.time()) - self.started if self.started else 0.0


class Jobs:
    """A queue of jobs, worked off by one thread.

    `host_lock` gives a context in which a job may have the model: the host's lock. `interrupt` tells the host that the
    running job should stop. `tell` makes a sentence of an exception.
    """

    def __init__(
        self,
        host_lock: Callable[[Job], AbstractContextManager],
        interrupt: Callable[[], None],
        tell: Callable[[BaseException], str],
    ):
        self.host_lock, self.interrupt_host, self.tell = host_lock, interrupt, tell
        self.jobs: list[Job] = []
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[Job]:
        """All remembered jobs, in the order in which they came."""
        with self.changed:
            return iter([*self.jobs])

    def find(self, id: str) -> Job | None:
        """The job of this id."""
        return next((job for job in self if job.id == id), None)

    def require_room(self, holds: int = 0) -> None:
        """Raises Busy where a job that holds so many bytes of pictures has no place in the queue."""
        unfinished = [job for job in self if not job.over]
        if len(unfinished) >= MOST_JOBS:
            raise Busy(f"{len(unfinished)} jobs wait, and {MOST_JOBS} are the most: try again when some are done.")
        if holds + sum(job.holds for job in unfinished) > MOST_WAITING:
            raise Busy("The jobs that wait hold as many pictures as the server has room for: try again when some are done.")

    def submit(self, kind: str, title: str, work: Callable[[Job], JobResult], holds: int = 0) -> Job:
        """Puts work, which holds so many bytes of pictures, into the queue and returns at once; raises Busy where there is
        no room."""
        job = Job(kind, title, work, holds=holds)
        with self.changed:
            self.require_room(holds)
            over = [old for old in self.jobs if old.over]
            for old in over[: max(len(over) - KEPT_JOBS, 0)]:
                self.jobs.remove(old)
            self.jobs.append(job)
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self.run, name="forget-me-not", daemon=True)
                self.thread.start()
            self.changed.notify_all()
        return job

    def interrupt(self, id: str) -> Job | None:
        """Stops a job: a queued one never starts, a running one ends soon and keeps what it can."""
        with self.changed:
            job = next((job for job in self.jobs if job.id == id), None)
            if job is not None and not job.over:
                job.asked_to_stop = True
                if job.state == "running":
                    self.interrupt_host()
                else:
                    self.end(job, "stopped", error="Taken out of the queue before it began.")
        return job

    def run(self) -> None:
        """The thread: takes the oldest queued job, and ends where there is none."""
        while True:
            with self.changed:
                job = next((job for job in self.jobs if job.state == "queued"), None)
                if job is None:
                    self.thread = None
                    return
            self.run_one(job)

    def run_one(self, job: Job) -> None:
        """Runs a job in its turn; whatever happens, it is over before another has the model."""
        try:
            with self.host_lock(job):
                with self.changed:
                    if job.over:  # taken out of the queue while a generation ran
                        return
                    job.state, job.started = "running", time.time()
                try:
                    result = job.work(job)
                    self.end(job, "stopped" if result.stopped else "done", result=result)
                except BaseException as error:  # the webui's interrupt is no Exception
                    self.fail(job, error)
        except Exception as error:  # of the host's own, before or after the work
            self.fail(job, error)

    def fail(self, job: Job, error: BaseException) -> None:
        """Ends a job that an exception has ended, if it is not over already."""
        if job.over:
            return
        if job.asked_to_stop:
            self.end(job, "stopped", error="Stopped before there was anything to keep.")
        else:
            self.end(job, "failed", error=self.tell(error))

    def end(self, job: Job, state: str, *, result: JobResult | None = None, error: str = "") -> None:
        with self.changed:
            job.state, job.result, job.error, job.preview, job.ended = state, result, error, None, time.time()
            job.work = None  # it holds the pictures that were given
            self.changed.notify_all()
