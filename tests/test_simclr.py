"""SimCLR: NT-Xent, the views, alignment and uniformity, the score; mutants of each."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from ad_course import simclr
from ad_course.detector import isolated, load
from ad_course.simclr import (SimCLR, alignment, augment, jitter, nearest_cosine,
                              nt_xent, uniformity)
from ad_course.surfaces import surfaces

from .mutants import assert_caught, each_mutant, mutant
from .players import check_explosion, check_refused

X = np.random.default_rng(0).random((24, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(width=2, code_dim=5, head_dim=4, verbose=False)


def rng(seed=0): return torch.Generator().manual_seed(seed)


def rows(n, d, seed=0): return torch.randn(n, d, generator=rng(seed), dtype=torch.float64)


# ---------------------------------------------------------------- NT-Xent
def slow(a, b, tau):
    """Equation (1) as it is printed, one anchor after the other."""
    z = [v / np.linalg.norm(v) for v in np.concatenate([a, b])]
    n, total = len(a), 0.
    for i in range(2 * n):
        e = [math.exp(z[i] @ z[k] / tau) for k in range(2 * n)]
        total -= math.log(e[(i + n) % (2 * n)] / (sum(e) - e[i]))
    return total / (2 * n)


def check_nt_xent(loss):
    """By hand, by the slow loop at three temperatures, collapsed, and whatever the lengths."""
    e = torch.eye(2, dtype=torch.float64)
    hand = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert math.isclose(loss(e, e, .5), hand, abs_tol=1e-9), 'two images by hand'
    a, b = rows(5, 4), rows(5, 4, 1)
    for tau in (.1, .5, 2.):
        assert math.isclose(loss(a, b, tau), slow(a.numpy(), b.numpy(), tau), rel_tol=1e-9), 'loop'
    assert math.isclose(loss(3 * a, b / 7, .5), loss(a, b, .5), rel_tol=1e-9), 'lengths'


def own(a, b, tau):
    z = F.normalize(torch.cat([a, b]))
    return F.cross_entropy(z @ z.T / tau, torch.arange(len(z)).roll(len(a)))

def side_by_side(a, b, tau):
    z = F.normalize(torch.cat([a, b]))
    logits = (z @ z.T / tau).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)) ^ 1)

def across(a, b, tau):
    return F.cross_entropy(F.normalize(a) @ F.normalize(b).T / tau, torch.arange(len(a)))

def raw(a, b, tau):
    z = torch.cat([a, b])
    logits = (z @ z.T / tau).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))

def multiplied(a, b, tau): return nt_xent(a, b, 1 / tau)
def summed(a, b, tau): return nt_xent(a, b, tau) * 2 * len(a)

def without_partner(a, b, tau):
    """The partner is not in the denominator."""
    z = F.normalize(torch.cat([a, b]))
    s, i = z @ z.T / tau, torch.arange(len(z))
    others = s.clone().fill_diagonal_(-math.inf)
    others[i, i.roll(len(a))] = -math.inf
    return (others.logsumexp(1) - s[i, i.roll(len(a))]).mean()


def test_nt_xent(): check_nt_xent(nt_xent)


@each_mutant({'two images by hand': (own, side_by_side, across, multiplied, summed,
                                     without_partner), 'loop|lengths': (raw,)})
def test_wrong_contrasts_are_caught(why, broken): assert_caught(check_nt_xent, broken, why)


def test_the_slope_is_that_of_the_softmax_and_has_nothing_along_the_row():
    a, b = (rows(4, 3, s).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(nt_xent, (a, b))
    slope, = torch.autograd.grad(nt_xent(a, b), a)
    assert (slope * a).sum(1).abs().max() < 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.sampled_from((.05, .5, 5.)))
def test_bounds_and_symmetries(n, d, tau):
    a, b = rows(n, d, n), rows(n, d, d + 10)
    value, order = nt_xent(a, b, tau), torch.randperm(n, generator=rng())
    assert 0 <= value <= math.log(max(1, 2 * n - 1)) + 2 / tau
    assert torch.isclose(value, nt_xent(b, a, tau))
    assert torch.isclose(value, nt_xent(a[order], b[order], tau))
    same = torch.ones(n, d)
    assert math.isclose(nt_xent(same, same, tau), math.log(2 * n - 1), abs_tol=1e-4)


def test_half_precision_is_counted_in_32_bits_and_wrong_shapes_are_named():
    a, b = rows(40, 8).float(), rows(40, 8, 1).float()
    with torch.autocast('cpu', torch.bfloat16): value = nt_xent(a, b, .1)
    assert value.dtype == torch.float32 and torch.isclose(value, nt_xent(a, b, .1))
    for wrong in (rows(4, 8), rows(40, 7), rows(40, 8)[None]):
        with pytest.raises(ValueError, match='rows .n, d. of one shape'): nt_xent(a, wrong)


# ---------------------------------------------------------------- views
OFF = dict(crop=1., flip=0., brightness=0., contrast=0., color=0., gray=0.)


def check_views(view):
    """Off is off; each ingredient alone does its own, per image, and within its bounds."""
    x = torch.rand(8, 3, 7, 10, generator=rng())
    assert torch.allclose(view(x, rng(), **OFF), x, atol=1e-5), 'off'
    assert torch.allclose(view(x, rng(), **OFF | dict(flip=1.)), x.flip(3), atol=1e-5), 'mirror'
    ramp = torch.linspace(0, 1, 64).expand(200, 1, 64, 64)
    ends = view(ramp, rng(), **OFF | dict(crop=.25))[:, 0, 0, [0, -1]]
    side = (ends[:, 1] - ends[:, 0])
    assert side.min() > .4 and side.max() <= 1.001 and side.std() > .05, 'side of a crop'
    assert ends.min() >= 0 and ends[:, 0].std() > .05, 'place of a crop'
    ends = view(ramp.mT, rng(), **OFF | dict(crop=.25))[:, 0, [0, -1], 0]
    high = ends[:, 1] - ends[:, 0]
    assert high.min() > .4 and high.max() <= 1.001 and high.std() > .05, 'height of a crop'
    assert ends[:, 0].std() > .05 and (side / high).std() > .05, 'shape of a crop'
    light = view(torch.full((400, 1, 2, 2), .4), rng(), **OFF | dict(brightness=.5))[:, 0, 0, 0]
    light = light / .4
    assert .5 <= light.min() < .6 and 1.4 < light.max() <= 1.5, 'light'
    two = torch.tensor([.4, .6]).expand(400, 1, 1, 2)
    far = view(two, rng(), **OFF | dict(contrast=.5))
    assert torch.allclose(far.mean(3), torch.tensor(.5)), 'contrast keeps the mean'
    wide = (far[..., 1] - far[..., 0]) / .2
    assert .5 <= wide.min() < .6 and 1.4 < wide.max() <= 1.5, 'contrast'
    pale = .4 + .2 * x
    hued = view(pale, rng(), **OFF | dict(color=.4))
    assert torch.allclose(hued.mean(1), pale.mean(1), atol=1e-5), 'color keeps the gray'
    assert (hued - pale).abs().amax((1, 2, 3)).min() > .005, 'color'
    grays = view(pale.repeat(50, 1, 1, 1), rng(), **OFF | dict(gray=.3)).std(1).amax((1, 2)) < 1e-6
    assert .2 < grays.float().mean() < .4, 'gray'


def broken(**changes):
    """augment with other settings inside."""
    def view(x, rng, **kw): return augment(x, rng, **{k: changes.get(k, v) for k, v in kw.items()})
    view.__name__ = '_'.join(changes)
    return view

def one_for_all(x, rng, **kw):
    """One draw for the whole batch."""
    seed = int(torch.randint(99, (), generator=rng))
    return torch.cat([augment(v[None], torch.Generator().manual_seed(seed), **kw) for v in x])

def upside_down(x, rng, **kw): return augment(x.flip(2), rng, **kw)


def test_views(): check_views(augment)


@each_mutant({'mirror': (broken(flip=0.),), 'side of a crop': (broken(crop=1.), one_for_all),
              'light': (broken(brightness=0.),), 'contrast': (broken(contrast=0.),),
              'color': (broken(color=0.),), 'gray': (broken(gray=0.),), 'off': (upside_down,)})
def test_wrong_views_are_caught(why, broken): assert_caught(check_views, broken, why)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.sampled_from((1, 3)), st.integers(1, 9), st.integers(1, 9))
def test_any_image_has_views(n, c, h, w):
    x = torch.rand(n, c, h, w, generator=rng(n))
    kept = x.clone()
    v = augment(x, rng(3))
    assert v.shape == x.shape and v.min() >= 0 and v.max() <= 1 and torch.equal(x, kept)
    assert torch.equal(v, augment(x, rng(3)))


def test_hue_is_a_turn_about_gray_and_saturation_a_length():
    """The color part keeps its length where only the hue is drawn (saturation factor known)."""
    x = .4 + .2 * torch.rand(300, 3, 1, 1, generator=rng())
    tint = lambda v: v - v.mean(1, keepdim=True)
    y = jitter(x, rng(1), 0., 0., .4, 0.)
    factor = tint(y).norm(dim=1) / tint(x).norm(dim=1)
    cosine = F.cosine_similarity(tint(x), tint(y), dim=1)
    assert .6 <= factor.min() < .65 and 1.35 < factor.max() <= 1.4001
    turn = cosine.clamp(-1, 1).acos() / (2 * math.pi)
    assert .09 < turn.max() <= .1001
    red, green = (torch.eye(3)[i].view(1, 3, 1, 1) for i in (0, 1))
    def last_or_middle(n, low, high, like, rng=None):   # hue a third of a circle, saturation 1
        return torch.full((n, 1, 1, 1), high if low == -high else (low + high) / 2)
    with mutant(simclr, _uniform=last_or_middle):
        turned = jitter(.3 * red, None, 0., 0., 4 / 3, 0.)
    assert torch.allclose(turned, .3 * green, atol=1e-6)


# ---------------------------------------------------------------- alignment, uniformity, score
def test_alignment_and_uniformity_by_hand():
    poles = torch.tensor([[0., 2.], [0., -1.]])
    assert torch.isclose(uniformity(poles), torch.tensor(-8.))
    assert torch.isclose(uniformity(poles, t=1.), torch.tensor(-4.))
    assert alignment(poles, 5 * poles) == 0 and alignment(poles, -poles) == 4
    e = torch.eye(3)                                                  # all at squared distance 2
    assert torch.isclose(uniformity(e), torch.tensor(-4.))


class Half(nn.Module):
    """An encoder: the pixels of three, as they are."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1))
    def forward(self, x): return x.flatten(1) * self.w


