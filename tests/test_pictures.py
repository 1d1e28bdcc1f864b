"""Pictures: contrast, what is drawn, errors by name, settings left alone, one style, the knob."""
import ast
import base64
import io
import os
import subprocess
import sys
from types import SimpleNamespace

import matplotlib as mpl
mpl.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from ipywidgets import (Checkbox, Dropdown, FloatLogSlider, FloatSlider, IntSlider, SelectionSlider,
                        fixed, interactive)
from matplotlib.colors import to_rgb

from ad_course import pictures as p

from .project import notebooks

RNG = np.random.default_rng(0)
X, MAPS = RNG.random((4, 1, 8, 8)), RNG.random((4, 8, 8))
Y, SCORES = np.repeat([0, 1], [30, 10]), np.r_[RNG.normal(1, .2, 30), RNG.normal(2, .2, 10)]
HISTORY = {'reconstruction': [3., 2., 1.], 'penalty': [.1, .2, .3]}
AE = ('x | [encoder> | code | <decoder] | x^\n  |   | (reconstruction) |  | ',
      'x -> encoder -> code -> decoder -> x^', ['reconstruction: x, x^ => encoder, decoder'])
AAE = ('  | | (reconstruction) | |\n x | [encoder> | code | <decoder] | x^\n'
       '| | [critic] | (tell apart) |\n | | prior | (fool) | ',
       'x -> encoder -> code -> decoder -> x^; code -> critic; prior -> critic',
       ['1 reconstruction: x, x^ => encoder, decoder', '2 tell apart: critic => critic',
        '3 fool: critic => encoder'])


def from_origin(points): return np.linalg.norm(points, axis=1)


DRAWINGS = {
    'show_images': lambda ax=None: p.show_images(X, titles='abcd', marks=[0, 1, 0, 1], ax=ax),
    'show_reconstructions': lambda ax=None: p.show_reconstructions(X, X[::-1], [1, 2, 3, 4],
                                                                   [0, 0, 1, 1], ax=ax),
    'score_histogram': lambda ax=None: p.score_histogram(SCORES, Y, 1.5, ax=ax),
    'roc_curve': lambda ax=None: p.roc_curve(Y, SCORES, 'toy', ax=ax),
    'pr_curve': lambda ax=None: p.pr_curve(Y, {'a': SCORES, 'b': -SCORES}, ax=ax),
    'latent_scatter': lambda ax=None: p.latent_scatter(RNG.random((40, 5)), Y, ax=ax),
    'show_plane': lambda ax=None: p.show_plane(from_origin, RNG.random((40, 2)), Y, .5, ax=ax),
    'show_maps': lambda ax=None: p.show_maps(X, MAPS, MAPS > .8, .9, ax=ax),
    'training_curves': lambda ax=None: p.training_curves(HISTORY, ax=ax),
    'diagram': lambda ax=None: p.diagram(*AE, ax=ax),
}


@pytest.fixture(autouse=True)
def closed():
    plt.close('all'); yield; plt.close('all')


def texts(ax):
    legend = ax.get_legend()
    named = [t.get_text() for t in legend.get_texts()] if legend else []
    return [t.get_text() for t in ax.texts] + named


def title(ax): return ax.get_title(loc='left') + ax.get_title()


# --- color

def linear(color):
    c = np.array(to_rgb(color))
    return np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055)**2.4)


def luminance(color): return linear(color) @ [.2126, .7152, .0722]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + .05) / (low + .05)


def gray(color): return np.array(to_rgb(color)) @ [.299, .587, .114]   # Rec. 601, as printers do


def test_normal_and_anomaly_differ_in_gray():
    assert contrast(p.NORMAL, p.ANOMALY) > 3 and abs(gray(p.NORMAL) - gray(p.ANOMALY)) > .3
    for color in (p.NORMAL, p.ANOMALY, p.INK): assert contrast(color, 'white') > 3


# Machado, Oliveira and Fernandes (2009), severity 1.
BLIND = {'protanopia': [[.152286, 1.052583, -.204868], [.114503, .786281, .099216],
                        [-.003882, -.048116, 1.051998]],
         'deuteranopia': [[.367322, .860646, -.227968], [.280085, .672501, .047413],
                          [-.011820, .042940, .968881]],
         'tritanopia': [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602],
                        [.004733, .691367, .303900]]}


@pytest.mark.parametrize('kind', BLIND)
def test_normal_and_anomaly_differ_for_the_color_blind(kind):
    seen = [np.clip(np.array(BLIND[kind]) @ linear(c), 0, 1) for c in (p.NORMAL, p.ANOMALY)]
    a, b = (c @ [.2126, .7152, .0722] for c in seen)
    assert (max(a, b) + .05) / (min(a, b) + .05) > 2.5


@pytest.mark.parametrize('name', ['HEAT', 'AMOUNT'])
def test_heat_darkens_with_the_score(name):
    colors = mpl.colormaps[getattr(p, name)](np.linspace(0, 1, 64))
    assert (np.diff([luminance(c) for c in colors[:, :3]]) < 0).all()


def test_signs_meet_in_white():
    assert luminance(mpl.colormaps[p.SIGNED](.5)[:3]) > .9


@pytest.mark.parametrize('color', p.PLAYERS)
def test_a_white_number_is_read_on_every_players_color(color): assert contrast(color, 'white') > 3


# --- every function

@pytest.mark.parametrize('name', DRAWINGS)
def test_returns_the_axes_and_leaves_matplotlib_alone(name, monkeypatch):
    monkeypatch.setattr(plt, 'show', lambda *a, **k: pytest.fail('plt.show was called'))
    before = dict(mpl.rcParams)
    ax = DRAWINGS[name]()
    assert isinstance(ax, mpl.axes.Axes) and dict(mpl.rcParams) == before
    assert plt.get_fignums() == [ax.figure.number]
    assert ax.figure.get_facecolor() == (1, 1, 1, 1)                   # an opaque white card
    ax.figure.canvas.draw()
    own = plt.subplots()[1]
    assert DRAWINGS[name](own) is own and len(plt.get_fignums()) == 2


