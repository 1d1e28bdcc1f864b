"""Classical one-class methods: every score against an independent formula or library, and mutants
of each that must be caught."""
import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.contour import QuadContourSet
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
from ad_course.check import check_detector
from ad_course.classical import (GMM, KDE, OCSVM, SVDD, FeatureKNN, IForest, Kernelized,
                                 OnFeatures, average_path, isolation_score, likely_bandwidth,
                                 pairwise_distances, path_lengths, smo, tree_table)
from ad_course.data import digits
from ad_course.pictures import show_plane
from tests.mutants import assert_caught, changed, each_mutant, mutant

TASK = digits(normal=3)
X = TASK.x_train[:80]
NORMALS, ANOMALIES = (TASK.x_test[TASK.y_test == y] for y in (0, 1))
OTHER = np.concatenate([NORMALS[:30], ANOMALIES[:90]])
flat = lambda x: np.asarray(x, float).reshape(len(x), -1)
ROWS, QUERY = flat(X), flat(OTHER)
as_images = lambda points: np.asarray(points, float).reshape(-1, 1, 1, 2)
close, QUIET = np.testing.assert_allclose, dict(verbose=False)


def random_points(n, seed=0, spread=.1):
    return np.random.default_rng(seed).normal(.5, spread, (n, 2)).clip(0, 1)


def scored(cls, **params): return cls(**params, **QUIET).fit(X).decision_function(OTHER)


# ---------------------------------------------------------------- features
def check_features(cls):
    """Pixels as they are; components as scikit-learn's, from the training images alone."""
    batch = torch.tensor(OTHER)
    close(cls(**QUIET).fit(X).features(batch), QUERY, atol=1e-12, err_msg='pixels')
    for components in (5, .8):
        d = cls(components=components, **QUIET).fit(X)
        theirs = LinearPCA(components, svd_solver='full').fit(ROWS)
        z, query = theirs.transform(ROWS), theirs.transform(QUERY)
        assert d.features(batch).shape == query.shape, 'components: how many'
        close(d.features(batch), query, atol=1e-4, err_msg='components')
        assert d.features(batch).dtype == torch.float64, '64 bits'
        distance = np.sort(cdist(query, z), 1)[:, :5].mean(1) / z.shape[1]**.5
        close(d.decision_function(OTHER), distance, rtol=1e-3, err_msg='distance')


def rows_of(xb): return xb.flatten(1).double()


def not_centered(self, xb):
    return rows_of(xb) @ self.directions_.T if hasattr(self, 'directions_') else rows_of(xb)


def from_the_batch(self, xb):
    if not hasattr(self, 'directions_'): return rows_of(xb)
    return (rows_of(xb) - rows_of(xb).mean(0)) @ self.directions_.T


def ignored(self, xb): return rows_of(xb)


def test_k_nn_on_pixels_is_the_baseline(): close(scored(FeatureKNN), scored(KNN), rtol=1e-5)


def test_a_base_alone_says_what_it_lacks():
    with pytest.raises(NotImplementedError, match='OnFeatures defines no learn_features'):
        OnFeatures(**QUIET).fit(X)
    half = changed(OnFeatures, 'Half', learn_features=lambda self, z: None)
    with pytest.raises(NotImplementedError, match='Half defines no score_features'):
        half(**QUIET).fit(X)


# ---------------------------------------------------------------- the width of a kernel
def width(rows, **params): return Kernelized(**params).choose_gamma(torch.tensor(rows))


def test_gamma_rules_by_hand():
    line = np.array([[0.], [1.], [3.], [7.]])  # distances 1 3 7, 1 2 6, 3 2 4, 7 6 4
    assert np.isclose(width(line, gamma='median'), .5 / 3**2)  # of 1 2 3 4 6 7, each twice
    assert np.isclose(width(line, gamma='neighbors', nu=.1), .5 / 1**2)  # nearest: 1 1 2 4
    assert np.isclose(width(line, gamma='neighbors', nu=.5), .5 / 3**2)  # second: 3 2 3 6
    assert np.isclose(width(line, gamma='scale'), 1 / line.var()) and width(line, gamma=2) == 2


