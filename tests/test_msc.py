"""Mean-shifted contrast: the shift, the loss of two views, the angle, the score; mutants."""
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from ad_course.batches import FeatureRows
from ad_course.detector import isolated, load
from ad_course.metrics import auroc
from ad_course.msc import MSC, angular, mean_shifted
from ad_course.pretrained import DN2

from .mutants import assert_caught, changed, each_mutant
from .test_panda import CLOTH, NORMAL, draws, seen_once   # the last is a fixture for all tests

QUIET = dict(device='cpu', verbose=False, size=32, n_views=2)


# ---------------------------------------------------------------- equations
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
def test_shifted_rows_are_directions_from_the_center(n, d, seed):
    rows, c = draws(n, d, seed=seed), draws(d, seed=seed + 1)
    theta = mean_shifted(rows, c)
    assert torch.allclose(theta.norm(dim=1), torch.ones(n).double())
    assert torch.allclose(theta * (rows - c).norm(dim=1, keepdim=True) + c, rows)
    assert torch.allclose(mean_shifted(c + 3 * (rows - c), c), theta)      # distance is not seen
    assert torch.allclose(mean_shifted(rows, 0 * c), F.normalize(rows))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
def test_angular_is_half_a_squared_distance_on_the_sphere(n, d, seed):
    rows, c = F.normalize(draws(n, d, seed=seed)), draws(d, seed=seed + 1)
    wanted = (rows - c / c.norm()).square().sum(1) / 2
    assert torch.allclose(angular(rows, c), wanted)
    assert torch.allclose(angular(rows, 7 * c), wanted)


def test_the_slope_has_no_part_along_the_way_to_the_center():
    rows, c = draws(5, 4).requires_grad_(), draws(4, seed=1)
    slope, = torch.autograd.grad((mean_shifted(rows, c) * draws(5, 4, seed=2)).sum(), rows)
    assert ((slope * (rows - c)).sum(1).abs() < 1e-9).all() and slope.abs().max() > .01


# ---------------------------------------------------------------- the loss
def fit(cls=MSC, **params): return cls(**QUIET | params).fit(CLOTH.x_train, CLOTH.y_train)


@functools.cache
def before():
    """Fitted without a training, and the maps of two views of six normal images."""
    d = fit(epochs=0)
    with isolated(0), torch.no_grad(): m = d.views(torch.tensor(NORMAL[:6]), 2)
    return d, m


def slow_contrast(a, b, tau):
    """Equation (2), one anchor after the other."""
    z = torch.cat([a, b]).double()
    similar, n = (z @ z.T / tau).exp(), len(a)
    return torch.stack([-(similar[i, (i + n) % (2 * n)] / (similar[i].sum() - similar[i, i])).log()
                        for i in range(2 * n)]).mean()


def check_loss(cls):
    """Each term written out, with and without the shift, and only from normal images."""
    d, m = before()
    made = cls(**QUIET | dict(epochs=0, temperature=.4, angular_weight=.3))
    made.__dict__.update({k: v for k, v in vars(d).items() if k.endswith('_')})
    with torch.no_grad(): a, b = (d.map_rows(v) for v in m.unbind(1))
    c = d.center_
    def terms(y=torch.zeros(6), **params):
        with isolated(3), torch.no_grad(): return made.set_params(**params).map_loss(m, y)
    seen = [(v - c) / (v - c).norm(dim=1, keepdim=True) for v in (a, b)]
    found = terms()
    near = lambda value, wanted, why: torch.testing.assert_close(
        value.double(), wanted.double(), rtol=1e-4, atol=1e-5, msg=why)
    near(found['contrast'], slow_contrast(*seen, .4), 'contrast')
    near(found['angular'], .3 * (1 - torch.cat([a, b]) @ (c / c.norm())).mean(), 'angular')
    near(terms(shift=False)['contrast'], slow_contrast(a, b, .4), 'plain')
    assert terms(angular_weight=0.).keys() == {'contrast'}, 'names'
    y, some = torch.tensor([0, 1, 0, 0, 1, 0]), [0, 2, 3, 5]
    near(terms(y, shift=True)['contrast'], slow_contrast(*(v[some] for v in seen), .4), 'labels')


def other(**changes):
    """A map_loss with another center, temperature or order of views, in the equations' place."""
    def map_loss(self, m, yb):
        m = changes.get('m', lambda m: m)(m)
        m, keep = m if changes.get('all') else m[yb == 0], self.center_
        self.center_ = changes.get('center', lambda c: c)(keep)
        try: return changes.get('after', lambda t: t)(MSC.map_loss(self, m, torch.zeros(len(m))))
        finally: self.center_ = keep
    return changed(MSC, map_loss=map_loss, name='_'.join(changes))