@pytest.mark.parametrize('name', DRAWINGS)
def test_readable_under_a_dark_style(name):
    with plt.style.context('dark_background'): ax = DRAWINGS[name]()
    assert to_rgb(ax.figure.get_facecolor()) == (1, 1, 1)
    inside = [t for t in ax.texts if to_rgb(t.get_color()) != (1, 1, 1)]   # white stands on a tag
    for t in [*inside, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()]:
        assert contrast(t.get_color(), 'white') > 7


@pytest.mark.parametrize('name', DRAWINGS)
def test_letters_are_large_enough_to_read(name):
    """At 90 dots an inch 8 points of CSS (96 dots for 72 points) are 8.5 points of the figure."""
    ax = DRAWINGS[name]()
    ax.figure.canvas.draw()
    shown = [t for t in ax.figure.findobj(mpl.text.Text) if t.get_text() and t.get_visible()]
    pixels = [t.get_size() * ax.figure.dpi / 72 for t in shown]
    assert min(pixels, default=99) >= 8 * 96 / 72 - .1 and ax.figure.get_figwidth() <= p.PAGE + .2


@pytest.mark.parametrize('call', [
    lambda: p.show_images(np.zeros(3)), lambda: p.show_plane(from_origin, scale='mine'),
    lambda: p.show_plane(np.zeros(3)), lambda: p.roc_curve([0, 0], [1, 2]),
    lambda: p.training_curves({}), lambda: p.diagram('x', 'x -> y')])
def test_a_mistake_leaves_no_empty_figure(call):
    with pytest.raises(ValueError): call()
    assert not plt.get_fignums()


def test_style_restores_after_an_error():
    before = dict(mpl.rcParams)
    with pytest.raises(RuntimeError), p.style(): raise RuntimeError
    with pytest.raises(ValueError): p.show_images(np.zeros(3))
    assert dict(mpl.rcParams) == before


def test_importing_changes_no_settings_of_a_program():
    code = ('import matplotlib as m; a = dict(m.rcParams); import ad_course.pictures; '
            'assert dict(m.rcParams) == a')
    env = {**os.environ, 'MPLBACKEND': 'Agg'}
    subprocess.run([sys.executable, '-c', code], check=True, env=env)


def test_panels_have_the_courses_sizes():
    assert p.panels().figure.get_size_inches().tolist() == [5, 3]
    for columns in (2, 3, 5):
        axes = p.panels(columns, sharey=True)
        assert axes.shape == (columns,) and axes[0].figure.get_figwidth() == p.PAGE
    assert p.panels(4, 2).shape == (2, 4)
    width, height = p.panels(4, square=True)[0].figure.get_size_inches()
    assert width == 4 * height == p.PAGE
    assert p.panels(width=6, height=1).figure.get_size_inches().tolist() == [6, 1]
    assert p.panels(square=True).figure.get_size_inches().tolist() == [p.HALF, p.HALF]


def grids(n, w):
    """Each picture made of tiles, for `n` images `w` wide."""
    x = RNG.random((n, w, w))
    yield lambda **kw: p.show_images(x, columns=n, **kw)
    yield lambda **kw: p.show_reconstructions(x, x[::-1], **kw)
    yield lambda **kw: p.show_maps(x, x, **kw)
    yield lambda **kw: p.show_maps(x, x, scale='image', **kw)


@pytest.mark.parametrize('size', [.5, 1, 3])
@pytest.mark.parametrize('n, w', [(2, 8), (3, 64), (8, 28), (12, 28), (16, 28), (16, 8), (30, 128)])
def test_grids_of_images_fit_the_page_and_fill_half_of_it(n, w, size):
    for draw in grids(n, w):
        ax = draw(size=size)
        inches = ax.figure.get_tightbbox().width
        assert p.HALF - .8 < inches < p.PAGE + .3, (inches, n, w, size)
        plt.close('all')


def test_a_tile_is_as_large_as_asked_where_it_fits():
    for w, columns, size in ((8, 8, .8), (28, 8, .9), (64, 4, 1.5)):
        ax = p.show_images(RNG.random((8, w, w)), columns=columns, size=size)
        ax.figure.canvas.draw()
        across = ax.images[0].get_array().shape[1]
        dots = ax.get_window_extent().width / across
        assert dots == pytest.approx(max(1, round(size * 90 / w)), abs=1e-6)   # sharp
    one = p.show_images(RNG.random((1, 8, 8)))
    assert one.figure.get_figwidth() < 2.8                  # an image alone is not blown up


# --- images

@pytest.mark.parametrize('x', [
    X, X[:, 0], np.repeat(X, 3, 1), (X * 255).astype(np.uint8), torch.tensor(X),
    torch.tensor(X, requires_grad=True), X > .5, X.astype(np.float32), RNG.random((1, 3, 300, 200)),
    RNG.random((3, 1, 1, 1))], ids=str)
def test_images_of_every_kind(x):
    ax = p.show_images(x, marks=[1] * len(x), titles=range(len(x)))
    ax.figure.canvas.draw()
    assert len(texts(ax)) == len(x)


def test_uint8_and_float_look_the_same():
    whole = (X * 255).astype(np.uint8)
    a, b = (p.show_images(v).images[0].get_array() for v in (whole, whole / 255))
    assert np.array_equal(a, b)


@pytest.mark.parametrize('x, message', [
    (np.zeros((2, 8, 8, 3)), r'got shape \(2, 8, 8, 3\)'), (np.zeros((0, 8, 8)), 'at least one'),
    (np.zeros((2, 8)), 'shape'), (np.full((1, 4, 4), np.inf), 'got 16 pixels'),
    (np.zeros((2, 4, 4), int), 'int64'), (np.zeros((401, 2, 2)), 'x.:40.*got 401'),
])
def test_wrong_images_are_named(x, message):
    with pytest.raises(ValueError, match=message): p.show_images(x)