@pytest.mark.parametrize('rule', ['median', 'neighbors'])
def test_gamma_follows_distances_only(rule):
    of = lambda rows: width(rows, gamma=rule)
    assert np.isclose(of(ROWS + np.linspace(0, 3, 64)), of(ROWS)), 'moved'
    assert np.isclose(of(3 * (ROWS + np.linspace(0, 3, 64))), of(ROWS) / 9), 'moved and stretched'
    assert np.isclose(of(3 * ROWS), of(ROWS) / 9), 'stretched'
    assert np.isclose(of(np.repeat(ROWS, 4, 0)), of(ROWS), rtol=.05), 'copies'


def test_distances_between_pairs():
    z = torch.tensor(np.random.default_rng(0).normal(size=(30, 3)))
    z[7] = z[3]
    d, want = pairwise_distances(z), cdist(z, z)
    want[want < 1e-9] = np.inf
    close(d, want)
    assert d[7, 3] == torch.inf and pairwise_distances(z, most=10).shape == (10, 10)


# ---------------------------------------------------------------- one-class SVM
def check_ocsvm(cls):
    """The weights satisfy (2) and its optimality conditions; the score is the equation, and
    scikit-learn's with the sign turned."""
    for nu, kernel in ((.1, 'rbf'), (.4, 'rbf'), (.2, 'linear')):
        d = cls(nu=nu, kernel=kernel, **QUIET).fit(X)
        S, a = d.support_.numpy(), d.alpha_.numpy()
        assert np.isclose(a.sum(), 1) and a.min() > 0, 'the constraints'
        assert a.max() <= 1 / (nu * len(X)) + 1e-9, 'the constraints'
        linear, square = kernel == 'linear', cdist(QUERY, S, 'sqeuclidean')
        k = QUERY @ S.T if linear else np.exp(-d.gamma_ * square)
        s, train = d.decision_function(OTHER), d.decision_function(X)
        close(s, d.rho_ - k @ a, atol=1e-5, err_msg='the equation')
        theirs = OneClassSVM(kernel=kernel, gamma=d.gamma_, nu=nu, tol=1e-6).fit(ROWS)
        expected = -theirs.decision_function(QUERY) / (nu * len(X))
        close(s, expected, atol=1e-5, err_msg='scikit-learn')
        assert (train > 1e-5).mean() <= nu <= len(a) / len(X), 'the nu-property'


def unscaled(self, z):
    OCSVM.learn_features(self, z)
    self.alpha_, self.rho_ = self.alpha_ * self.nu * len(z), self.rho_ * self.nu * len(z)


def distance_not_squared(self, a, b):
    return a @ b.T if self.kernel == 'linear' else (-self.gamma_ * torch.cdist(a, b)).exp()


def svm_score(name, f):
    """The class with the score f(detector, features, score)."""
    score = lambda self, z: f(self, z, OCSVM.score_features(self, z))
    return changed(OCSVM, name, score_features=score)


def test_fit_leaves_the_global_generator_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    for d in (OCSVM(), IForest(n_trees=3), GMM(), SVDD()): d.set_params(**QUIET).fit(X)
    assert np.array_equal(before, np.random.get_state()[1]) and np.random.get_state()[2] == 624


# ---------------------------------------------------------------- SVDD
@pytest.mark.parametrize('seed', range(4))
def test_smo_against_a_general_solver(seed):
    z, most = np.random.default_rng(seed).normal(size=(9, 4)), (.2, .35, 1., 5.)[seed]
    K = z @ z.T
    a = smo(K, most)
    f, slope = lambda a: a @ K @ a - a @ K.diagonal(), lambda a: 2 * K @ a - K.diagonal()
    one = dict(type='eq', fun=lambda a: a.sum() - 1, jac=lambda a: np.ones(9))
    how = dict(method='SLSQP', options=dict(ftol=1e-12, maxiter=500))
    best = minimize(f, np.full(9, 1 / 9), jac=slope, bounds=[(0, most)] * 9, constraints=one, **how)
    assert np.isclose(a.sum(), 1) and a.min() >= 0 and a.max() <= most and best.success
    close(f(a), best.fun, atol=1e-5)


