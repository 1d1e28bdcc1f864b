"""E3Outlier: its operations, three scores, gradients of single images; mutants of each."""
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform
from torch.nn import functional as F

from ad_course import e3outlier
from ad_course.data import contaminate, digits
from ad_course.detector import load
from ad_course.e3outlier import (IRREGULAR, OPERATIONS, E3Outlier, entropy_score, image_gradients,
                                 irregular, max_probability_score, patch_index, rearranged,
                                 update_share)
from ad_course.geom import probability_score, view_index, views
from ad_course.metrics import auroc
from ad_course.networks import encoder

from .mutants import assert_caught, each_mutant
from .players import check_refused

X = np.random.default_rng(0).random((12, 1, 6, 6), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(arch='mlp', width=2, transforms='rotations', operations='RA', verbose=False)
LOG_P = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0)).double().log_softmax(2)


# ---------------------------------------------------------------- operations
def check_patches(f):
    """Every order against a picture that is put together by hand."""
    a = np.arange(24.).reshape(4, 6)
    quarters = [a[:2, :3], a[:2, 3:], a[2:, :3], a[2:, 3:]]
    for order in permutations(range(4)):
        q = [quarters[i] for i in order]
        want = np.block([[q[0], q[1]], [q[2], q[3]]])
        got = f(torch.tensor(a)[None, None], order)[0, 0].numpy()
        assert got.shape == want.shape and np.array_equal(got, want), 'the patches'


def columns_first(x, order): return rearranged(x, [order[i] for i in (0, 2, 1, 3)])
def inverse(x, order): return rearranged(x, np.argsort(order).tolist())
def strided(x, order):
    """Every second pixel in place of halves."""
    parts = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], -3)[..., order, :, :]
    return parts.unflatten(-3, (2, 2)).movedim(-2, -3).flatten(-4, -3).flatten(-2)


def test_the_patches_are_put_together_by_the_order(): check_patches(rearranged)


@each_mutant({'the patches': (columns_first, inverse, strided)})
def test_wrong_patches_are_caught(why, broken): assert_caught(check_patches, broken, why)


def test_the_index_of_patches_is_the_slow_form():
    slow = torch.stack([rearranged(XB, o) for o in [*permutations(range(4))][1:]], 1)
    assert torch.equal(views(XB, patch_index(6, 6)), slow)


def test_the_irregular_ones_are_affine():
    """Inside of the image against SciPy's interpolation; quarter turns against rot90."""
    x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    for turns in range(4):
        got = irregular(x, 90 * turns, 0, 1)
        assert torch.allclose(got, x.rot90(turns, (-2, -1)), atol=1e-6)
    for degrees, shear, scale in IRREGULAR[:6]:
        c, s = (f(math.radians(degrees)) * scale for f in (math.cos, math.sin))
        m = np.array([[c, -s], [s, c]]) @ [[1, shear], [0, 1]]      # of (x, y); SciPy has (y, x)
        m = m[::-1, ::-1]
        want = affine_transform(x[0, 0].numpy(), m, np.full(2, 7.5) - m @ np.full(2, 7.5), order=1)
        got = irregular(x, degrees, shear, scale)[0, 0].numpy()
        assert np.allclose(got[6:10, 6:10], want[6:10, 6:10], atol=1e-6)
        assert irregular(torch.ones_like(x), degrees, shear, scale).min() > .99, 'a black corner'


def test_the_numbers_of_views():
    k = {o: E3Outlier(operations=o).views(XB).shape[1] for o in OPERATIONS}
    assert k == {'RA': 72, 'IA': 16, 'PR': 23, 'RA+PR': 95, 'RA+IA+PR': 111}


# ---------------------------------------------------------------- scores
def check_scores(cls):
    """All three against loops, through the class."""
    class Shown(cls):
        """With answers that are given."""
        def log_probabilities(self, xb): return LOG_P
    p = LOG_P.exp().numpy()
    want = dict(PL=[-np.mean([q[i, i] for i in range(4)]) for q in p],
                MP=[-np.mean([max(q[i]) for i in range(4)]) for q in p],
                NE=[-np.mean([sum(v * np.log(v) for v in q[i]) for i in range(4)]) for q in p])
    for scoring, w in want.items():
        assert np.allclose(Shown(scoring=scoring).image_score(XB), w), f'score {scoring}'


class SoleEntropy(E3Outlier):
    """NE whatever is asked."""
    def image_score(self, xb): return entropy_score(self.log_probabilities(xb))

class AsPrinted(E3Outlier):
    """The signs of the paper, higher for inliers."""
    def image_score(self, xb): return -super().image_score(xb)

class OverOperations(E3Outlier):
    """The largest over views in place of answers."""
    def image_score(self, xb):
        if self.scoring == 'MP': return -self.log_probabilities(xb).exp().amax(1).mean(1)
        return super().image_score(xb)


