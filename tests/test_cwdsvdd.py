"""CWD-SVDD: the radius against a search, every term against hand values and closed-form gradients,
what each set of images may touch; and mutants that each check must catch."""
import warnings
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ad_course import cwdsvdd
from ad_course.achc import ACHC
from ad_course.check import check_detector
from ad_course.baselines import whitening
from ad_course.cwdsvdd import (Bank, CWDSVDD, Features, balanced_radius, conformal_quantile,
                               equation_6, feature_rows, label_weights, unit_sphere, wrapping_bank)
from ad_course.data import digits
from ad_course.deepsvdd import contrast_normalize, quantile_radius
from ad_course.detector import isolated, total_loss
from ad_course.wrapping import ImageWrapper, density_epsilon
from tests.mutants import assert_caught, changed, each_mutant, mutant

TASK = digits(normal=3)
X = np.concatenate([TASK.x_train[:60], TASK.x_reserve[:20]])
Y = np.repeat([0, 1], [60, 20])
SMALL = dict(arch='mlp', code_dim=4, width=2, batch_size=32, epochs=2, pretrain_epochs=1,
             warm_up=1, wraps=100, verbose=False)


def tensor(*rows): return torch.tensor(rows, dtype=torch.float64)


CODES = tensor([1, 0], [1, 1], [4, 0], [1, -2], [1, 0], [2, 0])
LABELS = torch.tensor([0, 0, 0, 0, 1, 1])
POINTS = tensor([2, 0], [1, 2], [1, 1])


def by_hand(cls=CWDSVDD, **params):
    """A detector with center (1, 0), R = 2; the encoder doubles the second number.

    Squared distances: normal 0, 1, 9, 4; foreign 0, 1; wrapping points 1, 16, 4.
    """
    d = cls(**dict(nu=.5, mu=.25, weight_decay=.1) | params)
    d.nets_ = nn.ModuleDict(dict(encoder=nn.Linear(2, 2, bias=False).double()))
    d.nets_.encoder.weight.data = torch.diag(tensor(1., 2.))
    d.center_, d.radius_, d.unknown_share_ = tensor(1., 0.), 2., 1 / 3
    d.bank = Bank([])
    d.bank.points, d.bank.sample = POINTS, lambda b: POINTS   # each once
    return d


def means(terms):
    """Name -> mean of the term, a number."""
    return {name: float(torch.as_tensor(t).detach().mean()) for name, t in terms.items()}


# ---------------------------------------------------------------- the radius
def loss_of_radius(R2, d, nu, mu, repelled):
    """Equation (6) as a function of the squared radius."""
    inside = sum(np.maximum(0, R2 - r).mean() / mu for r in repelled)
    return R2 + np.maximum(0, d - R2).mean() / nu + inside


@pytest.mark.parametrize('nu, mu, sizes', [(.1, .1, ()), (.1, .1, (50,)), (.03, 1., (7, 90)),
                                           (.7, .01, (1, 2))])
def test_the_radius_minimizes(nu, mu, sizes):
    g = np.random.default_rng(0)
    d, repelled = g.gamma(2, size=83), [g.gamma(3, size=m) for m in sizes]
    R2 = balanced_radius(d, nu, mu, repelled)**2
    loss = lambda r: loss_of_radius(r, d, nu, mu, repelled)
    others = np.concatenate([d, *repelled, [0, R2 + 1e-3, R2 - 1e-3]])
    assert all(loss(R2) <= loss(other) + 1e-9 for other in others)
    if not sizes: assert np.isclose(R2, quantile_radius(d, nu)**2)
    outside = lambda at: (d > at).mean()
    inside = lambda at: sum((r < at).mean() for r in repelled)
    just_above, just_below = R2 + 1e-9, R2 - 1e-9
    assert outside(just_above) <= nu * (1 + inside(just_above) / mu) + 1e-9, 'share outside'
    assert outside(just_below) >= nu * (1 + inside(just_below) / mu) - 1e-9, 'share outside'


def test_the_radius_of_odd_sets():
    assert balanced_radius([4.]) == 2 and balanced_radius([0., 0, 0]) == 0
    assert balanced_radius([1, 4], .5, .5, [[]]) == 1
    with pytest.raises(ValueError, match='at least one'): balanced_radius([])


# ---------------------------------------------------------------- the pieces
def test_terms_without_their_images_are_absent():
    d, R2 = torch.tensor([1., 3.]), torch.tensor(2.)
    assert list(equation_6(d, R2, .5, .25)) == ['radius', 'outside']
    terms = equation_6(d, R2, .5, .25, wrapping=d[:1], unknown=torch.tensor([0., 2.]))
    assert means(terms) == dict(radius=2, outside=1, wrapping=4, unknown=0)