def test_clipping_is_said():
    assert not texts(p.show_images(X))
    note = texts(p.show_images(X * 3))[0]
    assert 'values from 0.' in note and 'clipped' in note


def test_marks_frame_the_anomalies():
    frames = p.show_images(X, marks=[0, 1, 0, 0]).patches
    dark = [to_rgb(f.get_edgecolor()) == to_rgb(p.ANOMALY) for f in frames]
    assert dark == [False, True, False, False]
    assert frames[1].get_linewidth() > 2 * frames[0].get_linewidth()   # not by color alone


def test_input_is_not_changed():
    x, maps = X * 2, MAPS.copy()
    before = x.copy()
    p.show_images(x); p.show_reconstructions(x, x / 2); p.show_maps(x, maps)
    assert np.array_equal(x, before) and np.array_equal(maps, MAPS)


def test_reconstructions_share_one_scale():
    ax = p.show_reconstructions(X, np.zeros_like(X), size=1)
    assert f'darkest = {X.max():.2g}' in texts(ax)[-1]
    assert {'image', 'reconstruction', '|difference|'} <= set(texts(ax))
    with pytest.raises(ValueError, match='one shape'): p.show_reconstructions(X, X[:, :, :4])
    with pytest.raises(ValueError, match='scores must .* 4 images; got 1'):
        p.show_reconstructions(X, X, [1])


# --- scores

def test_histogram_shows_shares_threshold_and_hatch():
    ax = p.score_histogram(SCORES, Y, 1.5)
    groups = ['anomaly (n = 10, 100% above)', 'normal (n = 30, 0% above)', 'threshold 1.5']
    assert sorted(texts(ax)) == groups
    assert [bool(a.get_hatch()) for a in ax.patches] == [False, True]
    for patch in ax.patches: assert .02 < patch.get_xy()[:, 1].max() <= 1


def test_histogram_counts_every_image_once():
    ax = p.score_histogram([0., 0, 1, 10], bins=5)
    area = ax.patches[0].get_xy()
    assert area[:, 1].max() == .75                                     # three of four in the first


def test_histogram_axis_and_threshold():
    tail = np.r_[np.ones(50), 1e4]
    assert p.score_histogram(tail).get_xscale() == 'log'
    assert p.score_histogram(tail, log=False).get_xscale() == 'linear'
    assert p.score_histogram(SCORES).get_xscale() == 'linear'
    with pytest.raises(ValueError, match='positive'): p.score_histogram([-1, 2], log=True)
    with pytest.raises(ValueError, match='scores must'): p.score_histogram([1, np.nan])
    with pytest.raises(ValueError, match='y must .* got 1'): p.score_histogram([1, 2], [1])
    detector = type('D', (), {'threshold_': 1.25})()
    assert 'threshold 1.25' in texts(p.score_histogram(SCORES, Y, detector))
    p.score_histogram(SCORES, Y, -np.inf); p.score_histogram(np.ones(5))
    p.score_histogram(torch.tensor(SCORES), torch.tensor(Y))


def test_curves_say_their_area():
    y, scores = [0, 0, 0, 1, 1], [.1, .3, .5, .2, .9]
    assert texts(p.roc_curve(y, scores, 'toy'))[0] == 'toy AUROC 0.667'
    assert texts(p.pr_curve(y, scores)) == ['AP 0.750', 'base rate 0.400']
    ax = p.roc_curve(Y, {str(i): SCORES for i in range(9)})
    assert len(ax.lines) == 10
    assert ax.get_xlim()[0] < 0.01 and ax.get_ylim()[0] < 0.01         # no cut axes
    for draw in (p.roc_curve, p.pr_curve):
        with pytest.raises(ValueError, match='both normal'): draw([0, 0], [1, 2])
        with pytest.raises(ValueError, match='something to draw'): draw([0, 1], {})


def test_methods_differ_in_gray_or_in_line():
    assert len({str(line) for _, line in p.LINES}) == len(p.LINES)


# --- codes, maps, curves

def test_scatter_names_its_projection():
    flat = p.latent_scatter(RNG.random((40, 2)), Y)
    assert flat.get_xlabel() == 'code 1'
    codes = RNG.normal(size=(40, 3)) * [3, 2, .1]
    ax = p.latent_scatter(codes, Y)
    share = np.linalg.eigvalsh(np.cov(codes.T))[::-1]
    first = share[0] / share.sum()
    assert ax.get_xlabel() == f'PCA 1 of 3 dimensions ({first:.0%} of variance)'
    drawn = np.concatenate([c.get_offsets() for c in ax.collections])
    assert np.allclose(np.var(drawn, 0, ddof=1), share[:2])
    assert 'one dimension' in p.latent_scatter(codes[:, :1]).get_ylabel()


def test_scatter_kinds_and_odd_shapes():
    ax = p.latent_scatter(RNG.random((40, 2)), Y, np.where(Y, 'scratch', 'good'))
    assert texts(ax) == ['good (n = 30)', 'scratch (n = 10)']
    good, bad = (c.get_paths()[0].vertices for c in ax.collections)
    assert not np.array_equal(good, bad)                               # another marker
    p.latent_scatter(RNG.random((9, 2, 3, 3)), kinds=list('abcabcabc'))
    p.latent_scatter(np.ones((5, 4)))
    for wrong, message in ((np.ones((2, 2)), 'at least 3'), (np.full((5, 2), np.nan), 'finite')):
        with pytest.raises(ValueError, match=message): p.latent_scatter(wrong)
    with pytest.raises(ValueError, match='kinds must .* got 1'):
        p.latent_scatter(np.ones((5, 2)), kinds=['a'])


def test_scatter_colors_say_who_is_normal():
    colors = lambda ax: [to_rgb(c.get_facecolor()[0]) for c in ax.collections]
    kinds = np.where(Y, 'scratch', 'good')
    for ax in (p.latent_scatter(X[:, 0, 0], [0, 0, 1, 1]), p.latent_scatter(np.c_[Y, Y], Y, kinds)):
        assert colors(ax) == [to_rgb(p.NORMAL), to_rgb(p.ANOMALY)]
    assert colors(p.latent_scatter(X[:, 0, 0])) == [to_rgb(p.NORMAL)]
    assert texts(p.latent_scatter(X[:, 0, 0])) == []                   # one group needs no legend


