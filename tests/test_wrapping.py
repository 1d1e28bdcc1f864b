"""Compact wrapping points: brute force, closed forms and properties; bounded memory.

And mutants of the module, each of which a check must catch."""
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
    axes = np.eye(points.shape[1])
    return [(x + sign * epsilon * axis, i, k, sign) for i, x in enumerate(points)
            for k, axis in enumerate(axes) for sign in (1, -1)]


def prim(points):
    """Edges of the minimal spanning tree, by Prim's algorithm."""
    far, left, edges = cdist(points, points), set(range(1, len(points))), []
    while left:
        inside = [i for i in range(len(points)) if i not in left]
        i = min(left, key=lambda j: far[j, inside].min())
        edges.append(far[i, inside].min()); left.remove(i)
    return np.sort(edges)


# ---------------------------------------------------------------- checks, functions of the module
def check_brute(w):
    wide = G.normal(size=(50, 20))
    for points, epsilon, r in ((P2, .4, 2.), (P2, .4, 1.1), (P5, 1.6, 1.05), (P5[:, :1], .3, 3.),
                               (wide, 3., 1.01)):
        made, radius = w.wrap(points, epsilon, r=r), epsilon / (r * points.shape[1])**.5
        z, parents, axes, signs = (np.array(a) for a in zip(*candidates(points, epsilon)))
        keep = cdist(z, points).min(1) > radius
        assert np.isclose(made.radius, radius) and made.epsilon == epsilon, 'lengths'
        assert keep.sum() == len(made.points), f'{len(made.points)} points, not {keep.sum()}'
        names = 'points', 'parents', 'axes', 'signs'
        for name, a, b in zip(names, made, (z, parents, axes, signs)):
            assert np.allclose(a, b[keep]), name


def check_promises(w):
    for points in (P2, P5, P2 + 1e6, P2 * 1e-6):
        made = w.wrap(points)
        assert len(made.points), 'no wrapping point'
        assert cdist(made.points, points).min() > made.radius, 'a wrapping point in the cover'
        steps, rtol = made.points - points[made.parents], 1e-3 if points.max() > 1e3 else 1e-9
        away = np.linalg.norm(steps, axis=1)
        assert np.allclose(away, made.epsilon, rtol=rtol), 'distance to the parent'
        along = steps[np.arange(len(steps)), made.axes]
        assert np.allclose(along, made.signs * made.epsilon, rtol=1e-3), 'axis and sign'


def directions(rng, *shape):
    u = rng.normal(size=shape)
    return u / np.linalg.norm(u, axis=1, keepdims=True)


def check_hull(w):
    u = directions(G, 500, 5)
    for points, epsilon in ((P5, .7), (P5 * [1, 1, 1, .01, .01], .2)):
        reach = lambda z: (z @ u.T).max(0)
        gain = reach(w.wrapping_points(points, epsilon, r=1.001)) - reach(points)
        far_enough = gain.min() >= epsilon / 5**.5 - 1e-9 and gain.max() <= epsilon + 1e-9
        assert far_enough, f'gain {gain.min()} to {gain.max()}'


def check_radius(w):
    assert np.isclose(w.cover_radius(3., 9, 4.), .5) and np.isclose(w.cover_radius(1., 2), .5)
    line = np.stack([np.arange(-60, 61), -np.arange(-60, 61)], 1) / 40
    sides = lambda r: sum(abs(sum(z)) > .1 for z in w.wrapping_points(line, 1., r=r))
    assert sides(1.01) == 4 * 121, 'with r > 1 the sides of a slanting stroke are wrapped'


def check_epsilon(w):
    for points in (P2, P5, np.concatenate([P2, P2 + 20])):
        edges, d = prim(points), points.shape[1]
        assert np.isclose(w.density_epsilon(points), edges[-1]), 'chained'
        whole = edges[-1] / 2 * (3 * d)**.5
        assert np.isclose(w.density_epsilon(points, 'connected', r=3.), whole), 'connected'
        far = cdist(points, points); np.fill_diagonal(far, np.inf)
        assert np.isclose(w.density_epsilon(points, 'nearest'), far.min(1).mean()), 'nearest'
        connected = w.cover_radius(w.density_epsilon(points, 'connected'), d)
        pieces = w.n_pieces(points, connected), w.n_pieces(points, .999 * connected)
        assert pieces == (1, 2), 'the smallest cover in one piece'
        longer = (edges > edges[10] + 1e-6).sum()
        assert w.n_pieces(points, edges[10] / 2) == 1 + longer, 'pieces'
    two = np.concatenate([P2, P2 + 20])
    half, more = w.density_epsilon(two, share=.5), w.density_epsilon(two, share=.51)
    assert half < 5 < more, 'share'


