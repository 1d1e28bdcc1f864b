"""HADGAN: scenes, RX in disguise, the filter, both games, the score; mutants of each."""
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from ad_course.aae import AAE
from ad_course.detector import load
from ad_course.gan import cross_entropy_critic
from ad_course.hadgan import (HADGAN, area_opening, as_spectra, hyperspectral_cube, local_rx,
                              smooth_spectra)
from ad_course.metrics import auroc
from ad_course.pretrained import Mahalanobis

from .mutants import assert_caught, each_mutant
from .players import (SHAPES, altered, check_any_image, check_explosion, check_refused, moved,
                      ready, without)

CUBE, MASK = hyperspectral_cube(0, side=16, bands=6, targets=3)
X = as_spectra(CUBE)
XB = torch.tensor(X[:12])
SMALL = dict(width=2, critic_width=6, code_dim=3, verbose=False)


def raw(cls=HADGAN, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


# ---------------------------------------------------------------- scenes
def test_a_scene_is_made_of_its_mixture_and_its_targets():
    plain = dict(side=20, bands=12, targets=5, noise=0., shade=0., gain=0., bilinear=0.)
    cube, mask = hyperspectral_cube(4, **plain, fraction=.3)
    empty, same = hyperspectral_cube(4, **plain, fraction=0.)
    assert cube.shape == (20, 20, 12) and cube.dtype == np.float32 and mask.shape == (20, 20)
    assert mask.sum() == 20 and np.array_equal(mask, same)
    assert ndimage.label(mask, np.ones((3, 3)))[1] == 5, 'targets touch'
    assert np.array_equal(cube[mask == 0], empty[mask == 0])
    strange = (cube - .7 * empty)[mask == 1] / .3
    assert np.allclose(strange, strange[0], atol=1e-4)
    unlike, mask = hyperspectral_cube(4, **plain, fraction=.3, alike=False)
    bare = hyperspectral_cube(4, **plain, fraction=0., alike=False)[0]
    strange, which = (unlike - .7 * bare) / .3, ndimage.label(mask)[0]
    each = np.array([strange[which == k].mean(0) for k in range(1, 6)])
    assert all(strange[which == k].std(0).max() < 1e-4 for k in range(1, 6))
    assert np.abs(each[:, None] - each).max(2)[~np.eye(5, dtype=bool)].min() > .01
    rank = lambda x: np.linalg.matrix_rank(x.reshape(-1, 12), tol=1e-3)
    assert rank(empty) == 4
    assert rank(hyperspectral_cube(4, **plain | dict(bilinear=2.), fraction=0.)[0]) > 6


def test_light_gain_and_noise_are_what_they_are_called():
    still = dict(side=16, bands=8, targets=0, noise=0., shade=0., gain=0.)
    cube = hyperspectral_cube(1, **still)[0].astype(float)
    light = hyperspectral_cube(1, **still | dict(shade=.1))[0] / cube
    assert np.allclose(light, light[..., :1], atol=1e-4) and .05 < light[..., 0].std() < .15
    band = hyperspectral_cube(1, **still | dict(gain=.4))[0] / cube
    assert np.allclose(band, band[:1, :1], atol=1e-4) and .6 <= band.min() < band.max() <= 1
    noise = 1.5 * (hyperspectral_cube(1, **still | dict(noise=.02))[0] - cube)
    assert abs(noise.std() - .02) < 2e-3


def test_a_scene_is_the_seeds_and_too_many_targets_are_refused():
    again = hyperspectral_cube(0, side=16, bands=6, targets=3)
    assert np.array_equal(again[0], CUBE) and np.array_equal(again[1], MASK)
    assert not np.array_equal(hyperspectral_cube(1, side=16, bands=6, targets=3)[0], CUBE)
    with pytest.raises(ValueError, match='99 targets of 2 pixels a side find no place'):
        hyperspectral_cube(0, side=16, targets=99)
    assert smooth_spectra(3, 9, np.random.default_rng(0)).shape == (3, 9)


# ---------------------------------------------------------------- local RX, the filter
def test_local_rx_by_hand_and_blind_to_its_inside():
    cube = hyperspectral_cube(2, side=24, bands=5)[0]
    near = [cube[11 + i, 12 + j] for i in range(-4, 5) for j in range(-4, 5)
            if max(abs(i), abs(j)) > 1]
    near, x = np.array(near, 'float64'), cube[11, 12].astype('float64')
    away = x - near.mean(0)
    wanted = away @ np.linalg.solve(np.cov(near.T, bias=True), away)
    assert np.isclose(local_rx(cube, 3, 9, ridge=0.)[11, 12], wanted, rtol=1e-4)
    assert local_rx(cube, 3, 9, ridge=.5)[11, 12] < wanted
    assert np.isfinite(local_rx(cube)).all()


def by_levels(m, area):
    """Area opening by its definition."""
    out = np.full(m.shape, m.min())
    for level in np.unique(m):
        label = ndimage.label(m >= level, np.ones((3, 3)))[0]
        large = np.bincount(label.ravel()) >= area
        large[0] = False
        out[large[label]] = level
    return out


@pytest.mark.parametrize('area', [1, 3, 7, 40, 500])
def test_the_opening_is_its_definition(area):
    g = np.random.default_rng(area)
    for m in (g.normal(size=(9, 14)), g.integers(0, 4, (9, 14)) * 1., -np.ones((9, 14))):
        cut = area_opening(m, area)
        assert np.array_equal(cut, by_levels(m, area))
        assert (cut <= m).all() and np.array_equal(area_opening(cut, area), cut)


def test_what_is_small_stays_and_what_is_large_goes():
    m = np.zeros((10, 10))
    m[1, 1], m[2, 2], m[5:9, 5:9] = 4, 4, 7                     # two on a diagonal; sixteen
    cut = m - area_opening(m, 3)
    assert cut[1, 1] == cut[2, 2] == 4 and cut.sum() == 8
    assert not (m - area_opening(m, 2)).any()


# ---------------------------------------------------------------- the games
def check_values(cls):
    """The four losses against formulas, each with its weight."""
    d = raw(cls, image_weight=.3, weight_decay=0.)
    E, G, judge, critic = (d.nets_[k] for k in ('encoder', 'decoder', 'image_critic', 'critic'))
    with torch.no_grad():
        z = E(XB)
        rebuilt = G(z)
        real, fake = torch.sigmoid(judge(XB)), torch.sigmoid(judge(rebuilt))
        terms = d.image_critic_loss(XB)
        assert torch.allclose(terms['real'], -real.log(), atol=1e-5), 'value of real'
        assert torch.allclose(terms['fake'], -(1 - fake).log(), atol=1e-5), 'value of fake'
        terms = d.loss(XB)
        error = (XB - rebuilt).square().mean()
        assert torch.allclose(terms['reconstruction'].mean(), error, atol=1e-6), 'reconstruction'
        assert torch.allclose(terms['pleasing'], -.3 * fake.log(), atol=1e-5), 'pleasing'
        wanted = F.softplus(-critic(z))
        assert torch.allclose(d.fooling_loss(XB)['fooling'], wanted, atol=1e-5), 'fooling'


def check_players(cls):
    """Each step moves its own players and nobody else."""
    d = raw(cls)
    assert moved(d, 'image_critic', d.image_critic_loss, XB) == {'image_critic'}, 'image critic'
    assert moved(d, 'autoencoder', d.loss, XB) == {'encoder', 'decoder'}, 'autoencoder'
    assert moved(d, 'critic', d.critic_loss, XB) == {'critic'}, 'latent critic'
    assert moved(d, 'encoder', d.fooling_loss, XB) == {'encoder'}, 'encoder'
    d = raw(cls, lr=1e-2, image_weight=100.)
    moved(d, 'image_critic', d.image_critic_loss, XB, 20)
    opinion = lambda: float(d.nets_.image_critic(d.reconstruction(XB)).mean().detach())
    before = opinion()
    moved(d, 'autoencoder', d.loss, XB, 20)
    assert opinion() > before, 'does not please'


def check_turns(cls):
    """Who moves when, with each critic and without."""
    turns = lambda **kw: [player for player, _ in raw(cls, **kw).turns()]
    game = ['autoencoder', 'critic', 'encoder']
    assert turns() == ['image_critic', *game], 'both critics'
    assert turns(image_weight=0.) == game, 'without the image critic'
    assert turns(latent_critic=False) == ['image_critic', 'autoencoder'], 'without the latent'
    alone = raw(cls, image_weight=0., latent_critic=False)
    assert [player for player, _ in alone.turns()] == ['autoencoder'], 'alone'
    assert set(alone.nets_) == {'encoder', 'decoder'}, 'networks that nobody needs'
    seen = {k for k, v in cls(**SMALL | dict(epochs=2)).fit(X).history_.items() if len(v) == 2}
    assert {'image_critic/real', 'image_critic/fake', 'autoencoder/pleasing',
            'autoencoder/reconstruction', 'critic/prior', 'critic/codes',
            'encoder/fooling'} <= seen, 'records'


def parts_by_hand(d):
    """Energy, length, distance in units of the training set, in float64: (3, n)."""
    xb = torch.tensor(X)
    with torch.no_grad(): z, r = d.code(xb), (xb - d.reconstruction(xb)).flatten(1)
    away = (r - d.center_) @ d.whitening_
    parts = torch.stack([r.square().mean(1), z.square().mean(1), away.square().sum(1)]).double()
    return ((parts - parts.mean(1, keepdim=True)) / parts.std(1, False, keepdim=True)).numpy()


def check_score(cls):
    """lambda of energy, the rest of distance; in a scene the energy is filtered, no other part."""
    d = cls(**SMALL | dict(epochs=2), spatial_weight=.3, prior_weight=.2).fit(X)
    energy, length, distance = parts_by_hand(d)
    wanted = .3 * energy + .7 * distance + .2 * length
    assert np.allclose(d.decision_function(X), wanted, atol=2e-3), 'the score'
    e = energy.reshape(MASK.shape)
    wanted = .3 * (e - by_levels(e, 6)).ravel() + .7 * distance + .2 * length
    found = d.scene_score(CUBE, area=5)
    assert found.shape == MASK.shape and np.allclose(found.ravel(), wanted, atol=2e-3), 'the scene'
    maps = d.scene_parts(CUBE)
    assert maps.shape == (3, *MASK.shape) and np.allclose(maps[2].ravel(), distance, atol=2e-3)


CHECKS = check_values, check_players, check_turns, check_score


@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(HADGAN)


# ---------------------------------------------------------------- mutants
NO_REAL, NO_FAKE = (altered(HADGAN, 'image_critic_loss', without(k), f'No{k}')
                    for k in ('real', 'fake'))
NO_PLEASING, NO_RECONSTRUCTION = (altered(HADGAN, 'loss', without(k), f'No{k}')
                                  for k in ('pleasing', 'reconstruction'))
NO_FOOLING = altered(HADGAN, 'fooling_loss', without('fooling'), 'NoFooling')

class Saturating(HADGAN):
    """log(1 - D) in place of -log D."""
    def loss(self, xb):
        fake = self.nets_.image_critic(self.reconstruction(xb))
        return super().loss(xb) | dict(pleasing=-self.image_weight * F.softplus(fake))

class Unweighted(HADGAN):
    """gamma is forgotten."""
    def loss(self, xb):
        return {k: v / (self.image_weight if k == 'pleasing' else 1)
                for k, v in super().loss(xb).items()}

class Displeasing(HADGAN):
    """The autoencoder does what the critic does."""
    def loss(self, xb):
        return {k: -v if k == 'pleasing' else v for k, v in super().loss(xb).items()}

class OnCodesOfNoise(HADGAN):
    """The image critic sees decoded noise, as in a GAN, in place of rebuilt images."""
    def image_critic_loss(self, xb):
        judge = self.nets_.image_critic
        fake = self.nets_.decoder(torch.randn(len(xb), self.code_dim))
        return cross_entropy_critic(judge(xb), judge(fake))

class CriticMovesAll(HADGAN):
    """The image critic's Adam holds everything."""
    def optimizers(self):
        """Also the autoencoder."""
        return super().optimizers() | dict(image_critic=self.adam(*self.nets_))

class AutoencoderMovesAll(HADGAN):
    """The autoencoder's Adam holds the critics too."""
    def optimizers(self):
        """Also the critics."""
        return super().optimizers() | dict(autoencoder=self.adam(*self.nets_))

class DecoderFools(HADGAN):
    """The game about codes moves the image critic."""
    def optimizers(self):
        """Another network in the critic's name."""
        return super().optimizers() | dict(critic=self.adam('critic', 'image_critic'))
    def critic_loss(self, xb):
        return super().critic_loss(xb) | dict(more=self.nets_.image_critic(xb))

class ImagesLast(HADGAN):
    """The image critic moves after all others."""
    def turns(self):
        """One turned round."""
        return [*super().turns()[1:], *super().turns()[:1]]

class AlwaysBoth(HADGAN):
    """Networks stand there that nobody trains."""
    def networks(self, shape):
        both = HADGAN(**self.get_params() | dict(latent_critic=True, image_weight=1.))
        return HADGAN.networks(both, shape)

class Turned(HADGAN):
    """lambda at the distance."""
    def mixed(self, energy, length, distance): return super().mixed(distance, length, energy)

class Unwhitened(HADGAN):
    """The spectral half is the energy once more."""
    def score_parts(self, xb):
        parts = AAE.score_parts(self, xb)
        return torch.cat([parts, self.difference(xb).square().sum(1, keepdim=True)], 1)

class Uncentered(HADGAN):
    """Distances from zero."""
    def score_parts(self, xb):
        distance = (self.difference(xb) @ self.whitening_).square().sum(1, keepdim=True)
        return torch.cat([AAE.score_parts(self, xb), distance], 1)

class FiltersAll(HADGAN):
    """The opening is taken from the sum."""
    def scene_score(self, cube, area=10):
        whole = self.mixed(*self.scene_parts(cube))
        return whole - area_opening(whole, area + 1)

class OneTooFew(HADGAN):
    """Parts of `area` pixels are cut off."""
    def scene_score(self, cube, area=10): return super().scene_score(cube, area - 1)

class Opened(HADGAN):
    """What is left of the opening, not what it cuts off."""
    def scene_score(self, cube, area=10):
        energy, length, distance = self.scene_parts(cube)
        return self.mixed(area_opening(energy, area + 1), length, distance)


@each_mutant({'value of real': (NO_REAL,), 'value of fake': (NO_FAKE, OnCodesOfNoise),
              'pleasing': (NO_PLEASING, Saturating, Unweighted, Displeasing),
              'reconstruction': (NO_RECONSTRUCTION,), 'fooling': (NO_FOOLING,)})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_values, broken, why)


