"""Sampling settings and functions, against formulas written out again and against statistics with fixed seeds."""

import itertools
import math

import pytest
import torch

from clear_adapters.errors import ClearValueError
from clear_adapters.sampling import (
    LatentSampling,
    RowRandom,
    TextSampling,
    choose_token,
    flow_schedule,
    guide,
    ode_step,
    sde_logprob,
    sde_mean,
    shift_time,
)

CPU = torch.device("cpu")


def rows(*seeds: int) -> RowRandom:
    return RowRandom.from_seeds(list(seeds), CPU)


# ---------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("kind", "values", "name"),
    [
        (TextSampling, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (TextSampling, {"temperature": -0.1}, "temperature=-0.1"),
        (TextSampling, {"temperature": float("nan")}, "temperature=nan"),
        (TextSampling, {"top_p": 0.0}, "top_p=0"),
        (TextSampling, {"top_p": 1.1}, "top_p=1.1"),
        (TextSampling, {"top_k": -1}, "top_k=-1"),
        (LatentSampling, {"steps": 1}, "steps=1"),
        (LatentSampling, {"shift": 0}, "shift=0"),
        (LatentSampling, {"shift": float("inf")}, "shift=inf"),
        (LatentSampling, {"shift": float("nan")}, "shift=nan"),
        (LatentSampling, {"guidance_text": 0.5}, "guidance_text=0.5"),
        (LatentSampling, {"guidance_image": float("inf")}, "guidance_image=inf"),
        (LatentSampling, {"guidance_interval": (1.0, 0.4)}, "guidance_interval"),
        (LatentSampling, {"renorm": "local"}, "global, channel"),
        (LatentSampling, {"renorm_min": 2}, "renorm_min=2"),
        (LatentSampling, {"sde_sigma": -1}, "sde_sigma=-1"),
        (
            LatentSampling,
            {"sde_sigma": float("inf"), "guidance_text": 1, "guidance_image": 1},
            "sde_sigma=inf",
        ),
        (LatentSampling, {"temperature": -1}, "temperature=-1"),
        (LatentSampling, {"temperature": float("inf")}, "temperature=inf"),
        (LatentSampling, {"temperature": float("nan")}, "temperature=nan"),
        (LatentSampling, {"logprob": "max"}, "'mean' or 'sum'"),
        (LatentSampling, {"sde_sigma": 0.3}, "guidance together with sde_sigma"),
    ],
)
def test_settings_are_checked(kind, values, name):
    with pytest.raises(ClearValueError, match=name.replace("(", r"\(")):
        kind(**values)


def test_guided():
    assert LatentSampling().guided
    assert not LatentSampling(guidance_text=1, guidance_image=1).guided
    assert LatentSampling(guidance_text=1, guidance_image=2).guided


# ------------------------------------------------------------------------------------------------------ random


def test_normal_numbers_are_normal():
    x = rows(*range(64)).normal(4096)
    assert x.shape == (64, 4096)
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert x.isfinite().all()
    assert 4 < x.abs().max() < 6.5


def test_uniform_numbers_are_uniform():
    u = rows(*range(64)).uniform(4096)
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    chi = ((counts - u.numel() / 64) ** 2 / (u.numel() / 64)).sum()
    assert chi < 63 + 4 * math.sqrt(2 * 63)


def test_streams_are_uncorrelated():
    """Rows of neighbouring seeds, draws of a row, and places within a draw."""
    random = rows(*range(16))
    draws = torch.stack([random.normal(1024) for _ in range(16)])  # draw, row, place
    limit = 5 / math.sqrt(1024)
    for series in (draws[0], draws[:, 0], draws[3, :, :512], draws[:, 5].roll(1, -1)):
        correlation = torch.corrcoef(series) - torch.eye(len(series))
        assert correlation.abs().max() < 5 / math.sqrt(series.shape[1])
    flat = draws[0].flatten()
    for lag in (1, 2, 1024):
        assert abs((flat[:-lag] * flat[lag:]).mean()) < limit / 4
    # The two uniform numbers of a Box-Muller pair come from different bits of one word.
    bits = rows(*range(64)).bits(1024)
    low, high = ((bits >> 9) & 0x7FFFFF).float(), ((bits >> 41) & 0x7FFFFF).float()
    assert abs(torch.corrcoef(torch.stack((low.flatten(), high.flatten())))[0, 1]) < 0.02


