import weakref

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import Ridge as Reference

from avrl import splits
from avrl.probes import ridge
from avrl.probing import Floor
from avrl.ridge import ALPHAS, Moments, Path, choose_alpha, choose_alpha_of, solve, standardise, total


def data(n=200, d=20, k=3, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(d, k, generator=generator, dtype=torch.float64)
    return z, z @ weight + noise * torch.randn(n, k, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("d", [20, 400])  # fewer and more dimensions than rows: both forms of the solution
@pytest.mark.parametrize("alpha", [1e-4, 1e-2, 1.0])
def test_equals_scikit_learn(d, alpha):
    z, y = data(d=d)
    x = (z - z.mean(0)) / z.std(0, unbiased=False)
    reference = Reference(alpha=alpha * len(x), solver="cholesky").fit(x.numpy(), y.numpy())
    ours = Path(z, y).fit(alpha).predict(z)
    np.testing.assert_allclose(ours.numpy(), reference.predict(x.numpy()), rtol=1e-6, atol=1e-6)


def test_recovers_a_planted_map_and_finds_nothing_in_shuffled_targets():
    z, y = data(600)
    fit, valid, test = slice(300), slice(300, 450), slice(450, 600)
    shuffled = y[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    for target, low, high in ((y, 0.99, 1.0), (shuffled, -0.1, 0.1)):
        alpha = choose_alpha(z[fit], target[fit], z[valid], target[valid])
        error = (Path(z[fit], target[fit]).fit(alpha).predict(z[test]) - target[test]).square().sum(0)
        r2 = 1 - error / (target[test] - target[test].mean(0)).square().sum(0)
        assert ((low <= r2) & (r2 <= high)).all()


def test_scaling_all_features_or_moving_them_changes_nothing():
    z, y = data()
    plain = Path(z, y).fit(1e-2).predict(z)
    torch.testing.assert_close(Path(1e4 * z + 7, y).fit(1e-2).predict(1e4 * z + 7), plain, rtol=1e-6, atol=1e-8)


def test_each_target_has_its_own_alpha_and_does_not_disturb_the_others():
    z, y = data(d=50)
    alpha = torch.tensor([1e-3, 1e-1, 10.0])
    together = Path(z, y).fit(alpha).predict(z)
    for k in range(3):
        alone = Path(z, y[:, k : k + 1]).fit(float(alpha[k])).predict(z)
        torch.testing.assert_close(together[:, k : k + 1], alone)


def test_a_constant_column_is_left_out_and_a_nearly_constant_one_is_not_blown_up():
    z, y = data()
    quiet = torch.full((200, 2), 3.0, dtype=torch.float64)
    quiet[0, 1] += 1e-7
    wide = torch.cat([z, quiet], 1)
    model = Path(wide, y).fit(1e-6)
    moved = wide.clone()
    moved[:, 20:] += 0.01  # a test episode in which the quiet columns move
    torch.testing.assert_close(model.predict(moved), model.predict(wide), atol=0.05, rtol=0)
    assert standardise(wide)[1][20] == 0


def test_a_constant_target_is_predicted_as_it_is():
    z, _ = data()
    predicted = Path(z, torch.full((200, 1), 4.0)).fit(1e-2).predict(z)
    torch.testing.assert_close(predicted, torch.full((200, 1), 4.0, dtype=torch.float64))


def test_alpha_grid_covers_no_to_full_shrinkage():
    z, y = data()
    assert (Path(z, y).fit(ALPHAS[0]).predict(z) - y).square().mean() < 0.02
    assert (Path(z, y).fit(ALPHAS[-1]).predict(z) - y.mean(0)).square().mean() < 0.05 * y.var()


# From sums over rows, which need not be in memory.


def moments(z, y, pieces=3):
    """Taken in piece by piece, about an origin that is only near the mean."""
    found = Moments(z[:7].mean(0), y.shape[1])
    for a, b in zip(z.chunk(pieces), y.chunk(pieces), strict=True):
        found.add(a, b)
    return found


@pytest.mark.parametrize("alpha", [1e-4, 1e-2, 1.0])
def test_sums_give_scikit_learns_solution(alpha):
    z, y = data()
    x = (z - z.mean(0)) / z.std(0, unbiased=False)
    reference = Reference(alpha=alpha * len(x), solver="cholesky").fit(x.numpy(), y.numpy()).predict(x.numpy())
    each = torch.full((3,), alpha, dtype=torch.float64)
    for fit in (Path.of(moments(z, y)).fit(alpha), solve(moments(z, y), each)):
        np.testing.assert_allclose(fit.predict(z).numpy(), reference, rtol=1e-6, atol=1e-6)


def test_sums_survive_columns_far_from_zero_and_of_any_size():
    z, y = data()
    far = z * torch.logspace(-2, 2, 20, dtype=torch.float64) / 10 + 1e4
    scale = 1 / (far - far.mean(0)).std(0, unbiased=False)
    same = Path(far * scale, y).fit(1e-2).predict(far * scale)  # the cap on magnifying is not what is tested here
    centred = (far - far.mean(0)) * scale
    torch.testing.assert_close(solve(moments(centred, y), torch.full((3,), 1e-2)).predict(centred), same)
    plain = solve(moments(z, y), torch.full((3,), 1e-2)).predict(z)
    moved = solve(moments(1e4 * z + 1e6, y), torch.full((3,), 1e-2)).predict(1e4 * z + 1e6)
    torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-7)
    small = solve(moments(z, 1e-3 * y), torch.full((3,), 1e-2)).predict(z)
    torch.testing.assert_close(1e3 * small, plain, rtol=1e-9, atol=1e-9)


def test_the_error_on_other_rows_follows_from_their_sums():
    z, y = data(n=300)
    fit = Path(z[:200], y[:200]).fit(0.1)
    other = Moments(z[:50].mean(0) + 3, 3).add(z[200:], y[200:])  # about an origin of its own
    direct = (fit.predict(z[200:]) - y[200:]).square().mean(0)
    torch.testing.assert_close(fit.errors(other), direct, rtol=1e-9, atol=1e-12)
    rows = choose_alpha(z[:200], y[:200], z[200:], y[200:])
    assert torch.equal(choose_alpha_of(moments(z[:200], y[:200]), other), rows)


def test_sums_add_up():
    z, y = data(n=300)
    origin = z[:9].mean(0)
    parts = [Moments(origin, 3).add(z[a:b], y[a:b]) for a, b in ((0, 100), (100, 130), (130, 300))]
    each = torch.tensor([1e-3, 1e-1, 10.0])
    apart, whole = solve(total(parts), each), solve(Moments(origin, 3).add(z, y), each)
    torch.testing.assert_close(apart.predict(z), whole.predict(z), rtol=1e-10, atol=1e-10)


def test_sums_without_some_rows_are_those_of_the_others():
    z, y = data(n=300)
    z, origin = 100 + z, z[:9].mean(0) + 100
    left = Moments(origin, 3).add(z[240:], y[240:]).taken_from(Moments(origin, 3).add(z, y))
    rest, each = Moments(origin, 3).add(z[:240], y[:240]), torch.tensor([1e-3, 1e-1, 10.0])
    assert left.n == 240
    torch.testing.assert_close(solve(left, each).predict(z), solve(rest, each).predict(z), rtol=1e-10, atol=1e-10)


@pytest.fixture
def folded():
    """Sixty episodes of five tasks, and the fits of them."""
    episodes = pl.DataFrame({"episode_index": range(60), "task": [f"task {i % 5}" for i in range(60)]})
    episodes = episodes.with_columns(split=pl.Series(["train"] * 50 + ["val"] * 10))
    rows = pl.DataFrame({"episode_index": np.repeat(np.arange(60), 5)})
    z, y = data(n=300)
    parts = splits.split(rows, episodes, 0)
    return z, y, parts, lambda: ridge.fits(Floor("z", z.numpy()), y.numpy(), parts, episodes, 0)


def test_every_fit_without_a_fold_is_scikit_learns(folded):
    z, y, _, fitted = folded
    found = [one for one in fitted() if one[0].train in (splits.SEEN, splits.UNSEEN)]
    assert len(found) == 2 * splits.FOLDS
    for part, fit, alpha_K in found:
        train = part.fit_N | part.validate_N
        mean, std = z[train].mean(0), z[train].std(0, unbiased=False)
        x, every = ((rows - mean) / std for rows in (z[train], z))
        for k, alpha in enumerate(alpha_K):
            reference = Reference(alpha=alpha * len(x), solver="cholesky").fit(x.numpy(), y[train][:, k].numpy())
            np.testing.assert_allclose(fit.predict(z)[:, k], reference.predict(every.numpy()), rtol=1e-6, atol=1e-6)


def test_columns_that_hardly_move_elsewhere_do_not_stop_it():
    """Sixteen of four: less the rows where they are 1e5 times as large, their correlations are not quite positive."""
    z, y = data(n=300, noise=0)
    generator = torch.Generator().manual_seed(0)
    four, mix = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((300, 4), (4, 16)))
    z = torch.cat([z, four @ mix], 1)
    z[:60, 20:] *= 1e5
    origin, each = z[60:70].mean(0), torch.full((3,), 1e-6)
    left = Moments(origin, 3).add(z[:60], y[:60]).taken_from(Moments(origin, 3).add(z, y))
    torch.testing.assert_close(solve(left, each).predict(z[60:]), y[60:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first", [0, 1])  # the origin is a mean over the task that moves, and it is not
def test_a_column_that_moves_in_one_task_alone_is_left_out_where_that_task_is(first):
    z, y = data(n=300, noise=0)
    task = np.repeat(np.arange(5), 60)
    quiet = torch.full((300, 16), 5.0, dtype=torch.float64)  # many, for rounding is below nothing as often as not
    quiet[task == first] *= 1e4 * torch.randn(60, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.cat([z, quiet], 1)
    origin, out = z[:60].mean(0), torch.from_numpy(task == first)
    every = Moments(origin, 3).add(z, y)
    rest = solve(Moments(origin, 3).add(z[out], y[out]).taken_from(every), torch.full((3,), 1e-6))
    assert (rest.weight_DK[20:] == 0).all()
    torch.testing.assert_close(rest.predict(z), y, rtol=1e-3, atol=1e-3)


def test_folds_of_wide_features_are_taken_in_turn(folded, monkeypatch):
    """Sums over the rows of all folds at once took 3.8 GB at 6,912 dimensions. No fit depends on how many there are."""
    alive, most = weakref.WeakSet(), []

    class Watched(Moments):
        def __init__(self, *given):
            super().__init__(*given)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(ridge, "Moments", Watched)
    at_once = list(folded[3]())
    assert max(most) >= 2 + 2 * splits.FOLDS
    most.clear()
    monkeypatch.setattr(ridge, "MEMORY", 1)
    for (part, fit, alpha), (other, same, its) in zip(folded[3](), at_once, strict=True):
        assert part.train == other.train
        assert np.array_equal(alpha, its)
        torch.testing.assert_close(fit.weight_DK, same.weight_DK, rtol=1e-10, atol=1e-12)
    assert max(most) <= 2 + 2