def test_label_weights_by_hand():
    normal, unknown = label_weights(torch.tensor([0, 1, 0]), .25)
    assert normal.tolist() == pytest.approx([4 / 3, 0, 4 / 3]) and unknown.tolist() == [0, 4, 0]
    normal, unknown = label_weights(torch.tensor([0, 0]), 0.)
    assert normal.tolist() == [1, 1] and unknown is None


def test_a_bank_gives_each_of_its_points():
    bank = Bank(np.arange(3000.).reshape(3000, 1))
    with isolated(0): drawn = bank.sample(9000)
    assert len(bank) == 3000 and .9 < len(drawn.unique()) / 3000 < 1
    np.testing.assert_array_equal(bank.map(lambda part: part[:, 0]), np.arange(3000))
    assert not Bank([]) and bank.points.dtype == torch.float32


def test_a_unit_sphere_changes_no_ranking():
    d = CWDSVDD(**SMALL | dict(epochs=0)).fit(X, Y)
    before = d.decision_function(X)
    d.radius_, d.spread_start_ = 3., 6.
    unit_sphere(d)
    assert d.radius_ == 1 and d.spread_start_ == 2
    np.testing.assert_allclose(d.decision_function(X) * 9, before, rtol=1e-4)
    d.radius_, kept = 0., d.center_.clone()
    unit_sphere(d)
    assert d.radius_ == 0 and torch.equal(d.center_, kept)


def test_features_of_a_backbone():
    """They are extracted once, with components of unit mean variance; no backbone learns."""
    class Listens(CWDSVDD):
        def draw_bank(self, data, draw=0):
            """As before, and noted."""
            state = self.nets_.features.state_dict()
            self.before = {name: v.clone() for name, v in state.items()}
            super().draw_bank(data, draw)
    d = Listens(**SMALL, features='resnet18', weights='random', components=4).fit(X[:8])
    features = d.nets_.features
    assert features.mean.shape == (512,) and features.axes.shape == (4, 512)
    assert np.isfinite(d.decision_function(X[:3])).all()
    assert all(torch.equal(v, d.before[name]) for name, v in features.state_dict().items())
    rows = feature_rows(d, d.as_batches(X[:8]))
    seen = torch.cat([xb for xb, _ in rows.batches(3)])
    assert seen.shape == (8, 4) and rows.shape == (4,)
    assert float(seen.var(0).mean()) == pytest.approx(1, rel=1e-3)


def test_features_follow_the_covariance():
    points = np.random.default_rng(0).normal(size=(300, 3)) * [3, 1, .1]
    two = Features((1, 1, 3), 2)
    two.fit(points)
    rows = two(torch.tensor(points).float().view(-1, 1, 1, 3)).numpy()
    covariance = np.cov(rows.T)
    values = np.linalg.eigvalsh(np.cov(points.T))[::-1][:2]
    np.testing.assert_allclose(np.diag(covariance), values / values.mean(), rtol=1e-3)
    assert abs(covariance[0, 1]) < 1e-3
    three = Features((1, 1, 3), 3)
    with pytest.raises(ValueError, match='at most .* got 3 for 2 images'): three.fit(points[:2])


def whitened(rows):
    """Features of rows (n, d), all of them whitened."""
    features = Features((1, 1, rows.shape[1]))
    features.fit(rows)
    return features


@pytest.mark.parametrize('n', [20, 300])
def test_whitened_features_have_the_distances_of_mahalanobis(n):
    """Fewer rows than numbers, and more; nothing is left out."""
    g = np.random.default_rng(0)
    rows, later = (g.normal(size=(m, 40)) * np.geomspace(3, .01, 40) + 1 for m in (n, 9))
    mean, matrix = whitening(rows)
    seen = whitened(rows)(torch.tensor(later).float().view(9, 1, 1, 40)).double().numpy()
    np.testing.assert_allclose((seen**2).sum(1), (((later - mean) @ matrix)**2).sum(1), rtol=1e-3)
    assert seen.shape == (9, 40)


def test_whitened_features_refuse_what_they_cannot_whiten():
    with pytest.raises(ValueError, match='the same for all'): whitened(np.ones((5, 3)))
    with pytest.raises(ValueError, match='at most 8192 numbers to be whitened; got 12288'):
        CWDSVDD(**SMALL, features='pca', components=None).fit(np.random.rand(4, 3, 64, 64))


