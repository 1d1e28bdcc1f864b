"""Classical one-class methods: every score against an independent formula or library, and mutants of each that must fail."""
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA as LinearPCA
from sklearn.ensemble import IsolationForest
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from sklearn.svm import OneClassSVM

import ad_course.classical as classical
from ad_course.baselines import KNN, MeanImage
from ad_course.classical import (GMM, KDE, OCSVM, SVDD, FeatureKNN, IForest, Kernelized, average_path, gaps, likely_bandwidth,
                                 show_boundary, smo, tree_table)
from ad_course.data import digits
from ad_course.check import check_detector

TASK = digits(normal=3)
X, OTHER = TASK.x_train[:80], np.concatenate([TASK.x_test[TASK.y_test == 0][:30], TASK.x_test[TASK.y_test == 1][:90]])
flat = lambda x: np.asarray(x, float).reshape(len(x), -1)
ROWS, QUERY = flat(X), flat(OTHER)
as_images = lambda points: np.asarray(points, float).reshape(-1, 1, 1, 2)
quiet = dict(verbose=False)


def random_points(n, seed=0, spread=.1): return np.random.default_rng(seed).normal(.5, spread, (n, 2)).clip(0, 1)


def mutant(kind, **members): return type('Mutant', (kind,), members)


def all_fail(check, mutants):
    for name, kind in mutants.items():
        with pytest.raises(AssertionError): check(kind); print(f'{name} survives')


# ---------------------------------------------------------------- features
def check_features(kind):
    """Pixels as they are; components as scikit-learn's, from the training images alone."""
    d = kind(**quiet).fit(X)
    np.testing.assert_allclose(d.features(torch.tensor(OTHER)), QUERY, atol=1e-12, err_msg='pixels')
    for components in (5, .8):
        d, theirs = kind(components=components, **quiet).fit(X), LinearPCA(components, svd_solver='full').fit(ROWS)
        np.testing.assert_allclose(d.features(torch.tensor(OTHER)), theirs.transform(QUERY), atol=1e-4, err_msg='components')
        assert d.features(torch.tensor(OTHER)).dtype == torch.float64
        z = theirs.transform(ROWS)
        distance = np.sort(cdist(theirs.transform(QUERY), z), 1)[:, :5].mean(1) / z.shape[1]**.5
        np.testing.assert_allclose(d.decision_function(OTHER), distance, rtol=1e-3)


def not_centered(self, xb): return xb.flatten(1).double() @ self.directions_.T if hasattr(self, 'directions_') else xb.flatten(1).double()
def from_the_batch(self, xb):
    rows = xb.flatten(1).double()
    return (rows - rows.mean(0)) @ self.directions_.T if hasattr(self, 'directions_') else rows
def ignored(self, xb): return xb.flatten(1).double()


def test_features_and_their_mutants():
    check_features(FeatureKNN)
    all_fail(check_features, {f.__name__: mutant(FeatureKNN, features=f) for f in (not_centered, from_the_batch, ignored)})


def test_k_nn_on_pixels_is_the_baseline():
    np.testing.assert_allclose(FeatureKNN(**quiet).fit(X).decision_function(OTHER), KNN(**quiet).fit(X).decision_function(OTHER), rtol=1e-5)


# ---------------------------------------------------------------- the width of a kernel
def width(rows, **params): return Kernelized(**params).choose_gamma(torch.tensor(rows))


def test_gamma_rules_by_hand():
    line = np.array([[0.], [1.], [3.], [7.]])  # distances 1 3 7, 1 2 6, 3 2 4, 7 6 4
    assert np.isclose(width(line, gamma='median'), .5 / 3**2)       # the lower median of 1 2 3 4 6 7, each twice
    assert np.isclose(width(line, gamma='neighbors', nu=.1), .5 / 1**2)  # nearest: 1 1 2 4, lower median 1
    assert np.isclose(width(line, gamma='neighbors', nu=.5), .5 / 3**2)  # second nearest: 3 2 3 6
    assert np.isclose(width(line, gamma='scale'), 1 / line.var()) and width(line, gamma=2) == 2


