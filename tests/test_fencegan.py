"""Fence GAN: its three equations, who moves whom, the covered share, the score; mutants of each."""
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ad_course.data import flat_set
from ad_course.detector import isolated, load
from ad_course.fencegan import FenceGAN, covered_share, dispersion, encirclement
from ad_course.gan import GAN
from ad_course.metrics import auroc

from .mutants import assert_caught, each_mutant
from .players import altered, check_explosion, check_refused, moved, ready, without

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(latent_dim=3, width=2, verbose=False)
PIXELS = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(2))
NOISE = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(3))
WEIGHTS = torch.tensor([1., -2., 3.])


class Sum(nn.Module):
    """A critic that answers with a weighted sum of three pixels."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(WEIGHTS.clone())
    def forward(self, x): return x.flatten(1) @ self.w


class Drawn(nn.Module):
    """A generator whose images are its weights."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(NOISE.clone())
    def forward(self, z): return self.w[:len(z)]


def shown(cls, **params):
    """The class with networks that can be worked out, on images of three pixels."""
    def networks(self, shape): return dict(generator=Drawn(), critic=Sum())
    kind = type('Shown', (cls,), dict(networks=networks))
    settings = dict(epochs=0, latent_dim=3, batch_size=6, verbose=False) | params
    return kind(**settings).fit(PIXELS)


# ---------------------------------------------------------------- equations
def check_values(cls):
    """All four terms against formulas in float64, each with its weight."""
    d = shown(cls, alpha=.3, fake_weight=.2, dispersion_weight=.7)
    D = {name: torch.sigmoid(x.flatten(1).double() @ WEIGHTS.double())
         for name, x in (('real', PIXELS), ('fake', NOISE))}
    terms = d.critic_loss(PIXELS)
    assert terms.keys() == {'real', 'fake'}, 'names of the critic'
    assert torch.allclose(terms['real'].double(), -D['real'].log(), atol=1e-5), 'value of real'
    fake = -.2 * (1 - D['fake']).log()
    assert torch.allclose(terms['fake'].double(), fake, atol=1e-5), 'value of fake'
    terms, rows = d.generator_loss(PIXELS), NOISE.flatten(1).double()
    assert terms.keys() == {'encirclement', 'dispersion'}, 'names of the generator'
    wanted = -(.3 * D['fake'].log() + .7 * (1 - D['fake']).log()).mean()
    assert torch.allclose(terms['encirclement'].double(), wanted, atol=1e-5), 'encirclement'
    away = (rows - rows.mean(0)).square().sum(1).sqrt().mean()
    wanted = .7 * math.sqrt(3) / away
    assert torch.allclose(terms['dispersion'].double(), wanted, atol=1e-5), 'value of dispersion'


def check_slopes(cls):
    """Encirclement pulls by D - alpha at the logit; dispersion reaches each image."""
    d = shown(cls, alpha=.3, dispersion_weight=.7)
    D = torch.sigmoid(NOISE.flatten(1) @ WEIGHTS)
    pull, = torch.autograd.grad(d.generator_loss(PIXELS)['encirclement'], d.nets_.generator.w)
    wanted = ((D - .3) / 6)[:, None] * WEIGHTS
    assert torch.allclose(pull.flatten(1), wanted, atol=1e-5), 'slope of encirclement'
    spread, = torch.autograd.grad(d.generator_loss(PIXELS)['dispersion'], d.nets_.generator.w)
    rows = NOISE.flatten(1).double().requires_grad_()
    value = .7 * math.sqrt(3) / (rows - rows.mean(0)).norm(dim=1).mean()
    truth, = torch.autograd.grad(value, rows)
    assert torch.allclose(spread.flatten(1).double(), truth, atol=1e-5), 'slope of dispersion'