def check_copies(w):
    points = np.concatenate([P2[:3], P2[:3], P2[2:20], -np.zeros((1, 2)), np.zeros((1, 2))])
    made, once = w.wrap(points, .5), w.wrap(points[[0, 1, 2, *range(7, 25)]], .5)
    assert np.array_equal(made.points, once.points), 'a copy counts'
    assert not {3, 4, 5, 6, 25} & set(made.parents.tolist()), 'the first copy is the parent'
    steps = np.linalg.norm(made.points - points[made.parents], axis=1)
    assert np.allclose(steps, .5), 'parents index the rows as given'
    with_copies, without = points, np.unique(points + 0., axis=0)
    nearest = [w.density_epsilon(p, 'nearest') for p in (with_copies, without)]
    assert nearest[0] == nearest[1], 'distance to another point'
    assert len(w.wrap([[1., 2, 3]], .5).points) == 6, 'a single point'


def check_sample(w):
    rows = lambda points: {tuple(z) for z in points}
    sample = lambda seed, n=40: w.wrap(P5, .7, n_max=n, seed=seed)
    whole, seen = rows(w.wrapping_points(P5, .7)), set()
    for seed in range(6):
        made = sample(seed)
        assert len(made.points) == 40, f'{len(made.points)} points, not 40'
        assert len(rows(made.points) & whole) == 40, 'no sample of the wrapping points'
        assert len(set(made.parents.tolist())) > 30, 'crowded on few parents'
        seen |= set(zip(made.axes.tolist(), made.signs.tolist()))
        assert np.array_equal(made.points, sample(seed).points), 'not the same twice'
    assert len(seen) == 10, f'moves that occur: {sorted(seen)}'
    assert rows(sample(1, 10**6).points) == whole, 'a large sample is all'
    assert not np.array_equal(sample(0).points, sample(1).points), 'the seed does nothing'


def check_symmetries(w):
    order, q = G.permutation(60), np.array([[0, -1], [1, 0]])
    base = w.wrap(P2)
    rows = lambda a: {tuple(z) for z in np.round(a, 8) + 0.}
    assert rows(base.points) == rows(w.wrap(P2 + [4, -8]).points - [4, -8]), 'translation'
    assert rows(base.points) == rows(w.wrap(P2 @ q).points @ q.T), 'quarter turn'
    assert rows(base.points) == rows(w.wrap(P2 * 4).points / 4), 'unit'
    mixed = w.wrap(P2[order])
    pairs = {(*z, p) for z, p in zip(base.points.tolist(), base.parents)}
    back = {(*z, order[p]) for z, p in zip(mixed.points.tolist(), mixed.parents)}
    assert pairs == back, 'permutation'


def check_chunks(w):
    for options in ({}, dict(n_max=30)):
        made = [w.wrap(P5, .7, memory=m, **options) for m in (1e-4, 1e-2, 32)]
        for other in made[1:]:
            same = all(np.array_equal(a, b) for a, b in zip(made[0], other))
            assert same, 'chunks change the result'


def check_images(w):
    for space in ('pixels', 'pca'):
        maker = w.ImageWrapper(space=space, components=6).fit(IMAGES)
        images, parents = maker.wrap()
        assert images.shape[1:] == (1, 4, 4) and images.dtype == np.float32
        assert len(images) == len(parents) > 0
        steps, known = (images - IMAGES[parents]).reshape(len(images), -1), maker.space_
        away = np.linalg.norm(steps, axis=1)
        assert np.allclose(away, maker.epsilon_, rtol=1e-4), 'distance in pixels'
        radius = maker.cover_radius_ * .9999
        assert not w.in_cover(known.reduce(images), known.codes, radius).any(), 'in the cover'
        assert np.isclose(maker.epsilon_, w.density_epsilon(known.reduce(IMAGES)))
    rows = IMAGES.reshape(30, -1).astype(float)
    u, s, v = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    components = np.allclose(np.abs(known.codes), np.abs(u * s)[:, :6], atol=1e-5)
    assert components, 'coordinates are principal components'
    in_plane = lambda z: z @ v[:6].T @ v[:6]
    assert np.allclose(in_plane(steps), steps, atol=1e-5), 'the residual of the parent'
    flat, parents = w.ImageWrapper(components=6, keep_residual=False).fit(IMAGES).wrap()
    off = flat.reshape(len(flat), -1) - rows.mean(0)
    assert np.allclose(in_plane(off), off, atol=1e-5), 'residual not lost'


