"""Networks of video as encoders of pairs: how two frames fill a clip, and how its tokens are read.

Shapes: B pairs, T frames of a clip, C=3 RGB, H=W pixels, t h w places of the network's tokens, D dimensions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from avrl.encoders.timm_image import ImageEncoder
from avrl.errors import MissingError

if TYPE_CHECKING:
    from torch import Tensor


class PairEncoder(ImageEncoder):
    """A network of clips that sees a pair: readouts ``patch-mean`` and ``grid``."""

    paired = True


class Clip(nn.Module):
    """A network of transformers that is shown each frame of a pair several times, in order, as one clip.

    A clip of two frames only is nothing that a network of 16 frames has ever seen; one that stands still, jumps
    once and stands still again is not natural either, but each of its parts is.
    Tokens are averaged over time: the map has one token a place, whatever the length of the clip.

    Args:
        network: Takes (B, T, C, H, W), gives an object with `last_hidden_state` (B, t h w, D).
        repeats: How often each frame is shown.
        tubelet: Frames a token sees.
    """

    num_prefix_tokens = 0

    def __init__(self, network: nn.Module, repeats: int, tubelet: int) -> None:
        super().__init__()
        self.network, self.repeats, self.tubelet = network, repeats, tubelet

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        """The frames of the pairs one after the other, (2 B, C, H, W) -> (B, h w, D)."""
        clip_BTCHW = x_NCHW.reshape(-1, 2, *x_NCHW.shape[1:]).repeat_interleave(self.repeats, 1)
        tokens: Tensor = self.network(clip_BTCHW).last_hidden_state
        times = 2 * self.repeats // self.tubelet
        return tokens.reshape(len(tokens), times, -1, tokens.shape[-1]).mean(1)


def build(name: str, model: str, config: str, settings: dict[str, Any]) -> Any:
    """A model of transformers by the names of its class and of its config's, with seeded random weights.

    Raises:
        MissingError: transformers is not installed.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise MissingError(f"{name} needs transformers", "pip install 'avrl[video]'") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**settings))
