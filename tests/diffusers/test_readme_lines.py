"""The README's lines on a pipeline."""

from __future__ import annotations

import re
import runpy

from conftest import ROOT

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
