"""A stage of training: seeded, stopped by steps or minutes, resumed."""

import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

SHEET_SECONDS = 600


class Run:
    """One stage of training: seeded, stopped by steps or minutes, resumed from its checkpoint."""

    def __init__(self, name, folder, minutes, device="cpu", bf16=False, seed=0, most_steps=None):
        self.name, self.path, self.minutes = name, Path(folder) / f"{name}.checkpoint.pt", minutes
        self.device, self.bf16, self.most_steps = torch.device(device), bf16, most_steps
        self.dice = torch.Generator().manual_seed(seed)
        self.spent, self.smooth = 0.0, {}

    def integers(self, below, shape):
        return torch.randint(below, shape, generator=self.dice)

    def normal(self, shape):
        return torch.randn(shape, generator=self.dice).to(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @staticmethod
    def cosine(done, warm=0.01):
        """A short rise from 0 to 1, then half a cosine down to 0, for `done` in 0..1."""
        return min(1, done / warm) * 0.5 * (1 + math.cos(math.pi * min(1, done)))

    def progress(self, step):
        return max(self.spent / (60 * self.minutes), step / self.most_steps if self.most_steps else 0)

    def steps(self, model, optimizer, rate, show=None):
        """Yields step numbers until the time or the steps are up; `rate(done)` gives the learning rate.

        `show(step)` is called now and then, its time not counted.
        """
        self.model, self.optimizer, step = model, optimizer, 0
        if self.path.exists():
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.dice.set_state(state["dice"].cpu())
            step, self.spent = state["step"], state["spent"]
        with tqdm(total=100, desc=self.name, bar_format="{l_bar}{bar}| {postfix}") as bar:
            saved = shown = time.monotonic()
            while self.progress(step) < 1:
                start = time.monotonic()
                for group in optimizer.param_groups:
                    group["lr"] = rate(self.progress(step))
                yield step
                step += 1
                self.spent += time.monotonic() - start
                bar.n = round(100 * min(1, self.progress(step)), 1)
                numbers = " ".join(f"{key} {value:.4f}" for key, value in self.smooth.items())
                bar.set_postfix_str(f"step {step} {numbers} {self.spent:.0f} s", refresh=False)
                bar.refresh() if step % 20 == 0 else None
                if time.monotonic() - saved > 120:
                    self.save(step)
                    saved = time.monotonic()
                if show and time.monotonic() - shown > SHEET_SECONDS:
                    show(step)
                    shown = time.monotonic()
        self.save(step)

    def save(self, step):
        """Writes the checkpoint under another name and renames it, so that a kill leaves the last one whole."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step}
        torch.save({**state, "spent": self.spent, "dice": self.dice.get_state()}, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)

    def backward(self, loss):
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def update(self, step, **numbers):
        """One step of the optimizer on the gradients there are, clipped to norm 1; numbers are shown smoothed."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        for key, value in numbers.items():
            self.smooth[key] = 0.99 * self.smooth.get(key, value) + 0.01 * value


def make_run(stage, options):
    """The Run of a stage, for as many minutes as the option of its name says."""
    return Run(
        stage, options.work, getattr(options, stage), options.device, options.bf16, options.seed, most_steps=options.steps
    )