def check_clipping(w):
    for space in ('pixels', 'pca'):
        maker = w.ImageWrapper(space=space, components=6, clip=True).fit(IMAGES)
        images, _ = maker.wrap()
        assert 0 <= images.min() and images.max() <= 1, 'not clipped'
        inside = w.in_cover(maker.space_.reduce(images), maker.space_.codes, maker.cover_radius_)
        assert not inside.any(), 'clipped into the cover'
    same = lambda x: w.ImageWrapper(components=6, clip=True).fit(x).wrap(100)[0]
    coarse = np.round(255 * IMAGES).astype('uint8')
    for x in (coarse, torch.tensor(coarse)):
        assert np.allclose(same(x), same(coarse / 255), atol=1e-6), 'bytes are no bytes'
    black_and_white = np.round(IMAGES)
    black = w.ImageWrapper(space='pixels', clip=True, epsilon=.5).fit(black_and_white)
    images, parents = black.wrap()
    change = np.abs(images - black_and_white[parents]).reshape(len(images), -1).max(1)
    assert (change > .4).all(), 'a clipped parent is no wrapping point'


def check_settings(w):
    """Each setting of the wrapper of images does what the function of the same name does."""
    two = np.concatenate([IMAGES[:20], 1 - IMAGES[20:] * .01]).astype('float32')
    codes = two.reshape(30, -1)
    for settings in (dict(rule='nearest'), dict(rule='connected'), dict(rule='connected', r=5.),
                     dict(share=.5), dict(share=.5, rule='connected', r=3.)):
        maker = w.ImageWrapper(space='pixels', **settings).fit(two)
        epsilon = w.density_epsilon(codes, **settings)
        assert np.isclose(maker.epsilon_, epsilon), f'the step by {settings}'
        radius = w.cover_radius(epsilon, 16, settings.get('r', 2.))
        assert np.isclose(maker.cover_radius_, radius), f'the radius by {settings}'
    assert w.density_epsilon(codes, share=.5) < w.density_epsilon(codes), 'a test of nothing'
    line = np.linspace(0, 1, 30, dtype='float32')[:, None] * np.float32([1, 0])
    for r in (1.01, 20.):          # steps of one and a half points: a small ball drops fewer
        made = w.ImageWrapper(space='pixels', epsilon=.05, r=r).fit(line).wrap()[0]
        assert len(made) == len(w.wrapping_points(line, .05, r=r)), f'the cover by r = {r}'
    few = w.ImageWrapper(components=3).fit(IMAGES).space_
    assert few.codes.shape == (30, 3), 'the number of components'


CHECKS = [check_brute, check_promises, check_hull, check_radius, check_epsilon, check_copies,
          check_sample, check_symmetries, check_chunks, check_images, check_clipping,
          check_settings]


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_the_module(check): check(W)


