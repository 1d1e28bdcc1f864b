"""The critic that must not be steep: its two losses, clipping, the penalty, turns; and mutants."""
import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from sklearn.exceptions import NotFittedError
from torch import nn

from ad_course.detector import isolated, total_loss
from ad_course.gan import GAN
from ad_course.metrics import energy_distance
from ad_course.networks import Critic, gradient_norm, interpolate
from ad_course.wgan import (WGAN, WGANGP, clip_weights, wasserstein_critic, wasserstein_generator)

from .mutants import assert_caught, each_mutant
from .players import altered, ready, without

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(latent_dim=3, width=2, n_draws=50, verbose=False)


def raw(cls, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


def largest(d): return max(float(p.detach().abs().max()) for p in d.nets_.critic.parameters())


class Pixels(nn.Module):
    """A generator that shows its noise: (b, 3) -> (b, 3, 1, 1), a pixel of three channels."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(3))
    def forward(self, z): return (self.w * z).view(-1, 3, 1, 1)


class Squares(nn.Module):
    """A critic of known slope: |x|^2 / 2, so that the gradient at x is w x."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(()))
    def forward(self, x): return self.w * x.flatten(1).square().sum(1) / 2


def shown(cls, **params):
    """The class with the two networks above, on images of one pixel and three channels."""
    nets = dict(networks=lambda self, shape: dict(generator=Pixels(), critic=Squares()))
    d = type('Shown', (cls,), nets)(epochs=0, latent_dim=3, n_draws=2, verbose=False, **params)
    return d.fit(np.random.default_rng(1).random((6, 3, 1, 1), dtype='float32'))


# ---------------------------------------------------------------- equations
def check_values(cls):
    """Equation (3) on known answers; for WGAN-GP also (4), with its points on the segments."""
    d = shown(cls, penalty_weight=3.) if issubclass(cls, WGANGP) else shown(cls)
    xb = torch.rand(6, 3, 1, 1, generator=torch.Generator().manual_seed(2))     # three channels
    answer = lambda x: x.flatten(1).square().sum(1) / 2
    with isolated(7): z = torch.randn(6, 3); e = torch.rand(6, 1, 1, 1)
    fake = z.view(6, 3, 1, 1)
    with isolated(7): terms = d.critic_loss(xb)
    with isolated(7): terms |= d.generator_loss(xb)
    expected = dict(real=-answer(xb), fake=answer(fake), fooling=-answer(fake))
    if issubclass(cls, WGANGP):
        between = xb + e * (fake - xb)
        expected['penalty'] = 3 * (between.flatten(1).norm(dim=1) - 1).square()
    assert sorted(terms) == sorted(expected), 'terms'
    for name, value in expected.items():
        assert terms[name].shape == (6,), f'shape of {name}'
        assert torch.allclose(terms[name], value, atol=1e-5), f'value of {name}'


def check_slopes(cls):
    """Each loss has the slope of its formula: the generator's, the critic's penalty included."""
    gp = issubclass(cls, WGANGP)
    d = shown(cls, penalty_weight=3.) if gp else shown(cls)
    xb = torch.rand(6, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    with isolated(7): z = torch.randn(6, 3).view(6, 3, 1, 1); e = torch.rand(6, 1, 1, 1)
    with isolated(7): ours = total_loss(d.critic_loss(xb), 6)
    norm = (xb + e * (z - xb)).flatten(1).norm(dim=1)
    half = lambda x: x.flatten(1).square().sum(1).mean() / 2
    expected = half(z) - half(xb) + (6 * (norm - 1) * norm).mean() * gp
    found, = torch.autograd.grad(ours, d.nets_.critic.w)
    assert torch.isclose(found, expected, atol=1e-4), 'slope of the critic'
    with isolated(7): ours = total_loss(d.generator_loss(xb), 6)
    found, = torch.autograd.grad(ours, d.nets_.generator.w)
    expected = -z.view(6, 3).square().mean(0)
    assert torch.allclose(found, expected, atol=1e-5), 'slope of the generator'


# ---------------------------------------------------------------- the game
def check_game(cls):
    """Who moves when; weights are clipped after the critic's steps, and only the critic's."""
    class Noted(cls):
        def descend(self, player, loss, xb, *yb):
            before = {n: [p.clone() for p in net.parameters()] for n, net in self.nets_.items()}
            terms = super().descend(player, loss, xb, *yb)
            moved = [n for n, net in self.nets_.items()
                     if not all(map(torch.equal, before[n], net.parameters()))]
            self.notes.append((player, *moved))
            self.sizes.append(largest(self))
            return terms
    d = Noted(**SMALL, n_critic=3, clip=.05, epochs=2, batch_size=10)
    d.notes, d.sizes = [], []
    d.fit(X)
    critic, generator = ('critic', 'critic'), ('generator', 'generator')
    wanted = [critic] * 3 + [generator] + [critic] * 3 + [generator] + [critic] * 2
    assert d.notes == wanted, 'turns'
    assert max(d.sizes) <= .05 + 1e-7, 'clipped after each step'
    free = cls(**SMALL, clip=0., epochs=2, batch_size=10).fit(X)
    assert largest(free) > .1, 'clip=0 means no limit'


def check_learns(cls):
    """Played on pixels around .3, the generator comes to draw pixels around .3."""
    x = np.random.default_rng(0).normal(.3, .05, (200, 1, 1, 1)).astype('float32')
    weight = dict(penalty_weight=.01) if issubclass(cls, WGANGP) else dict(clip=.3)
    d = cls(latent_dim=2, epochs=80, batch_size=50, width=4, lr=3e-3, critic_lr=3e-3,
            n_critic=2, verbose=False, **weight).fit(x)
    raw = cls(epochs=0, verbose=False).fit(x)
    far, before = (energy_distance(a.sample(500).reshape(-1, 1), x.reshape(-1, 1))
                   for a in (d, raw))
    assert far < .3 * before, f'distance {far:.3f}, {before:.3f} before: it does not learn'


CHECKS = (check_values, check_slopes, check_game, check_learns)


@pytest.mark.parametrize('cls', (WGAN, WGANGP))
@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check, cls): check(cls)


# ---------------------------------------------------------------- mutants


def negative(terms): return {k: -v for k, v in terms.items()}


BOTH = (WGAN, WGANGP)
NO_REAL, NO_FAKE, FLIPPED = (
    [altered(cls, 'critic_loss', change, f'{cls.__name__}{name}') for cls in BOTH]
    for change, name in ((without('real'), 'NoReal'), (without('fake'), 'NoFake'),
                         (negative, 'Flipped')))
HELPS, SILENT = (
    [altered(cls, 'generator_loss', change, f'{cls.__name__}{name}') for cls in BOTH]
    for change, name in ((negative, 'Helps'), (without('fooling'), 'Silent')))


class Swapped(WGAN):
    def critic_loss(self, xb):
        return wasserstein_critic(self.critic_output(self.fake(len(xb))), self.critic_output(xb))

class NonSaturating(WGAN):
    def generator_loss(self, xb): return GAN.generator_loss(self, xb)

def penalized(penalty, name):
    """A WGAN-GP with another penalty: (critic, real, fake) -> (b,)."""
    def critic_loss(self, xb):
        fake = self.fake(len(xb))
        terms = wasserstein_critic(self.critic_output(xb), self.critic_output(fake))
        return terms | dict(penalty=self.penalty_weight * penalty(self.nets_.critic, xb, fake))
    return type(name, (WGANGP,), dict(critic_loss=critic_loss))


def at(points): return lambda critic, a, b: (gradient_norm(critic, points(a, b)) - 1).square()
def each_channel(a, b): return a + torch.rand(*a.shape[:2], 1, 1) * (b - a)
def one_for_all(a, b): return a + torch.rand(()) * (b - a)


WRONG = [penalized(f, name) for f, name in (
    (at(each_channel), 'EachChannel'), (at(one_for_all), 'OneForAll'),
    (at(lambda a, b: a), 'AtReal'),
    (at(lambda a, b: b), 'AtFake'),
    (lambda D, a, b: gradient_norm(D, interpolate(a, b)).square(), 'ToZero'),
    (lambda D, a, b: (gradient_norm(D, interpolate(a, b)) - 1).abs(), 'Unsquared'),
    (lambda D, a, b: (gradient_norm(D, interpolate(a, b)) - 1).clamp(min=0).square(), 'OneSided'),
    (lambda D, a, b: (gradient_norm(D, interpolate(a, b)).square() - 1).square(), 'SquaredNorm'))]
CONSTANT = penalized(lambda D, a, b: at(interpolate)(D, a, b).detach(), 'Constant')

class Unweighted(WGANGP):
    def critic_loss(self, xb):
        terms = super().critic_loss(xb)
        return terms | dict(penalty=terms['penalty'] / self.penalty_weight)

class NeverClips(WGAN):
    def descend(self, player, loss, xb, *yb): return GAN.descend(self, player, loss, xb, *yb)

class ClipsAll(WGAN):
    def descend(self, player, loss, xb, *yb):
        terms = super().descend(player, loss, xb, *yb)
        if self.clip: clip_weights(self.nets_, self.clip)
        return terms

class ClipsBefore(WGAN):
    def descend(self, player, loss, xb, *yb):
        if player == 'critic' and self.clip: clip_weights(self.nets_.critic, self.clip)
        return GAN.descend(self, player, loss, xb, *yb)

class ClipsAlways(WGAN):
    def descend(self, player, loss, xb, *yb):
        terms = super().descend(player, loss, xb, *yb)
        clip_weights(self.nets_.critic, self.clip)
        return terms

class AlwaysBoth(WGAN):
    def turns(self):
        """The generator moves on each batch."""
        return [turn[:2] for turn in super().turns()]


@each_mutant({'value of real': NO_REAL + FLIPPED + [Swapped], 'value of fake': NO_FAKE,
              'value of fooling': HELPS + SILENT + [NonSaturating],
              'value of penalty': WRONG + [Unweighted]})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_values, broken, why)