def test_maps_state_one_scale():
    ax = p.show_maps(X, MAPS * [[[1]], [[2]], [[3]], [[4]]])
    bar = ax.child_axes[0]
    assert bar.get_ylim() == pytest.approx((MAPS.min(), (MAPS[3] * 4).max()), rel=1)
    assert 'one scale' in bar.get_ylabel()
    own = p.show_maps(X, MAPS, scale='image')
    assert not own.child_axes and 'own color scale' in title(own)


def test_common_scale_keeps_the_order_and_image_scale_does_not():
    maps, black = np.stack([np.eye(8) * .01, np.eye(8)]), np.zeros((2, 8, 8))
    drawn = [p.show_maps(black, maps, scale=s).images[0].get_array() for s in ('common', 'image')]
    common, own = ([canvas[10:18, left:left + 8].min() for left in (1, 10)] for canvas in drawn)
    assert common[0] > common[1] + .3 and own[0] == pytest.approx(own[1])


def test_maps_take_a_detector_tensors_and_no_mask():
    class Detector:
        def anomaly_map(self, x): return MAPS
    drawn = [p.show_maps(torch.tensor(X), m) for m in (Detector(), torch.tensor(MAPS))]
    assert np.array_equal(*(ax.images[0].get_array() for ax in drawn))
    p.show_maps(X, MAPS, np.zeros_like(MAPS), threshold=9); p.show_maps(X, 0 * MAPS)


def test_outlines_say_what_they_surround():
    lines = lambda **kw: len(p.show_maps(X, MAPS, **kw).collections)
    assert lines() == 0 and lines(masks=MAPS > .8) == 2 == lines(threshold=.9)
    assert lines(masks=MAPS > .8, threshold=.9) == 4 and lines(threshold=9) == 0


@pytest.mark.parametrize('kw, message', [
    (dict(maps=MAPS[:2]), r'maps must be \(4, 8, 8\)'),
    (dict(maps=MAPS, masks=MAPS[:, :4]), 'masks must be'),
    (dict(maps=np.full_like(MAPS, np.nan)), '256 pixels'),
    (dict(maps=MAPS, scale='mine'), "'mine'")])
def test_wrong_maps_are_named(kw, message):
    with pytest.raises(ValueError, match=message): p.show_maps(X, **kw)


def test_training_curves():
    ax = p.training_curves(HISTORY | {'seconds': [9, 9, 9]})
    assert texts(ax) == ['sum', 'reconstruction', 'penalty']
    assert list(ax.lines[0].get_ydata()) == [3.1, 2.2, 1.3]
    thick, thin = (line.get_linewidth() for line in ax.lines[:2])
    assert thick > thin and ax.get_yscale() == 'linear'
    assert texts(p.training_curves({'loss': [1, .001], 'a': [.5, .0005]})) == ['loss', 'a']
    assert p.training_curves({'loss': [1, .001]}).get_yscale() == 'log'
    assert p.training_curves({'loss': [1, -.001]}).get_yscale() == 'linear'
    sides = {'critic/real': [1], 'critic/fake': [2], 'generator/adversarial': [3]}
    assert texts(p.training_curves(sides)) == ['critic/sum', *sides]
    detector = type('D', (), {'history_': HISTORY})()
    assert texts(p.training_curves(detector)) == ['sum', 'reconstruction', 'penalty']
    ax = p.training_curves({'loss': [1., np.nan, np.nan]})
    assert 'not finite from epoch 2' in title(ax) and ax.get_xlim()[1] >= 3
    for empty in ({}, {'loss': []}, {'seconds': [1.]}):
        with pytest.raises(ValueError, match='empty'): p.training_curves(empty)


# --- the plane

class Flat:
    """A detector of two-pixel images: the larger pixel, so that its boundary is a square."""
    threshold_ = .5
    def decision_function(self, x):
        assert x.shape[1:] == (1, 1, 2)
        return x.reshape(-1, 2).max(1)


def shades(ax):
    """Luminance of the plane as drawn, from the lowest row up."""
    for c in ax.collections[1:]: c.remove()
    ax.figure.canvas.draw()
    inside = ax.get_window_extent().extents.round().astype(int)
    pixels = np.asarray(ax.figure.canvas.buffer_rgba())[::-1, :, :3] / 255
    cut = pixels[inside[1] + 4:inside[3] - 4, inside[0] + 4:inside[2] - 4]
    return np.apply_along_axis(luminance, -1, cut[::20, ::20])


@pytest.mark.parametrize('scale', ['ranks', 'values', (0, 2)])
def test_dark_is_anomalous_in_every_plane(scale):
    right = shades(p.show_plane(lambda at: at[:, 0], scale=scale))
    up = shades(p.show_plane(lambda at: at[:, 1], scale=scale))
    for field, axis in ((right, 1), (up, 0)):
        steps = np.diff(field, axis=axis)
        assert (steps < .05).all() and steps.sum(axis).mean() < -.2


def test_a_plane_of_ranks_keeps_its_looks_under_a_monotone_map():
    drawn = [shades(p.show_plane(f)) for f in (from_origin, lambda at: np.exp(9 * from_origin(at)))]
    assert np.array_equal(*drawn)
    own = [shades(p.show_plane(lambda at: from_origin(at)**k, scale='values')) for k in (1, 9)]
    assert not np.array_equal(*own)


def test_a_common_scale_tells_sizes_apart():
    small, large = (shades(p.show_plane(lambda at: k * at[:, 0], scale=(0, 1))) for k in (.1, 1))
    assert small.min() > large.min() + .3 and small.max() == pytest.approx(large.max(), abs=.1)


