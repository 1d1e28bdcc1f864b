"""GEOM: its transformations, the three scores, the Dirichlet fit, the class; mutants of each."""
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.optimize import minimize
from scipy.special import digamma as scipy_digamma
from torch import nn
from torch.nn import functional as F

from ad_course import geom
from ad_course.data import digits
from ad_course.detector import load
from ad_course.geom import (GEOM, PADDINGS, SETS, dirichlet_mle, dirichlet_score, fixed_point_step,
                            inverse_digamma, log_likelihood, newton_step, probability_score,
                            sum_score, transform, transformations, view_index, views, wide_resnet)

from .mutants import assert_caught, each_mutant
from .players import check_refused
from .tasks import quick

X = np.random.default_rng(0).random((30, 1, 6, 6), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(arch='mlp', width=2, transforms='rotations', verbose=False)
G = torch.Generator().manual_seed(0)
LOG_P = torch.randn(5, 4, 4, generator=G, dtype=torch.float64).log_softmax(2)
ALPHA = torch.rand(4, 4, generator=G, dtype=torch.float64) * 3


# ---------------------------------------------------------------- transformations
def check_parts(f):
    """Each part by NumPy, and their order: flip, shift, turn."""
    x = torch.arange(30.).view(1, 1, 5, 6)
    a = x[0, 0].numpy()
    same = lambda parts, want, **kw: np.array_equal(f(x, *parts, **kw)[0, 0].numpy(), want)
    assert same((0, 0, 0, 0), a), 'nothing'
    assert same((1, 0, 0, 0), a[:, ::-1]), 'a flip'
    assert same((0, 0, 0, 1), np.rot90(a)) and same((0, 0, 0, 3), np.rot90(a, 3)), 'a turn'
    by = dict(shift=.4)                                             # 2 pixels down, 2 across
    roll = lambda a, down, right: np.roll(a, (2 * down, 2 * right), (0, 1))
    for down, right in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, -1)):
        assert same((0, down, right, 0), roll(a, down, right), padding='wrap', **by), 'a shift'
    mirrored = np.pad(a, ((2, 0), (0, 0)), 'reflect')[:5]
    assert same((0, 1, 0, 0), mirrored, padding='reflect', **by), 'the mirror'
    black = np.pad(a, ((0, 0), (2, 0)))[:, :6]
    assert same((0, 0, 1, 0), black, padding='zero', **by), 'the black'
    whole = np.rot90(roll(a[:, ::-1], 1, -1), 1)
    assert same((1, 1, -1, 1), whole, padding='wrap', **by), 'the order'


def other_way(x, *parts, **kw): return transform(x, *parts[:3], -parts[3], **kw)
def up_for_down(x, flip, down, right, turns, **kw):
    return transform(x, flip, -down, right, turns, **kw)
def upside_down(x, flip, *parts, **kw): return transform(x.flip(-2) if flip else x, 0, *parts, **kw)
def turn_first(x, flip, down, right, turns, **kw):
    return transform(transform(x, 0, 0, 0, turns), flip, down, right, 0, **kw)
def always_mirror(x, *parts, shift=.25, padding=''): return transform(x, *parts, shift, 'reflect')


def test_the_parts_and_their_order(): check_parts(transform)


@each_mutant({'a flip': (upside_down,), 'a turn': (other_way,), 'a shift': (up_for_down,),
              'a shift|the black': (always_mirror,), 'the order': (turn_first,)})
def test_wrong_parts_are_caught(why, broken): assert_caught(check_parts, broken, why)


def test_the_sets_are_what_they_say():
    assert {k: len(transformations(k)) for k in SETS} == {
        'rotations': 4, 'shifts': 9, 'rotations and shifts': 36, 'all': 72}
    for which in SETS:
        assert len({*transformations(which)}) == len(transformations(which))
        assert transformations(which)[0] == (0, 0, 0, 0)
    assert {*transformations('rotations and shifts')} < {*transformations('all')}


@given(side=st.integers(2, 12), channels=st.integers(1, 3), which=st.sampled_from([*SETS]),
       padding=st.sampled_from([*PADDINGS]), shift=st.floats(.25, .5))
@quick
def test_the_gather_is_the_slow_form(side, channels, which, padding, shift):
    if SETS[which][1] > 1 and round(shift * side) < 1: return
    x = torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(side))
    slow = torch.stack([transform(x, *t, shift, padding) for t in transformations(which)], 1)
    assert torch.equal(views(x, view_index(side, side, which, shift, padding)), slow)