# ---------------------------------------------------------------- the game
def raw(cls, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


def seen(d):
    """Mean D of generated images, and their mean distance from the center."""
    with isolated(1), torch.no_grad():
        fake = d.fake(400)
        return float(torch.sigmoid(d.critic_output(fake)).mean()), float(1 / dispersion(fake))


def check_players(cls):
    """Each step moves its own player, the generator toward alpha from both sides, and apart."""
    d = raw(cls)
    assert moved(d, 'critic', d.critic_loss, XB) == {'critic'}, 'step of the critic'
    assert moved(d, 'generator', d.generator_loss, XB) == {'generator'}, 'step of the generator'
    for alpha in (.2, .8):
        d = raw(cls, alpha=alpha, dispersion_weight=0., lr=1e-2)
        moved(d, 'critic', d.critic_loss, XB, 30)
        before = abs(seen(d)[0] - alpha)
        moved(d, 'generator', d.generator_loss, XB, 60)
        assert abs(seen(d)[0] - alpha) < before, 'not toward alpha'
    d = raw(cls, dispersion_weight=5., lr=1e-2)
    before = seen(d)[1]
    moved(d, 'generator', d.generator_loss, XB, 60)
    assert seen(d)[1] > 1.2 * before, 'not apart'


def check_turns(cls):
    """One turn each, critic first; every term is recorded."""
    turns = [(player, loss.__name__) for player, loss in cls(**SMALL).turns()]
    assert turns == [('critic', 'critic_loss'), ('generator', 'generator_loss')], 'turns'
    recorded = {k for k, v in cls(**SMALL, epochs=2).fit(X).history_.items() if len(v) == 2}
    assert recorded == {'critic/real', 'critic/fake', 'generator/encirclement',
                        'generator/dispersion', 'seconds'}, 'records'


def check_score(cls):
    """Minus the logit: without ties where the critic is sure, and the same alone as in a batch."""
    d, x = shown(cls), PIXELS.clone()
    assert np.allclose(d.decision_function(x), -x.flatten(1) @ WEIGHTS, atol=1e-5), 'the score'
    d.nets_.critic.w.data *= -300
    assert len(np.unique(d.decision_function(x))) == len(x), 'ties'
    alone = np.concatenate([d.decision_function(x[i:i + 1]) for i in range(6)])
    assert np.allclose(alone, d.decision_function(x), rtol=1e-5), 'its company decides'


CHECKS = check_values, check_slopes, check_players, check_turns, check_score


@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(FenceGAN)


# ---------------------------------------------------------------- mutants
NO_REAL, NO_FAKE = (altered(FenceGAN, 'critic_loss', without(k), f'No{k}')
                    for k in ('real', 'fake'))
NO_ENCIRCLEMENT, NO_DISPERSION = (altered(FenceGAN, 'generator_loss', without(k), f'No{k}')
                                  for k in ('encirclement', 'dispersion'))
TOGETHER = altered(FenceGAN, 'generator_loss',
                   lambda t: {k: -v if k == 'dispersion' else v for k, v in t.items()},
                   'Together')

class Unweighted(FenceGAN):
    """Generated images count as much as real ones."""
    def critic_loss(self, xb): return GAN.critic_loss(self, xb)

class RealWeighted(FenceGAN):
    """gamma stands at the real images."""
    def critic_loss(self, xb):
        t = GAN.critic_loss(self, xb)
        return dict(real=self.fake_weight * t['real'], fake=t['fake'])

def other(change, name):
    """A class whose generator's terms come from change(self, fake, logits)."""
    def generator_loss(self, xb):
        fake = self.fake(self.batch_size)
        terms = FenceGAN.generator_loss(self, xb)
        return terms | {k: v for k, v in change(self, fake, self.critic_output(fake)).items()
                        if k in terms}
    return type(name, (FenceGAN,), dict(generator_loss=generator_loss))

PRINTED = other(lambda self, fake, u: dict(
    encirclement=(self.alpha - torch.sigmoid(u)).abs().log().mean()), 'Printed')
FLIPPED = other(lambda self, fake, u: dict(
    encirclement=encirclement(u, 1 - self.alpha).mean()), 'Flipped')
FOOLING = other(lambda self, fake, u: dict(encirclement=F.softplus(-u).mean()), 'Fooling')
PIXELWISE = other(lambda self, fake, u: dict(
    dispersion=self.dispersion_weight * dispersion(fake)), 'Pixelwise')
SQUARES = other(lambda self, fake, u: dict(
    dispersion=self.dispersion_weight * math.sqrt(3) /
    (fake - fake.mean(0)).flatten(1).square().sum(1).mean()), 'Squares')
FROM_ZERO = other(lambda self, fake, u: dict(
    dispersion=self.dispersion_weight * math.sqrt(3) / fake.flatten(1).norm(dim=1).mean()),
    'FromZero')
FIXED_CENTER = other(lambda self, fake, u: dict(
    dispersion=self.dispersion_weight * math.sqrt(3) /
    (fake - fake.mean(0).detach()).flatten(1).norm(dim=1).mean()), 'FixedCenter')

class CriticMovesAll(FenceGAN):
    """The critic's Adam holds everything."""
    def optimizers(self):
        """Also the generator."""
        return super().optimizers() | dict(critic=self.adam(*self.nets_))

class GeneratorMovesAll(FenceGAN):
    """The generator's Adam holds everything."""
    def optimizers(self):
        """Also the critic."""
        return super().optimizers() | dict(generator=self.adam(*self.nets_))

class GeneratorFirst(FenceGAN):
    """The turns are the other way round."""
    def turns(self):
        """Generator, critic."""
        return super().turns()[::-1]

class Probability(FenceGAN):
    """1 - D(x), which ties in float32."""
    def image_score(self, xb): return 1 - torch.sigmoid(self.critic_output(xb))

class Turned(FenceGAN):
    """Real images score high."""
    def image_score(self, xb): return self.critic_output(xb)


@each_mutant({'value of real': (NO_REAL, RealWeighted), 'value of fake': (NO_FAKE, Unweighted),
              'encirclement': (NO_ENCIRCLEMENT, PRINTED, FLIPPED, FOOLING),
              'value of dispersion': (NO_DISPERSION, TOGETHER, PIXELWISE, SQUARES, FROM_ZERO)})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_values, broken, why)


