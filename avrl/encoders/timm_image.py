"""Any image model of timm as a frozen encoder: DINOv2, CLIP, SigLIP, ImageNet networks.

Size, mean, standard deviation and interpolation come from timm's own data config of the model, never from a
caller.
Shapes: B samples, T=1 frame, H=W pixels, C=3 RGB, h w patches of the network's last map, D its dimensions.
"""

from __future__ import annotations

import contextlib
import math
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from avrl.encoders import name_of, transformers_layout, weights
from avrl.errors import ConfigError, IntegrityError
from avrl.torchvision_ops import timm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
GRID = 3  # the `grid` readout keeps 3x3 places of the map
CPU_CHUNK = 16  # frames at once on a CPU: EfficientNet-Lite0 does 58 frames/s so, 16 frames/s with 64 at once
VIT_SIZE = 224  # px; 16x16 patches of 14 px (DINOv2, 518 px at home) or 14x14 of 16 px
CHOOSE = "choose another model of timm"
NEAR = 256  # px: transformers trained at most at this side keep it (DINOv3), the frames are resized for them


class ImageEncoder(nn.Module):
    """A network that sees one frame, with the preparation of frames that it was trained with.

    Transformers give ``cls`` (where they have such a token), ``map`` (where they pool by attention: SigLIP) and
    ``patch-mean`` (registers left out); convolutional networks ``pool``, the mean of their last map; both
    ``grid``, the map averaged to 3x3 places and flattened place by place. Output is made in inference mode:
    clone it before you train something on it.
    """

    paired = False
    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, data: Mapping[str, Any]) -> None:
        """`data` is as timm's data config: ``input_size`` (C, H, W), ``mean``, ``std``, ``interpolation``."""
        super().__init__()
        self.network = network
        self.image_size: int = data["input_size"][-1]
        # PIL's Lanczos and the rest have no antialiased twin in torch; bicubic is the nearest.
        self.interpolation = "bilinear" if data["interpolation"] == "bilinear" else "bicubic"
        self.register_buffer("mean", torch.tensor(data["mean"]).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).reshape(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        # What a network gives is seen by looking: timm's `num_features` is not the last map's width for all
        # of them.
        black = torch.zeros(1, 1 + self.paired, self.image_size, self.image_size, 3, dtype=torch.uint8)
        self.readouts: Mapping[str, int] = {name: z.shape[1] for name, z in self.encode(black).items()}

    @torch.inference_mode()
    def encode(self, frames_BTHWC: Tensor) -> dict[str, Tensor]:
        """uint8 0..255 (B, 1, H, H, 3) -> one float32 (B, D) a readout.

        Raises:
            TypeError: the frames are not uint8.
            ValueError: the frames are not square, or not one a sample.
        """
        chunks = [self._readouts(self.prepare(chunk)) for chunk in self._chunks(frames_BTHWC)]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    @torch.inference_mode()
    def patches(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 0..255 (B, 1, H, H, 3) -> the last map, float32 (B, h, w, D). Raises as `encode`."""
        chunks = self._chunks(frames_BTHWC)
        return torch.cat([self._forward(self.prepare(chunk))[1] for chunk in chunks])

    def _chunks(self, frames_BTHWC: Tensor) -> tuple[Tensor, ...]:
        """Depthwise networks lose two thirds of their speed on a CPU when many frames leave its caches."""
        return torch.split(frames_BTHWC, CPU_CHUNK) if self.mean.device.type == "cpu" else (frames_BTHWC,)

    def _readouts(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Input -> one (B, D) a readout."""
        y, map_BhwD = self._forward(x_BCHW)
        mean_BD = map_BhwD.mean((1, 2))
        grid_BDhw = F.adaptive_avg_pool2d(map_BhwD.permute(0, 3, 1, 2), GRID)
        grid_BD = grid_BDhw.permute(0, 2, 3, 1).flatten(1)
        network: Any = self.network
        if y.ndim == 4 and not hasattr(network, "num_prefix_tokens"):
            return {"pool": mean_BD, "grid": grid_BD}
        found = {"cls": y[:, 0]} if getattr(network, "cls_token", None) is not None else {}
        if getattr(network, "attn_pool", None) is not None:
            found["map"] = network.forward_head(y, pre_logits=True).float()
        return found | {"patch-mean": mean_BD, "grid": grid_BD}

    def prepare(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 0..255 (B, 1, H, H, 3) -> the network's input, float32 (B, 3, image_size, image_size).

        An encoder of pairs takes (B, 2, H, H, 3) and gives (2 B, ...), the two of a pair one after the other.

        timm's evaluation transform enlarges and cuts the border off (`crop_pct`). Not here: the frame store
        has cut the frame already, and a hand or a gripper is often at the border. At the native size no pixel
        is resampled.

        Raises:
            TypeError: the frames are not uint8.
            ValueError: the frames are not square, or not one a sample.
        """
        if frames_BTHWC.dtype != torch.uint8:
            raise TypeError(f"frames must be uint8 0..255, got {frames_BTHWC.dtype}")
        _, T, H, W, C = frames_BTHWC.shape
        n_frames = 1 + self.paired
        if n_frames != T or C != 3 or H != W:
            raise ValueError(f"frames must be (B, {n_frames}, H, H, 3), got {tuple(frames_BTHWC.shape)}")
        x_BCHW = frames_BTHWC.flatten(0, 1).to(self.mean.device).permute(0, 3, 1, 2).float()
        for size in ((H, self.image_size), (self.image_size, self.image_size)) if self.image_size != H else ():
            x_BCHW = F.interpolate(x_BCHW, size, mode=self.interpolation, antialias=True)
            # The models were trained on what Pillow resized: along rows, then along columns, whole levels after each.
            x_BCHW = x_BCHW.add_(0.5).floor_().clamp_(0, 255)
        return x_BCHW.div_(255).sub_(self.mean).div_(self.std)

    def _forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Input -> (the network's tokens or map as it gives them, last map (B, h, w, D)), float32.

        Raises:
            ConfigError: the network has no one map of patches, or does not say where.
        """
        network: Any = self.network
        y, name = network.forward_features(x_BCHW), type(network).__name__
        if not isinstance(y, torch.Tensor):
            raise ConfigError(f"{name} gives {len(y)} maps at once, and a probe reads one", CHOOSE)
        y = y.float()
        if y.ndim == 4:
            return y, y if getattr(network, "output_fmt", "NCHW") == "NHWC" else y.permute(0, 2, 3, 1)
        # Networks without such tokens (MLPs, LeViT, Hiera) name no number of them; others of theirs leave it unsaid.
        unsaid = any("cls_token" in one for one, _ in network.named_parameters())
        prefix = getattr(network, "num_prefix_tokens", None if unsaid else 0)
        if prefix is None:
            raise ConfigError(f"{name} has a class token, and timm does not say where among its tokens", CHOOSE)
        side = math.isqrt(y.shape[1] - prefix)
        if side * side != y.shape[1] - prefix:
            raise ConfigError(f"{name} gives {y.shape[1] - prefix} patches that are no square", CHOOSE)
        return y, y[:, prefix:].reshape(len(y), side, side, -1)


def load(argument: str, init: str, weights_file: Path | None = None) -> ImageEncoder:
    """A timm model by its name (``vit_base_patch14_dinov2.lvd142m``).

    Args:
        argument: timm's name, with the tag of the weights after the dot.
        init: ``pretrained``, or ``random`` for the untrained twin (seeded; needs no weights).
        weights_file: Weights in the layout of timm or of the model's authors, instead of the hub's.

    Raises:
        ConfigError: timm has no such model, or `init` is neither.
        MissingError: the weights are not at hand.
        IntegrityError: the weights do not fit the model.
    """
    name = name_of(__name__, argument) or f"timm:{argument}"
    path = weights.find(name, weights_file) if is_pretrained(init) else None
    network = build(argument)
    if path is not None:
        fill(network, weights.read(path), f"{argument} ({path})")
    return ImageEncoder(network, data_config(network))


def fill(network: Any, state: dict[str, Tensor], what: str) -> None:
    """Load weights in the layout of timm, of transformers or of the authors; a classifier in them is left out.

    Raises:
        IntegrityError: the weights do not fit `what`.
    """
    classifiers = network.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    state = _translate(network, state, what)
    weights.fit(network, state, what, surplus=tuple(f"{one}." for one in classifiers))


def build(argument: str, **settings: Any) -> Any:
    """The network without its classifier, with seeded random weights.

    Args:
        argument: timm's name.
        settings: Of timm's constructor: tests ask for fewer and narrower blocks.

    Raises:
        ConfigError: timm has no such model.
    """
    name = argument.split(".")[0]
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {argument!r}", "see timm.list_models(pretrained=True)")
    # Transformers are asked for 224 px, the side of our frames, where they come from afar: position embeddings
    # are resized then, not the frames.
    families = ["vision_transformer", "eva", "deit", "beit"]
    if timm.models.is_model_in_modules(name, families) and _home(argument) > NEAR:
        settings.setdefault("img_size", VIT_SIZE)
    if "_siglip_" in name:
        # As trained: big_vision's GELU is the approximate one, as transformers has it; timm's is exact.
        settings.setdefault("act_layer", "gelu_tanh")
    with seeded():
        return timm.create_model(argument, num_classes=0, **settings)


def _home(argument: str) -> int:
    """The side that a model was trained at, px."""
    config = timm.get_pretrained_cfg(argument)
    return int(config.input_size[-1]) if config else VIT_SIZE


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Random weights made inside are the untrained twin's, the same every time; the random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def data_config(network: Any) -> dict[str, Any]:
    """The data config of a network, at the size that the network was really built for."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(network)
    embed = getattr(network, "patch_embed", None)
    if getattr(embed, "img_size", None):
        config["input_size"] = (3, *network.patch_embed.img_size)
    return config


def is_pretrained(init: str) -> bool:
    """Whether `init` asks for published weights.

    Raises:
        ConfigError: it is neither ``pretrained`` nor ``random``.
    """
    if init not in ("pretrained", "random"):
        raise ConfigError(f"init is pretrained or random, not {init!r}")
    return init == "pretrained"


def _translate(network: nn.Module, state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """Another layout of the same weights -> timm's: names, and position embeddings at the size asked for.

    timm's own loader would do this too, but turns strictness off as soon as the classifier is left out
    (`load_pretrained`, num_classes=0): keys that match nothing leave random weights behind, with an info
    line.
    """
    translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", lambda state, _: state)
    try:
        state = _dinov2_positions(network, transformers_layout.to_timm(state))
        _require_biases(network, state, what)
        with contextlib.redirect_stdout(None):  # DINOv3's prints a line a block for the biases that it leaves out
            return dict(translate(state, network))
    except (KeyError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
        raise IntegrityError(f"the weights do not fit {what}: {error!r}") from error


def _require_biases(network: Any, state: dict[str, Tensor], what: str) -> None:
    """DINOv3's biases of queries and values, which timm leaves out where its network has none, must be zeros then.

    Raises:
        IntegrityError: they are not zeros.
    """
    if "storage_tokens" not in state or getattr(network.blocks[0].attn, "q_bias", None) is not None:
        return
    for key, one in state.items():
        query, _, value = one.chunk(3) if key.endswith("attn.qkv.bias") else (one.new_zeros(1),) * 3
        if query.any() or value.any():
            name = network.pretrained_cfg["architecture"]
            raise IntegrityError(
                f"{what} has no place for {key}, which is not zero there",
                f"where timm has it: --encoder timm:{name}_qkvb --weights FILE",
            )


def _dinov2_positions(network: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's position embeddings at the size asked for, as its authors' own network resizes them.

    Bicubic, without antialiasing, scaled by (n + 0.1) / N: `interpolate_pos_encoding` of github.com/facebookresearch/
    dinov2 at 027a9ac. timm smooths them, which the authors do for the networks with registers alone; those are left
    to timm.
    """
    architecture = network.pretrained_cfg.get("architecture", "")
    if not architecture.endswith("_dinov2") or "_reg" in architecture or "pos_embed" not in state:
        return state
    positions = state["pos_embed"]
    N, n = math.isqrt(positions.shape[1] - 1), network.patch_embed.grid_size[0]
    if n == N:
        return state
    grid = positions[:, 1:].reshape(1, N, N, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(n + 0.1) / N, mode="bicubic")
    return state | {"pos_embed": torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)}
