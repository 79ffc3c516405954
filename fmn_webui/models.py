"""Which checkpoint a patch was made for, and whether it is the one that draws."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from fmn_core.hosts.webui.base import WebuiBase
from fmn_core.patch.patch import Patch, fingerprint

_fingerprints: WeakKeyDictionary = WeakKeyDictionary()  # UNet -> (what it was made of, its hash)


def hash_of(host: WebuiBase) -> str:
    """The fingerprint of the model's weights, computed once: the webui puts another checkpoint into the same UNet."""
    info = host.sd_model.sd_checkpoint_info
    made_of = info.filename, next(host.unet.parameters()).dtype
    known, found = _fingerprints.get(host.unet, (None, ""))
    if known != made_of:
        found = fingerprint(host)
        _fingerprints[host.unet] = made_of, found
    return found


def made_elsewhere(host: WebuiBase, name: str, patch: Patch) -> str:
    """A sentence on a patch that was made for another checkpoint than the host's; empty for one that was not, or does not
    say so. Under one name other weights are the same in another precision."""
    base = patch.info["base"]
    if not base.get("hash") or host.quantised or base["name"] == host.model_name() or base["hash"] == hash_of(host):
        return ""
    return (
        f"The patch `{name}` was made for {base['name']}, or for this model in another precision, and this is "
        f"{host.model_name()}: it may forget less here. Forget `{patch.info['concept']}` in this checkpoint to be sure."
    )