@pytest.mark.parametrize('cls', [CWDSVDD, ACHC])
def test_a_head_on_whitened_features(cls):
    d = cls(**SMALL | dict(pretrain_epochs=1), features='pca', components=None).fit(X[:60])
    views = d.map_normal(d.prepare, d.as_batches(X[:60]))
    assert views.shape == (60, 64) and np.isfinite(d.decision_function(X)).all()
    flat = contrast_normalize(torch.tensor(X[:60])).flatten(1).double().numpy()
    low, high = d.contrast_range_
    mean, matrix = whitening((flat - low) / (high - low))
    np.testing.assert_allclose(views, ((flat - low) / (high - low) - mean) @ matrix, atol=1e-2)


# ---------------------------------------------------------------- the cross-fitted radius
def check_conformal(quantile):
    """By counting all orders of n scores and a new one."""
    for n in range(1, 6):
        for nu in (.1, .2, .25, .4, .5, .9):
            orders = [*permutations(range(n + 1))]
            above = np.mean([order[n] > quantile(order[:n], nu) for order in orders])
            least = max(nu, 1 / (n + 1))       # the largest of n is as far as one can go
            assert above <= least + 1e-9, f'too many above: n {n}, nu {nu}'
            assert above > least - 1 / (n + 1) - 1e-9, f'too few above: n {n}, nu {nu}'


def test_the_conformal_quantile():
    check_conformal(conformal_quantile)
    assert conformal_quantile([3., 1, 2], .25) == 3 and conformal_quantile([3., 1, 2], .5) == 2
    for wrong, why in ((lambda s, nu: np.quantile(s, 1 - nu, method='lower'), 'many'),
                       (lambda s, nu: max(s), 'few')):
        assert_caught(check_conformal, wrong, why)


FIVE = SMALL | dict(radius='cross-fitted', folds=5)


def check_cross_fitted(cls):
    """Each normal image is left out once; the copies have all labelled ones; nothing else moves."""
    seen = []
    class Listens(cls):
        def train(self, data):
            """As before, and noted."""
            seen.append((data.x[data.y == 0].clone(), int(data.y.sum()), self.radius))
            super().train(data)
    d, plain = Listens(**FIVE).fit(X, Y), cls(**SMALL).fit(X, Y)
    assert np.allclose(d.decision_function(X), plain.decision_function(X)), 'scores moved'
    assert [radius for *_, radius in seen] == ['cross-fitted'] + ['training'] * 5, 'trainings'
    assert all(labelled == 20 for _, labelled, _ in seen), 'labelled images left out'
    held, whole = [], set(map(bytes, seen[0][0].numpy()))
    for part, *_ in seen[1:]:
        left = whole - set(map(bytes, part.numpy()))
        held += left
        assert len(left) == 12, 'size of a part'
    assert len(held) == len(set(held)) == 60, 'not each image once'
    shares = []
    for part, *_ in seen[1:]:
        model = cls(**SMALL).fit(np.concatenate([part, X[60:]]), np.repeat([0, 1], [48, 20]))
        known = set(map(bytes, part.numpy()))
        left = np.stack([x for x in X[:60].astype('float32') if x.tobytes() not in known])
        shares.append(model.decision_function(left) / model.radius_**2)
    want = plain.radius_**2 * conformal_quantile(np.concatenate(shares), d.nu)
    assert np.isclose(d.threshold_, want, rtol=1e-4), 'threshold'
    assert np.isclose(d.radius_**2, d.threshold_), 'radius'


@pytest.mark.filterwarnings('ignore:the threshold of')
@pytest.mark.parametrize('cls', [CWDSVDD, ACHC])
def test_the_cross_fitted_radius(cls): check_cross_fitted(cls)


def seen_by_all(d, data, y):
    """The parts measured by copies that have seen them."""
    own = d.map_normal(d.squared_distances, data)
    return conformal_quantile(own, d.nu)**.5


def without_labelled(data, index):
    index = index[data.y[index].numpy() == 0]
    return data.x[index], data.y[index]


def test_wrong_cross_fitting_is_caught():
    with mutant(cwdsvdd, cross_fitted_radius=seen_by_all):
        assert_caught(check_cross_fitted, CWDSVDD, 'trainings')
    with mutant(cwdsvdd, images_at=without_labelled):
        assert_caught(check_cross_fitted, CWDSVDD, 'labelled')
    with mutant(cwdsvdd, conformal_quantile=lambda s, nu: float(np.quantile(s, 1 - nu))):
        assert_caught(check_cross_fitted, CWDSVDD, 'threshold')


