"""Export: what makes a checkpoint of use elsewhere, a model card and, where timm has the network, weights for timm.

``README.md`` is the card, with the header that the Hugging Face hub reads. ``timm/`` opens by
``timm.create_model("local-dir:.../timm", pretrained=True)``. Nothing that a clock decides is written.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file

from avrl import __version__, checkpoint
from avrl.artifact import write_durably
from avrl.objectives.vit import PATCH_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from avrl.artifact import Artifact
    from avrl.encoders import Encoder
    from avrl.objectives.vit import Plain

FOLDER = "timm"
# Of the facts of a run, what the card tells: the rest depends on the machine.
RESULTS = ("parameters", "steps", "samples", "arithmetic", "final_loss", "final_skill", "baseline")


def export(out: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], frames: Artifact) -> None:
    """Write the card, and the weights for timm, beside a trained checkpoint.

    Args:
        out: Folder that holds ``model.safetensors`` and ``config.json``.
        settings: Identity fields of the run's config.
        facts: What `avrl.training.train` returned.
        frames: What it was trained on.
    """
    objective = checkpoint.load(out)
    plain, encoder = objective.plain(), objective.encoder()
    if plain:
        (out / FOLDER).mkdir(exist_ok=True)
        save_file(weights(plain), out / FOLDER / "model.safetensors")
        described = json.dumps(architecture(plain, encoder.image_size), indent=1, sort_keys=True)
        write_durably(out / FOLDER / "config.json", described.encode())
    write_durably(out / "README.md", card(settings, facts, frames, encoder, plain).encode())


def weights(plain: Plain) -> dict[str, Tensor]:
    """A plain transformer's weights under the names of timm's VisionTransformer.

    Ours adds fixed positions to the patches only, timm a learned one to CLS too: there it is zero.
    """
    tokens = plain.tokens
    nowhere = torch.zeros(1, tokens.position.shape[1])
    state = {
        "cls_token": tokens.cls,
        "pos_embed": torch.cat([nowhere, tokens.position]).unsqueeze(0),
    }
    state |= {f"patch_embed.proj.{name}": one for name, one in tokens.project.state_dict().items()}
    state |= {f"blocks.{name}": one for name, one in plain.blocks.state_dict().items()}
    state |= {f"norm.{name}": one for name, one in plain.norm.state_dict().items()}
    return {name: one.detach().contiguous().clone() for name, one in state.items()}


def architecture(plain: Plain, image_size: int) -> dict[str, Any]:
    """``config.json`` as timm reads it: one of its names, and in what ours differs from that."""
    channels, first = plain.tokens.project.in_channels, cast("Any", plain.blocks[0])
    return {
        "architecture": f"vit_base_patch{PATCH_SIZE}_224",
        "num_classes": 0,
        "num_features": plain.tokens.cls.shape[2],
        "model_args": {
            "img_size": image_size,
            "in_chans": channels,
            "embed_dim": plain.tokens.cls.shape[2],
            "depth": len(plain.blocks),
            "num_heads": first.attn.num_heads,
        },
        # No "first_conv": timm would take it for one of 3 channels, and leave it random.
        "pretrained_cfg": {
            "input_size": [channels, image_size, image_size],
            "fixed_input_size": True,
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
            "num_classes": 0,
            "classifier": "head",
        },
    }


def card(
    settings: Mapping[str, Any], facts: Mapping[str, Any], frames: Artifact, encoder: Encoder, plain: Plain | None
) -> str:
    """The model card, in the hub's form: a YAML header, then Markdown."""
    source, manifest = str(frames.manifest.facts["source"]), frames.manifest
    counts = ", ".join(f"{manifest.facts[name]} {name}" for name in ("episodes", "frames") if name in manifest.facts)
    name = f"{settings['objective']}, {settings['size']}"
    return f"""---
license: other
license_name: terms-of-the-training-data
library_name: {"timm" if plain else "avrl"}
pipeline_tag: image-feature-extraction
tags: [avrl, egocentric-video, action-free]
datasets: [{source}]
---

# {name}, pretrained on {source}

An encoder of frame pairs (t, t+gap), trained by avrl {__version__} on video alone: no action label was read.

**Licence.** The weights come from data under these terms; respect them when you use or share the weights.

{_listed(manifest.licence or ["none is recorded with the frames"])}

## Trained on

`{frames.ref}` ({counts}), digest `{frames.digest}`. `manifest.json` has every file's checksum.

{_table("setting", "value", settings)}

## Result

Skill is 1 - error / error of the baseline: at 0 the network predicts no better than that.

{_table("", "value", {one: facts[one] for one in RESULTS})}

## Readouts

{_table("readout", "dimensions", encoder.readouts)}

## Load it with avrl

```python
from pathlib import Path
from avrl import checkpoint

encoder = checkpoint.load(Path("THIS FOLDER")).encoder()
vectors = encoder.encode(frames)  # uint8 (B, 2, H, W, 3), 0..255: frame t and frame t+gap; a (B, D) for each readout
```

On the command line: `avrl probe bridge --encoder NAME-OF-THIS-FOLDER`.

## Load it with timm

{_for_timm(plain, encoder) if plain else "Not possible: timm has no such network."}
"""


def _for_timm(plain: Plain, encoder: Encoder) -> str:
    channels, side = plain.tokens.project.in_channels, encoder.image_size
    return f"""```python
import timm

vit = timm.create_model("local-dir:THIS FOLDER/{FOLDER}", pretrained=True).eval()
tokens = vit.forward_features(picture)  # float (B, {channels}, {side}, {side}) -> `cls` and the patches (B, 1+N, D)
```

The channels of the picture are {plain.channels}; `avrl.objectives.channels` makes them."""


def _listed(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    cells = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in rows.items()}
    return "\n".join([f"| {left} | {right} |", "| --- | --- |", *(f"| {one} | {two} |" for one, two in cells.items())])