def test_detector_function_and_array_draw_the_same():
    at = np.stack(np.meshgrid(*[np.linspace(0, 1, 80)] * 2), -1).reshape(-1, 2)
    forms = Flat(), lambda points: points.max(1), at.max(1).reshape(80, 80), torch.tensor(at.max(1))
    drawn = [shades(p.show_plane(f.reshape(80, 80) if hasattr(f, 'numpy') else f)) for f in forms]
    for other in drawn[1:]: assert np.array_equal(drawn[0], other)


def lines(ax):
    """The lines of equal score: their vertices, without the filling."""
    ink = [c for c in ax.collections[1:] if isinstance(c, mpl.contour.ContourSet)]
    return [path.vertices for c in ink for path in c.get_paths() if len(path.vertices)]


def test_the_line_is_the_threshold_or_what_is_asked():
    def side(ax): return np.concatenate(lines(ax)).max(1)
    assert np.allclose(side(p.show_plane(Flat())), .5, atol=.02)
    assert np.allclose(side(p.show_plane(Flat(), level=.25)), .25, atol=.02)
    assert len(lines(p.show_plane(Flat(), level=[.25, .75]))) == 2
    assert not lines(p.show_plane(Flat(), level=9)) and not lines(p.show_plane(from_origin))
    p.show_plane(Flat(), level=[9, .5, .5])


def test_points_crosses_and_marks():
    points = RNG.random((40, 2))
    ax = p.show_plane(None, points, Y, marked=points[:3] * 2)
    normal, bad, marked = ax.collections
    assert np.array_equal(normal.get_offsets(), points[Y == 0])
    assert np.array_equal(bad.get_offsets(), points[Y == 1]) and len(marked.get_offsets()) == 3
    assert to_rgb(normal.get_facecolor()) == to_rgb(p.NORMAL)
    assert to_rgb(bad.get_edgecolor()) == to_rgb(p.ANOMALY)
    assert not np.array_equal(normal.get_paths()[0].vertices, bad.get_paths()[0].vertices)
    images = p.show_plane(None, points[:, None, None], torch.tensor(Y))
    assert np.array_equal(images.collections[0].get_offsets(), points[Y == 0])


def test_a_circle_and_where_the_plane_ends():
    ax = p.show_plane(None, [[0, 0], [2, 4]], center=torch.tensor([1., 2.]), radius=1.5)
    ring = ax.patches[0]
    assert tuple(ring.center) == (1, 2) and ring.radius == 1.5 and ax.get_aspect() == 1
    assert ax.get_xlim()[0] < 0 and ax.get_ylim()[1] > 4               # around the points
    assert p.show_plane(Flat(), [[.2, .3]]).get_xlim() == (0, 1)
    assert p.show_plane(from_origin, extent=(-2, 1, 0, 3)).get_xlim() == (-2, 1)
    p.show_plane(np.zeros((5, 7)), extent=(0, 2, 0, 1)); p.show_plane(from_origin, [[1, 1]])


@pytest.mark.parametrize('args, kw, message', [
    ([np.zeros(5)], {}, r'array \(rows, columns\); got shape \(5,\)'),
    ([lambda at: at[:, 0] / 0], {}, 'finite.*got 6400'),
    ([from_origin, np.zeros((3, 3))], {}, r'points must be \(n, 2\).*got \(3, 3\)'),
    ([from_origin, np.zeros((3, 2)), [1]], {}, 'y must .* got 1'),
    ([from_origin], dict(marked=np.zeros((0, 2))), r'marked must .* got \(0, 2\)'),
    ([from_origin], dict(scale='rank'), "'ranks', 'values' or .low, high.; got 'rank'"),
    ([from_origin], dict(scale=(2, 1)), r'got \(2, 1\)'),
    ([from_origin], dict(scale=3.), 'got 3.0'),
    ([None], dict(radius=1.), 'center'),
])
@pytest.mark.filterwarnings('ignore:divide by zero', 'ignore:invalid value')
def test_wrong_planes_are_named(args, kw, message):
    with pytest.raises(ValueError, match=message): p.show_plane(*args, **kw)


# --- the diagram

EXAMPLES = {
    'AE': AE, 'AAE': AAE,
    'Deep SVDD': ('| | (reconstruction) | |\nx | [encoder> | code | <decoder] | x^\n'
                  '| | (distance) | |\n| | {center c} | | ',
                  'x -> encoder -> code -> decoder -> x^',
                  ['1 reconstruction: x, x^ => encoder, decoder',
                   '2 distance: code, center c => encoder']),
    'ACHC': ('| | | | (similar)\nz | [generator] | generated | | generated code | (push out)\n'
             'wrapping point | | [backbone] | [encoder> | wrapping code | (keep out) | {sphere}\n'
             'x | | | | code | (pull in)',
             'z -> generator -> generated -> backbone; wrapping point -> backbone; '
             'x -> backbone -> encoder -> code; encoder -> generated code; '
             'encoder -> wrapping code',
             ['1 pull in: code, sphere => encoder, sphere',
              '1 keep out: wrapping code, sphere => encoder',
              '1 push out: generated code, sphere => encoder',
              '2 similar: generated code => generator']),
    'BiGAN': ('x | [encoder> | E(x) |\n | | | [critic] | (tell apart)\n'
              'z | <generator] | G(z) | | (fool)',
              'x -> encoder -> E(x) -> critic; x -> critic; z -> generator -> G(z) -> critic; '
              'z -> critic',
              ['1 tell apart: critic => critic', '2 fool: critic => encoder, generator']),
    'GANomaly': ('| | (code) | | |\nx | [encoder> | z | <decoder] | x^ | [encoder 2> | z^\n'
                 '| | (context) | |\n| | | [critic] | (feature)',
                 'x -> encoder -> z -> decoder -> x^ -> encoder 2 -> z^; x -> critic; x^ -> critic',
                 ['1 context: x, x^ => encoder, decoder', '1 code: z, z^ => encoder, encoder 2',
                  '1 feature: critic => encoder, decoder']),
    'U-Net': ('x | | | | x^\n[down 1] | | | | [up 1]\n| [down 2] | | [up 2] |\n| | [bottom] |',
              'x -> down 1 -> down 2 -> bottom -> up 2 -> up 1 -> x^; down 1 -skip-> up 1; '
              'down 2 -skip-> up 2', []),
    'calls': ('[fit] | [networks]\n | [run] | [descend] | [loss]\n | [score] | threshold_',
              'fit -1-> networks; fit -2-> run -> descend -> loss; fit -3-> score -> threshold_',
              []),
}