@pytest.mark.filterwarnings('ignore:the threshold of')
def test_new_rows_outside_of_a_cross_fitted_radius():
    """About nu of the rows of a known law, where the training radius has nearly all outside."""
    g, out = np.random.default_rng(0), []
    width = np.geomspace(3, .3, 64)
    for seed in range(4):
        seen, later = (.5 + .04 * g.normal(size=(n, 1, 1, 64)) * width for n in (60, 300))
        seen, later = seen.clip(0, 1), later.clip(0, 1)
        params = SMALL | dict(features='pca', components=None, gcn=False, seed=seed, warm_up=5)
        out.append([CWDSVDD(**params, radius=radius).fit(seen).predict(later).mean()
                    for radius in ('training', 'cross-fitted')])
    training, cross = np.mean(out, 0)
    assert training > .5 and .02 < cross < .15


def test_a_cross_fitted_radius_of_a_dataset_equals_that_of_an_array():
    x, y = torch.tensor(X).float(), torch.tensor(Y)
    a, b = CWDSVDD(**FIVE).fit(x, Y), CWDSVDD(**FIVE).fit(TensorDataset(x, y))
    c = CWDSVDD(**FIVE).fit(TensorDataset(x), Y)
    assert a.threshold_ == pytest.approx(b.threshold_, rel=1e-5)
    assert a.threshold_ == pytest.approx(c.threshold_, rel=1e-5)


def test_too_few_images_for_the_folds():
    with pytest.raises(ValueError, match='at most half .* normal images; got 5 for 9'):
        CWDSVDD(**FIVE).fit(X[:9])
    CWDSVDD(**FIVE).fit(X[:10])


def test_a_cross_fitted_training_goes_on(tmp_path):
    """From a checkpoint: the same threshold."""
    whole = CWDSVDD(**FIVE).fit(X[:60])
    class Stops(CWDSVDD):
        def after_epoch(self, data, epoch):
            """As before, and an end."""
            super().after_epoch(data, epoch)
            if self.ends and epoch == 2: raise RuntimeError('stop')
    Stops.ends = True
    with pytest.raises(RuntimeError): Stops(**FIVE).fit(X[:60], checkpoint=tmp_path / 'a')
    Stops.ends = False
    again = Stops(**FIVE).fit(X[:60], checkpoint=tmp_path / 'a')
    assert again.threshold_ == pytest.approx(whole.threshold_, rel=1e-5)


# ---------------------------------------------------------------- checks of the class
def check_terms(cls):
    """Names, shapes and values of the five terms."""
    terms = by_hand(cls).sphere_terms(CODES, LABELS)
    names = ['radius', 'outside', 'decay', 'wrapping', 'unknown']
    assert list(terms) == names, f'names {list(terms)}'
    want = dict(radius=4, outside=5 / (.5 * 4), decay=.05 * 5, wrapping=3 / (.25 * 3),
                unknown=(4 + 3) / (.25 * 2))
    for name, value in means(terms).items(): assert np.isclose(value, want[name]), f'{name} {value}'
    assert terms['outside'].shape == terms['unknown'].shape == (6,), 'one number an image'
    assert 'decay' not in by_hand(cls, weight_decay=0).sphere_terms(CODES, LABELS), 'no decay'


def check_gradients(cls):
    """Pulls and pushes in closed form; a code on the right side feels nothing."""
    d, z = by_hand(cls), CODES.clone().requires_grad_()
    g, = torch.autograd.grad(total_loss(d.sphere_terms(z, LABELS), 6), z)
    factor = tensor(0, 0, 2 / (.5 * 4), 0, -2 / (.25 * 2), -2 / (.25 * 2))
    assert torch.allclose(g, factor[:, None] * (CODES - d.center_)), 'gradient of the codes'
    V = d.nets_.encoder.weight
    g, = torch.autograd.grad(total_loss(d.sphere_terms(CODES, LABELS), 6), V)
    inside = POINTS[0]
    want = -2 / (.25 * 3) * torch.outer(V @ inside - d.center_, inside) + .1 * V
    assert torch.allclose(g, want), 'gradient of the weights'


def check_homogeneous(cls):
    """All but the decay grow with the square of the scale."""
    one, three = by_hand(cls, weight_decay=0), by_hand(cls, weight_decay=0)
    three.nets_.encoder.weight.data *= 3
    three.center_, three.radius_ = 3 * three.center_, 6.
    a = total_loss(one.sphere_terms(CODES, LABELS), 6).item()
    b = total_loss(three.sphere_terms(3 * CODES, LABELS), 6).item()
    assert np.isclose(9 * a, b), 'not homogeneous'


def check_shares(cls):
    """The mean over batches, some without a labelled image, is the loss of all."""
    d = by_hand(cls)
    value = lambda i: total_loss(d.sphere_terms(CODES[i], LABELS[i]), len(i)).item()
    parts = np.mean([value([0, 1]), value([2, 4]), value([3, 5])])
    assert np.isclose(parts, value([0, 1, 2, 3, 4, 5])), 'batches do not add up'


