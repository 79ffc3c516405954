"""The API: what the tab can do, as routes beside the webui's own and under the same locks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from secrets import compare_digest

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import shared

from fmn_core.errors import ForgetError, brief
from fmn_core.evaluation.config import EvaluationConfig
from fmn_core.patch.file import read_patch

from .escaping import json_values
from .forms import converted, decoded, forget_config, rows_of, settings_of
from .jobs import Job, JobResult
from .receiving import RECEIVER, parsed
from .tasks import JOBS, ForgetRequest, patches, pictures_for, submit_evaluate, submit_forget, submit_stack

BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}


class Answer(JSONResponse):
    """JSON that can be sent whatever a file or a user has put into it."""

    def render(self, content) -> bytes:
        return json.dumps(json_values(content), ensure_ascii=False, allow_nan=False).encode()


class NoSuchJob(ForgetError):
    """A job that is not remembered."""

    status = 404

    def __init__(self, id: str):
        super().__init__(f"There is no job {brief(id)}: GET /fmn/jobs lists them.")


def add_routes(demo, app: FastAPI) -> None:
    """Adds the routes where the webui's own API is on, behind the user and password that it or its page asks for."""
    if not (shared.cmd_opts.api or shared.cmd_opts.nowebui):
        return
    guards = guards_of(app)
    for method, path, endpoint in ROUTES:
        asks = endpoint in (post_forget, post_evaluate, post_stack)
        app.add_api_route(
            path,
            answering(endpoint, asks),
            name=endpoint.__name__,
            description=endpoint.__doc__,
            methods=[method],
            dependencies=guards,
            status_code=202 if asks else 200,
            response_model=None,
            openapi_extra=BODY if asks else None,
            tags=["FMN"],
        )


def guards_of(app: FastAPI) -> list:
    """What a request has to pass: the users of --api-auth or, where only the page is locked, the page's, by HTTP Basic both.

    The webui leaves its API open in the second case, and asks nobody with --nowebui; training is too much for that.
    """
    flags = shared.cmd_opts
    locked = flags.api_auth or flags.gradio_auth or flags.gradio_auth_path or getattr(app, "auth", None)
    if not locked:
        return []
    users = users_in(flags.api_auth) if flags.api_auth else getattr(app, "auth", None) or page_users()

    def check(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008
        if callable(users):
            right = users(given.username, given.password)
        else:
            known = users.get(given.username)
            right = known is not None and compare_digest(raw(known), raw(given.password))
        if not right:
            raise HTTPException(401, "Incorrect user or password.", {"WWW-Authenticate": "Basic"})

    return [Depends(check)]


def page_users() -> dict[str, str]:
    """The users of --gradio-auth and --gradio-auth-path, which only a page asks for by itself; raises OSError where the
    file cannot be read, and no route is added then."""
    flags, users = shared.cmd_opts, users_in(shared.cmd_opts.gradio_auth)
    if flags.gradio_auth_path:
        for line in Path(flags.gradio_auth_path).read_text(encoding="utf8").splitlines():
            users |= users_in(line)
    return users


def users_in(text: str | None) -> dict[str, str]:
    """User -> password in `user:password,user:password`; what has no colon names nobody."""
    pairs = (each.strip().partition(":") for each in (text or "").split(","))
    return {user: password for user, colon, password in pairs if colon}


def raw(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def answering(endpoint: Callable, asks: bool) -> Callable:
    """The endpoint as a route: what a user can mend is an answer with its status and `detail`, a sentence."""

    async def answer(request: Request) -> Response:
        try:
            if asks:
                async with RECEIVER.body(request) as body:
                    found = await run_in_threadpool(lambda: endpoint(parsed(body)))
            else:
                found = await run_in_threadpool(endpoint, **request.path_params)
        except ForgetError as error:
            return Answer({"detail": str(error)}, getattr(error, "status", 422))
        return Answer(found, 202 if asks else 200)

    return answer


def post_forget(body: dict) -> dict:
    """Queues the making of a patch: `concept`, and by choice `name`, `images` and `masks` (base64), `card`, `preset`,
    and any setting that the preset reads."""
    own = {"concept": "", "name": "", "card": True}
    taken = {key: converted(key, body.pop(key, default), default) for key, default in own.items()}
    sources, masks = decoded(body.pop("images", []), "`images`"), decoded(body.pop("masks", []), "`masks`")
    config = forget_config(converted("preset", body.pop("preset", "fast"), ""), body)
    images, mask = pictures_for(config, sources, masks)
    return job_json(submit_forget(ForgetRequest(**taken, config=config, images=images, mask=mask)))


def post_evaluate(body: dict) -> dict:
    """Queues the measuring of a patch: `patch`, and by choice `save_as`, `images` (base64), any setting."""
    taken = {key: converted(key, body.pop(key, ""), "") for key in ("patch", "save_as")}
    sources = decoded(body.pop("images", []), "`images`")
    settings = settings_of(EvaluationConfig, body)
    return job_json(submit_evaluate(taken["patch"], settings, pictures_for(settings, sources)[0], taken["save_as"]))


def post_stack(body: dict) -> dict:
    """Queues the stacking of `patches`, pairs of a name and a strength; with `save` as a file, by choice under `name`."""
    rows = rows_of(body.pop("patches", []))
    save, name = converted("save", body.pop("save", True), True), converted("name", body.pop("name", ""), "")
    if body:
        raise ForgetError(f"`{brief(next(iter(body)))}` is unknown: there are patches, save and name.")
    return job_json(submit_stack(rows, name, save))


def get_jobs() -> list:
    """All remembered jobs, in the order in which they came."""
    return [job_json(job) for job in JOBS]


def get_job(id: str) -> dict:
    """One job, with its pictures (base64 JPEG) and figures."""
    job = JOBS.find(id)
    if job is None:
        raise NoSuchJob(id)
    result = job.result or JobResult([])
    pictures = {"picture": result.picture, "preview": job.look()}
    encoded = {name: picture and picture.jpeg for name, picture in pictures.items()}
    return job_json(job) | encoded | {"figures": result.figures}


def post_interrupt(id: str) -> dict:
    """Stops a job; what it has learned by then is kept."""
    job = JOBS.interrupt(id)
    if job is None:
        raise NoSuchJob(id)
    return job_json(job)


def get_patches() -> list:
    """The patches in the LoRA folder, and what each forgets."""
    found = []
    for name, path in patches().items():
        try:
            info = read_patch(path).info
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
    result = job.result or JobResult([])
    facts = {key: getattr(job, key) for key in ("id", "kind", "title", "state", "step", "steps", "error")}
    files = [path.name for path in result.files]
    return facts | {"seconds": round(job.seconds, 1), "lines": result.lines, "files": files}
