"""The rows of the table of costs, and what this machine was measured to do, which bounds them below."""

from __future__ import annotations

import torch

from benchmarks.measuring import waited

GIGABYTE = 2**30
RATIOS = ("ratio_time", "ratio_memory")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def tensors_of(pipeline) -> list[torch.Tensor]:
    """The weights that a pipeline holds."""
    return [p for name in PARTS if getattr(pipeline, name, None) is not None for p in getattr(pipeline, name).parameters()]


class Machine:
    """What this machine was measured to do: multiplications and additions, and bytes copied, in a second."""

    def __init__(self, device):
        rows, width = (8192, 8192) if device == "cuda" else (2048, 1280)
        x, w = torch.randn(rows, width, device=device), torch.randn(width, width, device=device)
        y = torch.randn(64 << 20, device=device)
        products = torch.backends.cuda.matmul
        before, products.allow_tf32 = products.allow_tf32, torch.backends.cudnn.allow_tf32
        self.operations = 2 * x.numel() * len(w) / self.best(lambda: x @ w)
        products.allow_tf32 = before
        self.bytes = 2 * y.numel() * 4 / self.best(y.clone)  # read and written

    def best(self, work, times: int = 5) -> float:
        taken = []
        for _ in range(times + 1):
            start = waited()
            work()
            taken.append(waited() - start)
        return min(taken[1:])

    def floor(self, operations: float, read: float) -> float:
        """Seconds that so much arithmetic, and so many bytes, take at least."""
        return max(operations / self.operations, read / self.bytes)


def row(what: str, seconds: float | None, peak: float | None, original: dict | None = None, **more) -> dict:
    """A row of the table, with its ratios to the original's."""
    made = {"what": what, "seconds": seconds, "peak_bytes": peak, **more}
    for key, name in (("seconds", "ratio_time"), ("peak_bytes", "ratio_memory")):
        of = original or made
        made[name] = made[key] / of[key] if made[key] is not None and of[key] is not None else None
    line = f"{what:46}"
    line += f"{seconds:9.2f} s" if seconds is not None else " " * 11
    line += f"{peak / GIGABYTE:8.2f} GB" if peak is not None else " " * 11
    line += "".join(f"{made[name]:8.3f}" if made[name] is not None and original else " " * 8 for name in RATIOS)
    floor = f"   floor {more['floor']:.2f} s" if more.get("floor") else ""
    print(line + floor, flush=True)
    return made