def test_gamma_follows_distances_only():
    moved = ROWS + np.linspace(0, 3, 64)
    for rule in ('median', 'neighbors'):
        assert np.isclose(width(moved, gamma=rule), width(ROWS, gamma=rule)), rule
        assert np.isclose(width(3 * ROWS, gamma=rule), width(ROWS, gamma=rule) / 9), rule
        assert np.isclose(width(np.repeat(ROWS, 4, 0), gamma=rule), width(ROWS, gamma=rule), rtol=.05), f'{rule}: copies'


def test_gaps():
    rng = np.random.default_rng(0)
    z = torch.tensor(rng.normal(size=(30, 3)))
    z[7] = z[3]
    d, want = gaps(z), cdist(z, z)
    want[want < 1e-9] = np.inf
    np.testing.assert_allclose(d, want)
    assert d[7, 3] == torch.inf and gaps(z, most=10).shape == (10, 10)


# ---------------------------------------------------------------- one-class SVM
def check_ocsvm(kind):
    """The weights satisfy (2) and its optimality conditions, the score is the equation, and scikit-learn agrees with the sign turned."""
    for nu, kernel in ((.1, 'rbf'), (.4, 'rbf'), (.2, 'linear')):
        d = kind(nu=nu, kernel=kernel, **quiet).fit(X)
        S, a = d.support_.numpy(), d.alpha_.numpy()
        k = lambda q: q @ S.T if kernel == 'linear' else np.exp(-d.gamma_ * cdist(q, S, 'sqeuclidean'))
        assert np.isclose(a.sum(), 1) and a.min() > 0 and a.max() <= 1 / (nu * len(X)) + 1e-9, 'the constraints'
        s = d.decision_function(OTHER)
        np.testing.assert_allclose(s, d.rho_ - k(QUERY) @ a, atol=1e-5)
        theirs = OneClassSVM(kernel=kernel, gamma=d.gamma_, nu=nu, tol=1e-6).fit(ROWS)
        np.testing.assert_allclose(s, -theirs.decision_function(QUERY) / (nu * len(X)), atol=1e-5)
        train = d.decision_function(X)
        assert (train > 1e-5).mean() <= nu <= len(a) / len(X), 'the nu-property'


def other_sign(self, z): return -OCSVM.score_features(self, z)
def no_rho(self, z): return OCSVM.score_features(self, z) - self.rho_
def unweighted(self, z): return self.rho_ - self.gram(z, self.support_).mean(1)
def unscaled(self, z):
    OCSVM.learn_features(self, z)
    self.alpha_, self.rho_ = self.alpha_ * self.nu * len(z), self.rho_ * self.nu * len(z)
def distance_not_squared(self, a, b): return a @ b.T if self.kernel == 'linear' else (-self.gamma_ * torch.cdist(a, b)).exp()


def test_ocsvm_and_its_mutants():
    check_ocsvm(OCSVM)
    mutants = {f.__name__: mutant(OCSVM, score_features=f) for f in (other_sign, no_rho, unweighted)}
    all_fail(check_ocsvm, mutants | {'unscaled': mutant(OCSVM, learn_features=unscaled), 'distance': mutant(OCSVM, gram=distance_not_squared)})


def test_fit_leaves_the_global_generator_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    for d in (OCSVM(), IForest(trees=3), GMM(), SVDD()): d.set_params(verbose=False).fit(X)
    assert np.array_equal(before, np.random.get_state()[1]) and np.random.get_state()[2] == 624


# ---------------------------------------------------------------- SVDD
@pytest.mark.parametrize('seed', range(4))
def test_smo_against_a_general_solver(seed):
    rng = np.random.default_rng(seed)
    z, most = rng.normal(size=(9, 4)), (.2, .35, 1., 5.)[seed]
    K = z @ z.T
    a = smo(K, most)
    f = lambda a: a @ K @ a - a @ K.diagonal()
    best = minimize(f, np.full(9, 1 / 9), jac=lambda a: 2 * K @ a - K.diagonal(), bounds=[(0, most)] * 9, method='SLSQP',
                    constraints=dict(type='eq', fun=lambda a: a.sum() - 1, jac=lambda a: np.ones(9)), options=dict(ftol=1e-12, maxiter=500))
    assert np.isclose(a.sum(), 1) and a.min() >= 0 and a.max() <= most and best.success
    np.testing.assert_allclose(f(a), best.fun, atol=1e-5)


