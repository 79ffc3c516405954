"""A webui's page around the extension: its tab, its script in txt2img, its files in the head, its API.

python tests/webui/ui/host_page.py PORT LORA_FOLDER [--api] [--api-auth U:P] [--gradio-auth U:P] [--nowebui] [--forge]

Runs in the Gradio that is first on sys.path, with the stand-in for the webui's `modules` beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}

HEAD = """
function gradioApp() {
    const app = document.getElementsByTagName('gradio-app')[0]
    return app?.shadowRoot ?? app ?? document
}
function onUiLoaded(callback) {
    const timer = setInterval(() => {
        if (gradioApp().querySelector('#txt2img_prompt')) { clearInterval(timer); callback() }
    }, 50)
}
"""


def import_standin(forge: bool) -> None:
    """The stand-in's `modules`, and beside its files those that only a page needs."""
    sys.path[:0] = [str(ROOT / f"tests/webui/{folder}") for folder in ("forge",) * forge + ("a1111",)]
    import huggingface_hub
    import modules

    # Gradio 4.40 imports this for its login to a service, and the tests' newer huggingface_hub has it no more.
    vars(huggingface_hub).setdefault("HfFolder", None)
    modules.__path__.append(str(ROOT / "tests/webui/ui/modules"))


def load_extension():
    """Loads scripts/*.py as the webui does: the extension's folder is on sys.path meanwhile, and no longer."""
    before = [*sys.path]
    sys.path[:] = [str(ROOT), *(path for path in before if Path(path or ".").resolve() != ROOT)]
    path = ROOT / "scripts/forget_me_not.py"
    spec = importlib.util.spec_from_file_location(path.name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    from modules.scripts import Script

    found = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Script)]
    assert len(found) == 1, found
    return found[0]()


def set_options(
    lora_dir: Path, api=False, api_auth=None, nowebui=False, gradio_auth=None, gradio_auth_path=None, **_
) -> None:
    from modules import paths, script_callbacks, shared

    paths.models_path = str(lora_dir.parent)
    flags = {"lora_dir": str(lora_dir), "api": api, "api_auth": api_auth, "nowebui": nowebui, "hide_ui_dir_config": False}
    shared.cmd_opts.__dict__.update(flags, gradio_auth=gradio_auth, gradio_auth_path=gradio_auth_path)

    def add_option(key, info):
        vars(shared.opts)[key] = info.default

    shared.opts.__dict__.update(samples_format="png", list_hidden_files=True, add_option=add_option)
    shared.OptionInfo = lambda default, label, section: argparse.Namespace(default=default, label=label, section=section)
    for callback in script_callbacks.ui_settings:
        callback()


def make_page(script):
    """The page: txt2img with the script's controls, and the tabs of the extension."""
    import gradio as gr
    from modules import script_callbacks

    tabs = [tab for callback in script_callbacks.ui_tabs for tab in callback()]
    with gr.Blocks(analytics_enabled=False, title="Stable Diffusion") as page:
        with gr.Tabs(elem_id="tabs"):
            with gr.TabItem("txt2img", id="txt2img", elem_id="tab_txt2img"):
                gr.Textbox("a photo of a cat", label="Prompt", elem_id="txt2img_prompt")
                with gr.Group():
                    controls = script.ui(False)
                generate, made = gr.Button("Generate", elem_id="txt2img_generate"), gr.JSON(elem_id="made")
                generate.click(lambda *values: list(values), controls, made)
            for interface, label, id in tabs:
                with gr.TabItem(label, id=id, elem_id=f"tab_{id}"):
                    interface.render()
    return page.queue()


def inject(gradio) -> None:
    """Puts the extension's javascript and style into the page, as the webui does."""
    scripts = HEAD + "".join(path.read_text() for path in sorted((ROOT / "javascript").glob("*.js")))
    head = f"<script>{scripts}</script><style>{(ROOT / 'style.css').read_text()}</style></head>".encode()
    make = gradio.routes.templates.TemplateResponse

    def response(*args, **kwargs):
        made = make(*args, **kwargs)
        made.body = made.body.replace(b"</head>", head)
        made.init_headers()
        return made

    gradio.routes.templates.TemplateResponse = response


def serve(options: argparse.Namespace) -> None:
    import_standin(options.forge)
    script = load_extension()
    set_options(**vars(options))
    from modules import script_callbacks

    if options.nowebui:
        import uvicorn
        from fastapi import FastAPI

        app = FastAPI()
        for callback in script_callbacks.app_started:
            callback(None, app)
        print("ready", flush=True)
        uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")
        return
    import gradio

    inject(gradio)
    page = make_page(script)
    auth = [tuple(options.gradio_auth.split(":"))] if options.gradio_auth else None
    app, *_ = page.launch(
        server_name="127.0.0.1", server_port=options.port, prevent_thread_lock=True, quiet=True, auth=auth, show_api=False
    )
    for callback in script_callbacks.app_started:
        callback(page, app)
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("lora_dir", type=Path)
    for flag in ("--api", "--nowebui", "--forge"):
        parser.add_argument(flag, action="store_true")
    for value in ("--api-auth", "--gradio-auth"):
        parser.add_argument(value)
    serve(parser.parse_args())