def test_smo_with_copies_and_without_patience():
    K = np.exp(-cdist(*[np.repeat(random_points(10), 3, 0)] * 2, 'sqeuclidean'))
    assert np.isclose(smo(K, .2).sum(), 1)
    with pytest.raises(RuntimeError, match='SVDD'): smo(K, .2, steps=2)


def check_svdd(cls):
    """The sphere: strong duality, who is inside, on and outside, the distance from an explicit
    center, and twice the one-class SVM."""
    for nu, kernel in ((.1, 'rbf'), (.3, 'rbf'), (.2, 'linear')):
        d = cls(nu=nu, kernel=kernel, **QUIET).fit(X)
        S, a, most = d.support_.numpy(), d.alpha_.numpy(), 1 / (nu * len(X))
        assert np.isclose(a.sum(), 1) and a.min() > 0 and a.max() <= most + 1e-12, 'the constraints'
        s = d.decision_function(X).astype(float)
        at = d.decision_function(np.clip(S, 0, 1).reshape(-1, 1, 8, 8))
        full = a >= most * (1 - 1e-9)
        assert np.abs(at[~full]).max(initial=0) < 1e-4, 'on the sphere'
        assert at[full].min(initial=0) > -1e-4, 'outside the sphere'
        assert (s > 1e-4).mean() <= nu <= len(a) / len(X), 'the nu-property'
        own = (S**2).sum(1) if kernel == 'linear' else np.ones(len(S))
        primal = d.radius_**2 + np.maximum(s, 0).sum() * most
        close(primal, a @ own - d.center_square_, atol=1e-3, err_msg='duality')
        if kernel == 'linear':
            explicit = ((QUERY - a @ S)**2).sum(1) - d.radius_**2
            close(d.decision_function(OTHER), explicit, rtol=1e-4, atol=1e-4, err_msg='center')
        else:
            theirs = OneClassSVM(gamma=d.gamma_, nu=nu, tol=1e-7).fit(ROWS)
            twice = -2 * theirs.decision_function(QUERY) / (nu * len(X))
            close(d.decision_function(OTHER), twice, atol=1e-5, err_msg='twice the OC-SVM')


def svdd_learned(name, **values):
    """The class with other values of what it has learned, each a function of the detector."""
    def learn_features(self, z):
        SVDD.learn_features(self, z)
        for key, value in values.items(): setattr(self, f'{key}_', value(self))
    return changed(SVDD, name, learn_features=learn_features)


def svdd_score(name, f):
    """The class with the score f(detector, squared distances)."""
    return changed(SVDD, name, score_features=lambda self, z: f(self, self.squared_distances(z)))


def constant_diagonal(self, z):
    return 1 - 2 * self.gram(z, self.support_) @ self.alpha_ + self.center_square_


def cross_term_once(self, z):
    return SVDD.squared_distances(self, z) + self.gram(z, self.support_) @ self.alpha_


def constant_in_smo(K, most):
    """The weights for a kernel whose diagonal is its mean everywhere."""
    return smo(K - np.diag(K.diagonal()) + np.eye(len(K)) * K.diagonal().mean(), most)


@pytest.mark.parametrize('broken, why', [
    (constant_in_smo, 'on the sphere|outside the sphere'),
    (lambda K, most: smo(K, 1.), 'the constraints'),
    (lambda K, most: smo(K, most, tolerance=.3), 'on the sphere|outside the sphere')],
    ids=['no diagonal', 'limit forgotten', 'stopped early'])
def test_mutant_of_the_solver_is_caught(broken, why):
    with mutant(classical, smo=broken): assert_caught(check_svdd, SVDD, why)


@pytest.mark.parametrize('settings', [
    dict(), dict(components=6, gamma='median', nu=.5), dict(gamma=2., nu=.03),
    dict(components=.8, gamma='scale')])
def test_svdd_is_twice_the_one_class_svm_for_rbf(settings):
    close(scored(SVDD, **settings), 2 * scored(OCSVM, **settings), atol=3e-6)