@each_mutant({'image critic': (CriticMovesAll,), 'autoencoder': (AutoencoderMovesAll,),
              'latent critic': (DecoderFools,), 'does not please': (Displeasing,)})
def test_wrong_games_are_caught(why, broken): assert_caught(check_players, broken, why)


@each_mutant({'both critics': (ImagesLast,), 'networks': (AlwaysBoth,)})
def test_wrong_turns_are_caught(why, broken): assert_caught(check_turns, broken, why)


@each_mutant({'the score': (Turned, Unwhitened, Uncentered),
              'the scene': (FiltersAll, OneTooFew, Opened)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


# ---------------------------------------------------------------- the whole
def test_both_critics_left_out_it_is_an_autoencoder():
    bare = dict(**SMALL, epochs=3, batch_size=64)
    d = HADGAN(**bare, latent_critic=False, image_weight=0.).fit(X)
    assert set(d.history_) == {'reconstruction', 'seconds'}


class Affine(nn.Module):
    """An encoder that is the identity, with a decoder x -> Ax + b."""
    def __init__(self, A, b): super().__init__(); self.A, self.b = A, b
    def forward(self, x): return (x.flatten(1) @ self.A + self.b)[:, None, None]


def test_the_distance_is_rx_for_any_affine_network():
    """Equation (5), exact without shrinkage; a projection is another matter."""
    def plain(rows):
        rows = rows.astype('float64')
        away = rows - rows.mean(0)
        return (away * np.linalg.solve(np.cov(away.T, bias=True), away.T).T).sum(1)
    g, rx = torch.Generator().manual_seed(0), plain(X.reshape(len(X), -1))
    d = HADGAN(**SMALL, epochs=0, latent_critic=False, image_weight=0.).fit(X)
    d.nets_.encoder = nn.Flatten()
    def distances(A, b):
        d.nets_.decoder = Affine(A, b)
        return d.for_each(d.difference, X, dims=2)
    b = torch.rand(6, generator=g)
    for A in (torch.zeros(6, 6), .3 * torch.randn(6, 6, generator=g), 2 * torch.eye(6)):
        assert np.allclose(plain(distances(A, b)), rx, rtol=1e-2, atol=1e-2)
    one = F.normalize(torch.ones(6), dim=0)
    lost = distances(torch.outer(one, one), b) @ np.linalg.svd(one[None].numpy())[2][1:].T
    assert not np.allclose(plain(lost), rx, rtol=.1)


def test_an_untrained_network_has_rx_and_a_target_that_fills_a_pixel_is_found():
    cube, mask = hyperspectral_cube(1, side=24, bands=12, targets=4, fraction=.6)
    x, y = as_spectra(cube), mask.ravel()
    raw = HADGAN(epochs=0, spatial_weight=0., verbose=False).fit(x).decision_function(x)
    rx = Mahalanobis(backbone=None, normalize=False, verbose=False).fit(x).decision_function(x)
    assert np.corrcoef(raw, rx)[0, 1] > .95 and auroc(y, raw) > .95
    d = HADGAN(epochs=15, batch_size=64, verbose=False).fit(x)
    assert auroc(y, d.scene_score(cube).ravel()) > .9


@pytest.mark.parametrize('params, message', [
    (dict(image_weight=-1.), 'image_weight must be a number, at least 0'),
    (dict(image_lr=0.), 'image_lr must be a number above 0'),
    (dict(spatial_weight=1.1), 'spatial_weight must be a number, at least 0 and at most 1'),
    (dict(latent_critic=1), 'latent_critic must be one of True, False')])
def test_wrong_settings_are_named(params, message): check_refused(HADGAN, message, **SMALL | params)


def test_an_exploding_game_names_player_term_epoch_and_rates():
    check_explosion(HADGAN, 'image_critic/.*image_lr=1e\\+30', **SMALL, image_lr=1e30)


@pytest.mark.parametrize('shape', SHAPES)
def test_any_image_fits(shape): check_any_image(HADGAN, shape, **SMALL)


def test_a_saved_game_scores_the_same(tmp_path):
    for kw in ({}, dict(latent_critic=False), dict(image_weight=0.)):
        d = HADGAN(**SMALL | dict(epochs=2), **kw).fit(X)
        d.save(tmp_path/'d')
        again = load(tmp_path/'d')
        assert np.array_equal(again.scene_score(CUBE), d.scene_score(CUBE))
        assert again.anomaly_map(X[:3]).shape == (3, 1, 6)