@each_mutant({'slope of the critic': FLIPPED + NO_REAL + NO_FAKE + [CONSTANT],
              'slope of the generator': HELPS + SILENT + [NonSaturating]})
def test_wrong_slopes_are_caught(why, broken): assert_caught(check_slopes, broken, why)


@each_mutant({'turns': (AlwaysBoth, ClipsAll), 'clipped after each step': (NeverClips, ClipsBefore),
              'no limit': (ClipsAlways,)})
def test_wrong_games_are_caught(why, broken): assert_caught(check_game, broken, why)


@each_mutant({'does not learn': [*HELPS, *FLIPPED]})
def test_a_game_that_teaches_nothing_is_caught(why, broken):
    assert_caught(check_learns, broken, why)


# ---------------------------------------------------------------- pieces
def test_a_critic_of_slope_one_gives_the_exact_distance():
    a, b = np.random.default_rng(0).normal(size=200), np.random.default_rng(1).normal(5, 1, 200)
    terms = wasserstein_critic(torch.tensor(-a), torch.tensor(-b))      # b has to go to the left
    gap = -sum(float(t.mean()) for t in terms.values())
    assert np.isclose(gap, wasserstein_distance(a, b))


def test_the_pull_does_not_fade():
    for m in (1., 10., 1000.):
        at = torch.tensor(m, requires_grad=True)
        fooling = wasserstein_generator(-(at + torch.zeros(5)))['fooling'].mean()
        assert torch.autograd.grad(fooling, at)[0] == 1