def test_they_differ_for_the_linear_kernel():
    points = as_images(random_points(80))
    a, b = (cls(kernel='linear', **QUIET).fit(points) for cls in (OCSVM, SVDD))
    corner, middle = as_images([[1, 1]]), as_images([[.5, .5]])
    assert a.decision_function(corner) < a.decision_function(middle)
    assert b.decision_function(corner) > 0


def test_smallest_circle_by_hand():
    triangle = [[.1, .1], [.9, .1], [.5, .2]]  # obtuse: the circle of its longest side
    d = SVDD(kernel='linear', nu=.01, **QUIET).fit(as_images(triangle))
    assert np.isclose(d.radius_, .4, rtol=1e-3)
    assert np.isclose(d.decision_function(as_images([[.5, .1]]))[0], -.16, atol=1e-3)


def test_too_many_images_for_the_kernel_matrix_are_refused():
    with pytest.raises(ValueError, match='max_gb must be at least 7.2, the GB for the kernel'):
        SVDD().learn_features(torch.zeros(30_000, 1))


# ---------------------------------------------------------------- isolation forest
def check_forest(cls):
    for params in (dict(n_trees=20), dict(n_trees=7, max_samples=32, seed=5)):
        d = cls(**params, **QUIET).fit(X)
        same = dict(max_samples=min(d.max_samples, len(X)), random_state=d.seed)
        theirs = IsolationForest(n_estimators=d.n_trees, **same).fit(ROWS)
        for x, rows in ((OTHER, QUERY), (X, ROWS)):
            expected = -theirs.score_samples(rows)
            close(d.decision_function(x), expected, atol=1e-6, err_msg='scikit-learn')


def walk(self, z, fewer=0, children=('left_', 'right_')):
    """As `IForest.score_features`: the mutants differ from this by one thing."""
    tables = self.feature_, self.cut_, *(getattr(self, c) for c in children), self.path_
    lengths = path_lengths(z.float().double(), *tables, self.levels_ - fewer)
    return isolation_score(lengths, self.path_unit_)


def forest(name, score): return changed(IForest, name, score_features=score)


def exchanged(self, z): return walk(self, z, children=('right_', 'left_'))


def not_normalized(self, z): return IForest.score_features(self, z).log2() * self.path_unit_


def test_a_walk_of_one_step_fewer_is_one_change():
    check_forest(forest('Walk', walk))


def without_the_leafs_share(tree):
    *tables, path = tree_table(tree)
    return *tables, path - average_path(tree.n_node_samples)


def test_a_table_without_the_leafs_share_is_caught():
    with mutant(classical, tree_table=without_the_leafs_share):
        assert_caught(check_forest, IForest, 'scikit-learn')


def test_average_path_is_the_mean_depth_of_random_trees():
    harmonic = lambda n: sum(1 / i for i in range(1, n + 1))
    for n in (10, 256):                                      # up to the logarithm's error
        exact = 2 * harmonic(n - 1) - 2 * (n - 1) / n
        assert np.isclose(average_path(n), exact, atol=.12)
    assert [float(average_path(n)) for n in (1, 2)] == [0, 1]
    assert (np.diff(average_path(np.arange(2, 50))) > 0).all()


# ---------------------------------------------------------------- kernel density
def density(q, rows, h, leave_out=False):
    """-log of the density (7) at q, without the bump of the image itself if `leave_out`."""
    logs = -cdist(q, rows, 'sqeuclidean') / (2 * h**2)
    if leave_out: np.fill_diagonal(logs, -np.inf)
    constant = np.log(len(rows) - leave_out) + .5 * rows.shape[1] * np.log(2 * np.pi * h**2)
    return constant - logsumexp(logs, axis=1)


def check_kde(cls):
    for bandwidth in (.3, 'likelihood'):
        d = cls(bandwidth=bandwidth, **QUIET).fit(X)
        s, h = d.decision_function(OTHER), d.bandwidth_
        close(s, density(QUERY, ROWS, h), rtol=1e-4, err_msg='equation (7)')
        theirs = KernelDensity(bandwidth=h, leaf_size=len(X)).fit(ROWS).score_samples(QUERY)
        close(s, -theirs, rtol=1e-4, err_msg='scikit-learn, one leaf')
        left_out = density(ROWS, ROWS, h, leave_out=True)
        training, _ = d.training_scores(d.as_batches(X))
        close(training, left_out, rtol=1e-4, err_msg='own bump left out')
        quantile = np.quantile(left_out.astype('float32'), .95)
        close(d.threshold_, quantile, rtol=1e-4, err_msg='threshold')


