"""The builders of networks and the slope of a critic, against counts, closed forms and float64."""
import math

import pytest
import torch
from torch import nn

from ad_course.networks import (ARCHS, Critic, conv_decoder, conv_encoder, decay_terms, decoder,
                                encoder, generator, gradient_norm, gradient_penalty, interpolate,
                                mlp, pyramid, resolve_arch, squared_weights)
from tests.mutants import assert_caught



SHAPES = [(1, 1, 1), (1, 8, 8), (3, 5, 7), (1, 28, 28), (3, 33, 47), (2, 4, 100), (3, 64, 64)]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('arch', ARCHS)
def test_there_and_back(shape, arch):
    """Any shape, odd sides included; a pixel lies in [0, 1] and a code is a plain number."""
    x = torch.rand(3, *shape)
    code = encoder(shape, 5, arch, width=4)(x)
    image = decoder(shape, 5, arch, width=4)(code)
    plain = decoder(shape, 5, arch, width=4, last=None)(10 * torch.randn(50, 5))
    assert code.shape == (3, 5) and image.shape == x.shape
    assert 0 <= image.min() and image.max() <= 1 and plain.min() < 0
    assert Critic(shape, 6, arch, width=4)(x).shape == (3,)
    assert Critic(shape, 6, arch, width=4).features(x).shape == (3, 6)


@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 40, 40)], ids=str)
@pytest.mark.parametrize('norm', [False, True])
def test_without_biases_a_black_image_has_the_code_zero(shape, norm):
    net = encoder(shape, 4, norm=norm, bias=False).eval()
    assert not net(torch.zeros(2, *shape)).any() and net(torch.rand(2, *shape)).any()
    assert not [name for name, _ in net.named_parameters() if name.endswith('bias')]
    biased = encoder(shape, 4, norm=norm).eval()
    assert biased(torch.zeros(2, *shape)).any()


def test_which_family_for_which_image():
    assert [resolve_arch((1, s, s)) for s in (8, 16, 17, 28)] == ['mlp', 'mlp', 'conv', 'conv']
    assert resolve_arch((1, 8, 8), 'conv') == 'conv'
    with pytest.raises(ValueError, match='arch must be one of'): resolve_arch((1, 8, 8), 'rnn')


@pytest.mark.parametrize('h, w', [(1, 1), (5, 9), (28, 28), (100, 60), (257, 33)])
def test_sizes_halve_and_are_met(h, w):
    sizes = pyramid(h, w)
    assert sizes[0] == (h, w) and min(sizes[-1]) <= 4
    assert all(b == tuple(math.ceil(s / 2) for s in a) for a, b in zip(sizes, sizes[1:]))
    assert len(sizes) == 1 or min(sizes[-2]) > 4


def test_parameters_are_counted():
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(mlp((3, 5, 2))) == 3 * 5 + 5 + 5 * 2 + 2
    assert count(conv_encoder((1, 8, 8), 3, width=2)) == 2 * 9 + 4 + 2 * 16 * 3 + 3
    assert count(conv_decoder((1, 8, 8), 3, width=2, norm=False)) == 3 * 32 + 32 + 2 * 16 + 1
    assert generator is decoder


def test_squared_weights_leave_out_biases_and_normalizations():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert squared_weights(net) == net[0].weight.square().sum()
    assert not squared_weights(nn.Identity()) and decay_terms(0, net) == {}
    assert decay_terms(.3, net) == dict(decay=.3 * squared_weights(net))


