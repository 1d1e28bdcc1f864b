"""Compact wrapping points: brute force, closed forms and properties; bounded memory; and mutants of the module that each check must catch."""
import inspect
import sys
import tracemalloc
import types

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist, pdist

from ad_course import wrapping as W

G = np.random.default_rng(0)
P2, P5 = G.normal(size=(60, 2)), G.normal(size=(40, 5))
IMAGES = G.random((30, 1, 4, 4), dtype='float32')


def candidates(points, epsilon):
    """All 2nd candidates, parent by parent, with parent, axis and sign."""
    return [(x + sign * epsilon * axis, i, k, sign) for i, x in enumerate(points) for k, axis in enumerate(np.eye(points.shape[1])) for sign in (1, -1)]


def prim(points):
    """Edges of the minimal spanning tree, by Prim's algorithm."""
    far, left, edges = cdist(points, points), set(range(1, len(points))), []
    while left:
        inside = [i for i in range(len(points)) if i not in left]
        i = min(left, key=lambda j: far[j, inside].min())
        edges.append(far[i, inside].min()); left.remove(i)
    return np.sort(edges)


# ---------------------------------------------------------------- checks, as functions of the module
def check_brute(w):
    for points, epsilon, r in ((P2, .4, 2.), (P2, .4, 1.1), (P5, 1.6, 1.05), (P5[:, :1], .3, 3.), (G.normal(size=(50, 20)), 3., 1.01)):
        made, radius = w.wrap(points, epsilon, r=r), epsilon / (r * points.shape[1])**.5
        z, parents, axes, signs = (np.array(a) for a in zip(*candidates(points, epsilon)))
        keep = cdist(z, points).min(1) > radius
        assert np.isclose(made.radius, radius) and made.epsilon == epsilon, 'lengths'
        assert keep.sum() == len(made.points), f'{len(made.points)} points, {keep.sum()} expected'
        for name, a, b in zip(('points', 'parents', 'axes', 'signs'), made, (z, parents, axes, signs)): assert np.allclose(a, b[keep]), name


def check_promises(w):
    for points in (P2, P5, P2 + 1e6, P2 * 1e-6):
        made = w.wrap(points)
        assert len(made.points) and cdist(made.points, points).min() > made.radius, 'a wrapping point in the cover'
        steps = made.points - points[made.parents]
        assert np.allclose(np.linalg.norm(steps, axis=1), made.epsilon, rtol=1e-3 if points.max() > 1e3 else 1e-9), 'distance to the parent'
        assert np.allclose(steps[np.arange(len(steps)), made.axes], made.signs * made.epsilon, rtol=1e-3), 'axis and sign'


def check_hull(w):
    u = G.normal(size=(500, 5)); u /= np.linalg.norm(u, axis=1, keepdims=True)
    for points, epsilon in ((P5, .7), (P5 * [1, 1, 1, .01, .01], .2)):
        gain = (w.wrapping_points(points, epsilon, r=1.001) @ u.T).max(0) - (points @ u.T).max(0)
        assert gain.min() >= epsilon / 5**.5 - 1e-9 and gain.max() <= epsilon + 1e-9, f'gain {gain.min()} to {gain.max()}'


def check_radius(w):
    assert np.isclose(w.cover_radius(3., 9, 4.), .5) and np.isclose(w.cover_radius(1., 2), .5)
    line = np.stack([np.arange(-60, 61), -np.arange(-60, 61)], 1) / 40
    sides = lambda r: sum(abs(sum(z)) > .1 for z in w.wrapping_points(line, 1., r=r))
    assert sides(1.01) == 4 * 121, 'with r > 1 the sides of a slanting stroke are wrapped'


def check_epsilon(w):
    for points in (P2, P5, np.concatenate([P2, P2 + 20])):
        edges, d = prim(points), points.shape[1]
        assert np.isclose(w.density_epsilon(points), edges[-1]), 'chained'
        assert np.isclose(w.density_epsilon(points, 'connected', r=3.), edges[-1] / 2 * (3 * d)**.5), 'connected'
        far = cdist(points, points); np.fill_diagonal(far, np.inf)
        assert np.isclose(w.density_epsilon(points, 'nearest'), far.min(1).mean()), 'nearest'
        connected = w.cover_radius(w.density_epsilon(points, 'connected'), d)
        assert w.pieces(points, connected) == 1 and w.pieces(points, .999 * connected) == 2, 'the smallest cover in one piece'
        assert w.pieces(points, edges[10] / 2) == 1 + (edges > edges[10] + 1e-6).sum(), 'pieces'
    two = np.concatenate([P2, P2 + 20])
    assert w.density_epsilon(two, share=.5) < 5 < w.density_epsilon(two, share=.51), 'share'