def test_the_critic_has_no_batch_normalization():
    for cls in (WGAN, WGANGP):
        nets = cls(**SMALL, arch='conv').networks((1, 8, 8))
        norms = {name: any('BatchNorm' in type(m).__name__ for m in net.modules())
                 for name, net in nets.items()}
        assert norms == dict(generator=True, critic=False)


def test_the_sizes_reach_the_critic():
    count = lambda **kw: sum(p.numel() for p in WGAN(**SMALL | kw).networks((1, 8, 8))['critic']
                             .parameters())
    same = lambda **kw: sum(p.numel() for p in Critic((1, 8, 8), **kw).parameters())
    assert count(width=3, arch='conv') == same(width=3, arch='conv') != count(width=3)


def test_the_gap_is_that_of_the_history():
    d = WGANGP(**SMALL, epochs=3, batch_size=10).fit(X)
    real, fake = d.history_['critic/real'], d.history_['critic/fake']
    np.testing.assert_allclose(d.critic_gap(), [-a - b for a, b in zip(real, fake)])


def test_the_game_has_no_memory_by_default():
    groups = [o.param_groups[0]['betas'] for o in raw(WGANGP).optimizers_.values()]
    assert groups == [(0., .999)] * 2


def test_the_defaults():
    a, b = WGAN(), WGANGP()
    assert (a.n_critic, a.clip) == (2, .1)
    assert (b.n_critic, b.clip, b.penalty_weight) == (2, 0, 10)


def test_clipping_cuts_each_weight_by_itself():
    layer = nn.Linear(2, 1)
    layer.weight.data, layer.bias.data = torch.tensor([[3., -.5]]), torch.tensor([-2.])
    clip_weights(layer, 1.)
    assert layer.weight.tolist() == [[1, -.5]] and layer.bias.tolist() == [-1]
    for wrong in (-1., float('nan')):
        with pytest.raises(ValueError, match='limit must be at least 0'): clip_weights(layer, wrong)


def test_the_generator_is_in_train_mode_when_the_critic_looks():
    x = np.random.default_rng(0).random((20, 1, 8, 8), dtype='float32')
    d = WGANGP(**SMALL, arch='conv', epochs=0).fit(x)
    d.nets_.train()
    d.critic_loss(torch.tensor(x))
    layers = [m for m in d.nets_.generator.modules() if hasattr(m, 'running_mean')]
    assert layers and all(m.num_batches_tracked == 1 for m in layers)


def test_the_gap_needs_a_fit_and_may_be_empty():
    with pytest.raises(NotFittedError, match='critic_gap'): WGANGP().critic_gap()
    assert WGANGP(**SMALL, epochs=0).fit(X).critic_gap().shape == (0,)


def test_a_generator_without_a_turn_is_told():
    with pytest.warns(UserWarning, match='the generator never moved: n_critic is 50'):
        WGAN(**SMALL, n_critic=50, epochs=2).fit(X)


@pytest.mark.parametrize('cls, wrong', [(WGAN, dict(n_critic=0)), (WGAN, dict(n_critic=1.5)),
                                        (WGAN, dict(critic_lr=0.)), (WGAN, dict(clip=-.1)),
                                        (WGANGP, dict(penalty_weight=0.)),
                                        (WGANGP, dict(clip=float('nan')))])
def test_what_is_refused(cls, wrong):
    name = [*wrong][0]
    with pytest.raises(ValueError, match=f'{cls.__name__}: {name}'): cls(**SMALL, **wrong).fit(X)