def laid_out(grid, arrows, losses):
    """Boxes and lines of a diagram, as `diagram` lays them out."""
    arrows, losses = [*p._read_arrows(arrows)], [*p._read_losses(losses)]
    boxes = p._read_grid(grid, {})
    lanes = p._place(boxes.values())
    return boxes, [line[0] for line in p._connect(boxes, arrows, losses, lanes)]


@pytest.mark.parametrize('name', EXAMPLES)
def test_nothing_lies_over_anything_in_a_diagram(name):
    boxes, routes = laid_out(*EXAMPLES[name])
    edges = [np.array(b.edges) for b in boxes.values()]
    apart = lambda a, b: (a[:2] > b[2:]).any() or (b[:2] > a[2:]).any()
    assert all(apart(a, b) for i, a in enumerate(edges) for b in edges[:i])
    for path in routes:
        steps = np.diff(path, axis=0)
        assert (np.abs(steps).min(1) < 1e-9).all()                     # level or upright
        dots = np.concatenate([np.linspace(a, b, 50) for a, b in zip(path, path[1:])])
        for e in edges: assert not ((dots > e[:2] + .02) & (dots < e[2:] - .02)).all(1).any()


@pytest.mark.parametrize('name', EXAMPLES)
def test_texts_fit_into_their_boxes(name):
    ax = p.diagram(*EXAMPLES[name])
    draw = ax.figure.canvas.get_renderer()
    tags = [patch.get_window_extent() for patch in ax.patches]
    holds = lambda box, t: (box.min <= t.min).all() and (box.max >= t.max).all()
    for t in ax.texts:
        size = t.get_window_extent(draw)
        assert holds(ax.figure.bbox, size), t.get_text()
        if t.get_color() != 'white': continue
        assert any(holds(tag, size) for tag in tags), t.get_text()     # on its tag or disk


def test_a_line_ends_at_the_boxes_that_it_names():
    boxes, routes = laid_out(*AAE)
    def touches(at, name):
        low, high = np.reshape(boxes[name].edges, (2, 2))
        return (at > low - .01).all() and (at < high + .01).all()
    ends = 'x encoder code decoder x^'.split()
    pairs = [*zip(ends, ends[1:]), ('code', 'critic'), ('prior', 'critic')]
    pairs += [('x', 'reconstruction'), ('x^', 'reconstruction')]
    pairs += [('critic', 'tell apart'), ('critic', 'fool')]
    assert len(pairs) == len(routes)
    for (a, b), path in zip(pairs, routes): assert touches(path[0], a) and touches(path[-1], b)


def test_turns_have_numbers_and_colors():
    ax = p.diagram(*AAE)
    disks = [(t.get_text(), to_rgb(c.get_facecolor())) for t, c in zip(
        [t for t in ax.texts if t.get_text().isdigit()],
        [c for c in ax.patches if isinstance(c, mpl.patches.Circle)])]
    assert sorted(n for n, _ in disks) == list('1112233')            # three tags, four moved boxes
    assert {n: c for n, c in disks} == {n: to_rgb(c) for n, c in zip('123', p.PLAYERS)}
    assert len(set(disks)) == 3
    assert not [t for t in p.diagram(*AE).texts if t.get_text().isdigit()]     # one loss needs none


def test_what_no_loss_moves_is_gray():
    def frames(ax):
        boxes = [c for c in ax.patches if isinstance(c, mpl.patches.FancyBboxPatch)]
        return {to_rgb(c.get_edgecolor()) for c in boxes}
    frozen = p.diagram('x | [backbone] | [encoder] | code | (norm)',
                       'x -> backbone -> encoder -> code', ['norm: code => encoder'])
    assert frames(frozen) == {to_rgb('#777777'), to_rgb(p.PLAYERS[0])}
    assert frames(p.diagram('[fit] | [run]', 'fit -> run')) == {to_rgb(p.PLAYERS[0])}


@pytest.mark.parametrize('name, drawn', [
    ('x', '$x$'), ('x^', r'$\hat{x}$'), ("z'", "$z'$"), ('z_10', '$z_{10}$'), ('code', 'code'),
    ('wrapping point', 'wrapping\npoint'), ('E(x)', 'E(x)'),
    ('one two three four', 'one two\nthree four')])
def test_names_become_labels(name, drawn): assert p._label(name) == drawn


def test_labels_words_and_axes_given():
    ax = p.diagram('[a] | {s}', 'a -skip-> s', labels={'s': 'center $c$\nradius $R$'})
    assert texts(ax) == ['skip', '$a$', 'center $c$\nradius $R$']
    wide = p.diagram('|'.join(f'[network {i}]' for i in range(12)))
    assert wide.figure.get_figwidth() == pytest.approx(p.PAGE, abs=.2)  # not wider than the page
    left = p.panels(2)[0]
    size = lambda ax: min(t.get_size() for t in ax.texts)
    assert p.diagram(*AE, ax=left) is left and size(left) < size(p.diagram(*AE))


@pytest.mark.parametrize('args, message', [
    (('x | [encoder]', 'x -> encodr'), "must stand in the grid: x, encoder; got 'encodr'"),
    (('x | (l)', '', ['l: x, y => x']), "got 'y'"), (('x | (l)', '', ['l: x => y']), "got 'y'"),
    (('x | [a] [b]',), r"one box, .*got '\[a\] \[b\]'"), (('x | [a',), r"got '\[a'"),
    (('x | []',), r"got '\[\]'"), (('x | [y] | x',), "once in the grid; got 'x' twice"),
    ((' | ',), 'at least one'), (('x', 'x'), "must read 'a -> b -> c; d -> b'; got 'x'"),
    (('x | y', 'x->y'), 'must read'),
    (('x | (l)', '', ['l = x']), "must read '1 name.*got 'l = x'"),
    (('x | (l)',), r"each loss .* got \['l'\] and \[\]"),
    (('x | l', '', ['l: x => x']), r'each loss .* got \[\]'),
    (('x | (l)', '', ['l: x => x'] * 2), 'each loss'),
])
def test_wrong_diagrams_are_named(args, message):
    with pytest.raises(ValueError, match=message): p.diagram(*args)