def test_smo_with_copies_and_without_patience():
    K = np.exp(-cdist(*[np.repeat(random_points(10), 3, 0)] * 2, 'sqeuclidean'))
    assert np.isclose(smo(K, .2).sum(), 1)
    with pytest.raises(RuntimeError, match='SVDD'): smo(K, .2, steps=2)


def check_svdd(kind):
    """The sphere: strong duality, who is inside, on and outside, the distance from an explicit center, and twice the one-class SVM."""
    for nu, kernel in ((.1, 'rbf'), (.3, 'rbf'), (.2, 'linear')):
        d = kind(nu=nu, kernel=kernel, **quiet).fit(X)
        S, a, most = d.support_.numpy(), d.alpha_.numpy(), 1 / (nu * len(X))
        s, at = d.decision_function(X).astype(float), d.decision_function(np.clip(S, 0, 1).reshape(-1, 1, 8, 8))
        assert np.isclose(a.sum(), 1) and a.min() > 0 and a.max() <= most + 1e-12, 'the constraints'
        assert np.abs(at[a < most * (1 - 1e-9)]).max(initial=0) < 1e-4 and at[a >= most * (1 - 1e-9)].min(initial=0) > -1e-4, 'on and outside'
        assert (s > 1e-4).mean() <= nu <= len(a) / len(X), 'the nu-property'
        own = (S**2).sum(1) if kernel == 'linear' else np.ones(len(S))
        primal = d.radius_**2 + np.maximum(s, 0).sum() * most
        np.testing.assert_allclose(primal, a @ own - d.center_square_, atol=1e-3, err_msg='duality')
        if kernel == 'linear':
            np.testing.assert_allclose(d.decision_function(OTHER), ((QUERY - a @ S)**2).sum(1) - d.radius_**2, rtol=1e-4, atol=1e-4)
        else:
            theirs = OneClassSVM(gamma=d.gamma_, nu=nu, tol=1e-7).fit(ROWS)
            np.testing.assert_allclose(d.decision_function(OTHER), -2 * theirs.decision_function(QUERY) / (nu * len(X)), atol=1e-5)


def learn_with(change):
    def learn_features(self, z):
        SVDD.learn_features(self, z)
        change(self)
    return mutant(SVDD, learn_features=learn_features)


def test_svdd_and_its_mutants():
    check_svdd(SVDD)
    all_fail(check_svdd, {
        'sign': mutant(SVDD, score_features=lambda self, z: -SVDD.score_features(self, z)),
        'no radius': mutant(SVDD, score_features=lambda self, z: self.distance_square(z)),
        'radius not squared': mutant(SVDD, score_features=lambda self, z: self.distance_square(z) - self.radius_),
        'distance not squared': mutant(SVDD, score_features=lambda self, z: self.distance_square(z).sqrt() - self.radius_),
        'diagonal taken as constant': mutant(SVDD, distance_square=lambda self, z: 1 - 2 * self.gram(z, self.support_) @ self.alpha_ + self.center_square_),
        'cross term once': mutant(SVDD, distance_square=lambda self, z: SVDD.distance_square(self, z) + self.gram(z, self.support_) @ self.alpha_),
        'no square of the center': learn_with(lambda d: setattr(d, 'center_square_', 0.)),
        'larger radius': learn_with(lambda d: setattr(d, 'radius_', 1.05 * d.radius_)),
        'smaller radius': learn_with(lambda d: setattr(d, 'radius_', .95 * d.radius_)),
        'equal weights': learn_with(lambda d: setattr(d, 'alpha_', torch.full_like(d.alpha_, 1 / len(d.alpha_))))})


def test_mutants_of_the_solver(monkeypatch):
    real = smo
    for name, wrong in {'no diagonal': lambda K, most: real(K - np.diag(K.diagonal()) + np.eye(len(K)) * K.diagonal().mean(), most),
                        'limit forgotten': lambda K, most: real(K, 1.), 'stopped early': lambda K, most: real(K, most, tolerance=.3)}.items():
        monkeypatch.setattr(classical, 'smo', wrong)
        with pytest.raises(AssertionError): check_svdd(SVDD); print(f'{name} survives')