def check_radius(cls):
    """After each epoch the minimizer, with bank and labelled images; 1 when the game begins."""
    class Watched(cls):
        def after_epoch(self, data, epoch):
            """As before, and compared."""
            done = super().after_epoch(data, epoch)
            d, y = map(np.concatenate, zip(*self.each_batch(self.squared_distances, data)))
            repelled = [self.bank.map(self.view_squared_distances), d[y == 1]]
            best = balanced_radius(d[y == 0], self.nu, self.mu, repelled)
            assert np.isclose(self.radius_, best, rtol=1e-5), 'radius not refreshed'
            return done
    d = Watched(**SMALL | dict(lr=1e-2, mu=.3)).fit(X, Y)   # nu and mu are not the same
    first, second = d.history_['radius']
    assert np.isclose(first, 1) and not np.isclose(second, 1), 'radius at the start'
    assert np.isclose(d.threshold_, d.radius_**2), 'threshold is not R^2'


def check_score(cls):
    """The score is the squared distance; calibrate moves the threshold only."""
    d = cls(**SMALL).fit(X, Y)
    s = d.decision_function(X)
    away = ((d.encode(X) - d.center_.numpy())**2).sum(1)
    assert np.allclose(s, away, rtol=1e-4), 'score'
    d.calibrate(X[:60])
    assert np.isclose(d.threshold_, np.quantile(s[:60], .95), rtol=1e-3), 'calibrate'
    assert np.allclose(d.decision_function(X), s), 'calibrate changes scores'


def check_wraps(cls):
    """They surround what the network sees of normal images, and are gone after training."""
    for params in (dict(epsilon_factor=2.),
                   dict(epsilon_factor=.5, features='pca', components=8, rule='nearest')):
        d = cls(**SMALL | params).fit(X, Y)
        assert not len(d.bank), 'the bank is kept'
        d.draw_bank(d.as_batches(X, Y))
        views = d.map_normal(d.prepare, d.as_batches(X, Y))
        assert len(views) == 60 and d.bank.points.shape == (100, *views.shape[1:]), 'shape'
        rows = views.reshape(60, -1).astype(float)
        if views.ndim == 4: epsilon = ImageWrapper(rule=d.rule).fit(views).epsilon_
        else: epsilon = density_epsilon(rows, d.rule)
        made = d.bank.points.numpy().reshape(100, 1, -1)
        away = np.sqrt(((made - rows)**2).sum(2)) / (d.epsilon_factor * epsilon)
        assert (np.abs(away - 1).min(1) < 1e-3).all(), 'a wrapping point without a parent'


def check_redraws(cls):
    """redraw_every counts epochs between draws; 0 draws once."""
    class Counts(cls):
        def draw_bank(self, data, draw=0):
            """As before, and noted."""
            super().draw_bank(data, draw)
            self.draws_ = [*getattr(self, 'draws_', []), draw]
            self.sums_ = [*getattr(self, 'sums_', []), float(self.bank.points[..., 2, 3].sum())]
    small = SMALL | dict(epochs=5)
    assert Counts(**small).fit(X[:60]).draws_ == [0], 'redraw_every=0'
    d = Counts(**small, redraw_every=2).fit(X[:60])
    assert d.draws_ == [0, 2, 4] and len(set(d.sums_)) == 3, 'redraw_every=2'


def check_each_step_meets_other_points(cls):
    """The batches of an epoch meet different wrapping points, and in the end nearly all."""
    met = []
    class Listens(cls):
        def view_squared_distances(self, views):
            """As before, and noted where a gradient is wanted of wrapping points."""
            if self.bank and torch.is_grad_enabled(): met.append(views.detach().clone())
            return super().view_squared_distances(views)
    Listens(**SMALL | dict(epochs=5, batch_size=20)).fit(X[:60])
    assert len(met) >= 15, 'no wrapping points in the loss'
    assert not torch.equal(met[0], met[1]), 'the same points in each batch'
    assert len(torch.cat(met).unique(dim=0)) > 80, 'only some of the points'


def check_batch_statistics(cls):
    """Equation (6) is measured with fixed batch statistics, which its epochs leave alone."""
    seen = []
    class Listens(cls):
        def sphere_terms(self, codes, yb):
            """As before, and noted."""
            seen.append(any(m.training for m in self.nets_.modules()))
            return super().sphere_terms(codes, yb)
        def draw_bank(self, data, draw=0):
            """As before, and noted."""
            self.before_ = self.nets_.encoder[1].running_mean.clone()
            super().draw_bank(data, draw)
    d = Listens(**SMALL | dict(arch='conv')).fit(X, Y)
    assert seen and not any(seen), 'training mode in the game'
    now = d.nets_.encoder[1].running_mean
    assert torch.equal(d.before_, now), 'batch statistics moved in the game'