MUTANTS = {'contrast': (other(center=lambda c: 0 * c),
                        other(center=lambda c: F.normalize(c, dim=0)),
                        other(m=lambda m: torch.stack([m[:, 0], m[:, 1].roll(1, 0)], 1))),
           'angular': (other(after=lambda t: t | dict(angular=-t['angular'])),
                       other(after=lambda t: t | dict(angular=t['angular'] / .3))),
           'labels': (other(all=True),)}


def test_loss_is_that_of_the_equations(): check_loss(MSC)


@each_mutant(MUTANTS)
def test_wrong_losses_are_caught(why, broken): assert_caught(check_loss, broken, why)


def test_a_step_takes_two_different_views():
    """Of four, of which two are alike: the contrast of like pairs would be another."""
    d, m = before()
    picked = []
    made = MSC(**QUIET)
    made.__dict__.update({k: v for k, v in vars(d).items() if k.endswith('_')})
    made.map_rows = lambda m: picked.append(m) or F.normalize(m)
    marks = torch.arange(4.).view(1, 4, 1).expand(50, 4, 1) + 1
    made.center_ = torch.zeros(1)
    with isolated(0): made.map_loss(marks, torch.zeros(50))
    first, second = picked[0].chunk(2)
    assert (first != second).all() and {*first.flatten().tolist()} == {1, 2, 3, 4}


# ---------------------------------------------------------------- the detector
def test_score_is_the_mean_cosine_distance_to_the_nearest():
    d, _ = before()
    with torch.no_grad(): new, bank = (d.rows(torch.tensor(x)) for x in (CLOTH.x_test, NORMAL))
    cosine = np.sort(1 - new.double().numpy() @ bank.double().numpy().T, 1)
    np.testing.assert_allclose(d.decision_function(CLOTH.x_test), cosine[:, :2].mean(1), atol=1e-5)
    own = np.sort(1 - bank.double().numpy() @ bank.double().numpy().T, 1)[:, 1:3].mean(1)
    np.testing.assert_allclose(d.held_out_, own, atol=1e-5)
    one = fit(epochs=0, k=1).decision_function(CLOTH.x_test)
    far = fit(lambda n_views, **kw: DN2(**kw), k=1).decision_function(CLOTH.x_test)
    np.testing.assert_allclose(one, 1280 * far**2 / 2, atol=1e-4)


def test_shown_are_views_of_the_normal_images_drawn_by_the_seed():
    d, _ = before()
    data = d.as_batches(CLOTH.x_train, CLOTH.y_train)
    source = FeatureRows(torch.zeros(len(NORMAL), 1), torch.zeros(len(NORMAL)))
    def shown(seed):
        with isolated(seed): return d.shown(source, data).rows
    rows = shown(0)
    assert rows.shape[:2] == (len(NORMAL), 2)
    assert not torch.allclose(rows[:, 0], rows[:, 1])
    assert torch.equal(rows, shown(0)) and not torch.equal(rows, shown(1))


def test_contrast_spreads_and_the_angle_gathers(tmp_path):
    """Rows so near each other are spread by either contrast; the angle keeps them."""
    params = dict(epochs=3, lr=1e-4)
    last = fit(angular_weight=10., **params)
    far = {name: float(angular(d.bank_, d.center_).mean()) for name, d in {
        'start': before()[0], 'plain': fit(shift=False, **params), 'shifted': fit(**params),
        'both': last}.items()}
    assert min(far['plain'], far['shifted']) > 2 * max(far['start'], far['both']), far
    last.save(tmp_path/'msc.safetensors')
    again = load(tmp_path/'msc.safetensors')
    np.testing.assert_array_equal(again.decision_function(CLOTH.x_test),
                                  last.decision_function(CLOTH.x_test))


def test_better_than_its_untrained_network():
    a, b = (fit(epochs=2, weights=w) for w in ('imagenet', 'random'))
    seen, blind = (auroc(CLOTH.y_test, d.decision_function(CLOTH.x_test)) for d in (a, b))
    assert seen > max(.65, blind + .05), (seen, blind)


@pytest.mark.parametrize('wrong', [dict(normalize=False), dict(n_views=1), dict(temperature=0.),
                                   dict(angular_weight=-1.), dict(shift=1), dict(penalty='early')])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): MSC(**wrong).check_params()