def test_a_line_without_a_way_is_an_error(monkeypatch):
    monkeypatch.setattr(p, '_routes', lambda *args: iter(()))
    with pytest.raises(ValueError, match="none from 'x' to 'y'"): p.diagram('x | y', 'x -> y')


# --- the knob

def draw(k=1): plt.subplots(); CALLS.append(k)
CALLS = []


@pytest.fixture
def live(monkeypatch):
    """A kernel that is there, and what was displayed."""
    monkeypatch.delenv('AD_COURSE_STATIC', raising=False)
    shown = []
    trace = lambda self, *a, **k: shown.append(sys.exc_info()[1])
    kernel = type('Shell', (), {'kernel': object(), 'showtraceback': trace})()
    monkeypatch.setattr('IPython.get_ipython', lambda: kernel)
    monkeypatch.setattr('ipywidgets.widgets.interaction.get_ipython', lambda: kernel)
    monkeypatch.setattr('ipywidgets.widgets.widget_output.get_ipython', lambda: None)
    monkeypatch.setattr('IPython.display.display', lambda *a, **k: shown.extend(a))
    CALLS.clear()
    return shown


def test_knob_is_static_without_a_kernel(monkeypatch):
    CALLS.clear()
    p.knob(draw, static=[dict(k=2), dict(k=3)], k=IntSlider(value=1))
    p.knob(draw, k=IntSlider(value=7))
    assert CALLS == [2, 3, 7] and len(plt.get_fignums()) == 3
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    p.knob(draw, static=[dict(k=4)], k=(0, 9, 1))
    assert CALLS[-1] == 4


ABBREVIATIONS = [
    (0, 10), (0, 10, 1), (0, 9), (1, 10, 2), (-3, 4), (-3, 4, 2), (5, 5), (0., 1.), (0, 1.),
    (0., 1, .1), (0, 10, .5), (1., 7., 3), (-1.5, .25, .1), (np.int64(0), np.int64(9)),
    3, -3, 0, .5, -1.5, np.float32(.5), True, False, 'text', '',
    [3, 1, 2], ['b', 'a'], [('one', 1), ('two', 2)], [[1, 2], [3, 4]], [(1, 2), 3], range(3, 6),
    {'low': .1, 'high': 9}, {'pair': (1, 2)}, fixed(4), fixed('word'),
    IntSlider(value=7), FloatSlider(value=.3), FloatLogSlider(value=1), Checkbox(value=True),
    Dropdown(options=['x', 'y']),
    SelectionSlider(options=[('a', 1), ('b', 2)], value=2)]


@pytest.mark.parametrize('slider', ABBREVIATIONS, ids=str)
def test_a_static_knob_draws_what_the_slider_shows_first(slider):
    CALLS.clear()
    p.knob(draw, k=slider)
    first = interactive.widget_from_abbrev(slider).value
    assert CALLS == [first] and isinstance(CALLS[0], (type(first), type(slider)))


def test_a_live_knob_starts_where_the_static_one_does(live, monkeypatch):
    p.knob(draw, k=(0, 9, 2)); live[-1].update()
    monkeypatch.setenv('AD_COURSE_STATIC', '1')
    p.knob(draw, k=(0, 9, 2))
    assert len(CALLS) > 1 and set(CALLS) == {4}


@pytest.mark.parametrize('slider', [None, object(), (1, 2, 3, 4), ('a', 'b'), [], {}])
def test_what_is_no_slider_is_named(slider):
    with pytest.raises(ValueError, match='k must be a slider.*got'): p.knob(draw, k=slider)


def test_knob_environment_variable_wins_over_a_kernel(live, monkeypatch):
    monkeypatch.setenv('AD_COURSE_STATIC', '1')
    p.knob(draw, static=[dict(k=2)], k=IntSlider(value=1))
    assert CALLS == [2] and not live


def test_knob_moves(live):
    sliders = dict(a=IntSlider(value=1), b=FloatSlider(value=.5), c=FloatLogSlider(value=1),
                   d=SelectionSlider(options=['x', 'y']), e=(0, 9, 1))
    seen = []
    p.knob(lambda **values: (seen.append(values), plt.subplots()), **sliders)
    panel = live[-1]
    panel.update()
    assert all(not w.continuous_update for w in panel.children[:-1])
    assert seen[-1] == dict(a=1, b=.5, c=1, d='x', e=4)
    sliders['a'].value = 5
    assert seen[-1]['a'] == 5 and any(isinstance(o, mpl.figure.Figure) for o in live)
    assert not plt.get_fignums()                                       # shown once, then closed


def test_knob_errors_are_seen_and_leave_no_figure(live):
    def fails(k):
        plt.subplots()
        if k > 3: raise RuntimeError('too far')
    slider = IntSlider(value=1)
    p.knob(fails, k=slider)
    slider.value = 5
    assert any(isinstance(o, RuntimeError) for o in live) and not plt.get_fignums()
    slider.value = 2
    assert isinstance(live[-1], mpl.figure.Figure)                      # and it goes on


def test_knob_says_what_is_missing():
    with pytest.raises(ValueError, match='at least one'): p.knob(draw)
    with pytest.raises(ValueError, match=r"\['k'\]; got \['z'\]"):
        p.knob(draw, static=[dict(z=1)], k=IntSlider())
    with pytest.raises(ZeroDivisionError):
        p.knob(lambda k: 1 / k, static=[dict(k=0)], k=IntSlider())