def check_foreign_images_touch_nothing_else(cls):
    """Range, warm start, center: the same with foreign images as without."""
    loud = np.eye(8)[None, None].repeat(20, 0) * np.linspace(.1, 1, 20).reshape(-1, 1, 1, 1)
    loud, none = np.concatenate([X[:60], loud]), SMALL | dict(epochs=0)
    a, b = cls(**none).fit(X[:60]), cls(**none).fit(loud, Y)
    z = contrast_normalize(torch.tensor(X[:60]))
    assert a.contrast_range_ == b.contrast_range_, 'range'
    assert np.isclose(b.contrast_range_[0], float(z.min())), 'range'
    directions = [d.center_ / d.center_.norm() for d in (a, b)]   # the radius, 1, may differ
    assert torch.allclose(*directions, atol=1e-5), 'center'
    seen = []
    class Listens(cls):
        def pretrain(self, data):
            """As before, and noted."""
            seen.extend(len(xb) for xb, _ in data.batches(self.batch_size))
            super().pretrain(data)
    Listens(**SMALL).fit(loud, Y)
    assert sum(seen) == 60, f'{sum(seen)} images in the warm start'


def check_warm_up(cls):
    """The warm-up lowers the mean distance of normal images, before there is a radius."""
    d = cls(**SMALL | dict(warm_up=30, epochs=1, lr=3e-3)).fit(X[:60])
    distance = d.history_['warm/distance']
    assert len(distance) == 30 and distance[-1] < .5 * distance[0], 'warm-up'
    assert len(d.history_['outside']) == 1, 'epochs'


def check_warm_up_pulls_normal_images_only(cls):
    """A labelled image costs nothing in the warm-up; the mean is that of all normal ones."""
    d = by_hand(cls)
    d.prepare = lambda xb: xb
    d.nets_.encoder = nn.Identity()
    term = d.warm_loss(CODES, LABELS)['distance']
    assert term[4:].tolist() == [0, 0], 'a labelled image is pulled'
    assert np.isclose(float(term.mean()), (0 + 1 + 9 + 4) / 4), 'mean of normal images'


def check_rates(cls):
    """The warm start has its own rate; warm-up and game share `lr`, with an Adam for each."""
    rates, adams = {}, {}
    class Listens(cls):
        def descend(self, player, loss, xb, *yb):
            """As before, and noted."""
            optimizer, phase = self.optimizers_[player], f'{player}, {loss.__name__}'
            rates.setdefault(phase, set()).add(optimizer.param_groups[0]['lr'])
            adams.setdefault(phase, set()).add(id(optimizer))
            return super().descend(player, loss, xb, *yb)
    Listens(**SMALL | dict(lr=2e-3, pretrain_lr=5e-3, arch='conv')).fit(X, Y)
    assert len(rates) == 3, f'phases {sorted(rates)}'
    assert rates['all, warm_loss'] == {2e-3} == rates['all, loss'], 'lr'
    assert rates['autoencoder, loss'] == {5e-3}, 'pretrain_lr'
    shared = adams['all, warm_loss'] & adams['all, loss']
    assert not shared, 'an optimizer remembers another scale'


CHECKS = [check_terms, check_gradients, check_homogeneous, check_shares, check_radius, check_score,
          check_wraps, check_redraws, check_each_step_meets_other_points, check_batch_statistics,
          check_foreign_images_touch_nothing_else, check_warm_up,
          check_warm_up_pulls_normal_images_only, check_rates]


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
def test_the_chapter_keeps(check): check(CWDSVDD)


# ---------------------------------------------------------------- mutants
def with_term(name, f):
    """CWD-SVDD whose named term is f(term)."""
    def sphere_terms(self, codes, yb):
        terms = CWDSVDD.sphere_terms(self, codes, yb)
        return {k: f(v) if k == name else v for k, v in terms.items()}
    return changed(CWDSVDD, f'other_{name}', sphere_terms=sphere_terms)


def labels_ignored(self, codes, yb): return CWDSVDD.sphere_terms(self, codes, yb * 0)
def not_squared(self, codes, yb):
    terms = CWDSVDD.sphere_terms(self, codes, yb)
    return terms | dict(radius=terms['radius'] / self.radius_)


TERMS = 'radius', 'outside', 'decay', 'wrapping', 'unknown'


@each_mutant({
    **{name: [with_term(name, f) for f in (lambda v: 0 * v, lambda v: 2 * v)] for name in TERMS},
    'unknown 0.0': [changed(CWDSVDD, sphere_terms=labels_ignored)],
    'one number an image': [with_term('outside', lambda v: v.mean()),
                            with_term('unknown', lambda v: v.mean())]})