def shown(cls, x, **params):
    """The class with networks that can be worked out, fitted to images of three pixels."""
    def networks(self, shape): return dict(encoder=Half(), head=nn.Linear(3, 2))
    kind = type('Shown', (cls,), dict(networks=networks))
    return kind(**dict(epochs=0, verbose=False) | params).fit(x)


def check_score(cls):
    """One minus the cosine to the nearest; a training image is not its own neighbor."""
    g = np.random.default_rng(1)
    x, new = (g.random((n, 1, 1, 3), dtype='float32') for n in (9, 4))
    norm = lambda v: np.linalg.norm(v, axis=1)
    far = lambda a, b: 1 - (a @ b.T) / norm(a)[:, None] / norm(b)
    for k in (1, 3):
        d = shown(cls, x, k=k)
        a, b = new.reshape(4, 3).astype('float64'), x.reshape(9, 3).astype('float64')
        wanted = np.sort(far(a, b), 1)[:, :k].mean(1)
        assert np.allclose(d.decision_function(new), wanted, atol=1e-6), 'score'
        others = far(b, b)
        np.fill_diagonal(others, 9)
        wanted = np.quantile(np.sort(others, 1)[:, :k].mean(1), .95)
        assert np.isclose(d.threshold_, wanted, atol=1e-5), 'threshold'
    d = shown(cls, x, layer='head')
    with torch.no_grad():
        a, b = (d.nets_.head(torch.tensor(v).flatten(1)).numpy() for v in (new, x))
    assert np.allclose(d.decision_function(new), far(a, b).min(1), atol=1e-5), 'head'


