"""Recording attention during a generation of the webui's, and the heat maps of its pictures."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from fmn_core.errors import ForgetError
from fmn_core.hosts.webui_attention import record_attention

from .heat_maps import heat_pictures
from .infotext import Wanted

Tiles = list[tuple[str, Image.Image]]  # a phrase and its heat map


class Recorder:
    """What the words of a batch attend to: a recording for each of its different prompts, of the last sampling."""

    def __init__(self):
        self.prompts: list[str] = []
        self.recordings: dict = {}
        self.ends: list = []

    def start(self, p) -> None:
        """Begins anew, right before a sampling; raises ForgetError for a model without such layers."""
        self.stop()
        later = getattr(p, "hr_prompts", None) if getattr(p, "is_hr_pass", False) else None
        self.prompts = [*(later or p.prompts)]
        self.recordings = {}
        for text in dict.fromkeys(self.prompts):
            self.recordings[text], end = record_attention(p, text)
            self.ends.append(end)

    def stop(self) -> None:
        """Takes every hook off."""
        while self.ends:
            self.ends.pop()()
        for recording in self.recordings.values():
            recording.end()

    def pictures(self, images: Tensor, wanted: Wanted) -> list[Tiles]:
        """The heat maps of each picture of [B, H, W, 3] in 0..1; raises ForgetError where there is nothing to show."""
        if not self.recordings:
            raise ForgetError("No attention was recorded: heat maps need the AUTOMATIC1111 webui 1.10 or Forge.")
        found: dict[int, Tiles] = {}
        for text, recording in self.recordings.items():
            rows = [row for row, prompt in enumerate(self.prompts) if prompt == text]
            found |= zip(rows, heat_pictures(recording, images[rows], wanted), strict=True)
        return [found[row] for row in range(len(images))]