# ---------------------------------------------------------------- mutants
KEEP, LONGEST = 'keep = ~cover.holds(z)', 'longest = lengths[sizes >= share * len(some)][0]'
STEP = 'z[np.arange(len(z)), moves // 2] += epsilon * (1 - 2 * (moves % 2))'
CONNECTED = 'cover_radius(1, rows.shape[1], r)**-1 * longest / 2'
START = 'start = rng.permutation(n), rng.permutation(2 * d), rng.integers(2 * d, size=n)'
BY_RULE = 'density_epsilon(codes, self.rule, self.r, self.share)'
MUTANTS = {  # name: (what stands in the module, what stands there instead, the check that notices)
    'candidates in the cover kept': (KEEP, 'keep = np.ones(len(z), bool)', check_brute),
    'against the own parent only': (
        KEEP, 'keep = np.linalg.norm(z - rows[parents], axis=1) > cover.radius', check_promises),
    'against half of the data': (
        '.fit(rows - self.origin)', '.fit((rows - self.origin)[::2])', check_promises),
    'those in the cover returned': (KEEP, 'keep = cover.holds(z)', check_promises),
    'no step back': (STEP, STEP.replace('(1 - 2 * (moves % 2))', '1'), check_hull),
    'no step along the last axis': (
        STEP, STEP.replace('moves // 2]', 'np.minimum(moves // 2, max(0, rows.shape[1] - 2))]'),
        check_hull),
    'steps too short': ('+= epsilon *', '+= .9 * epsilon *', check_images),
    'steps of epsilon by root d': (
        '+= epsilon *', '+= epsilon / rows.shape[1]**.5 *', check_copies),
    'all axes at once': (STEP, 'z += (epsilon * (1 - 2 * (moves % 2)))[:, None]', check_hull),
    'radius without the dimension': (
        'epsilon / math.sqrt(r * dim)', 'epsilon / math.sqrt(r)', check_brute),
    'radius without r': ('epsilon / math.sqrt(r * dim)', 'epsilon / math.sqrt(dim)', check_radius),
    'radius without the root': ('epsilon / math.sqrt(r * dim)', 'epsilon / (r * dim)', check_brute),
    'radius is epsilon': ('epsilon / math.sqrt(r * dim)', 'epsilon', check_hull),
    'radius squared in the comparison': (
        '<= self.radius * (1 + 1e-9)', '<= self.radius**2', check_brute),
    'queries not centered': (
        'part = rows[i:i + self.chunk] - self.origin', 'part = rows[i:i + self.chunk]',
        check_symmetries),
    'shortest edge': (LONGEST, 'longest = lengths[0]', check_epsilon),
    'share not heeded': (LONGEST, 'longest = lengths[-1]', check_epsilon),
    'connected without the half': ('**-1 * longest / 2', '**-1 * longest', check_epsilon),
    'connected without the root': (CONNECTED, 'longest / 2', check_epsilon),
    'a point is its own neighbor': (
        'return 2 * Cover(rows, 0).distance', 'return Cover(rows, 0).distance', check_epsilon),
    'balls touch at one radius': ('[0] > 2 * radius', '[0] > radius', check_epsilon),
    'copies count': (
        '    return np.fromiter(first.values(), np.int64)', '    return np.arange(len(rows))',
        check_copies),
    'minus zero is another number': ('row + 0., digest_size', 'row, digest_size', check_copies),
    'parents of the distinct rows': ('found = z, first[parents],', 'found = z, parents,',
                                     check_copies),
    'axes are moves': ('first[parents], moves // 2,', 'first[parents], moves,', check_brute),
    'signs turned over': (
        '1 - 2 * (moves % 2)\n    if', '2 * (moves % 2) - 1\n    if', check_promises),
    'sample from the front': (
        'candidate_order(n, d, rng if n_max else None)', 'candidate_order(n, d, None)',
        check_sample),
    'one move for all parents': (
        START, 'start = rng.permutation(n), np.arange(2 * d), np.zeros(n, int)', check_sample),
    'stops after one chunk': ('if n_max and m >= n_max: break', 'break', check_chunks),
    'n_max not heeded': ('[np.concatenate(a)[:n_max]', '[np.concatenate(a)', check_sample),
    'residual lost': ('elif self.keep_residual:', 'elif False:', check_images),
    'residual always kept': ('elif self.keep_residual:', 'elif True:', check_images),
    'mean not removed': (
        '(rows - self.mean) @ self.axes.T', 'rows @ self.axes.T', check_images),
    'clip without asking again': (
        'return images[outside], w.parents[outside]', 'return images, w.parents', check_clipping),
    'clip does not clip': ('images = np.clip(images, 0, 1)', 'images = images', check_clipping),
    'bytes are numbers': ('return rows / 255 if', 'return rows if', check_clipping),
    'the rule of images not heeded': (BY_RULE, BY_RULE.replace('self.rule', "'chained'"),
                                      check_settings),
    'r of images not heeded': (BY_RULE, BY_RULE.replace('self.r,', '2.,'), check_settings),
    'share of images not heeded': (BY_RULE, BY_RULE.replace('self.share', '1.'), check_settings),
    'radius of images without r': (
        'codes.shape[1], self.r)', 'codes.shape[1], 2.)', check_settings),
    'images wrapped without r': ('self.epsilon_, r=self.r,', 'self.epsilon_,', check_settings),
    'components of images not heeded': (
        'ImageSpace(x, self.space, self.components,', 'ImageSpace(x, self.space, .9,',
        check_settings),
}


