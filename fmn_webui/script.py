"""The script beside every generation: patches outside the prompt's text, and heat maps of its words."""

from __future__ import annotations

import logging

import gradio as gr
from modules import extra_networks, scripts

from fmn_core.errors import ForgetError
from fmn_core.log import displayable
from fmn_core.plots.colormaps import COLOR_MAPS

from . import infotext, webui
from .applying import Applied, allowed, check_loaded, prepared, refuse, refuse_sampling
from .heat_maps import hand_over, script_runs, to_images
from .infotext import LAYOUTS, NONE, SCRIPT_ROWS, ScriptOptions
from .recorder import Recorder
from .tags import with_params, with_tags
from .tasks import patches


class ForgetMeNotScript(scripts.Script):
    def __init__(self):
        super().__init__()
        self.recorder, self.options, self.applied, self.maps = Recorder(), ScriptOptions(), Applied(), []

    def title(self):
        return "Forget-Me-Not"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        """The controls, whose order is that of the API's `args`."""
        with gr.Accordion("Forget-Me-Not", open=False, elem_id=self.elem_id("accordion")):
            rows, fields = self.patch_rows()
            jointly = gr.Checkbox(
                True,
                label="Solve several jointly",
                info="Each does what it does alone. Off: they are simply added.",
                elem_id=self.elem_id("jointly"),
            )
            with gr.Row():
                heat_maps = gr.Checkbox(False, label="Heat maps of words", elem_id=self.elem_id("heat_maps"))
                save = gr.Checkbox(False, label="Save the heat maps", elem_id=self.elem_id("save"))
            words = gr.Textbox(
                "",
                label="Words",
                info="Words or phrases of the prompt, separated by commas. Empty: every word.",
                elem_id=self.elem_id("words"),
            )
            with gr.Row():
                layout = gr.Radio([*LAYOUTS], value=LAYOUTS[0], label="Layout", elem_id=self.elem_id("layout"))
                opacity = gr.Slider(0.0, 1.0, value=0.6, step=0.05, label="Opacity", elem_id=self.elem_id("opacity"))
                colours = gr.Dropdown([*COLOR_MAPS], value="inferno", label="Colours", elem_id=self.elem_id("colours"))
        self.infotext_fields = [
            *fields,
            (jointly, infotext.restored(infotext.JOINTLY, True, lambda text: text != "False")),
            (heat_maps, lambda params: infotext.LAYOUT in params),
            (words, infotext.restored(infotext.WORDS, "")),
            (layout, infotext.restored(infotext.LAYOUT, LAYOUTS[0])),
            (opacity, infotext.restored(infotext.OPACITY, 0.6, float)),
            (colours, infotext.restored(infotext.COLOURS, "inferno")),
        ]
        self.paste_field_names = [
            infotext.PATCHES, infotext.JOINTLY, infotext.LAYOUT, infotext.WORDS, infotext.OPACITY, infotext.COLOURS,
        ]  # fmt: skip
        controls = [*rows, jointly, heat_maps, words, layout, opacity, colours, save]
        for control in controls:
            control.do_not_save_to_config = True  # a patch chosen once would be on after every start
        return controls

    def patch_rows(self):
        """Components of the rows, a patch and its strength each, and what restores them."""
        names, controls, fields = [NONE, *patches()], [], []
        for row in range(SCRIPT_ROWS):
            with gr.Row():
                patch = gr.Dropdown(
                    names,
                    value=NONE,
                    label=f"Patch {row + 1}",
                    allow_custom_value=True,
                    elem_id=self.elem_id(f"patch_{row}"),
                )
                strength = gr.Slider(
                    -2.0, 2.0, value=1.0, step=0.01, label=f"Strength {row + 1}", elem_id=self.elem_id(f"strength_{row}")
                )
            controls += [patch, strength]
            fields += [(patch, infotext.patch_of(row)), (strength, infotext.strength_of(row))]
        refresh = gr.Button("Refresh the list", elem_id=self.elem_id("refresh"), size="sm")
        refresh.click(lambda: [gr.update(choices=[NONE, *patches()])] * SCRIPT_ROWS, [], controls[::2], queue=False)
        return controls, fields

    def process(self, p, *values):
        """Once for each generation: what is asked for, into the infotext too; what cannot be had ends it."""
        self.recorder.stop()
        self.options, self.applied, self.maps = ScriptOptions(), Applied(), []
        try:
            self.applied, self.options, sentences = prepared(p, ScriptOptions.of(values))
            p.extra_generation_params.update(self.options.infotext())
            for sentence in sentences:
                comment(p, sentence)
        except Exception as error:  # the host would log it and draw the concept
            refuse(p, webui.error_sentence(error))

    def before_process_batch(self, p, *values, **kwargs):
        prompts = kwargs["prompts"]
        prompts[:] = [with_tags(prompt, self.applied.rows) for prompt in prompts]

    def process_batch(self, p, *values, **kwargs):
        later = getattr(p, "hr_extra_network_data", None)  # hires fix takes its tags from prompts of its own
        if self.applied.rows and later is not None:
            make = extra_networks.ExtraNetworkParams
            later["lora"] = with_params(later.get("lora", []), self.applied.rows, lambda items: make(items=items))

    def process_before_every_sampling(self, p, *values, **kwargs):
        try:
            if self.applied.rows:
                check_loaded(p, self.applied)
        except Exception as error:  # as above
            sentence = webui.error_sentence(error)
            comment(p, sentence) if allowed() else refuse_sampling(p, sentence)
        if self.options.heat_maps:
            self.recorder.start(p)

    def postprocess_batch(self, p, *values, **kwargs):
        """The batch's heat maps; the infotexts, which the host writes next, tell of them only where there are any."""
        if not self.options.heat_maps:
            return
        infotext = self.options.heat_maps_infotext()
        try:
            self.maps += self.recorder.pictures(to_images(kwargs["images"]), self.options)
            p.extra_generation_params.update(infotext)
            if script_runs(p):
                comment(p, f"The heat maps are files in {p.outpath_samples}: a script counts the pictures of its gallery.")
        except ForgetError as error:
            self.maps += [[] for _ in kwargs["images"]]
            for key in infotext:
                p.extra_generation_params.pop(key, None)
            comment(p, str(error))
        finally:
            self.recorder.stop()

    def postprocess(self, p, processed, *values):
        hand_over(p, processed, self.maps, self.options)
        self.maps, self.applied = [], Applied()


def comment(p, text: str) -> None:
    """A sentence under the picture, where the host has a place for it, and in the console."""
    logging.warning("Forget-Me-Not: %s", displayable(text))
    if hasattr(p, "comment"):
        p.comment(text)