class Turned(SimCLR):
    """Near is anomalous."""
    def image_score(self, xb): return -super().image_score(xb)

class Farthest(SimCLR):
    """The farthest image of the bank."""
    def image_score(self, xb): return (1 - self.feature(xb) @ self.bank_.T).amax(1)

class Unnormalized(SimCLR):
    """A product in place of the cosine."""
    def feature(self, xb):
        """The encoder's output as it is."""
        return self.nets_.encoder(xb)

class OwnNeighbor(SimCLR):
    """A training image may be its own neighbor."""
    def training_scores(self, data):
        """As for new images."""
        s = self.for_rows(self.bank_)
        return s, np.zeros(len(s), int)
    def for_rows(self, rows): return nearest_cosine(rows, self.bank_, self.k).numpy()

class AlwaysEncoder(SimCLR):
    """`layer` is not asked."""
    def feature(self, xb):
        """The encoder, whatever `layer` says."""
        return F.normalize(self.nets_.encoder(xb))


def test_score(): check_score(SimCLR)


@each_mutant({'score': (Turned, Farthest, Unnormalized), 'threshold': (OwnNeighbor,),
              'head': (AlwaysEncoder,)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


# ---------------------------------------------------------------- the loss of the detector
def check_loss(cls):
    """Equation (1) on the head, of two different views of the same images."""
    d, seen = cls(**SMALL, epochs=0).fit(X), []
    view = d.view
    def watched(xb, rng=None): seen.append(view(xb, rng)); return seen[-1]
    d.view = watched
    with isolated(3): terms = {k: v.detach() for k, v in d.loss(XB).items()}
    assert terms.keys() == {'contrast'} and len(seen) == 2, 'two views'
    assert not torch.equal(*seen), 'views differ'
    with torch.no_grad(): a, b = (d.nets_.head(d.nets_.encoder(v)).double().numpy() for v in seen)
    assert math.isclose(terms['contrast'], slow(a, b, d.temperature), rel_tol=1e-4), 'value'
    with isolated(3): other = d.set_params(temperature=.1).loss(XB)['contrast'].detach()
    assert math.isclose(other, slow(a, b, .1), rel_tol=1e-4), 'temperature'


class OneView(SimCLR):
    """The image against one view of it."""
    def loss(self, xb):
        z = self.nets_.head(self.nets_.encoder(torch.cat([xb, self.view(xb)])))
        return dict(contrast=nt_xent(*z.chunk(2), self.temperature))

class SameView(SimCLR):
    """Twice the same view."""
    def loss(self, xb):
        g = torch.Generator().manual_seed(1)
        z = [self.nets_.head(self.nets_.encoder(self.view(xb, g.manual_seed(1)))) for _ in 'ab']
        return dict(contrast=nt_xent(*z, self.temperature))

class OnCode(SimCLR):
    """The loss without the head."""
    def loss(self, xb):
        z = self.nets_.encoder(torch.cat([self.view(xb), self.view(xb)]))
        return dict(contrast=nt_xent(*z.chunk(2), self.temperature))

class FixedTemperature(SimCLR):
    """Always one half."""
    def loss(self, xb):
        z = self.nets_.head(self.nets_.encoder(torch.cat([self.view(xb), self.view(xb)])))
        return dict(contrast=nt_xent(*z.chunk(2)))


def test_loss(): check_loss(SimCLR)


@each_mutant({'two views': (OneView,), 'views differ': (SameView,), 'value': (OnCode,),
              'temperature': (FixedTemperature,)})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_loss, broken, why)


# ---------------------------------------------------------------- behaviour
@pytest.mark.parametrize('params, message', [
    (dict(temperature=0.), 'temperature must be a number above 0'), (dict(crop=0.), 'crop must be'),
    (dict(crop=1.5), 'crop must be'), (dict(flip=2.), 'flip must be'),
    (dict(layer='middle'), "layer must be one of 'encoder', 'head'"), (dict(k=0), 'k must be'),
    (dict(batch_size=1), 'batch_size must be a whole number, at least 2'),
    (dict(arch='big'), 'arch must be')])
def test_wrong_settings_are_named(params, message): check_refused(SimCLR, message, **SMALL | params)


def test_k_is_below_the_number_of_images():
    with pytest.raises(ValueError, match='k must be below the number of training images'):
        SimCLR(**SMALL, epochs=1, k=24).fit(X)


def test_an_exploding_training_names_the_rate():
    check_explosion(SimCLR, 'contrast.*lr=1e\\+30', **SMALL, lr=1e30)


@pytest.mark.parametrize('arch', ['mlp', 'conv'])
@pytest.mark.parametrize('shape', [(1, 2, 3), (3, 9, 12)])
def test_any_image_fits_and_is_saved(arch, shape, tmp_path):
    x = np.random.default_rng(0).random((9, *shape), dtype='float32')
    d = SimCLR(**SMALL, arch=arch, epochs=2, batch_size=4).fit(x)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(x), d.decision_function(x))


def test_jitter_makes_the_features_blind_to_light():
    """How far a light of 0.7 moves a surface, in distances of two surfaces."""
    t = surfaces(n_train=80, n_test=40, kinds=('spot', 'hole', 'stain'), seed=8)
    x, moved = torch.tensor(t.x_test[t.y_test == 0]), []
    for kw in ({}, dict(brightness=0., contrast=0.), dict(epochs=0)):
        d = SimCLR(**dict(epochs=20, width=8, batch_size=20, verbose=False) | kw).fit(t.x_train)
        with torch.no_grad(): a, b = d.feature(x), d.feature(.7 * x)
        moved.append(float((1 - (a * b).sum(1).mean()) / (1 - (a @ a.flip(0).T).mean())))
    blind, sees, raw = moved
    assert sees > 2 * raw and sees > 4 * blind, moved