def test_shifts_take_images_that_are_not_square():
    x = torch.rand(2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    got = views(x, view_index(4, 8, 'shifts', .25, 'wrap'))
    want = torch.stack([x.roll((d, 2 * r), (-2, -1)) for _, d, r, _ in transformations('shifts')],
                       1)
    assert torch.equal(got, want)


# ---------------------------------------------------------------- scores
def check_scores(module):
    """All three against loops over images, views and answers."""
    p, a = LOG_P.exp().numpy(), ALPHA.numpy()
    right = [-np.mean([p[n, i, i] for i in range(4)]) for n in range(5)]
    assert np.allclose(module.probability_score(LOG_P), right), 'the probability'
    logs = [-sum(np.log(p[n, i, i]) for i in range(4)) for n in range(5)]
    assert np.allclose(module.sum_score(LOG_P), logs), 'the sum'
    dense = sum(torch.distributions.Dirichlet(ALPHA[i]).log_prob(LOG_P.exp()[:, i])
                for i in range(4))
    constant = torch.lgamma(ALPHA.sum(1)).sum() - torch.lgamma(ALPHA).sum()
    assert torch.allclose(module.dirichlet_score(LOG_P, ALPHA), constant - dense), 'the density'


def scores(**changes):
    """A module-like thing with some scores broken."""
    parts = dict(probability_score=probability_score, sum_score=sum_score,
                 dirichlet_score=dirichlet_score) | changes
    return type('_'.join(changes), (), {k: staticmethod(f) for k, f in parts.items()})


@each_mutant({
    'the probability': (scores(probability_score=lambda l: -probability_score(l)),
                        scores(probability_score=lambda l: -l.exp().amax(2).mean(1))),
    'the sum': (scores(sum_score=lambda l: sum_score(l) / 4),
                scores(sum_score=lambda l: -l.sum((1, 2))),
                scores(sum_score=lambda l: sum_score(l.roll(1, 2)))),
    'the density': (scores(dirichlet_score=lambda l, a: -(a * l).sum((1, 2))),
                    scores(dirichlet_score=lambda l, a: dirichlet_score(l, a.T)),
                    scores(dirichlet_score=lambda l, a: -dirichlet_score(l, a)),
                    scores(dirichlet_score=lambda l, a: ((1 - a) * l).diagonal(
                        dim1=1, dim2=2).sum(1)))})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_scores, broken, why)


def test_the_scores_are_the_equations(): check_scores(geom)


# ---------------------------------------------------------------- the Dirichlet fit
def sample(alpha, n=4000, seed=0):
    """Mean logarithms of draws."""
    rng = np.random.default_rng(seed)
    return torch.tensor(np.log(rng.dirichlet(alpha, n).clip(1e-300)).mean(0))


def check_fit(fit):
    """Slope zero, SciPy's maximum, several rows as each alone, and bounded where there is none."""
    many = torch.stack([sample(a) for a in ([8, .3, .05], [1, 1, 1], [30, 40, 50], [.02, .5, .1])])
    found = fit(many)
    at = found.clone().requires_grad_()
    slope, = torch.autograd.grad(log_likelihood(at, many).sum(), at)
    assert slope.abs().max() < 1e-5, 'the slope'
    for i, m in enumerate(many):
        other = minimize(lambda v: -float(log_likelihood(torch.tensor(np.exp(v)), m)),
                         np.zeros(3), tol=1e-10)
        assert np.allclose(np.exp(other.x), found[i], rtol=1e-2), 'the maximum'
        assert torch.allclose(fit(m), found[i], rtol=1e-5), 'alone'
    alike = fit(torch.tensor([[.5, .3, .2], [.98, .01, .01]]).log())     # draws all the same
    assert alike.isfinite().all() and alike.mean(1).max() < 2e4, 'no bound'
    assert torch.allclose(alike[0] / alike[0].sum(), torch.tensor([.5, .3, .2]).double(),
                          atol=1e-3), 'mean'


def newton_alone(m):
    """Without the fixed point."""
    alpha = torch.ones_like(m.double())
    for _ in range(100): alpha = newton_step(alpha, m.double())
    return alpha
def two_steps(m): return dirichlet_mle(m, rounds=2)
def forgot_the_total(m): return inverse_digamma(m.double())
def unbounded(m): return dirichlet_mle(m, most=float('inf'))