def test_a_row_draws_the_same_in_any_batch_and_size():
    alone = rows(7)
    batch = rows(3, 7, 9)
    torch.testing.assert_close(batch.normal(10)[1, :4], alone.normal(4)[0], atol=0, rtol=0)
    torch.testing.assert_close(batch.uniform(3)[1], alone.uniform(3)[0], atol=0, rtol=0)
    picked = batch.select(torch.tensor([1, 1]))
    torch.testing.assert_close(picked.uniform(2)[0], alone.uniform(2)[0], atol=0, rtol=0)


def test_inactive_rows_do_not_advance():
    random = rows(1, 2)
    random.uniform(1, torch.tensor([True, False]))
    assert random.counts.tolist() == [1, 0]
    torch.testing.assert_close(random.uniform(1)[1], rows(2).uniform(1)[0], atol=0, rtol=0)


def test_a_clone_goes_its_own_way():
    random = rows(1)
    other = random.clone()
    first = random.uniform(1)
    assert other.counts.tolist() == [0]
    assert torch.equal(other.uniform(1), first)
    assert not torch.equal(other.uniform(1), first)


def test_any_seed_is_taken():
    wide = rows(0, -1, 2**63, 2**64 - 1, 2**64 + 5, 5)
    values = wide.uniform(1)[:, 0]
    assert values[4] == values[5]  # seeds count modulo 2^64
    assert values[1] == values[3]
    assert values.unique().numel() == 4


# ------------------------------------------------------------------------------------------------------ tokens


def chi_square(sampling: TextSampling, logits: torch.Tensor, expected: torch.Tensor) -> float:
    n = 20000
    token, _ = choose_token(logits.expand(n, -1), sampling, rows(*range(n)))
    counts = torch.bincount(token, minlength=logits.shape[-1]).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi = ((counts - n * expected) ** 2)[kept] / (n * expected)[kept]
    return float(chi.sum()) / max(1, int(kept.sum()) - 1)


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5, -2.0, 0.2])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax(temperature):
    expected = (LOGITS.double() / temperature).softmax(-1)
    assert chi_square(TextSampling(temperature=temperature), LOGITS, expected) < 2.5


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"top_k": 3}, [0, 5, 1]),
        ({"top_k": 100}, range(8)),
        # In order 0.405, 0.246, 0.149, ...: the smallest set that reaches the probability.
        ({"top_p": 0.3}, [0]),
        ({"top_p": 0.41}, [0, 5]),
        ({"top_p": 0.66}, [0, 5, 1]),
        ({"top_p": 0.9, "top_k": 2}, [0, 5]),
    ],
)
def test_top_p_and_top_k(values, kept):
    probs = LOGITS.double().softmax(-1)
    expected = torch.zeros_like(probs)
    expected[list(kept)] = probs[list(kept)]
    expected /= expected.sum()
    assert chi_square(TextSampling(temperature=1.0, **values), LOGITS, expected) < 2.5


def test_logprobs_are_those_before_the_cut():
    logits = LOGITS.repeat(50, 1)
    token, logprob = choose_token(logits, TextSampling(temperature=0.7, top_k=2), rows(*range(50)))
    expected = (LOGITS / 0.7).log_softmax(-1)[token]
    torch.testing.assert_close(logprob, expected)
    greedy, logprob = choose_token(logits, TextSampling(), rows(*range(50)))
    assert set(greedy.tolist()) == {0}
    torch.testing.assert_close(logprob, LOGITS.log_softmax(-1)[greedy])


def test_greedy_draws_nothing_and_low_temperature_is_greedy():
    random = rows(1)
    choose_token(LOGITS[None], TextSampling(), random)
    assert random.counts.tolist() == [0]
    token, _ = choose_token(LOGITS.expand(500, -1), TextSampling(temperature=0.01), rows(*range(500)))
    assert set(token.tolist()) == {0}


def test_impossible_tokens_are_never_taken():
    logits = torch.full((2000, 5), -float("inf"))
    logits[:, 3], logits[:, 1] = 0.0, -1.0
    token, _ = choose_token(logits, TextSampling(temperature=1.0), rows(*range(2000)))
    assert set(token.tolist()) == {1, 3}


# -------------------------------------------------------------------------------------------------------- flow


def test_schedule():
    assert flow_schedule(3, 1.0) == [1.0, 0.5, 0.0]
    times = flow_schedule(20, 3.0)
    assert (len(times), times[0], times[-1]) == (20, 1.0, 0.0)
    assert all(a > b for a, b in itertools.pairwise(times))
    assert times[10] == pytest.approx(3 * (9 / 19) / (1 + 2 * 9 / 19))
    t = torch.tensor([0.0, 9 / 19, 1.0])
    torch.testing.assert_close(shift_time(t, 3.0), torch.tensor([0.0, times[10], 1.0]))