def kde_score(name, f):
    """The class with the score f(detector, score, features)."""
    score = lambda self, z: f(self, KDE.score_features(self, z), z)
    return changed(KDE, name, score_features=score)


def kde_training(name, scores):
    """The class with other scores of the training images, f(detector, data)."""
    training = lambda self, data: (scores(self, data), np.zeros(len(self.bank_)))
    return changed(KDE, name, training_scores=training)


def no_constant(d, s, z): return s - .5 * z.shape[1] * np.log(2 * np.pi * d.bandwidth_**2)


def no_half(self, z):
    square = (torch.cdist(z, self.bank_) / self.bandwidth_).square()
    return -square - .5 * z.shape[1] * np.log(2 * np.pi * self.bandwidth_**2)


def own_kept(self, data): return KDE.score_features(self, self.bank_).numpy()


def divided_by_n(self, data): return KDE.training_scores(self, data)[0] + 1


def test_bandwidth_is_the_likeliest():
    z = torch.tensor(ROWS[:, 10:30])
    h = likely_bandwidth(z)
    loss = lambda h: density(z.numpy(), z.numpy(), h, leave_out=True).mean()
    assert loss(h) < min(loss(.9 * h), loss(1.1 * h))
    assert np.isclose(likely_bandwidth(7 * z), 7 * h, rtol=1e-3)
    assert np.isclose(likely_bandwidth(z.repeat(3, 1)), h, rtol=1e-3)


def test_one_chain_from_the_mean_image_to_the_nearest_neighbor():
    batch, ranks = torch.tensor(OTHER).double(), lambda s: np.argsort(np.argsort(s))
    score = lambda d: d.set_params(**QUIET).fit(X).image_score(batch).numpy()
    same_ranking = lambda a, b: np.corrcoef(*(ranks(score(d)) for d in (a, b)))[0, 1] > .999
    assert same_ranking(OCSVM(nu=.999, gamma=.5), KDE(bandwidth=1.))
    assert same_ranking(SVDD(nu=.999, gamma=.5), KDE(bandwidth=1.))
    assert same_ranking(KDE(bandwidth=50.), MeanImage())
    assert same_ranking(GMM(variance_floor=1e5), MeanImage())
    assert same_ranking(KDE(bandwidth=.1), KNN(k=1))


# ---------------------------------------------------------------- Gaussian mixture
def check_gmm(cls):
    floor = .01 * ROWS.var(0).mean()
    one = multivariate_normal(ROWS.mean(0), np.cov(ROWS.T, bias=True) + floor * np.eye(64))
    close(scored(cls), -one.logpdf(QUERY), rtol=1e-3, err_msg='one Gaussian')
    theirs = GaussianMixture(3, reg_covar=floor, random_state=2, max_iter=200).fit(ROWS)
    three = scored(cls, n_components=3, seed=2)
    close(three, -theirs.score_samples(QUERY), rtol=1e-4, err_msg='three Gaussians')


def gmm_learned(name, key, f):
    """The class with another value of what it has learned, a function of the right one."""
    def learn_features(self, z):
        GMM.learn_features(self, z)
        setattr(self, key, f(getattr(self, key)))
    return changed(GMM, name, learn_features=learn_features)


def gmm_score(name, f):
    """The class with the score f(detector, score)."""
    return changed(GMM, name, score_features=lambda self, z: f(self, GMM.score_features(self, z)))


def no_determinant(d, s): return s + d.roots_.diagonal(dim1=1, dim2=2).log().sum(1).mean()


def diagonal(roots): return torch.diag_embed(roots.diagonal(dim1=1, dim2=2))


def test_the_floor_is_relative():
    at = lambda f: GMM(**QUIET).fit(f * X).image_score(torch.tensor(f * OTHER))
    torch.testing.assert_close(at(1) + 64 * np.log(.1), at(.1), rtol=1e-3, atol=1e-2)


