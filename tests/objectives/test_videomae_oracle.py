"""Hugging Face's `VideoMAEForPreTraining` as the oracle of ours: the same weights, the same predictions and loss.

Compared: predicted pixels of every hidden tubelet and the loss, from frames to the end. Set aside, so that the two are
one function: our CLS token (theirs has none: ours is emptied), positions (theirs are given our table), the epsilon of
the encoder's last norm (theirs is given ours), the bias between encoder and decoder (ours is zero, theirs is absent).
They standardise pixels by ImageNet's statistics: their patch embedding takes that back.
"""

import pytest
import torch
from contracts.objective import network

from avrl import checkpoint
from avrl.objectives import modules, vit
from avrl.objectives.channels import unit
from avrl.objectives.videomae import noise

SIDE, PLACES = 64, 16
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # transformers.image_utils


def theirs(frames):
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    size = vit.SIZES["tiny"]
    config = VideoMAEConfig(
        image_size=SIDE,
        num_frames=frames,
        hidden_size=size.embed_dim,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.embed_dim,
        decoder_hidden_size=size.decoder_dim,
        decoder_num_hidden_layers=size.decoder_depth,
        decoder_num_attention_heads=size.decoder_dim // 64,
        decoder_intermediate_size=4 * size.decoder_dim,
        layer_norm_eps=1e-6,
        use_mean_pooling=False,
    )
    return VideoMAEForPreTraining(config).eval()


def ours(frames):
    """With random numbers wherever a fresh network has zeros or ones, but for what theirs has not."""
    ratio = {2: 0.75, 16: 0.9}[frames]
    objective = checkpoint.build(network("videomae", image_size=SIDE, num_frames=frames, mask_ratio=ratio))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in modules(objective).parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        objective.narrow.bias.zero_()
        objective.tokens.cls = torch.nn.Parameter(torch.zeros(1, 0, vit.SIZES["tiny"].embed_dim))
    return modules(objective).eval().requires_grad_(False)


def block(their, name, our):
    """Weights of one of our blocks (timm's) under their names; k's bias is dropped: softmax does not see it."""
    weight, bias = our.attn.qkv.weight.chunk(3), our.attn.qkv.bias.chunk(3)
    found = {
        f"attention.attention.{part}.weight": one for part, one in zip(("query", "key", "value"), weight, strict=True)
    }
    found |= {"attention.attention.query.bias": bias[0], "attention.attention.value.bias": bias[2]}
    for to, part in {
        "attention.output.dense": our.attn.proj,
        "intermediate.dense": our.mlp.fc1,
        "output.dense": our.mlp.fc2,
        "layernorm_before": our.norm1,
        "layernorm_after": our.norm2,
    }.items():
        found |= {f"{to}.weight": part.weight, f"{to}.bias": part.bias}
    their.update({f"{name}.{key}": value for key, value in found.items()})


def copy(our, model):
    """Our weights into theirs; every one of theirs is given."""
    state = {}
    kernel = our.tokens.project.weight.unflatten(1, (2, 3)).transpose(1, 2)  # (D, 3, 2, 16, 16), as Conv3d has it
    shift = (kernel.sum((2, 3, 4)) * MEAN).sum(1)
    state["videomae.embeddings.patch_embeddings.projection.weight"] = kernel * STD.view(1, 3, 1, 1, 1)
    state["videomae.embeddings.patch_embeddings.projection.bias"] = our.tokens.project.bias + shift
    for i, one in enumerate(our.blocks):
        block(state, f"videomae.encoder.layer.{i}", one)
    for i, one in enumerate(our.decoder):
        block(state, f"decoder.decoder_layers.{i}", one)
    for to, part in {"videomae.layernorm": our.norm, "decoder.norm": our.decoder_norm}.items():
        state |= {f"{to}.weight": part.weight, f"{to}.bias": part.bias}
    # Within a patch we have (frame, colour, y, x), they have (frame, y, x, colour).
    order = torch.arange(our.head.out_features).view(2, 3, 256).transpose(1, 2).flatten()
    state |= {"decoder.head.weight": our.head.weight[order], "decoder.head.bias": our.head.bias[order]}
    state |= {"encoder_to_decoder.weight": our.narrow.weight, "mask_token": our.mask_token}
    model.load_state_dict(state)
    model.videomae.layernorm.eps = our.norm.eps
    model.videomae.embeddings.position_embeddings = (our.tokens.position + our.time).flatten(0, 1).unsqueeze(0)
    model.position_embeddings = (our.position + our.narrow_time).flatten(0, 1).unsqueeze(0)
    return order


@pytest.mark.parametrize("frames", [2, 16])
def test_predictions_and_loss_are_those_of_hugging_face(frames):
    our, model = ours(frames), theirs(frames)
    order = copy(our, model)
    clip = torch.randint(
        0, 256, (3, frames, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    seed = torch.arange(3) * 7919
    hidden = noise(seed, PLACES).argsort(dim=1, stable=True)[:, : our.hidden]
    mask = torch.zeros(3, PLACES, dtype=torch.bool).scatter_(1, hidden, True)

    pixels = (unit(clip, SIDE) - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    wanted = model(pixels, bool_masked_pos=mask.repeat(1, frames // 2))
    predicted, _ = our.predict(clip, seed)
    by_place = hidden.argsort(1)[:, None, :, None].expand(-1, frames // 2, -1, predicted.shape[-1])
    sorted_ = predicted.unflatten(1, (frames // 2, -1)).gather(2, by_place).flatten(1, 2)[..., order]

    assert wanted.logits.abs().mean() > 0.1
    torch.testing.assert_close(sorted_, wanted.logits, atol=1e-5, rtol=0)
    found = our.loss(clip, torch.ones(3, dtype=torch.int64), seed)["loss"]
    torch.testing.assert_close(found, wanted.loss, atol=1e-5, rtol=0)
