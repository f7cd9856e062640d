"""The bootstrap over episodes against scikit-learn, against its own promise, and at its edges."""

import numpy as np
import pytest

from avrl.intervals import Sums, difference, ends, interval, jackknife, r2, r2_interval, weights

E, K = 30, 3


def episodes(seed, noise=0.5, n_episodes=E, shared=None):
    """Targets and predictions of some episodes, with an error that an episode shares."""
    rng = np.random.default_rng(seed)
    lengths = np.random.default_rng(7).integers(5, 20, n_episodes)
    target_rng = np.random.default_rng(11) if shared is None else shared
    y = [target_rng.normal(size=(n, K)) for n in lengths]
    z = [one + noise * rng.normal(size=one.shape) + noise * rng.normal(size=K) for one in y]
    return y, z


def sums(y, z):
    return Sums(
        np.array([len(one) for one in y], float),
        np.array([((a - b) ** 2).sum(0) for a, b in zip(y, z, strict=True)]),
        np.array([one.sum(0) for one in y]),
        np.array([(one**2).sum(0) for one in y]),
    )


def test_r2_is_scikit_learns():
    from sklearn.metrics import r2_score

    y, z = episodes(0)
    expected = r2_score(np.concatenate(y), np.concatenate(z), multioutput="raw_values")
    assert r2(*sums(y, z)) == pytest.approx(expected, abs=1e-12)


def test_a_resample_is_r2_of_the_drawn_episodes():
    from sklearn.metrics import r2_score

    y, z = episodes(1)
    drawn = weights(E, 5, seed=3)
    assert drawn.shape == (5, E)
    assert (drawn.sum(1) == E).all()
    picks = np.repeat(np.arange(E), drawn[2].astype(int))
    expected = r2_score(
        np.concatenate([y[i] for i in picks]), np.concatenate([z[i] for i in picks]), multioutput="raw_values"
    )
    assert r2(*sums(y, z), drawn)[2] == pytest.approx(expected, abs=1e-12)


def test_interval_covers_the_truth_as_often_as_it_says():
    """500 simulations of each number of episodes: counted together, for a count of 500 is off by 1% itself."""
    noise, covered = 0.5, []
    for n_episodes in (15, 40, 100):
        drawn = weights(n_episodes, 1000)
        for seed in range(500):
            y, z = episodes(seed, noise, n_episodes, shared=np.random.default_rng(10_000 + seed))
            _, low, high = r2_interval(sums(y, z), drawn, mean=True)
            covered.append(low <= 1 - 2 * noise**2 <= high)  # two independent errors on a target of variance 1
    assert 0.93 <= np.mean(covered) <= 0.97


def test_ends_widen_for_few_episodes():
    assert ends(2000) == pytest.approx((0.025, 0.975), abs=1e-4)
    assert ends(15)[0] < 0.014 < ends(40)[0] < 0.021
    assert ends(1) == (0.0, 1.0)


def test_paired_is_narrower_than_unpaired():
    y, z = episodes(2)
    better = [one + 0.9 * (other - one) for one, other in zip(y, z, strict=True)]
    drawn = weights(E, 500)
    paired = difference(sums(y, better), sums(y, z), drawn, mean=True)
    apart = r2(*sums(y, better), weights(E, 500, 1)).mean(1) - r2(*sums(y, z), weights(E, 500, 2)).mean(1)
    unpaired = interval(paired.value, apart, E)
    assert paired.value > 0
    assert paired.low > 0
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_difference_refuses_other_samples():
    y, z = episodes(4)
    with pytest.raises(ValueError, match="different samples"):
        difference(sums(y, z), sums(y[1:], z[1:]), weights(E, 10))


def test_constant_target_is_undefined_not_zero():
    y, z = episodes(5)
    for one in y:
        one[:, 1] = 0.1
    value, low, high = r2_interval(sums(y, z), weights(E, 200))
    assert np.isnan([value[1], low[1], high[1]]).all()
    assert np.isfinite([value[0], low[0], high[0], value[2], low[2], high[2]]).all()
    assert np.isnan(r2_interval(sums(y, z), weights(E, 200), mean=True)).all()


def test_a_target_that_moves_in_one_episode_only():
    y = [np.zeros((4, 1)) for _ in range(6)]
    y[0] = np.arange(4.0)[:, None]
    value, low, high = r2_interval(sums(y, y), weights(6, 400))
    assert (value, low, high) == (1, 1, 1)  # about a third of the draws miss that episode: left out


def test_same_seed_same_draws():
    assert (weights(9, 50, 1) == weights(9, 50, 1)).all()
    assert (weights(9, 50, 1) != weights(9, 50, 2)).any()


def test_the_jackknife_of_a_mean_is_students_interval():
    from scipy import stats

    x = np.random.default_rng(0).normal(size=17)
    found = jackknife(x.mean(), np.array([np.delete(x, i).mean() for i in range(17)]))
    assert found[1:] == pytest.approx(stats.t.interval(0.95, 16, x.mean(), stats.sem(x)), abs=1e-12)
    assert np.isnan(jackknife(1.0, np.ones(1))[1:]).all()