def test_ode_recovers_the_picture_of_a_straight_path():
    picture, noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    x = noise
    times = flow_schedule(7, 3.0)
    for t, after in itertools.pairwise(times):
        torch.testing.assert_close(x, (1 - t) * picture + t * noise)
        x = ode_step(x, noise - picture, t - after)
    torch.testing.assert_close(x, picture, atol=1e-6, rtol=1e-5)


def test_sde_step():
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 4, 3, generator=g), torch.randn(2, 4, 3, generator=g)
    t, dt, sigma = 0.6, 0.1, 0.3
    mean = sde_mean(x, v, t, dt, sigma)
    torch.testing.assert_close(mean, x - v * dt - 0.045 * ((x + 0.4 * v) / 0.6) * 0.1)
    torch.testing.assert_close(sde_mean(x, v, t, dt, 0.0), ode_step(x, v, dt))
    near = sde_mean(x, v, 1e-9, dt, sigma)
    torch.testing.assert_close(near, x - (v + 0.045 * (x + v).sign() * 100) * dt)
    # Against the density of torch, but for the constant.
    new = mean + sigma * dt**0.5 * torch.randn(2, 4, 3, generator=g)
    normal = torch.distributions.Normal(mean, sigma * dt**0.5)
    expected = (normal.log_prob(new) - normal.log_prob(mean)).sum((-2, -1))
    torch.testing.assert_close(sde_logprob(new, mean, dt, sigma, "sum"), expected)
    torch.testing.assert_close(sde_logprob(new, mean, dt, sigma, "mean"), expected / 12)


def test_sde_keeps_the_marginal_of_the_flow():
    """For a Gaussian picture the velocity is known, and the stochastic sampler ends in the same distribution."""
    n, scale = 20000, 0.5
    random = rows(*range(n))
    x = random.normal(1)
    times = flow_schedule(200, 1.0)
    for t, after in itertools.pairwise(times):
        variance = (1 - t) ** 2 * scale**2 + t**2
        v = x * (t - (1 - t) * scale**2) / variance  # E[noise - picture | x]
        dt = t - after
        x = sde_mean(x, v, t, dt, 0.5) + 0.5 * dt**0.5 * random.normal(1)
    assert abs(x.mean()) < 0.02
    assert float(x.std()) == pytest.approx(scale, rel=0.03)


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel", "none"])
def test_guide(renorm):
    g = torch.Generator().manual_seed(0)
    v, text, image = torch.randn(3, 2, 5, 4, generator=g).unbind(0)
    sampling = LatentSampling(guidance_text=3.0, guidance_image=2.0, renorm=renorm, renorm_min=0.1)
    found = guide(v, text, image, sampling)
    u = text + 3 * (v - text)
    if renorm == "text_channel":
        u = u * (v.norm(dim=-1, keepdim=True) / u.norm(dim=-1, keepdim=True)).clamp(0.1, 1)
    w = image + 2 * (u - image)
    if renorm == "global":
        w = w * (v.flatten(1).norm(dim=1) / w.flatten(1).norm(dim=1)).clamp(0.1, 1)[:, None, None]
    if renorm == "channel":
        w = w * (v.norm(dim=-1, keepdim=True) / w.norm(dim=-1, keepdim=True)).clamp(0.1, 1)
    torch.testing.assert_close(found, w)


def test_guidance_that_is_off_changes_nothing():
    v, other = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    off = LatentSampling(guidance_text=1, guidance_image=1)
    torch.testing.assert_close(guide(v, other, other, off), v)
    torch.testing.assert_close(guide(v, None, None, LatentSampling()), v)


@pytest.mark.parametrize("more", [{}, {"top_k": 4}, {"top_p": 0.99}])
def test_a_token_of_probability_zero_is_never_taken(more):
    """Not even where the uniform number is the largest there is, and the last tokens of the vocabulary have no mass."""

    class Highest:
        def uniform(self, size, active=None):
            return torch.full((3, size), 1 - 2.0**-24)

    logits = torch.full((3, 6), float("-inf"))
    logits[:, :3] = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0], [0.1, 0.2, 0.3]])
    token, logprob = choose_token(logits, TextSampling(temperature=1.0, **more), Highest())
    assert (token < 3).all()
    assert logprob.isfinite().all()