@pytest.mark.parametrize('settings', [dict(), dict(components=6, gamma='median', nu=.5), dict(gamma=2., nu=.03), dict(components=.8, gamma='scale')])
def test_svdd_is_twice_the_one_class_svm_for_rbf(settings):
    a, b = (kind(**settings, **quiet).fit(X).decision_function(OTHER) for kind in (OCSVM, SVDD))
    np.testing.assert_allclose(b, 2 * a, atol=3e-6)


def test_they_differ_for_the_linear_kernel():
    a, b = (kind(kernel='linear', **quiet).fit(as_images(random_points(80))) for kind in (OCSVM, SVDD))
    corner = as_images([[1, 1]])
    assert a.decision_function(corner) < a.decision_function(as_images([[.5, .5]])) and b.decision_function(corner) > 0


def test_smallest_circle_by_hand():
    triangle = [[.1, .1], [.9, .1], [.5, .2]]  # obtuse: the circle of its longest side
    d = SVDD(kernel='linear', nu=.01, **quiet).fit(as_images(triangle))
    assert np.isclose(d.radius_, .4, rtol=1e-3) and np.isclose(d.decision_function(as_images([[.5, .1]]))[0], -.16, atol=1e-3)


def test_too_many_images_for_the_kernel_matrix_are_refused():
    with pytest.raises(ValueError, match='OCSVM'): SVDD().learn_features(torch.zeros(20_001, 1))


# ---------------------------------------------------------------- isolation forest
def check_forest(kind):
    for params in (dict(trees=20), dict(trees=7, samples=32, seed=5)):
        d = kind(**params, **quiet).fit(X)
        m = min(d.samples, len(X))
        theirs = IsolationForest(n_estimators=d.trees, max_samples=m, random_state=d.seed).fit(ROWS)
        for x, q in ((OTHER, QUERY), (X, ROWS)): np.testing.assert_allclose(d.decision_function(x), -theirs.score_samples(q), atol=1e-6)


def walk(self, z, levels, strict=False):
    z, tree = z.float().double(), torch.arange(len(self.cut_))
    node = torch.zeros(len(z), len(tree), dtype=torch.long)
    for _ in range(levels):
        v, cut = z.gather(1, self.feature_[tree, node]), self.cut_[tree, node]
        node = torch.where(v < cut if strict else v <= cut, self.left_[tree, node], self.right_[tree, node])
    return 2 ** (-self.path_[tree, node].mean(1) / self.unit_)


def test_forest_and_its_mutants(monkeypatch):
    check_forest(IForest)
    check_forest(mutant(IForest, score_features=lambda self, z: walk(self, z, self.levels_)))  # the mutants differ from this by one thing
    all_fail(check_forest, {
        'sign': mutant(IForest, score_features=lambda self, z: -IForest.score_features(self, z)),
        'one level short': mutant(IForest, score_features=lambda self, z: walk(self, z, self.levels_ - 1)),
        'children exchanged': mutant(IForest, score_features=lambda self, z: walk(type('Flipped', (), vars(self) | dict(left_=self.right_, right_=self.left_)), z, self.levels_)),
        'not normalized': mutant(IForest, score_features=lambda self, z: IForest.score_features(self, z).log2() * self.unit_)})
    monkeypatch.setattr(classical, 'tree_table', lambda tree: (*tree_table(tree)[:4], tree_table(tree)[4] - average_path(tree.n_node_samples)))
    with pytest.raises(AssertionError): check_forest(IForest)  # the share of a leaf left out


def test_average_path_is_the_mean_depth_of_random_trees():
    exact = {1: 0., 2: 1.}
    harmonic = lambda n: sum(1 / i for i in range(1, n + 1))
    for n in (10, 256): assert np.isclose(average_path(n), 2 * harmonic(n - 1) - 2 * (n - 1) / n, atol=.12)  # the logarithm's error
    assert [float(average_path(n)) for n in exact] == list(exact.values()) and (np.diff(average_path(np.arange(2, 50))) > 0).all()