@each_mutant({'score PL': (SoleEntropy, AsPrinted), 'score MP': (OverOperations,)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_scores, broken, why)


def test_the_scores_are_the_equations():
    check_scores(E3Outlier)
    sure = torch.tensor([[[0., -300], [-300, 0]]])
    assert entropy_score(sure).isfinite().all() and max_probability_score(sure) == -1
    assert torch.allclose(probability_score(sure), torch.tensor([-1.]))


# ---------------------------------------------------------------- gradients
def check_gradients(f):
    """Each image's gradient against backward, also for other answers."""
    torch.manual_seed(0)
    net = encoder((1, 6, 6), 4, 'conv', 2).eval()
    v = views(XB, view_index(6, 6, 'rotations'))
    given = torch.rand(12, 4, generator=torch.Generator().manual_seed(2)).argsort(1)
    for answers in (None, given):
        g = f(net, v, answers)
        for n in range(12):
            net.zero_grad()
            F.cross_entropy(net(v[n]), torch.arange(4) if answers is None else given[n]).backward()
            want = torch.cat([w.grad.flatten() for w in net.parameters()])
            assert torch.allclose(g[n], want, atol=1e-5), 'the gradient'


def of_the_batch(net, v, answers=None):
    """The mean for everybody."""
    g = image_gradients(net, v, answers)
    return g.mean(0).expand_as(g)
def summed(net, v, answers=None): return 4 * image_gradients(net, v, answers)
def own_answers(net, v, answers=None): return image_gradients(net, v)


def test_one_call_is_the_slow_loop(): check_gradients(image_gradients)


@each_mutant({'the gradient': (of_the_batch, summed, own_answers)})
def test_wrong_gradients_are_caught(why, broken): assert_caught(check_gradients, broken, why)


def check_shares(f):
    """By hand, and groups that add up to 1."""
    g = torch.tensor([[1., 0.]] * 9 + [[0., 3.]])
    last = torch.arange(10) == 9
    update, norms = f(g, last)
    assert np.isclose(update, .09 / .9), 'in the update'            # mean (.9, .3): 9 : 1
    assert np.isclose(norms, 3 / 12), 'in the norms'
    g = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)) + .5
    parts = [torch.arange(20) % 3 == i for i in range(3)]
    assert np.allclose(np.sum([f(g, part) for part in parts], 0), 1), 'the sum'
    loud = f(torch.tensor([[1., 0.]] * 9 + [[-2., 0.]]), last)
    assert np.isclose(loud[0], -2 / 7), 'against'


def of_numbers(g, group): return float(group.float().mean()), update_share(g, group)[1]
def absolute(g, group):
    """The size of the projections."""
    d = (g @ g.mean(0)).abs()
    return float(d[group].sum() / d.sum()), update_share(g, group)[1]
def squares(g, group):
    n = g.square().sum(1)
    return update_share(g, group)[0], float(n[group].sum() / n.sum())
def per_image(g, group): return tuple(v / float(group.float().mean()) for v in
                                      update_share(g, group))


def test_the_shares_are_those_of_the_update(): check_shares(update_share)


@each_mutant({'in the update': (per_image,), 'against': (of_numbers, absolute),
              'in the norms': (squares,)})
def test_wrong_shares_are_caught(why, broken): assert_caught(check_shares, broken, why)


# ---------------------------------------------------------------- the class
def test_inliers_come_first_and_without_a_majority_they_do_not():
    """At the start, three seeds: a tenth of the images has less of the update than of the norms."""
    for seed in range(3):
        t = contaminate(digits(normal=5, seed=seed), .1, seed=seed)
        d = E3Outlier(**SMALL | dict(width=8, epochs=0, seed=seed)).fit(t.x_train)
        g = image_gradients(d.nets_.classifier, d.views(torch.tensor(t.x_train)))
        update, norms = update_share(g, torch.tensor(t.kinds_train != 'normal'))
        assert update < .8 * norms
        halves = torch.arange(len(g)) % 2 == 0
        assert abs(update_share(g, halves)[0] - .5) < .1


def test_hidden_outliers_are_found():
    t = contaminate(digits(normal=5), .1)
    hidden = t.kinds_train != 'normal'
    kw = SMALL | dict(width=8)
    found, raw = (auroc(hidden, E3Outlier(**kw, epochs=e).fit(t.x_train)
                        .decision_function(t.x_train)) for e in (25, 0))
    assert found > .8 and found > raw + .05


def test_a_saved_detector_scores_the_same(tmp_path):
    d = E3Outlier(operations='RA+IA+PR', width=2, epochs=1, verbose=False).fit(X)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))
    assert not hasattr(d, 'alpha_')


@pytest.mark.parametrize('arch', ['mlp', 'conv', 'wrn'])
@pytest.mark.parametrize('operations', OPERATIONS)
def test_all_operations_fit(arch, operations):
    x = np.random.default_rng(0).random((4, 3, 10, 10), dtype='float32')
    d = E3Outlier(operations=operations, arch=arch, width=2, epochs=1, batch_size=2, verbose=False)
    assert np.isfinite(d.fit(x).decision_function(x)).all()


def test_labels_are_not_used():
    with pytest.warns(UserWarning, match='does not use labels'):
        E3Outlier(**SMALL, epochs=0).fit(X, [1] + [0] * 11)


@pytest.mark.parametrize('params, message', [
    (dict(operations='RA+IA'), "operations must be one of 'RA'"),
    (dict(scoring='sum'), "scoring must be one of 'NE', 'MP', 'PL'"),
    (dict(transforms='flips'), 'transforms must be one of')])
def test_wrong_settings_are_named(params, message):
    check_refused(E3Outlier, message, **SMALL | params)


def test_an_odd_side_is_not_cut():
    with pytest.raises(ValueError, match='even sides to be cut in four; got 7x7'):
        E3Outlier(operations='PR', verbose=False).fit(np.zeros((4, 1, 7, 7)))


def test_the_module_has_what_the_tests_name():
    assert {'rearranged', 'irregular', 'update_share'} <= {*e3outlier.__all__}