def test_wrong_terms_are_caught(why, broken): assert_caught(check_terms, broken, why)


@each_mutant({'of the codes': [with_term(name, lambda v: -v) for name in ('outside', 'unknown')],
              'of the weights': [with_term(name, lambda v: -v) for name in ('decay', 'wrapping')]})
def test_wrong_signs_are_caught(why, broken): assert_caught(check_gradients, broken, why)


def test_a_radius_that_is_not_squared_is_caught():
    broken = changed(CWDSVDD, sphere_terms=not_squared)
    assert_caught(check_homogeneous, broken, 'not homogeneous')


def means_of_the_batch(y, share):
    normal, unknown = (y == 0), (y == 1)
    part = lambda which: which * len(y) / which.sum().clamp(min=1)
    return part(normal), part(unknown)


def no_weights(y, share): return (y == 0).double(), (y == 1).double()


@pytest.mark.parametrize('check, weights, why', [
    (check_shares, means_of_the_batch, 'do not add up'), (check_terms, no_weights, 'outside'),
    (check_warm_up_pulls_normal_images_only, no_weights, 'mean of normal images')])
def test_wrong_weights_are_caught(check, weights, why):
    with mutant(cwdsvdd, label_weights=weights): assert_caught(check, CWDSVDD, why)


class RadiusWithoutBank(CWDSVDD):
    def find_radius(self, data):
        bank, self.bank = self.bank, ()
        super().find_radius(data)
        self.bank = bank


class RadiusWithoutLabelled(CWDSVDD):
    def find_radius(self, data):
        d, y = map(np.concatenate, zip(*self.each_batch(self.squared_distances, data)))
        wrapping = self.bank.map(self.view_squared_distances) if self.bank else ()
        self.radius_ = balanced_radius(d[y == 0], self.nu, self.mu, [wrapping])


class Exchanged(CWDSVDD):
    def find_radius(self, data):
        self.nu, self.mu = self.mu, self.nu
        super().find_radius(data)
        self.nu, self.mu = self.mu, self.nu


def radius_kept(self, data, epoch): pass
def of_scores(self, scores): return np.quantile(scores, .95)
def not_of_squares(self, scores): return float(self.radius_)
def forever(self, scores): return float(self.radius_)**2


@each_mutant({
    'not refreshed': [RadiusWithoutBank, RadiusWithoutLabelled, Exchanged,
                      changed(CWDSVDD, after_epoch=radius_kept)],
    'not R': [changed(CWDSVDD, threshold_rule=of_scores),
              changed(CWDSVDD, threshold_rule=not_of_squares)]})
def test_a_wrong_radius_is_caught(why, broken): assert_caught(check_radius, broken, why)


def test_a_sphere_that_is_not_scaled_is_caught():
    with mutant(cwdsvdd, unit_sphere=lambda d: None):
        assert_caught(check_radius, CWDSVDD, 'radius at the start')


@each_mutant({'score': [changed(CWDSVDD, image_score=lambda self, xb: self.squared_distances(xb)
                                - self.radius_**2)],
              'calibrate': [changed(CWDSVDD, threshold_rule=forever)]})
def test_a_wrong_score_is_caught(why, broken): assert_caught(check_score, broken, why)


def bank_of_all(self, data, draw=0):
    normal = type(data)(data.x, data.y * 0, 'cpu')
    CWDSVDD.draw_bank(self, normal, draw)


def kept_after(self, data):
    CWDSVDD.train(self, data)
    self.draw_bank(data)


@each_mutant({'shape|parent': [changed(CWDSVDD, draw_bank=bank_of_all)],
              'kept': [changed(CWDSVDD, train=kept_after)]})
def test_wrong_wrapping_points_are_caught(why, broken): assert_caught(check_wraps, broken, why)


@pytest.mark.parametrize('options', [
    lambda v, m, f, rule, seed: (v, m, 1., rule, seed),             # the factor is ignored
    lambda v, m, f, rule, seed: (v, m, f, 'chained', seed),         # the rule is ignored
    lambda v, m, f, rule, seed: (X[:60] if v.ndim == 4 else v, m, f, rule, seed)])   # of pixels
def test_wrong_settings_of_wrapping_points_are_caught(options):
    made = lambda *args: wrapping_bank(*options(*args))
    with mutant(cwdsvdd, wrapping_bank=made): assert_caught(check_wraps, CWDSVDD, 'parent')


def same_draw(self, data, draw=0): CWDSVDD.draw_bank(self, data, 0)
def never_redrawn(self, data, epoch): self.find_radius(data)


@each_mutant({'redraw_every=2': [changed(CWDSVDD, draw_bank=same_draw),
                                 changed(CWDSVDD, after_epoch=never_redrawn)]})