def check_copies(w):
    points = np.concatenate([P2[:3], P2[:3], P2[2:20], -np.zeros((1, 2)), np.zeros((1, 2))])
    made, once = w.wrap(points, .5), w.wrap(points[[0, 1, 2, *range(7, 25)]], .5)
    assert np.array_equal(made.points, once.points), 'a copy counts'
    assert not {3, 4, 5, 6, 25} & set(made.parents.tolist()), 'the parent is the first of its copies'
    assert np.allclose(np.linalg.norm(made.points - points[made.parents], axis=1), .5), 'parents index the rows as given'
    assert w.density_epsilon(points, 'nearest') == w.density_epsilon(np.unique(points + 0., axis=0), 'nearest'), 'distance to another point'
    assert len(w.wrap([[1., 2, 3]], .5).points) == 6, 'a single point'


def check_sample(w):
    whole = {tuple(z) for z in w.wrapping_points(P5, .7)}
    seen = set()
    for seed in range(6):
        made = w.wrap(P5, .7, n_max=40, seed=seed)
        assert len({tuple(z) for z in made.points} & whole) == len(made.points) == 40, 'no sample of the wrapping points'
        assert len(set(made.parents.tolist())) > 30, 'crowded on few parents'
        seen |= set(zip(made.axes.tolist(), made.signs.tolist()))
        assert np.array_equal(made.points, w.wrap(P5, .7, n_max=40, seed=seed).points), 'not the same twice'
    assert len(seen) == 10, f'moves that occur: {sorted(seen)}'
    assert {tuple(z) for z in w.wrapping_points(P5, .7, n_max=10**6, seed=1)} == whole, 'a large sample is all'
    assert not np.array_equal(w.wrapping_points(P5, .7, n_max=40, seed=0), w.wrapping_points(P5, .7, n_max=40, seed=1)), 'the seed does nothing'


def check_symmetries(w):
    order, q = G.permutation(60), np.array([[0, -1], [1, 0]])
    base = w.wrap(P2)
    sets = lambda a: {tuple(z) for z in np.round(a, 8) + 0.}
    assert sets(base.points) == sets(w.wrap(P2 + [4, -8]).points - [4, -8]), 'translation'
    assert sets(base.points) == sets(w.wrap(P2 @ q).points @ q.T), 'quarter turn'
    assert sets(base.points) == sets(w.wrap(P2 * 4).points / 4), 'unit'
    mixed = w.wrap(P2[order])
    assert {(*z, p) for z, p in zip(base.points.tolist(), base.parents)} == {(*z, order[p]) for z, p in zip(mixed.points.tolist(), mixed.parents)}, 'permutation'


def check_chunks(w):
    for options in ({}, dict(n_max=30)):
        made = [w.wrap(P5, .7, memory=m, **options) for m in (1e-4, 1e-2, 32)]
        for other in made[1:]: assert all(np.array_equal(a, b) for a, b in zip(made[0], other)), 'chunks change the result'


def check_images(w):
    for space in ('pixels', 'pca'):
        maker = w.ImageWrapper(space=space, components=6).fit(IMAGES)
        images, parents = maker.wrap()
        assert images.shape[1:] == (1, 4, 4) and images.dtype == np.float32 and len(images) == len(parents) > 0
        steps = (images - IMAGES[parents]).reshape(len(images), -1)
        assert np.allclose(np.linalg.norm(steps, axis=1), maker.epsilon_, rtol=1e-4), 'distance in pixels'
        assert not w.in_cover(maker.reduce(images), maker.codes_, maker.cover_radius_ * .9999).any(), 'in the cover'
        assert np.isclose(maker.epsilon_, w.density_epsilon(maker.reduce(IMAGES)))
    rows = IMAGES.reshape(30, -1).astype(float)
    u, s, v = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert np.allclose(np.abs(maker.codes_), np.abs(u * s)[:, :6], atol=1e-5), 'coordinates are principal components'
    assert np.allclose(steps @ v[:6].T @ v[:6], steps, atol=1e-5), 'the residual of the parent'
    flat, parents = w.ImageWrapper(components=6, keep_residual=False).fit(IMAGES).wrap()
    off = flat.reshape(len(flat), -1) - rows.mean(0)
    assert np.allclose(off @ v[:6].T @ v[:6], off, atol=1e-5), 'residual not lost'
    for space in ('pixels', 'pca'):
        maker = w.ImageWrapper(space=space, components=6, clip=True).fit(IMAGES)
        images, _ = maker.wrap()
        assert 0 <= images.min() and images.max() <= 1 and not w.in_cover(maker.reduce(images), maker.codes_, maker.cover_radius_).any(), 'clipped into the cover'
    black = w.ImageWrapper(space='pixels', clip=True, epsilon=.5).fit(np.round(IMAGES))
    images, parents = black.wrap()
    assert (np.abs(images - np.round(IMAGES)[parents]).reshape(len(images), -1).max(1) > .4).all(), 'a clipped parent is no wrapping point'


