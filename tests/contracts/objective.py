"""What every objective promises. Subclass, name the objective, inherit the tests."""

from typing import ClassVar

import pytest
import torch

from avrl import checkpoint
from avrl.objectives import modules
from contracts.encoder import EncoderContract

SIZE = 32


def network(name: str, **changed: object) -> dict:
    plain = {"objective": name, "size": "tiny", "image_size": SIZE, "loss_decay": 0.5, "mask_ratio": 0.75, "seed": 0}
    return {**plain, **changed}


def batch(n: int = 4, seed: int = 0, T: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smooth pictures with something that moves in them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, T, 3, 4, 4, generator=generator).flatten(0, 1)
    smooth = torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear").unflatten(0, (n, T))
    frames = (smooth * 255).byte().movedim(2, -1)
    return frames, torch.arange(n) % 3 + 1, torch.arange(n) * 7919 + seed


class ObjectiveContract:
    """Subclass with ``name`` set, and ``options`` where the network is not the default one."""

    name: str
    options: ClassVar[dict] = {}
    steps = 60  # after which four samples are known by heart

    @pytest.fixture(autouse=True)
    def one_thread(self):
        torch.set_num_threads(1)

    def make(self, **changed):
        return checkpoint.build(network(self.name, **{**self.options, **changed}))

    def batch(self, n=4):
        return batch(n, T=self.options.get("num_frames", 2))

    def test_forward_is_the_loss_and_its_parts_are_finite_scalars(self):
        objective = self.make()
        parts = modules(objective)(*self.batch())
        assert set(parts) == {"loss", "error", "reference"}
        assert all(one.ndim == 0 and torch.isfinite(one) for one in parts.values())
        assert torch.equal(parts["loss"], objective.loss(*self.batch())["loss"])

    def test_the_mean_over_halves_is_the_whole(self):
        objective = self.make()
        frames, gap, seed = self.batch(8)
        whole = objective.loss(frames, gap, seed)
        halves = [objective.loss(frames[h], gap[h], seed[h]) for h in (slice(4), slice(4, 8))]
        for part in whole:
            torch.testing.assert_close(whole[part], (halves[0][part] + halves[1][part]) / 2)

    def test_larger_gaps_weigh_less(self):
        frames, gap, seed = self.batch()
        near = self.make().loss(frames, torch.ones_like(gap), seed)["loss"]
        far = self.make().loss(frames, torch.full_like(gap, 3), seed)["loss"]
        torch.testing.assert_close(far, near / 4)

    def test_every_parameter_gets_a_gradient(self):
        objective = self.make()
        optimizer = torch.optim.SGD(modules(objective).parameters(), lr=1e-2)
        for _ in range(2):  # the head of a prediction starts at zero and passes a gradient on from the second step
            optimizer.zero_grad()
            objective.loss(*self.batch())["loss"].backward()
            optimizer.step()
        silent = [n for n, p in modules(objective).named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not silent

    def test_four_samples_can_be_learned_by_heart(self):
        torch.manual_seed(0)
        objective = self.make(loss_decay=1.0)
        optimizer = torch.optim.AdamW(modules(objective).parameters(), lr=1e-3)
        samples = self.batch()
        for _ in range(self.steps):
            optimizer.zero_grad()
            loss = objective.loss(*samples)
            loss["loss"].backward()
            optimizer.step()
        assert loss["error"] < 0.05 * loss["reference"]

    def test_panels_are_pictures_of_one_size_and_the_target_is_what_was_seen(self):
        frames, _, seed = self.batch()
        objective = self.make()
        with torch.no_grad():
            panels, again = objective.panels(frames, seed), objective.panels(frames, seed)
        (shape,) = {one.shape for one in panels.values()}
        assert shape[:3] == (4, 3, SIZE)
        assert all(one.min() >= 0 and one.max() <= 1 for one in panels.values())
        target = list(panels.values())[-1]
        truth = frames.movedim(-1, 2).float() / 255
        torch.testing.assert_close(target[..., -SIZE:], truth[:, 1])
        if shape[3] == 2 * SIZE:
            torch.testing.assert_close(target[..., :SIZE], truth[:, 0])
        assert all(torch.equal(one, other) for one, other in zip(panels.values(), again.values(), strict=True))

    def test_the_same_seed_gives_the_same_network(self):
        one, other, third = self.make(), self.make(), self.make(seed=1)
        states = [modules(each).state_dict() for each in (one, other, third)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])

    def test_floats_are_refused(self):
        frames, gap, seed = self.batch()
        with pytest.raises(TypeError, match="uint8"):
            self.make().loss(frames.float(), gap, seed)


class PairEncoderContract(EncoderContract):
    """The encoder contract, for the encoder that an objective leaves behind."""

    name: str
    options: ClassVar[dict] = {}

    def make(self):
        objective = checkpoint.build(network(self.name, **self.options))
        modules(objective).eval().requires_grad_(False)
        return objective.encoder()