def in_a_kernel(*code):
    """The outputs of cells with this code in a fresh kernel, as lists."""
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in code])
    env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'}
    nbclient.NotebookClient(nb, timeout=120, kernel_name='python3').execute(env=env)
    return [c.outputs for c in nb.cells]


def test_a_notebook_is_in_the_style_by_the_import_and_its_figures_stay_shown():
    """The first figure of a kernel starts the inline backend, inside of `style` or not."""
    look = ("from matplotlib import rcParams as r\n"
            "assert (r['figure.dpi'], r['image.cmap'], r['legend.fontsize']) == (90, 'gray', 9)")
    curves, start = "training_curves({'a': [2., 1.]});", 'from ad_course.pictures import *'
    shown = in_a_kernel(start, look, curves, curves, 'panels(2);', look)
    assert [[o.output_type for o in c] for c in shown] == [[], [], *[['display_data']] * 3, []]


# --- every notebook that draws

OWN_PLANES = {'contour', 'contourf', 'tricontour', 'tricontourf', 'pcolor', 'pcolormesh',
              'get_cmap'}
TEXT_CALLS = {'set_title', 'suptitle', 'set_xlabel', 'set_ylabel', 'text', 'annotate', 'set_xticks',
              'set_yticks', 'set_xticklabels', 'set_yticklabels'}
SETTINGS = {'rcParams', 'rc', 'rc_context', 'style'}
SIZES = {'figsize', 'fontsize', 'labelsize', 'dpi'}


def look_of_its_own(tree):
    """What in a cell chooses sizes, colors of planes or settings, which `pictures` does for all."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in SETTINGS:
            if getattr(node.value, 'id', '') in ('plt', 'mpl', 'matplotlib'):
                yield f'{node.value.id}.{node.attr}: the style comes with the import'
        if not isinstance(node, ast.Call): continue
        name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
        owner = getattr(getattr(node.func, 'value', None), 'id', '')
        if owner == 'plt' and name in ('subplots', 'figure', 'subplot_mosaic'):
            yield f'plt.{name}: figures come from panels(columns, rows)'
        if name in OWN_PLANES: yield f'{name}: a plane is drawn by show_plane'
        for k in node.keywords:
            literal = isinstance(k.value, ast.Constant)
            if k.arg == 'cmap' and literal: yield 'cmap: HEAT, GRAY, AMOUNT or SIGNED'
            if k.arg in SIZES or k.arg == 'size' and name in TEXT_CALLS:
                yield f'{name}({k.arg}=...): sizes are chosen once'


def unstyled(notebook):
    """What keeps a notebook from the style, in words."""
    drawing = [c for c in notebook.code_cells if any(isinstance(n, ast.Name) and n.id == 'plt'
                                                     for n in ast.walk(c.tree))]
    imports = any(isinstance(n, ast.ImportFrom) and (n.module or '').endswith('pictures')
                  for c in notebook.code_cells for n in ast.walk(c.tree))
    own = notebook.stem == 'pictures'
    if drawing and not (imports or own): yield 'it draws, and does not import ad_course.pictures'
    for cell in notebook.code_cells:
        if own and (cell.exported or 'rc_context' in cell.code): continue
        yield from (f'{cell}: {fault}' for fault in look_of_its_own(cell.tree))


def png_width(data):
    """The width in pixels of a PNG in base64."""
    return int.from_bytes(base64.b64decode(data[:64])[16:20], 'big')


# Pixels, with the white border of 9 on each side: from half of the page to the page. A browser
# shrinks what is wider, and its letters with it.
NARROWEST, WIDEST = 350, 90 * p.PAGE + 45


def of_another_size(notebook):
    """The pictures of a notebook that are too narrow or too wide, in words.

    A diagram has the size of its letters, so one of few boxes may be narrow."""
    for cell in (c for c in notebook.code_cells if not c.source.startswith('diagram(')):
        for data in (o.get('data', {}).get('image/png') for o in cell.outputs):
            width = png_width(''.join(data)) if data else NARROWEST
            if not NARROWEST <= width <= WIDEST: yield f'{cell}: {width} pixels wide'


@pytest.mark.parametrize('notebook', notebooks(), ids=str)
def test_figures_are_as_wide_as_they_are_read(notebook):
    faults = [*of_another_size(notebook)]
    assert not faults, f'{notebook}:\n' + '\n'.join(faults)


def test_a_figure_of_another_size_is_found():
    def drawn(width):
        buffer = io.BytesIO()
        plt.imsave(buffer, np.zeros((2, width)), format='png')
        output = dict(data={'image/png': base64.b64encode(buffer.getvalue()).decode()})
        return SimpleNamespace(code_cells=[SimpleNamespace(source='draw()', outputs=[output])])
    assert [len([*of_another_size(drawn(w))]) for w in (315, 360, 738, 900)] == [1, 0, 0, 1]


@pytest.mark.parametrize('notebook', notebooks(), ids=str)
def test_every_notebook_is_in_the_style(notebook):
    faults = [*unstyled(notebook)]
    assert not faults, f'{notebook}:\n' + '\n'.join(faults)


@pytest.mark.parametrize('code, fault', [
    ("plt.subplots(1, 2)", 'panels'), ("plt.figure()", 'panels'), ("ax.contourf(x)", 'show_plane'),
    ("ax.imshow(x, cmap='Blues')", 'HEAT'), ("ax.imshow(x, cmap=HEAT)", ''),
    ("f(figsize=(3, 2))", 'once'),
    ("ax.legend(fontsize=7)", 'once'), ("ax.set_title('a', size=9)", 'once'), ("panels(3)", ''),
    ("show_images(x, size=.7)", ''), ("plt.rcParams['font.size'] = 3", 'import'),
    ("plt.close()", ''),
    ("plt.style.use('dark')", 'import'), ("f, ax = plt.subplots()", 'panels')])
def test_a_look_of_its_own_is_found(code, fault):
    found = [*look_of_its_own(ast.parse(code))]
    assert fault in found[0] if fault else not found