def test_wrong_draws_are_caught(why, broken): assert_caught(check_redraws, broken, why)


@pytest.mark.parametrize('sample, why', [
    (lambda self, b: self.points[:b], 'the same points'),
    (lambda self, b: self.points[torch.randint(30, (b,))], 'only some')])
def test_a_bank_that_gives_the_same_points_is_caught(sample, why):
    with mutant(Bank, sample=sample):
        assert_caught(check_each_step_meets_other_points, CWDSVDD, why)


class TrainingMode(CWDSVDD):
    def train_sphere(self, data):
        """In training mode."""
        self.optimizers_ = self.optimizers()
        self.run(data, self.epochs)


class OldOptimizer(CWDSVDD):
    def train_sphere(self, data):
        """With the optimizer of the warm-up."""
        self.run(data, self.epochs, batch_statistics=False)


class OneRate(CWDSVDD):
    def adam(self, *names, lr=None, betas=(.9, .999)): return super().adam(*names, betas=betas)


@pytest.mark.parametrize('check, broken, why', [
    (check_batch_statistics, TrainingMode, 'training mode'),
    (check_rates, OldOptimizer, 'remembers'), (check_rates, OneRate, 'pretrain_lr')])
def test_a_wrong_training_is_caught(check, broken, why): assert_caught(check, broken, why)


def test_foreign_images_that_touch_more_are_caught():
    with mutant(cwdsvdd, OnlyNormal=lambda data, n: data):
        assert_caught(check_foreign_images_touch_nothing_else, CWDSVDD, 'range')
    with mutant(CWDSVDD, find_center=lambda self, data: centered_on_all(self, data)):
        assert_caught(check_foreign_images_touch_nothing_else, CWDSVDD, 'center')


def centered_on_all(d, data):
    codes = [out for out, _ in d.each_batch(d.code, data)]
    d.center_ = torch.as_tensor(np.concatenate(codes).mean(0))


def pulls_nothing(self, xb, yb): return dict(distance=0 * self.squared_distances(xb))
def pulls_all(self, xb, yb): return dict(distance=self.squared_distances(xb))


@pytest.mark.parametrize('check, loss, why', [
    (check_warm_up, pulls_nothing, 'warm-up'),
    (check_warm_up_pulls_normal_images_only, pulls_all, 'labelled image is pulled')])
def test_a_wrong_warm_up_is_caught(check, loss, why):
    assert_caught(check, changed(CWDSVDD, warm_loss=loss), why)


# ---------------------------------------------------------------- other settings, bad input
@pytest.mark.filterwarnings('ignore')
def test_promises_with_features():
    check_detector(CWDSVDD(features='pca', components=16, redraw_every=3, mu=.5))


@pytest.mark.filterwarnings('ignore')
def test_promises_whitened_and_cross_fitted():
    check_detector(CWDSVDD(features='pca', components=None, radius='cross-fitted', folds=2,
                           epsilon_factor=.1, epochs=5, warm_up=3, pretrain_epochs=3))


@pytest.mark.parametrize('params, match', [
    (dict(nu=0), 'nu'), (dict(nu=1), 'nu'), (dict(mu=0), 'mu'), (dict(mu=float('nan')), 'mu'),
    (dict(epsilon_factor=0), 'epsilon_factor'), (dict(wraps=-1), 'wraps'),
    (dict(redraw_every=1.5), 'redraw_every'), (dict(objective='one-class'), 'objective'),
    (dict(features='resnet19'), 'features'), (dict(components=0), 'components'),
    (dict(features='pca', components=90), 'got 90'), (dict(rule='far'), 'rule'),
    (dict(weights=None), 'weights'), (dict(radius='test'), 'radius'), (dict(folds=1), 'folds'),
    (dict(folds=2.5), 'folds'), (dict(components=2.5), 'components')])
def test_bad_settings_are_named(params, match):
    with pytest.raises(ValueError, match=match): CWDSVDD(**SMALL | params).fit(X[:60])


def test_constant_images_and_overlap():
    blank = np.full((9, 8, 8), .3)
    for params in (dict(), dict(features='pca', gcn=False, components=2)):
        with pytest.raises(ValueError, match='contrast|same'): CWDSVDD(**SMALL | params).fit(blank)
    with pytest.warns(UserWarning, match='^2 of 20 different images labelled 1'):
        CWDSVDD(**SMALL).fit(np.concatenate([X, X[60:62]]), np.append(Y, [0, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', 'the threshold of CWDSVDD')
        CWDSVDD(**SMALL).fit(np.concatenate([X, X[60:]]), np.append(Y, Y[60:]))