def test_the_fit_is_the_maximum(): check_fit(dirichlet_mle)


@each_mutant({'the slope': (newton_alone, two_steps, forgot_the_total), 'no bound': (unbounded,)})
def test_wrong_fits_are_caught(why, broken): assert_caught(check_fit, broken, why)


def test_the_inverse_of_digamma():
    y = np.linspace(-200, 8, 500)
    assert np.allclose(scipy_digamma(inverse_digamma(torch.tensor(y)).numpy()), y, atol=1e-8)


def test_the_fixed_point_climbs_and_newton_is_newton():
    m, alpha = sample([5, .2, 1]), torch.tensor([1., 2., .3], dtype=torch.float64)
    level = log_likelihood(alpha, m)
    for _ in range(20):
        alpha = fixed_point_step(alpha, m)
        level, before = log_likelihood(alpha, m), level
        assert level >= before - 1e-12
    H = torch.autograd.functional.hessian(lambda a: log_likelihood(a, m), alpha)
    a = alpha.clone().requires_grad_()
    g, = torch.autograd.grad(log_likelihood(a, m), a)
    assert torch.allclose(newton_step(alpha, m), alpha - torch.linalg.solve(H, g))


# ---------------------------------------------------------------- the class
class Fixed(nn.Module):
    """A classifier of four turns that can be worked out: weighted sums of pixels."""
    def __init__(self, scale=1.):
        super().__init__()
        weights = torch.randn(4, 36, generator=torch.Generator().manual_seed(3))
        self.w = nn.Parameter(scale * weights)
    def forward(self, x): return x.flatten(1) @ self.w.T


def shown(cls, scale=1., **params):
    """The class with that network."""
    def networks(self, shape): return dict(classifier=Fixed(scale))
    kind = type('Shown', (cls,), dict(networks=networks))
    return kind(**SMALL | dict(epochs=0, batch_size=7) | params).fit(X)


def by_loops(d, x):
    """Log-probabilities (n, 4, 4) image by image, turn by turn, in float64."""
    w = d.nets_.classifier.w.detach().double().numpy()
    rows = np.array([[w @ np.rot90(i[0].astype(float), t).ravel() for t in range(4)] for i in x])
    return torch.tensor(rows).log_softmax(2)


def check_class(cls):
    """Loss, parameters and scores against loops."""
    d = shown(cls)
    log_p = by_loops(d, X)
    terms = d.loss(XB)
    assert terms.keys() == {'cross_entropy'}, 'names'
    wanted = -log_p.diagonal(dim1=1, dim2=2).mean(1)
    assert torch.allclose(terms['cross_entropy'].double(), wanted, atol=1e-5), 'the loss'
    slow = F.cross_entropy(log_p.flatten(0, 1), torch.arange(4).repeat(len(X)))
    assert torch.allclose(terms['cross_entropy'].mean().double(), slow, atol=1e-5), 'the loss'
    assert torch.allclose(d.alpha_, dirichlet_mle(log_p.mean(0)), rtol=1e-3), 'alpha'
    for scoring, want in (('sum', sum_score(log_p)), ('probability', probability_score(log_p)),
                          ('dirichlet', dirichlet_score(log_p, d.alpha_))):
        got = shown(cls, scoring=scoring).decision_function(X)
        assert np.allclose(got, want, rtol=1e-4, atol=1e-3), f'score {scoring}'


def check_sure(cls):
    """A network that is sure of all leaves finite parameters and scores, without ties."""
    d = shown(cls, scale=60., scoring='dirichlet')
    s = d.decision_function(X)
    assert np.isfinite(s).all() and d.alpha_.isfinite().all()
    assert len(np.unique(s)) == len(X), 'ties'


def test_the_class_keeps_its_equations(): check_class(GEOM)
def test_a_sure_network_does_no_harm(): check_sure(GEOM)


class FirstViewOnly(GEOM):
    """The loss looks at the image as it is."""
    def loss(self, xb): return dict(cross_entropy=-self.log_probabilities(xb)[:, 0, 0])

class WrongPairs(GEOM):
    """Views and answers in other orders: images by views, read as views by images."""
    def log_probabilities(self, xb):
        v = self.views(xb)
        logits = self.nets_.classifier(v.transpose(0, 1).flatten(0, 1))
        return logits.unflatten(0, v.shape[:2]).log_softmax(2)