@each_mutant({'slope of encirclement': (PRINTED, FLIPPED), 'slope of dispersion': (FIXED_CENTER,)})
def test_wrong_slopes_are_caught(why, broken): assert_caught(check_slopes, broken, why)


@each_mutant({'step of the critic': (CriticMovesAll,),
              'step of the generator': (GeneratorMovesAll,),
              'not toward alpha': (NO_ENCIRCLEMENT, FLIPPED), 'not apart': (TOGETHER,)})
def test_wrong_games_are_caught(why, broken): assert_caught(check_players, broken, why)


@each_mutant({'turns': (GeneratorFirst,)})
def test_wrong_turns_are_caught(why, broken): assert_caught(check_turns, broken, why)


@each_mutant({'the score': (Probability, Turned)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


# ---------------------------------------------------------------- pieces
def test_encirclement_is_the_cross_entropy_with_alpha_as_label():
    u = torch.linspace(-6, 6, 50, dtype=torch.float64)
    for alpha in (.1, .5, 1.):
        wanted = F.binary_cross_entropy_with_logits(u, torch.full_like(u, alpha), reduction='none')
        assert torch.allclose(encirclement(u, alpha), wanted)
        if alpha < 1: assert abs(torch.sigmoid(u[encirclement(u, alpha).argmin()]) - alpha) < .06
    assert encirclement(torch.tensor([-200., 200.]), .5).isfinite().all()


def test_dispersion_by_hand():
    assert np.isclose(dispersion(torch.tensor([[[0., 0.]], [[6., 8.]]])), 1 / 5)
    assert dispersion(torch.ones(3, 2)).isinf()


def test_the_covered_share_is_that_of_the_best_critic():
    """A table of 12 places: any choice of that many has D = alpha, and the least loss there is."""
    alpha, gamma = .4, .5
    share = covered_share(alpha, gamma)
    assert np.isclose(share, 1 / 3) and covered_share(1., gamma) == math.inf
    p, q, A = np.full(12, 1 / 12), np.zeros(12), [1, 5, 6, 11]
    q[A] = p[A] / share
    assert np.isclose(q.sum(), 1)
    D = p / (p + gamma * q)
    assert np.allclose(D[A], alpha) and np.allclose(np.delete(D, A), 1)
    losses = encirclement(torch.logit(torch.linspace(.01, .99, 99, dtype=torch.float64)), alpha)
    assert encirclement(torch.logit(torch.tensor(D[A])), alpha).max() <= losses.min() + 1e-12


def test_with_alpha_one_it_is_an_ordinary_gan():
    params = dict(**SMALL, epochs=3, batch_size=8)
    fence = FenceGAN(**params, alpha=1., fake_weight=1., dispersion_weight=0.).fit(X)
    gan = GAN(**params).fit(X)
    ours, theirs = fence.nets_.state_dict(), gan.nets_.state_dict()
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in ours)


def test_a_short_batch_is_no_short_turn_of_the_generator():
    """Its images are batch_size in number, so that even a last batch of one can be dispersed."""
    d, drawn = raw(FenceGAN, batch_size=8), []
    def fake(n): drawn.append(n); return FenceGAN.fake(d, n)
    d.fake = fake
    d.generator_loss(XB[:3]), d.critic_loss(XB[:3])
    assert drawn == [8, 3]
    short = FenceGAN(**SMALL, epochs=2, batch_size=8).fit(X[:9])
    assert np.isfinite(short.history_['generator/dispersion']).all()


@pytest.mark.parametrize('params, message', [
    (dict(alpha=0.), 'alpha must be a number above 0 and at most 1'), (dict(alpha=1.1), 'alpha'),
    (dict(fake_weight=0.), 'fake_weight must be a number above 0'),
    (dict(dispersion_weight=-1.), 'dispersion_weight must be a number, at least 0'),
    (dict(batch_size=1), 'batch_size must be a whole number, at least 2')])
def test_wrong_settings_are_named(params, message):
    check_refused(FenceGAN, message, **SMALL | params)


def test_an_exploding_game_names_player_term_epoch_and_rates():
    check_explosion(FenceGAN, 'critic/.*epoch 1.*critic_lr=1e\\+30', **SMALL, critic_lr=1e30)


@pytest.mark.parametrize('shape', [(1, 1), (2, 9), (28, 28), (33, 32)])
@pytest.mark.parametrize('arch', ['mlp', 'conv'])
def test_any_image_fits(shape, arch):
    x = np.random.default_rng(0).random((5, 3, *shape), dtype='float32')
    d = FenceGAN(**SMALL, arch=arch, epochs=1, batch_size=4).fit(x)
    assert np.isfinite(d.decision_function(x)).all() and d.sample(2).shape == (2, 3, *shape)


def test_no_map_no_search_and_a_saved_game_scores_the_same(tmp_path):
    d = FenceGAN(**SMALL, epochs=2).fit(X)
    with pytest.raises(NotImplementedError, match='FenceGAN gives no anomaly map'):
        d.anomaly_map(X)
    with pytest.raises(NotImplementedError, match='FenceGAN has no way from an image'):
        d.reconstruct(X)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))


def test_the_fence_is_known_and_an_ordinary_critic_is_blind():
    """A disc in the plane: the critic of the fence knows it, the same game without terms not."""
    disc = (flat_set('disc', 200)[:, None, None] / 5 + .5).astype('float32')
    g = np.stack(np.meshgrid(*[np.linspace(.02, .98, 25)] * 2), -1).reshape(-1, 1, 1, 2)
    g = g.astype('float32')
    out = np.linalg.norm(g.reshape(-1, 2) - .5, axis=1) > .2
    both = dict(latent_dim=2, alpha=.2, verbose=False)
    plain = both | dict(alpha=1., fake_weight=1., dispersion_weight=0.)
    fence, gan = (auroc(out, FenceGAN(**k).fit(disc).decision_function(g)) for k in (both, plain))
    assert fence > .93 and gan < .75
