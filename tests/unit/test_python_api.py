"""The public API: the README's lines on a pipeline, and every name that docs/python-api.md lists."""

from __future__ import annotations

import inspect
import re
import runpy
import subprocess
import sys

from conftest import ROOT

import fmn_core

DOCS = (ROOT / "docs" / "python-api.md").read_text()


def snippet(text: str) -> str:
    return next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "fmn_core" in block)


def test_the_readmes_lines_save_a_lora_that_the_pipeline_loads(model, tmp_path, monkeypatch, capsys):
    from diffusers import StableDiffusionPipeline

    lines = snippet((ROOT / "README.md").read_text())
    assert lines == snippet(DOCS)
    assert len(lines.splitlines()) <= 8
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "readme.py").write_text(lines)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("readme.py")
    assert "cat" in capsys.readouterr().out
    pipeline = StableDiffusionPipeline.from_pretrained("model")
    pipeline.load_lora_weights("forget-cat.safetensors")
    assert pipeline.get_active_adapters()


def test_the_docs_list_every_public_name():
    assert set(fmn_core.PUBLIC) <= set(re.findall(r"\w+", DOCS))


def test_every_public_name_is_there_and_says_what_it_is():
    for name in fmn_core.PUBLIC:
        assert inspect.getdoc(getattr(fmn_core, name)), name
    assert set(fmn_core.PUBLIC) <= set(dir(fmn_core))


def test_importing_the_package_imports_no_torch():
    code = "import sys, fmn_core; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
