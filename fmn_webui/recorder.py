"""Recording attention during a generation of the webui's, and the heat maps of its pictures."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from fmn_core.attention.recorder import AttentionRecording
from fmn_core.errors import ForgetError, brief
from fmn_core.hosts.webui.attention import prompts_of, record_attention
from fmn_core.text.tokens import columns_of, find_phrase, phrases_of

from .heat_maps import HeatMap, heat_pictures
from .infotext import ScriptOptions

UNKNOWN = "No attention was recorded: heat maps need the AUTOMATIC1111 webui 1.10 or Forge."


class Recorder:
    """What the words of a batch attend to: recordings for each of its different prompts, of the last sampling. A prompt has
    one for each text that it comes to: several with AND, and where it changes over the steps."""

    def __init__(self):
        self.prompts: list[str] = []
        self.recordings: dict[str, list[AttentionRecording]] = {}
        self.ends: list = []
        self.prevented = UNKNOWN

    def start(self, p) -> None:
        """Starts over, right before a sampling; what prevents it is for `pictures` to raise."""
        self.stop()
        later = getattr(p, "hr_prompts", None) if getattr(p, "is_hr_pass", False) else None
        self.prompts, self.recordings, self.prevented = [*(later or p.prompts)], {}, UNKNOWN
        try:
            texts = {prompt: prompts_of(p, prompt) for prompt in self.prompts}
            require_apart(texts)
            for prompt, parts in texts.items():
                self.recordings[prompt] = [self.record(p, text) for part in parts for text in part]
        except ForgetError as error:
            self.stop()
            self.recordings, self.prevented = {}, str(error)

    def record(self, p, text: str) -> AttentionRecording:
        recording, end = record_attention(p, text)
        self.ends.append(end)
        return recording

    def stop(self) -> None:
        """Takes every hook off."""
        while self.ends:
            self.ends.pop()()
        for recordings in self.recordings.values():
            for recording in recordings:
                recording.end()

    def pictures(self, images: Tensor, options: ScriptOptions) -> list[list[HeatMap]]:
        """The heat maps of each picture of [B, H, W, 3] in 0..1; raises ForgetError where there is nothing to show."""
        if not self.recordings:
            raise ForgetError(self.prevented)
        found: dict[int, list[HeatMap]] = {row: [] for row in range(len(images))}
        for prompt, recordings in self.recordings.items():
            rows = [row for row, other in enumerate(self.prompts) if other == prompt]
            used = [recording for recording in recordings if recording.layers] or recordings[:1]
            for recording, words in zip(used, words_of_each(used, options.words), strict=True):
                if words is not None:
                    drawn = heat_pictures(recording, images[rows], options, words, several=len(used) > 1)
                    for row, maps in zip(rows, drawn, strict=True):
                        found[row] += maps
        return [found[row] for row in range(len(images))]


def require_apart(texts: dict[str, list[list[str]]]) -> None:
    """Raises ForgetError where one text is a part of several prompts, or several parts of one: rows of a batch are told
    apart by it."""
    owners = Counter(text for parts in texts.values() for part in parts for text in part)
    for text, count in owners.items():
        if count > 1:
            raise ForgetError(
                f"There are no heat maps: several prompts of the batch, or several parts of one, come to `{brief(text)}`, "
                "and they cannot be told apart. Draw one picture at a time, or word the parts differently."
            )


def words_of_each(recordings: list[AttentionRecording], words: str) -> list[str | None]:
    """Which of the words each recording is asked for, None for one that has none of them.

    Raises ForgetError for a phrase that is in no recording.
    """
    phrases = phrases_of(words)
    if not phrases:
        return [""] * len(recordings)
    for phrase in phrases:
        if not any(columns_of(recording.tokens, phrase) for recording in recordings):
            find_phrase(recordings[0].tokens, phrase)
    own = [[phrase for phrase in phrases if columns_of(recording.tokens, phrase)] for recording in recordings]
    return [", ".join(several) or None for several in own]