# ---------------------------------------------------------------- kernel density
def density(q, rows, h, leave_out=False):
    logs = -cdist(q, rows, 'sqeuclidean') / (2 * h**2)
    if leave_out: np.fill_diagonal(logs, -np.inf)
    return np.log(len(rows) - leave_out) + .5 * rows.shape[1] * np.log(2 * np.pi * h**2) - logsumexp(logs, axis=1)


def check_kde(kind):
    for h in (.3, 'likelihood'):
        d = kind(bandwidth=h, **quiet).fit(X)
        np.testing.assert_allclose(d.decision_function(OTHER), density(QUERY, ROWS, d.bandwidth_), rtol=1e-4, err_msg='equation (7)')
        theirs = KernelDensity(bandwidth=d.bandwidth_, leaf_size=len(X)).fit(ROWS).score_samples(QUERY)
        np.testing.assert_allclose(d.decision_function(OTHER), -theirs, rtol=1e-4, err_msg='scikit-learn, one leaf')
        left_out = density(ROWS, ROWS, d.bandwidth_, leave_out=True)
        np.testing.assert_allclose(d.training_scores(d.as_batches(X))[0], left_out, rtol=1e-4, err_msg='own bump left out')
        np.testing.assert_allclose(d.threshold_, np.quantile(left_out.astype('float32'), .95), rtol=1e-4)


def test_kde_and_its_mutants():
    check_kde(KDE)
    s = lambda change: mutant(KDE, score_features=lambda self, z: change(self, KDE.score_features(self, z), z))
    all_fail(check_kde, {
        'sign': s(lambda d, s, z: -s), 'no constant': s(lambda d, s, z: s - .5 * z.shape[1] * np.log(2 * np.pi * d.bandwidth_**2)),
        'sum for mean': s(lambda d, s, z: s - np.log(len(d.bank_))),
        'no half': mutant(KDE, log_bumps=lambda self, z: -(torch.cdist(z, self.bank_) / self.bandwidth_).square() - .5 * z.shape[1] * np.log(2 * np.pi * self.bandwidth_**2)),
        'own bump kept': mutant(KDE, training_scores=lambda self, data: (KDE.score_features(self, self.bank_).numpy(), np.zeros(len(self.bank_)))),
        'divided by n': mutant(KDE, training_scores=lambda self, data: (KDE.training_scores(self, data)[0] + 1, np.zeros(len(self.bank_))))})


def test_bandwidth_is_the_likeliest():
    z = torch.tensor(ROWS[:, 10:30])
    h = likely_bandwidth(z)
    loss = lambda h: density(z.numpy(), z.numpy(), h, leave_out=True).mean()
    assert loss(h) < min(loss(.9 * h), loss(1.1 * h))
    assert np.isclose(likely_bandwidth(7 * z), 7 * h, rtol=1e-3) and np.isclose(likely_bandwidth(z.repeat(3, 1)), h, rtol=1e-3)


def test_one_chain_from_the_mean_image_to_the_nearest_neighbor():
    score = lambda d: d.set_params(verbose=False).fit(X).image_score(torch.tensor(OTHER).double()).numpy()
    same_ranking = lambda a, b: np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1] > .999
    assert same_ranking(score(OCSVM(nu=.999, gamma=.5)), score(KDE(bandwidth=1.)))
    assert same_ranking(score(SVDD(nu=.999, gamma=.5)), score(KDE(bandwidth=1.)))
    assert same_ranking(score(KDE(bandwidth=50.)), score(MeanImage())) and same_ranking(score(GMM(floor=1e5)), score(MeanImage()))
    assert same_ranking(score(KDE(bandwidth=.1)), score(KNN(k=1)))


# ---------------------------------------------------------------- Gaussian mixture
def check_gmm(kind):
    floor = .01 * ROWS.var(0).mean()
    one = multivariate_normal(ROWS.mean(0), np.cov(ROWS.T, bias=True) + floor * np.eye(64))
    np.testing.assert_allclose(kind(**quiet).fit(X).decision_function(OTHER), -one.logpdf(QUERY), rtol=1e-3)
    theirs = GaussianMixture(3, reg_covar=floor, random_state=2, max_iter=200).fit(ROWS).score_samples(QUERY)
    np.testing.assert_allclose(kind(mixtures=3, seed=2, **quiet).fit(X).decision_function(OTHER), -theirs, rtol=1e-4)