CHECKS = [check_brute, check_promises, check_hull, check_radius, check_epsilon, check_copies, check_sample, check_symmetries, check_chunks, check_images]


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_the_module(check): check(W)


# ---------------------------------------------------------------- mutants
MUTANTS = {
    'candidates in the cover kept': ('keep = ~cover.holds(z)', 'keep = np.ones(len(z), bool)', check_brute),
    'against the own parent only': ('keep = ~cover.holds(z)', 'keep = np.linalg.norm(z - rows[parents], axis=1) > cover.radius', check_promises),
    'against half of the data': ('.fit(rows - self.origin)', '.fit((rows - self.origin)[::2])', check_promises),
    'those in the cover returned': ('keep = ~cover.holds(z)', 'keep = cover.holds(z)', check_promises),
    'no step back': ('(1 - 2 * (moves % 2))\n    return z', '1\n    return z', check_hull),
    'no step along the last axis': ('moves // 2] += epsilon', 'np.minimum(moves // 2, max(0, rows.shape[1] - 2))] += epsilon', check_hull),
    'steps too short': ('+= epsilon *', '+= .9 * epsilon *', check_images),
    'steps of epsilon by root d': ('+= epsilon *', '+= epsilon / rows.shape[1]**.5 *', check_copies),
    'all axes at once': ('z[np.arange(len(z)), moves // 2] += epsilon * (1 - 2 * (moves % 2))', 'z += (epsilon * (1 - 2 * (moves % 2)))[:, None]', check_hull),
    'radius without the dimension': ('epsilon / math.sqrt(r * dim)', 'epsilon / math.sqrt(r)', check_brute),
    'radius without r': ('epsilon / math.sqrt(r * dim)', 'epsilon / math.sqrt(dim)', check_radius),
    'radius without the root': ('epsilon / math.sqrt(r * dim)', 'epsilon / (r * dim)', check_brute),
    'radius is epsilon': ('epsilon / math.sqrt(r * dim)', 'epsilon', check_hull),
    'radius squared in the comparison': ('<= self.radius * (1 + 1e-9)', '<= self.radius**2', check_brute),
    'queries not centered': ('self.search.kneighbors(rows[i:i + self.chunk] - self.origin, k)', 'self.search.kneighbors(rows[i:i + self.chunk], k)', check_symmetries),
    'shortest edge': ('longest = lengths[sizes >= share * len(some)][0]', 'longest = lengths[0]', check_epsilon),
    'share not heeded': ('longest = lengths[sizes >= share * len(some)][0]', 'longest = lengths[-1]', check_epsilon),
    'connected without the half': ('**-1 * longest / 2', '**-1 * longest', check_epsilon),
    'connected without the root': ("cover_radius(1, rows.shape[1], r)**-1 * longest / 2", 'longest / 2', check_epsilon),
    'a point is its own neighbor': ('return 2 * Cover(rows, 0).distance(some, k=2).mean()', 'return Cover(rows, 0).distance(some, k=2).mean()', check_epsilon),
    'balls touch at one radius': ('joins(rows)[0] > 2 * radius', 'joins(rows)[0] > radius', check_epsilon),
    'copies count': ('    return np.fromiter(first.values(), np.int64)', '    return np.arange(len(rows))', check_copies),
    'minus zero is another number': ('row + 0., digest_size', 'row, digest_size', check_copies),
    'parents of the distinct rows': ('found = z, first[parents],', 'found = z, parents,', check_copies),
    'axes are moves': ('first[parents], moves // 2,', 'first[parents], moves,', check_brute),
    'signs turned over': ('1 - 2 * (moves % 2)\n    if', '2 * (moves % 2) - 1\n    if', check_promises),
    'sample from the front': ('visiting(n, d, rng if n_max else None)', 'visiting(n, d, None)', check_sample),
    'one move for all parents': ('start = rng.permutation(n), rng.permutation(2 * d), rng.integers(2 * d, size=n)', 'start = rng.permutation(n), np.arange(2 * d), np.zeros(n, int)', check_sample),
    'stops after one chunk': ('if n_max and m >= n_max: break', 'break', check_chunks),
    'n_max not heeded': ('[np.concatenate(a)[:n_max]', '[np.concatenate(a)', check_sample),
    'residual lost': ('elif self.keep_residual:', 'elif False:', check_images),
    'residual always kept': ('elif self.keep_residual:', 'else:\n            images = 0\n        if self.space == "pca":', check_images),
    'mean not removed': ('(rows - self.mean_) @ self.components_.T', 'rows @ self.components_.T', check_images),
    'clip without asking again': ('return images[outside], w.parents[outside]', 'return images, w.parents', check_images),
    'clip does not clip': ('images = np.clip(images, 0, 1)', 'images = images', check_images),
}


