import torch
from contracts.objective import SIZE, ObjectiveContract, PairEncoderContract, batch, network

from avrl import checkpoint
from avrl.objectives import modules, vit
from avrl.objectives.channels import unit


class TestTwoStream(ObjectiveContract):
    name = "two-stream"


class TestTwoStreamEncoder(PairEncoderContract):
    name = "two-stream"


class TestSingleStream(ObjectiveContract):
    name = "single-stream"


class TestSingleStreamEncoder(PairEncoderContract):
    name = "single-stream"


def test_the_first_prediction_is_the_copy_so_skill_starts_at_zero():
    parts = checkpoint.build(network("two-stream")).loss(*batch())
    torch.testing.assert_close(parts["error"], parts["reference"])


def test_frame_tk_reaches_the_decoder_through_change_emb_alone():
    """The trap of this plan: RGB(t) + M is the target, so no patch of M may reach the decoder."""
    objective = modules(checkpoint.build(network("single-stream")))
    torch.nn.init.normal_(objective.decoder.head.weight)
    img_t, img_tk = unit(batch()[0], SIZE).unbind(1)
    form, change = objective.network(img_t, img_tk)
    other_form, other_change = objective.network(img_t, img_tk.flip(0))
    assert torch.equal(form, other_form)
    assert not torch.equal(change, other_change)


def test_two_streams_hear_of_each_other_by_their_cls_tokens_only():
    model = modules(checkpoint.build(network("two-stream"))).network
    for block in model.exchanges:  # a block that adds nothing leaves both CLS as they are
        for part in (block[0].attn.proj, block[0].mlp.fc2):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)
    img_t, img_tk = unit(batch()[0], SIZE).unbind(1)
    p = model.streams(img_t, img_tk)["p"]
    assert torch.equal(p, model.streams(img_t, img_tk.flip(0))["p"])


def test_predicted_picture_and_change_emb_have_the_plans_shapes():
    objective = checkpoint.build(network("two-stream"))
    img_pred, change_emb = objective.predict(*unit(batch()[0], SIZE).unbind(1))
    assert img_pred.shape == (4, 3, SIZE, SIZE)
    assert change_emb.shape == (4, vit.SIZES["tiny"].embed_dim)


def test_patches_come_back_where_they_were():
    pictures = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(vit.unpatchify(vit.patchify(pictures)), pictures)
    assert torch.equal(vit.patchify(pictures)[0, 1, :16], pictures[0, 0, 0, 16:32])


def test_base_is_vit_b16_as_timm_builds_it():
    from avrl.torchvision_ops import timm

    ours = vit.blocks(768, 12, 12)
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0).blocks
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
