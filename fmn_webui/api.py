"""The API: what the tab can do, as routes beside the webui's own and under the same locks."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from functools import wraps
from secrets import compare_digest

from fastapi import Body, Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import shared

from fmn_core.errors import ForgetError
from fmn_core.patch import read_patch
from fmn_core.settings import EvaluateSettings, ForgetSettings

from .forms import converted, decoded, members_of, read_pictures, settings_of
from .jobs import Job, Outcome
from .work import JOBS, Asked, find_patch, patches, submit_evaluate, submit_forget, submit_stack


def add_routes(demo, app: FastAPI) -> None:
    """Adds the routes where the webui's own API is on, behind the user and password that it asks for."""
    if not (shared.cmd_opts.api or shared.cmd_opts.nowebui):
        return
    guards = guards_of(app)
    for method, path, endpoint in ROUTES:
        status = 202 if endpoint in (post_forget, post_evaluate, post_stack) else 200
        app.add_api_route(
            path,
            told(endpoint),
            methods=[method],
            dependencies=guards,
            status_code=status,
            response_model=None,
            tags=["FMN"],
        )


def guards_of(app: FastAPI) -> list:
    """What a request has to pass: the users of --api-auth or, where only the page is locked, those of --gradio-auth, by
    HTTP Basic both. The webui leaves its API open in the second case; training is too much for that."""
    if shared.cmd_opts.api_auth:
        users = dict(each.split(":", 1) for each in shared.cmd_opts.api_auth.split(","))
    else:
        users = getattr(app, "auth", None)
    if not users:
        return []

    def check(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008
        if callable(users):
            right = users(given.username, given.password)
        else:
            known = users.get(given.username)
            right = known is not None and compare_digest(known.encode(), given.password.encode())
        if not right:
            raise HTTPException(401, "Incorrect user or password.", {"WWW-Authenticate": "Basic"})

    return [Depends(check)]


def told(endpoint: Callable) -> Callable:
    """The endpoint with its ForgetError as a 422 that has the sentence."""

    @wraps(endpoint)
    def answer(*args, **kwargs):
        try:
            return endpoint(*args, **kwargs)
        except ForgetError as error:
            raise HTTPException(422, str(error)) from error

    return answer


def post_forget(body: dict = Body(...)) -> dict:  # noqa: B008
    """Queues the making of a patch: `concept`, and by choice `name`, `images` and `masks` (base64), `card`, any setting."""
    own = {"concept": "", "name": "", "card": True}
    taken = {key: converted(key, body.pop(key, default), default) for key, default in own.items()}
    pictures = decoded(body.pop("images", []), "`images`"), decoded(body.pop("masks", []), "`masks`")
    images, mask = read_pictures(*pictures)
    return job_json(submit_forget(Asked(**taken, settings=settings_of(ForgetSettings, body), images=images, mask=mask)))


def post_evaluate(body: dict = Body(...)) -> dict:  # noqa: B008
    """Queues the measuring of a patch: `patch`, and by choice `save_as`, `images` (base64), any setting."""
    taken = {key: converted(key, body.pop(key, ""), "") for key in ("patch", "save_as")}
    images, _ = read_pictures(decoded(body.pop("images", []), "`images`"))
    return job_json(submit_evaluate(taken["patch"], settings_of(EvaluateSettings, body), images, taken["save_as"]))


def post_stack(body: dict = Body(...)) -> dict:  # noqa: B008
    """Queues the stacking of `patches`, pairs of a name and a strength; with `save` as a file, by choice under `name`."""
    rows = members_of(body.pop("patches", []))
    save, name = converted("save", body.pop("save", True), True), converted("name", body.pop("name", ""), "")
    if body:
        raise ForgetError(f"`{next(iter(body))}` is unknown: there are patches, save and name.")
    return job_json(submit_stack(rows, name, save))


def get_jobs() -> list:
    """All remembered jobs, in the order in which they came."""
    return [job_json(job) for job in JOBS]


def get_job(id: str) -> dict:
    """One job, with its pictures (base64 JPEG) and figures."""
    job = JOBS.find(id)
    if job is None:
        raise HTTPException(404, f"There is no job {id}: GET /fmn/jobs lists them.")
    outcome = job.outcome or Outcome([])
    shown = {"picture": encoded(outcome.picture), "preview": encoded(job.preview), "figures": outcome.figures}
    return job_json(job) | shown


def post_interrupt(id: str) -> dict:
    """Stops a job; what it has learned by then is kept."""
    job = JOBS.interrupt(id)
    if job is None:
        raise HTTPException(404, f"There is no job {id}: GET /fmn/jobs lists them.")
    return job_json(job)


def get_patches() -> list:
    """The patches in the LoRA folder, and what each forgets."""
    found = []
    for name in patches():
        try:
            info = read_patch(find_patch(name)).info
            found.append({"name": name, "concept": info["concept"], "base": info["base"]["name"], "error": ""})
        except ForgetError as error:
            found.append({"name": name, "concept": "", "base": "", "error": str(error)})
    return found


ROUTES = (
    ("POST", "/fmn/forget", post_forget),
    ("POST", "/fmn/evaluate", post_evaluate),
    ("POST", "/fmn/stack", post_stack),
    ("GET", "/fmn/jobs", get_jobs),
    ("GET", "/fmn/jobs/{id}", get_job),
    ("POST", "/fmn/jobs/{id}/interrupt", post_interrupt),
    ("GET", "/fmn/patches", get_patches),
)


def job_json(job: Job) -> dict:
    """A job as plain values; `files` are names in the LoRA folder."""
    outcome = job.outcome or Outcome([])
    plain = {key: getattr(job, key) for key in ("id", "kind", "title", "state", "step", "steps", "error")}
    files = [path.name for path in outcome.files]
    return plain | {"seconds": round(job.seconds, 1), "lines": outcome.lines, "files": files}


def encoded(picture) -> str | None:
    """A picture as base64 JPEG."""
    if picture is None:
        return None
    data = io.BytesIO()
    picture.convert("RGB").save(data, "jpeg", quality=90)
    return base64.b64encode(data.getvalue()).decode()