@pytest.mark.parametrize('name', MUTANTS)
def test_mutants_are_caught(name):
    old, new, check = MUTANTS[name]
    source = inspect.getsource(W)
    assert source.count(old) == 1, f'{source.count(old)} times in the module: {old}'
    mutant = types.ModuleType('wrapping_mutant')
    sys.modules[mutant.__name__] = mutant
    try:
        exec(compile(source.replace(old, new), mutant.__name__, 'exec'), mutant.__dict__)
        with pytest.raises((AssertionError, ValueError, IndexError)): check(mutant)
    finally: del sys.modules[mutant.__name__]


# ---------------------------------------------------------------- properties
points_of = st.tuples(st.integers(1, 14), st.integers(1, 4)).flatmap(lambda s: arrays(np.float64, s, elements=st.integers(-40, 40).map(lambda i: i / 8)))


@given(points_of, st.sampled_from([.25, .7, 1., 3.]), st.sampled_from([1.01, 2., 5.]), st.sampled_from([np.float32, np.float64]))
def test_any_points(points, epsilon, r, dtype):
    points = points.astype(dtype)
    made, radius = W.wrap(points, epsilon, r=r), epsilon / (r * points.shape[1])**.5
    z = np.unique(np.array([c[0] for c in candidates(points.astype(float), epsilon)]), axis=0)
    gap = cdist(z, points).min(1)
    assume(not (np.abs(gap - radius) < 1e-5).any())     # on the sphere rounding decides
    assert made.points.dtype == dtype and cdist(made.points, points).min() > radius * (1 - 1e-6)
    assert {tuple(a) for a in np.round(made.points.astype(float), 4) + 0.} == {tuple(a) for a in np.round(z[gap > radius], 4) + 0.}
    assert np.allclose(np.linalg.norm(made.points - points[made.parents], axis=1), epsilon, rtol=1e-5)


@given(points_of, st.integers(0, 2**31))
def test_rotation(points, seed):
    points = np.unique(points, axis=0)
    assume(len(points) > 1)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(points.shape[1],) * 2))[0]
    for rule in ('connected', 'chained', 'nearest'): assert np.isclose(W.density_epsilon(points @ q, rule), W.density_epsilon(points, rule)), rule
    epsilon = W.density_epsilon(points)
    u = np.random.default_rng(seed).normal(size=(50, points.shape[1])); u /= np.linalg.norm(u, axis=1, keepdims=True)
    gain = (W.wrapping_points(points @ q, epsilon) @ u.T).max(0) - (points @ q @ u.T).max(0)
    assert gain.min() >= epsilon / points.shape[1]**.5 - 1e-9        # the guarantee does not depend on the axes, though the points do