# ---------------------------------------------------------------- mutants
CHECKS = dict(features=(check_features, FeatureKNN), ocsvm=(check_ocsvm, OCSVM),
              svdd=(check_svdd, SVDD), forest=(check_forest, IForest), kde=(check_kde, KDE),
              gmm=(check_gmm, GMM))


@pytest.mark.parametrize('check, cls', CHECKS.values(), ids=CHECKS)
def test_score(check, cls): check(cls)


# (name of the check, why it must fail) -> the broken classes
MUTANTS = {
    ('features', 'components'): (
        changed(FeatureKNN, 'NotCentered', features=not_centered),
        changed(FeatureKNN, 'CenteredByTheBatch', features=from_the_batch),
        changed(FeatureKNN, 'ComponentsIgnored', features=ignored)),
    ('ocsvm', 'the equation'): (
        svm_score('OtherSign', lambda d, z, s: -s), svm_score('NoRho', lambda d, z, s: s - d.rho_),
        svm_score('Unweighted', lambda d, z, s: d.rho_ - d.gram(z, d.support_).mean(1)),
        changed(OCSVM, 'DistanceNotSquared', gram=distance_not_squared)),
    ('ocsvm', 'the constraints'): (changed(OCSVM, 'Unscaled', learn_features=unscaled),),
    ('svdd', 'on the sphere'): (
        svdd_score('NoRadius', lambda d, distance: distance),
        svdd_score('RadiusNotSquared', lambda d, distance: distance - d.radius_),
        changed(SVDD, 'DiagonalTakenAsConstant', squared_distances=constant_diagonal),
        svdd_learned('NoSquareOfTheCenter', center_square=lambda d: 0.),
        svdd_learned('LargerRadius', radius=lambda d: 1.05 * d.radius_),
        svdd_learned('SmallerRadius', radius=lambda d: .95 * d.radius_),
        svdd_learned('EqualWeights', alpha=lambda d: torch.full_like(d.alpha_, 1 / len(d.alpha_)))),
    ('svdd', 'duality'): (changed(SVDD, 'CrossTermOnce', squared_distances=cross_term_once),),
    ('svdd', 'twice the OC-SVM'): (
        svdd_score('DistanceNotSquared', lambda d, distance: distance.sqrt() - d.radius_),),
    ('svdd', 'outside the sphere'): (svdd_score('OtherSign', lambda d, s: d.radius_**2 - s),),
    ('forest', 'scikit-learn'): (
        forest('OtherSign', lambda self, z: -IForest.score_features(self, z)),
        forest('OneLevelShort', lambda self, z: walk(self, z, fewer=1)),
        forest('ChildrenExchanged', exchanged), forest('NotNormalized', not_normalized)),
    ('kde', 'equation'): (
        kde_score('OtherSign', lambda d, s, z: -s), kde_score('NoConstant', no_constant),
        kde_score('SumForMean', lambda d, s, z: s - np.log(len(d.bank_))),
        changed(KDE, 'NoHalf', log_bumps=no_half)),
    ('kde', 'own bump left out'): (
        kde_training('OwnBumpKept', own_kept), kde_training('DividedByN', divided_by_n)),
    ('gmm', 'one Gaussian'): (
        gmm_score('OtherSign', lambda d, s: -s), gmm_score('NoDeterminant', no_determinant),
        gmm_learned('RootTransposed', 'roots_', lambda roots: roots.mT),
        gmm_learned('MeansForgotten', 'means_', lambda means: means * 0),
        gmm_learned('Diagonal', 'roots_', diagonal)),
    ('gmm', 'three Gaussians'): (
        gmm_learned('WeightsForgotten', 'log_weights_', lambda weights: weights * 0),)}


@each_mutant(MUTANTS)
def test_mutant_is_caught(why, broken):
    name, reason = why
    assert_caught(CHECKS[name][0], broken, reason)