@pytest.mark.parametrize('name', MUTANTS)
def test_mutants_are_caught(name):
    old, new, check = MUTANTS[name]
    source = inspect.getsource(W)
    assert source.count(old) == 1, f'{source.count(old)} times in the module: {old}'
    # relative imports need a package
    broken = types.ModuleType('ad_course.wrapping_mutant')
    broken.__package__ = 'ad_course'
    sys.modules[broken.__name__] = broken
    try:
        exec(compile(source.replace(old, new), broken.__name__, 'exec'), broken.__dict__)
        with pytest.raises((AssertionError, ValueError, IndexError)): check(broken)
    finally: del sys.modules[broken.__name__]


# ---------------------------------------------------------------- properties
eighths = st.integers(-40, 40).map(lambda i: i / 8)
shapes = st.tuples(st.integers(1, 14), st.integers(1, 4))
points_of = shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=eighths))
epsilons, dtypes = st.sampled_from([.25, .7, 1., 3.]), st.sampled_from([np.float32, np.float64])


@given(points_of, epsilons, st.sampled_from([1.01, 2., 5.]), dtypes)
def test_any_points(points, epsilon, r, dtype):
    points = points.astype(dtype)
    made, radius = W.wrap(points, epsilon, r=r), epsilon / (r * points.shape[1])**.5
    z = np.unique(np.array([c[0] for c in candidates(points.astype(float), epsilon)]), axis=0)
    gap = cdist(z, points).min(1)
    assume(not (np.abs(gap - radius) < 1e-5).any())     # on the sphere rounding decides
    assert made.points.dtype == dtype and cdist(made.points, points).min() > radius * (1 - 1e-6)
    rows = lambda a: {tuple(row) for row in np.round(a.astype(float), 4) + 0.}
    assert rows(made.points) == rows(z[gap > radius])
    steps = np.linalg.norm(made.points - points[made.parents], axis=1)
    assert np.allclose(steps, epsilon, rtol=1e-5)


@given(points_of, st.integers(0, 2**31))
def test_rotation(points, seed):
    points = np.unique(points, axis=0)
    assume(len(points) > 1)
    d = points.shape[1]
    turned = points @ np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    for rule in W.RULES:
        assert np.isclose(W.density_epsilon(turned, rule), W.density_epsilon(points, rule)), rule
    epsilon = W.density_epsilon(points)
    u = directions(np.random.default_rng(seed), 50, d)
    gain = (W.wrapping_points(turned, epsilon) @ u.T).max(0) - (turned @ u.T).max(0)
    # the guarantee does not depend on the axes, though the points do
    assert gain.min() >= epsilon / d**.5 - 1e-9


def test_tensors_and_types():
    want, tensor = W.wrap(P2, .5), torch.tensor(P2)
    learned = torch.tensor(P2, requires_grad=True)
    for points, dtype in ((tensor, torch.float64), (learned, torch.float64),
                          (tensor.float(), torch.float32)):
        made = W.wrap(points, .5)
        assert all(isinstance(a, torch.Tensor) for a in made[:4])
        assert made.points.dtype == dtype and not made.points.requires_grad
        assert np.allclose(made.points, want.points, atol=1e-6)
        assert made.parents.dtype == torch.int64
    assert W.wrap([[1, 2], [3, 4]], 1).points.dtype == np.float64
    assert W.wrap(np.uint8([[0, 255], [3, 4]]), 1.).points.min() == -1
    assert isinstance(W.in_cover(tensor, tensor, .1), torch.Tensor)
    g = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert np.array_equal(*(W.wrapping_points(P2, .5, n_max=9, seed=a) for a in g))
    rng = np.random.default_rng(1)
    assert not np.array_equal(*(W.wrapping_points(P2, .5, n_max=9, seed=rng) for _ in range(2)))