def forget(name, value):
    def learn_features(self, z):
        GMM.learn_features(self, z)
        setattr(self, name, value(getattr(self, name)))
    return mutant(GMM, learn_features=learn_features)


def test_gmm_and_its_mutants():
    check_gmm(GMM)
    all_fail(check_gmm, {
        'sign': mutant(GMM, score_features=lambda self, z: -GMM.score_features(self, z)), 'root transposed': forget('roots_', lambda r: r.mT),
        'no determinant': mutant(GMM, score_features=lambda self, z: GMM.score_features(self, z) + self.roots_.diagonal(dim1=1, dim2=2).log().sum(1).mean()),
        'weights forgotten': forget('log_weights_', lambda w: w * 0), 'means forgotten': forget('means_', lambda m: m * 0),
        'diagonal': forget('roots_', lambda r: torch.diag_embed(r.diagonal(dim1=1, dim2=2)))})


def test_floor_is_relative():
    a, b = (GMM(**quiet).fit(f * X).image_score(torch.tensor(f * OTHER)) for f in (1, .1))
    torch.testing.assert_close(a + 64 * np.log(.1), b, rtol=1e-3, atol=1e-2)


# ---------------------------------------------------------------- the contract, wrong use, drawing
@pytest.mark.parametrize('detector', [OCSVM(), SVDD(nu=.3), SVDD(kernel='linear'), IForest(trees=30), KDE(), KDE(components=8.), GMM(), GMM(components=.9, mixtures=2),
                                      FeatureKNN(components=10)], ids=lambda d: f'{type(d).__name__}, {d.components}')
def test_contract(detector): check_detector(detector)


@pytest.mark.parametrize('kind', [OCSVM, SVDD, IForest, KDE, GMM, FeatureKNN])
def test_wrong_use(kind):
    for params in ([dict(components=c) for c in (0, -1, 2.5, 'all', True, float('nan'))]
                   + [dict(nu=v) for v in (0, 1, -.1, 1.5, '.1')] * issubclass(kind, Kernelized) + [dict(gamma=v) for v in (0, -1, 'auto', True)] * issubclass(kind, Kernelized)
                   + [dict(kernel='poly')] * issubclass(kind, Kernelized) + [dict(trees=0), dict(samples=1)] * (kind is IForest)
                   + [dict(bandwidth=0), dict(bandwidth='scott')] * (kind is KDE) + [dict(mixtures=0), dict(floor=0), dict(mixtures=81)] * (kind is GMM)):
        with pytest.raises(ValueError, match=next(iter(params))): kind(**params, **quiet).fit(X)
    for images, components, words in ((X[:6], 20, '20 components need'), (X, 65, '65 components need'), (np.full((9, 8, 8), .5), None, 'the same'), (X[:1], None, '2 images')):
        with pytest.raises(ValueError, match=words): kind(components=components, **quiet).fit(images)


def test_copies_do_no_harm():
    twins = np.repeat(X[:2], 20, 0)
    for d in (OCSVM(), SVDD(), IForest(trees=5), KDE(), GMM(), FeatureKNN(), SVDD(components=1), KDE(components=1), OCSVM(nu=.9)):
        assert np.isfinite(d.set_params(verbose=False).fit(twins).decision_function(OTHER)).all(), d
    with pytest.raises(ValueError, match='3 mixtures need as many different images; got 2'): GMM(mixtures=3, **quiet).fit(twins)


def test_boundary_runs_where_the_score_equals_the_level():
    points = random_points(60)
    d = SVDD(kernel='linear', **quiet).fit(as_images(points))
    for level in (None, 0.):
        ax = show_boundary(d, points, y=np.repeat([0, 1], 30), level=level, steps=120)
        line = np.concatenate([p.vertices for p in ax.collections[-1].get_paths()])
        center, want = (d.alpha_ @ d.support_).numpy(), (d.radius_**2 + (d.threshold_ if level is None else level))**.5
        np.testing.assert_allclose(np.linalg.norm(line - center, axis=1), want, rtol=.01)
        assert [len(l.get_xdata()) for l in ax.lines] == [30, 30]