# ---------------------------------------------------------------- the contract, wrong use, drawing
SETTINGS = [SVDD(nu=.3), SVDD(kernel='linear'), IForest(n_trees=30), KDE(components=8.),
         GMM(components=.9, n_components=2), FeatureKNN(components=10)]


@pytest.mark.parametrize('detector', SETTINGS, ids=lambda d: f'{type(d).__name__}, {d.components}')
def test_contract_of_other_settings(detector): check_detector(detector)


METHODS = OCSVM, SVDD, IForest, KDE, GMM, FeatureKNN
WRONG = {OnFeatures: dict(components=(0, -1, 2.5, 'all', True, float('nan'))),
         Kernelized: dict(nu=(0, 1, -.1, 1.5, '.1'), gamma=(0, -1, 'auto', True), kernel=('poly',)),
         IForest: dict(n_trees=(0,), max_samples=(1,)), KDE: dict(bandwidth=(0, 'scott')),
         GMM: dict(n_components=(0, 81), variance_floor=(0,))}
WRONG_USE = [(method, name, value) for method in METHODS for base, wrong in WRONG.items()
             if issubclass(method, base) for name, values in wrong.items() for value in values]


@pytest.mark.parametrize('method, name, value', WRONG_USE)
def test_wrong_values_are_refused(method, name, value):
    with pytest.raises(ValueError, match=rf'\b{name} must'): method(**{name: value}, **QUIET).fit(X)


@pytest.mark.parametrize('method', METHODS)
def test_too_few_images_are_refused(method):
    for images, components, words in (
            (X[:6], 20, 'got 20 for 6 images'), (X, 65, 'got 65 for 80 images'),
            (np.full((9, 8, 8), .5), None, 'images must differ'), (X[:1], None, '2 images')):
        with pytest.raises(ValueError, match=words):
            method(components=components, **QUIET).fit(images)


def test_copies_do_no_harm():
    twins = np.repeat(X[:2], 20, 0)
    for d in (OCSVM(), SVDD(), IForest(n_trees=5), KDE(), GMM(), FeatureKNN(), SVDD(components=1),
              KDE(components=1), OCSVM(nu=.9)):
        assert np.isfinite(d.set_params(**QUIET).fit(twins).decision_function(OTHER)).all(), d
    with pytest.raises(ValueError, match='n_components must .* different images; got 3 for 2'):
        GMM(n_components=3, **QUIET).fit(twins)


def test_boundary_runs_where_the_score_equals_the_level():
    points = random_points(60)
    d = SVDD(kernel='linear', **QUIET).fit(as_images(points))
    center = (d.alpha_ @ d.support_).numpy()
    for level in (None, 0.):
        ax = show_plane(d, points, y=np.repeat([0, 1], 30), level=level, steps=120)
        contour, = (c for c in ax.collections if isinstance(c, QuadContourSet) and not c.filled)
        line = np.concatenate([p.vertices for p in contour.get_paths()])
        radius = (d.radius_**2 + (d.threshold_ if level is None else level))**.5
        close(np.linalg.norm(line - center, axis=1), radius, rtol=.01)
        dots = [len(c.get_offsets()) for c in ax.collections if isinstance(c, PathCollection)]
        assert dots == [30, 30]


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize('kind, takes', [(SVDD, 'kernel'), (OCSVM, 'distances'), (KDE, 'distances'),
                                         (GMM, 'covariances')])
def test_a_table_of_pairs_that_does_not_fit_is_refused_before_it_is_made(kind, takes):
    x = np.random.default_rng(0).random((20, 4, 4))
    with pytest.raises(ValueError, match=f'max_gb must be at least .*{takes}'):
        kind(max_gb=1e-9, verbose=False).fit(x)
    kind(max_gb=1e-5, verbose=False).fit(x)
    kind(verbose=False).set_params(max_gb=1e-5).fit(x)
    with pytest.raises(ValueError, match='max_gb must be a number'): kind(max_gb=0).fit(x)


def test_a_gaussian_on_large_photographs_says_what_it_would_take():
    x = np.random.default_rng(0).random((3, 3, 256, 256), dtype='float32')
    with pytest.raises(ValueError, match='at least 309, the GB for covariances of 196608'):
        GMM(verbose=False).fit(x)