class OverViews(GEOM):
    """The softmax runs over views instead of answers."""
    def log_probabilities(self, xb):
        v = self.views(xb)
        return self.nets_.classifier(v.flatten(0, 1)).unflatten(0, v.shape[:2]).log_softmax(1)

class Softmax(GEOM):
    """The logarithm of a float32 softmax, which is minus infinity for a sure network."""
    def log_probabilities(self, xb):
        v = self.views(xb)
        logits = self.nets_.classifier(v.flatten(0, 1)).unflatten(0, v.shape[:2])
        return logits.softmax(2).log()

class Turned(GEOM):
    """The density itself, so that normal images score high."""
    def image_score(self, xb): return -super().image_score(xb)

class OneAlpha(GEOM):
    """One Dirichlet distribution for all views."""
    def set_threshold(self, data):
        super().set_threshold(data)
        self.alpha_ = self.alpha_.mean(0, keepdim=True).expand(4, 4).contiguous()

class Together(GEOM):
    """All views share a sum of losses instead of a mean."""
    def loss(self, xb): return dict(cross_entropy=sum_score(self.log_probabilities(xb)))


@each_mutant({'the loss': (FirstViewOnly, WrongPairs, OverViews, Together), 'alpha': (OneAlpha,),
              'score': (Turned,)})
def test_wrong_classes_are_caught(why, broken): assert_caught(check_class, broken, why)


def test_a_softmax_in_float32_is_caught(): 
    assert_caught(check_sure, Softmax, 'not finite', FloatingPointError)


def test_it_learns_to_tell_turns_of_fives_and_not_of_zeros():
    """And so it detects: better than untrained on fives, two seeds."""
    five, answers = digits(normal=5), {}
    for seed in range(2):
        kw = dict(transforms='rotations', verbose=False, seed=seed)
        d, raw = GEOM(epochs=25, **kw).fit(five.x_train), GEOM(epochs=0, **kw).fit(five.x_train)
        assert d.score(five.x_test, five.y_test) > .9
        assert raw.score(five.x_test, five.y_test) < .8
    for k in (5, 0):
        t = digits(normal=k)
        d = GEOM(epochs=25, transforms='rotations', verbose=False).fit(t.x_train)
        log_p = d.for_each(d.log_probabilities, t.x_test[t.y_test == 0])
        answers[k] = (log_p.argmax(2) == np.arange(4)).mean()
    assert answers[5] > .95 and answers[0] < .9


def test_a_saved_detector_scores_the_same(tmp_path):
    d = GEOM(epochs=1, scoring='dirichlet', **SMALL).fit(X)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))


@pytest.mark.parametrize('shape', [(3, 3, 3), (1, 7, 7)])
@pytest.mark.parametrize('arch', ['mlp', 'conv', 'wrn'])
def test_any_square_image_fits(shape, arch):
    x = np.random.default_rng(0).random((4, *shape), dtype='float32')
    d = GEOM(arch=arch, width=2, epochs=1, batch_size=2, verbose=False).fit(x)
    assert np.isfinite(d.decision_function(x)).all()


def test_the_wide_network_has_the_shape_of_wrn_10_4():
    net = wide_resnet((3, 32, 32), 72, 64)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    widths = [(m.in_channels, m.out_channels, m.stride[0]) for m in convs]
    assert widths == [(3, 16, 1), (16, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1),
                      (128, 256, 2), (256, 256, 1)]
    assert wide_resnet((1, 9, 9), 4, 2)(torch.zeros(2, 1, 9, 9)).shape == (2, 4)


@pytest.mark.parametrize('params, message', [
    (dict(transforms='flips'), "transforms must be one of 'rotations'"),
    (dict(scoring='log'), "scoring must be one of 'sum'"), (dict(padding='mirror'), 'padding'),
    (dict(shift=0.), 'shift must be a number above 0'), (dict(shift=.6), 'at most 0.5'),
    (dict(arch='resnet'), "arch must be one of"), (dict(width=0), 'width must be a whole number'),
    (dict(transforms='shifts', shift=.1), 'shift must move 4x4 images by a pixel')])
def test_wrong_settings_are_named(params, message):
    check_refused(GEOM, message, **SMALL | params)


def test_an_oblong_image_is_not_turned():
    with pytest.raises(ValueError, match='images must be square to be turned; got 4x6'):
        GEOM(**SMALL).fit(np.random.default_rng(0).random((9, 1, 4, 6)))