def test_inputs_and_global_state_are_left_alone():
    points, state, torch_state = P2.copy(), np.random.get_state()[1].copy(), torch.get_rng_state()
    W.wrap(points, n_max=5)
    assert np.array_equal(points, P2) and np.array_equal(state, np.random.get_state()[1])
    assert torch.equal(torch_state, torch.get_rng_state())


def test_a_cover_of_ones_own_radius_may_swallow_all():
    disc = np.stack(np.meshgrid(np.arange(9.), np.arange(9.)), -1).reshape(-1, 2)
    made = W.wrap(disc, 1., radius=1.)
    assert made.points.shape == (0, 2) and len(made.parents) == 0
    assert len(W.wrap(disc, 1.).points) == 36


WIDE = np.zeros((1200, 784), 'float32')
WIDE[:, 0] = np.arange(1200)


@pytest.mark.parametrize('points, options, words', [
    (P2[:0], {}, 'at least one'), (P2[0], {}, r'shape \(n, d\)'), ([['a', 'b']], {}, 'numbers'),
    (P2 * np.inf, {}, 'NaN or infinite'), (P2[:1], {}, 'give epsilon'),
    (P2[[0, 0, 0]], {}, 'give epsilon'), (P2, dict(epsilon=0), 'epsilon'),
    (P2, dict(epsilon=float('nan')), 'epsilon'), (P2, dict(epsilon=True), 'epsilon'),
    (P2, dict(epsilon=1, r=.5), 'r must'), (P2, dict(share=0), 'share'),
    (P2, dict(share=True), 'share'), (P2, dict(rule='all'), 'rule must be one of'),
    (P2, dict(epsilon=1, n_max=1.5), 'n_max'), (P2, dict(epsilon=1, n_max=True), 'n_max'),
    (P2, dict(epsilon=1, radius=-1), 'radius'), (P2, dict(epsilon=1, radius=True), 'radius'),
    (WIDE, dict(epsilon=1.), 'GiB'),
    (np.float32([[1e9, 0], [0, 0]]), dict(epsilon=1.), 'rounding')])
def test_wrong_use(points, options, words):
    with pytest.raises(ValueError, match=words): W.wrap(points, **options)


@pytest.mark.parametrize('images, settings, words', [
    (IMAGES, dict(space='code'), 'space'), (IMAGES, dict(components=31), 'at most 16'),
    (IMAGES, dict(components=True), 'at most 16'), (IMAGES * 0, {}, 'all the same')])
def test_wrong_use_with_images(images, settings, words):
    with pytest.raises(ValueError, match=words): W.ImageWrapper(**settings).fit(images)


def test_queries_of_another_dimension():
    with pytest.raises(ValueError, match='2 dimensions; got 5'): W.Cover(P2, 1).holds(P5)


def test_memory_is_bounded(monkeypatch):
    many, sizes = np.random.default_rng(0).normal(size=(20_000, 20)), []
    kneighbors = W.NearestNeighbors.kneighbors
    def counted(self, q, *a):
        sizes.append(len(q))
        return kneighbors(self, q, *a)
    monkeypatch.setattr(W.NearestNeighbors, 'kneighbors', counted)
    tracemalloc.start()
    try:
        made = W.wrap(many, 1., n_max=1500, memory=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert len(made.points) == 1500 and max(sizes) <= 2**20 // (8 * 40), f'chunks of {max(sizes)}'
    every = 2 * many.size * 20 * 8
    used = f'{peak / 2**20:.0f} MiB for {many.nbytes / 2**20:.0f} data, {every / 2**20:.0f} in all'
    assert peak < 5 * many.nbytes + 2**20 * 4, used


def test_the_estimate_measures_a_part_of_many_points(monkeypatch):
    seen, linkage = [], W.linkage
    def counted(rows, *a):
        seen.append(len(rows))
        return linkage(rows, *a)
    monkeypatch.setattr(W, 'linkage', counted)
    many = np.random.default_rng(0).normal(size=(5000, 3))
    a, b = (W.density_epsilon(many, at_most=300, share=.9, seed=s) for s in (0, 0))
    assert seen == [300, 300] and a == b
    more = W.density_epsilon(many, at_most=1500, share=.9)
    assert more < a < pdist(many[:50]).max()