def test_tensors_and_types():
    want = W.wrap(P2, .5)
    for given_points, dtype in ((torch.tensor(P2), torch.float64), (torch.tensor(P2, requires_grad=True), torch.float64), (torch.tensor(P2).float(), torch.float32)):
        made = W.wrap(given_points, .5)
        assert all(isinstance(a, torch.Tensor) for a in made[:4]) and made.points.dtype == dtype and not made.points.requires_grad
        assert np.allclose(made.points, want.points, atol=1e-6) and made.parents.dtype == torch.int64
    assert W.wrap([[1, 2], [3, 4]], 1).points.dtype == np.float64 and W.wrap(np.uint8([[0, 255], [3, 4]]), 1.).points.min() == -1
    assert isinstance(W.in_cover(torch.tensor(P2), torch.tensor(P2), .1), torch.Tensor)
    g = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert np.array_equal(*(W.wrapping_points(P2, .5, n_max=9, seed=a) for a in g))
    rng = np.random.default_rng(1)
    assert not np.array_equal(W.wrapping_points(P2, .5, n_max=9, seed=rng), W.wrapping_points(P2, .5, n_max=9, seed=rng))


def test_inputs_and_global_state_are_left_alone():
    points, state, torch_state = P2.copy(), np.random.get_state()[1].copy(), torch.get_rng_state()
    W.wrap(points, n_max=5)
    assert np.array_equal(points, P2) and np.array_equal(state, np.random.get_state()[1]) and torch.equal(torch_state, torch.get_rng_state())


def test_a_cover_of_ones_own_radius_may_swallow_all():
    disc = np.stack(np.meshgrid(np.arange(9.), np.arange(9.)), -1).reshape(-1, 2)
    made = W.wrap(disc, 1., radius=1.)
    assert made.points.shape == (0, 2) and len(made.parents) == 0
    assert len(W.wrap(disc, 1.).points) == 36


@pytest.mark.parametrize('use, words', [
    (lambda: W.wrap(P2[:0]), 'at least one'), (lambda: W.wrap(P2[0]), r'shape \(n, d\)'), (lambda: W.wrap([['a', 'b']]), 'numbers'), (lambda: W.wrap(P2 * np.inf), 'NaN or infinite'),
    (lambda: W.wrap(P2[:1]), 'give epsilon'), (lambda: W.wrap(P2[[0, 0, 0]]), 'give epsilon'), (lambda: W.wrap(P2, 0), 'epsilon'), (lambda: W.wrap(P2, float('nan')), 'epsilon'), (lambda: W.wrap(P2, True), 'epsilon'),
    (lambda: W.wrap(P2, 1, r=.5), 'r must'), (lambda: W.wrap(P2, share=0), 'share'), (lambda: W.wrap(P2, rule='all'), 'no rule'), (lambda: W.wrap(P2, 1, n_max=1.5), 'n_max'), (lambda: W.wrap(P2, 1, radius=-1), 'radius'),
    (lambda: W.Cover(P2, 1).holds(P5), '5 dimensions'), (lambda: W.wrap(G.random((1200, 784), dtype='float32'), 1.), 'GiB'),
    (lambda: W.wrap(np.float32([[1e9, 0], [0, 0]]), 1.), 'rounding'), (lambda: W.ImageWrapper(space='code').fit(IMAGES), 'space'), (lambda: W.ImageWrapper(components=31).fit(IMAGES), 'at most 16'),
    (lambda: W.ImageWrapper().fit(IMAGES * 0), 'the same')])
def test_wrong_use(use, words):
    with pytest.raises(ValueError, match=words): use()


def test_memory_is_bounded(monkeypatch):
    many, sizes = np.random.default_rng(0).normal(size=(20_000, 20)), []
    kneighbors = W.NearestNeighbors.kneighbors
    monkeypatch.setattr(W.NearestNeighbors, 'kneighbors', lambda self, q, *a: sizes.append(len(q)) or kneighbors(self, q, *a))
    tracemalloc.start()
    try:
        made = W.wrap(many, 1., n_max=1500, memory=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert len(made.points) == 1500 and max(sizes) <= 2**20 // (8 * 40), f'chunks of {max(sizes)}'
    assert peak < 5 * many.nbytes + 2**20 * 4, f'{peak / 2**20:.0f} MiB for {many.nbytes / 2**20:.0f} MiB of data; all candidates have {2 * many.size * 20 * 8 / 2**20:.0f}'


def test_the_estimate_measures_a_part_of_many_points(monkeypatch):
    seen, linkage = [], W.linkage
    monkeypatch.setattr(W, 'linkage', lambda rows, *a: seen.append(len(rows)) or linkage(rows, *a))
    many = np.random.default_rng(0).normal(size=(5000, 3))
    a, b = (W.density_epsilon(many, at_most=300, share=.9, seed=s) for s in (0, 0))
    assert seen == [300, 300] and a == b and a > W.density_epsilon(many, at_most=1500, share=.9) and pdist(many[:50]).max() > a