# ---------------------------------------------------------------- between two images
def check_interpolate(f=interpolate):
    """On the segment, one coefficient an image, all of it, uniformly."""
    a, b = torch.zeros(4000, 3, 2, 2), torch.ones(4000, 3, 2, 2)
    e = f(a, b, torch.Generator().manual_seed(0)).flatten(1)
    assert (e.min(1).values == e.max(1).values).all(), 'a coefficient for each channel or pixel'
    assert len(e[:, 0].unique()) > 3900, 'one coefficient for many images'
    quantiles = torch.quantile(e[:, 0], torch.tensor([.1, .5, .9]))
    torch.testing.assert_close(quantiles, torch.tensor([.1, .5, .9]), atol=.03, rtol=0)
    mixed = f(a + 2, b + 4, torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(mixed, 2 + 3 * e, msg='not on the segment')


def each_channel(a, b, rng=None):
    return a + torch.rand(*a.shape[:2], 1, 1, generator=rng) * (b - a)
def one_for_all(a, b, rng=None): return a + torch.rand(1, generator=rng) * (b - a)
def middle(a, b, rng=None): return (a + b) / 2
def gaussian(a, b, rng=None): return a + torch.randn(len(a), 1, 1, 1, generator=rng) * (b - a)
def outside(a, b, rng=None): return a + torch.rand(len(a), 1, 1, 1, generator=rng) * b


def test_one_coefficient_an_image(): check_interpolate()


@pytest.mark.parametrize('wrong', [each_channel, one_for_all, middle, gaussian, outside])
def test_wrong_coefficients_are_seen(wrong):
    assert_caught(check_interpolate, wrong)


def test_unlike_shapes_are_refused():
    with pytest.raises(ValueError, match='one shape'):
        interpolate(torch.zeros(3, 1, 4, 4), torch.zeros(1, 1, 4, 4))


# ---------------------------------------------------------------- the slope
def smooth_critic():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))


def test_slope_against_a_jacobian():
    with torch.random.fork_rng(): critic = smooth_critic().double()
    x = torch.rand(5, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    jacobian = torch.autograd.functional.jacobian(critic, x)         # (5, 5, 2, 2, 2)
    want = torch.stack([jacobian[i, i].norm() for i in range(5)])
    torch.testing.assert_close(gradient_norm(critic, x), want)


def check_gradient(f=gradient_norm):
    """The gradient of the mean slope in a weight, against differences in float64."""
    with torch.random.fork_rng(): critic = smooth_critic().double()
    x = torch.rand(5, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight, h = critic[1].weight, 1e-6
    slope, = torch.autograd.grad(f(critic, x).mean(), weight)
    for i, j in ((0, 0), (3, 5), (5, 7)):
        values = []
        for step in (h, -h):
            with torch.no_grad(): weight[i, j] += step
            values.append(f(critic, x).mean().item())
            with torch.no_grad(): weight[i, j] -= step
        assert abs(slope[i, j] - (values[0] - values[1]) / (2 * h)) < 1e-7


def forgets_the_graph(f, x):
    x = x.detach().requires_grad_(True)
    slope, = torch.autograd.grad(f(x).sum(), x)
    return slope.flatten(1).norm(dim=1) + 0 * sum(p.sum() for p in f.parameters())


def test_the_slope_can_be_differentiated(): check_gradient()


def test_a_slope_without_a_graph_is_seen():
    assert_caught(check_gradient, forgets_the_graph)


def test_autocast_changes_nothing():
    with torch.random.fork_rng(): critic = smooth_critic()
    x = torch.rand(5, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    plain = gradient_norm(critic, x)
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad(): half = gradient_norm(critic, x)
    assert half.dtype == torch.float32 and torch.equal(plain, half)


def test_the_penalty_moves_the_critic_and_not_the_images():
    with torch.random.fork_rng(): critic = smooth_critic()
    made = torch.rand(5, 2, 2, 2).requires_grad_(True)
    gradient_penalty(critic, torch.rand(5, 2, 2, 2), made).mean().backward()
    assert made.grad is None and critic[1].weight.grad.any()


@pytest.mark.parametrize('length', [0., .5, 1., 3.])
def test_penalty_of_a_linear_critic(length):
    w = torch.tensor([3., 4.]) / 5 * length
    a, b = torch.rand(2, 6, 1, 1, 2)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ w + 0 * x.sum(), a, b)
    torch.testing.assert_close(penalty, torch.full((6,), (length - 1)**2))
