"""Pictures: contrast, what is drawn, errors by name, matplotlib left as found, and the knob in its two lives."""
import os
import subprocess
import sys

import matplotlib as mpl
mpl.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from ipywidgets import FloatLogSlider, FloatSlider, IntSlider, SelectionSlider
from matplotlib.colors import to_rgb

from ad_course import pictures as p

RNG = np.random.default_rng(0)
X, MAPS = RNG.random((4, 1, 8, 8)), RNG.random((4, 8, 8))
Y, SCORES = np.repeat([0, 1], [30, 10]), np.r_[RNG.normal(1, .2, 30), RNG.normal(2, .2, 10)]
HISTORY = {'reconstruction': [3., 2., 1.], 'penalty': [.1, .2, .3]}
DRAWINGS = {
    'show_images': lambda ax=None: p.show_images(X, titles='abcd', marks=[0, 1, 0, 1], ax=ax),
    'show_reconstructions': lambda ax=None: p.show_reconstructions(X, X[::-1], [1, 2, 3, 4], [0, 0, 1, 1], ax=ax),
    'score_histogram': lambda ax=None: p.score_histogram(SCORES, Y, 1.5, ax=ax),
    'roc_curve': lambda ax=None: p.roc_curve(Y, SCORES, 'toy', ax=ax),
    'pr_curve': lambda ax=None: p.pr_curve(Y, {'a': SCORES, 'b': -SCORES}, ax=ax),
    'latent_scatter': lambda ax=None: p.latent_scatter(RNG.random((40, 5)), Y, ax=ax),
    'show_maps': lambda ax=None: p.show_maps(X, MAPS, MAPS > .8, .9, ax=ax),
    'training_curves': lambda ax=None: p.training_curves(HISTORY, ax=ax),
}


@pytest.fixture(autouse=True)
def closed():
    plt.close('all'); yield; plt.close('all')


def texts(ax):
    legend = ax.get_legend()
    return [t.get_text() for t in ax.texts] + ([t.get_text() for t in legend.get_texts()] if legend else [])


# --- color

def linear(color): c = np.array(to_rgb(color)); return np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055)**2.4)
def luminance(color): return linear(color) @ [.2126, .7152, .0722]
def contrast(a, b): low, high = sorted((luminance(a), luminance(b))); return (high + .05) / (low + .05)
def gray(color): return np.array(to_rgb(color)) @ [.299, .587, .114]                    # Rec. 601, what printers and Pillow use


def test_normal_and_anomaly_differ_in_gray():
    assert contrast(p.NORMAL, p.ANOMALY) > 3 and abs(gray(p.NORMAL) - gray(p.ANOMALY)) > .3
    for color in (p.NORMAL, p.ANOMALY, p.INK): assert contrast(color, 'white') > 3


# Machado, Oliveira and Fernandes (2009), severity 1.
BLIND = {'protanopia': [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
    'deuteranopia': [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
    'tritanopia': [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]}


@pytest.mark.parametrize('kind', BLIND)
def test_normal_and_anomaly_differ_for_the_color_blind(kind):
    a, b = (np.clip(np.array(BLIND[kind]) @ linear(c), 0, 1) @ [.2126, .7152, .0722] for c in (p.NORMAL, p.ANOMALY))
    assert (max(a, b) + .05) / (min(a, b) + .05) > 2.5


def test_heat_darkens_with_the_score():
    levels = [luminance(c) for c in mpl.colormaps[p.HEAT](np.linspace(0, 1, 64))[:, :3]]
    assert (np.diff(levels) < 0).all()


# --- every function

@pytest.mark.parametrize('name', DRAWINGS)
def test_returns_the_axes_and_leaves_matplotlib_alone(name, monkeypatch):
    monkeypatch.setattr(plt, 'show', lambda *a, **k: pytest.fail('plt.show was called'))
    before = dict(mpl.rcParams)
    ax = DRAWINGS[name]()
    assert isinstance(ax, mpl.axes.Axes) and plt.get_fignums() == [ax.figure.number] and dict(mpl.rcParams) == before
    assert to_rgb(ax.figure.get_facecolor()) == (1, 1, 1) and ax.figure.get_facecolor()[3] == 1     # an opaque white card
    ax.figure.canvas.draw()
    own = plt.subplots()[1]
    assert DRAWINGS[name](own) is own and len(plt.get_fignums()) == 2


@pytest.mark.parametrize('name', DRAWINGS)
def test_readable_under_a_dark_style(name):
    with plt.style.context('dark_background'): ax = DRAWINGS[name]()
    assert to_rgb(ax.figure.get_facecolor()) == (1, 1, 1)
    for t in [*ax.texts, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()]: assert contrast(t.get_color(), 'white') > 7


def test_style_restores_after_an_error():
    before = dict(mpl.rcParams)
    with pytest.raises(RuntimeError), p.style(): raise RuntimeError
    with pytest.raises(ValueError): p.show_images(np.zeros(3))
    assert dict(mpl.rcParams) == before


def test_importing_changes_no_settings():
    code = 'import matplotlib as m; a = dict(m.rcParams); import ad_course.pictures; assert dict(m.rcParams) == a'
    subprocess.run([sys.executable, '-c', code], check=True, env={**os.environ, 'MPLBACKEND': 'Agg'})


# --- images

@pytest.mark.parametrize('x', [X, X[:, 0], np.repeat(X, 3, 1), (X * 255).astype(np.uint8), torch.tensor(X), torch.tensor(X, requires_grad=True),
    X > .5, X.astype(np.float32), RNG.random((1, 3, 300, 200)), RNG.random((3, 1, 1, 1))], ids=str)
def test_images_of_every_kind(x):
    ax = p.show_images(x, marks=[1] * len(x), titles=range(len(x)))
    ax.figure.canvas.draw()
    assert len(texts(ax)) == len(x)


def test_uint8_and_float_look_the_same():
    a, b = (p.show_images(v).images[0].get_array() for v in ((X * 255).astype(np.uint8), (X * 255).astype(np.uint8) / 255))
    assert np.array_equal(a, b)


@pytest.mark.parametrize('x, message', [
    (np.zeros((2, 8, 8, 3)), r'found shape \(2, 8, 8, 3\)'), (np.zeros((0, 8, 8)), 'at least one'), (np.zeros((2, 8)), 'shape'),
    (np.full((1, 4, 4), np.inf), '16 pixels'), (np.zeros((2, 4, 4), int), 'int64'), (np.zeros((401, 2, 2)), 'x.:40.'),
])
def test_wrong_images_are_named(x, message):
    with pytest.raises(ValueError, match=message): p.show_images(x)


def test_clipping_is_said():
    assert not texts(p.show_images(X))
    assert 'values from 0.' in texts(p.show_images(X * 3))[0] and 'clipped' in texts(p.show_images(X * 3))[0]


def test_marks_frame_the_anomalies():
    frames = p.show_images(X, marks=[0, 1, 0, 0]).patches
    assert [to_rgb(f.get_edgecolor()) == to_rgb(p.ANOMALY) for f in frames] == [False, True, False, False]
    assert frames[1].get_linewidth() > 2 * frames[0].get_linewidth()                 # not by color alone


def test_input_is_not_changed():
    x, maps = X * 2, MAPS.copy()
    before = x.copy()
    p.show_images(x); p.show_reconstructions(x, x / 2); p.show_maps(x, maps)
    assert np.array_equal(x, before) and np.array_equal(maps, MAPS)


def test_reconstructions_share_one_scale():
    ax = p.show_reconstructions(X, np.zeros_like(X), size=1)
    assert f'darkest = {X.max():.2g}' in texts(ax)[-1] and {'image', 'reconstruction', '|difference|'} <= set(texts(ax))
    with pytest.raises(ValueError, match='one shape'): p.show_reconstructions(X, X[:, :, :4])
    with pytest.raises(ValueError, match='scores has 1 entries for 4'): p.show_reconstructions(X, X, [1])


# --- scores

def test_histogram_shows_shares_threshold_and_hatch():
    ax = p.score_histogram(SCORES, Y, 1.5)
    assert sorted(texts(ax)) == ['anomaly (n = 10, 100% above)', 'normal (n = 30, 0% above)', 'threshold 1.5']
    assert [bool(a.get_hatch()) for a in ax.patches] == [False, True]
    for patch in ax.patches: assert .02 < patch.get_xy()[:, 1].max() <= 1


def test_histogram_counts_every_image_once():
    ax = p.score_histogram([0., 0, 1, 10], bins=5)
    area = ax.patches[0].get_xy()
    assert area[:, 1].max() == .75                                       # three of four in the first bin


def test_histogram_axis_and_threshold():
    tail = np.r_[np.ones(50), 1e4]
    assert p.score_histogram(tail).get_xscale() == 'log' and p.score_histogram(tail, log=False).get_xscale() == 'linear'
    assert p.score_histogram(SCORES).get_xscale() == 'linear'
    with pytest.raises(ValueError, match='positive'): p.score_histogram([-1, 2], log=True)
    with pytest.raises(ValueError, match='scores must'): p.score_histogram([1, np.nan])
    with pytest.raises(ValueError, match='y has 1'): p.score_histogram([1, 2], [1])
    detector = type('D', (), {'threshold_': 1.25})()
    assert 'threshold 1.25' in texts(p.score_histogram(SCORES, Y, detector))
    p.score_histogram(SCORES, Y, -np.inf); p.score_histogram(np.ones(5)); p.score_histogram(torch.tensor(SCORES), torch.tensor(Y))


def test_curves_say_their_area():
    assert texts(p.roc_curve([0, 0, 0, 1, 1], [.1, .3, .5, .2, .9], 'toy'))[0] == 'toy AUROC 0.667'
    assert texts(p.pr_curve([0, 0, 0, 1, 1], [.1, .3, .5, .2, .9])) == ['AP 0.750', 'base rate 0.400']
    ax = p.roc_curve(Y, {str(i): SCORES for i in range(9)})
    assert len(ax.lines) == 10 and ax.get_xlim()[0] < 0.01 and ax.get_ylim()[0] < 0.01             # no cut axes
    for draw in (p.roc_curve, p.pr_curve):
        with pytest.raises(ValueError, match='both normal'): draw([0, 0], [1, 2])
        with pytest.raises(ValueError, match='nothing to draw'): draw([0, 1], {})


def test_methods_differ_in_gray_or_in_line():
    assert len({str(line) for _, line in p.LINES}) == len(p.LINES)


# --- codes, maps, curves

def test_scatter_names_its_projection():
    flat = p.latent_scatter(RNG.random((40, 2)), Y)
    assert flat.get_xlabel() == 'code 1'
    codes = RNG.normal(size=(40, 3)) * [3, 2, .1]
    ax = p.latent_scatter(codes, Y)
    share = np.linalg.eigvalsh(np.cov(codes.T))[::-1]
    assert ax.get_xlabel() == f'PCA 1 of 3 dimensions ({share[0] / share.sum():.0%} of variance)'
    drawn = np.concatenate([c.get_offsets() for c in ax.collections])
    assert np.allclose(np.var(drawn, 0, ddof=1), share[:2])
    assert 'one dimension' in p.latent_scatter(codes[:, :1]).get_ylabel()


def test_scatter_kinds_and_odd_shapes():
    ax = p.latent_scatter(RNG.random((40, 2)), Y, np.where(Y, 'scratch', 'good'))
    assert texts(ax) == ['good (n = 30)', 'scratch (n = 10)']
    good, bad = ax.collections
    assert not np.array_equal(good.get_paths()[0].vertices, bad.get_paths()[0].vertices)             # another marker
    p.latent_scatter(RNG.random((9, 2, 3, 3)), kinds=list('abcabcabc')); p.latent_scatter(np.ones((5, 4)))
    for wrong, message in ((np.ones((2, 2)), 'at least 3'), (np.full((5, 2), np.nan), 'finite')):
        with pytest.raises(ValueError, match=message): p.latent_scatter(wrong)
    with pytest.raises(ValueError, match='kinds has 1'): p.latent_scatter(np.ones((5, 2)), kinds=['a'])


def test_maps_state_one_scale():
    ax = p.show_maps(X, MAPS * [[[1]], [[2]], [[3]], [[4]]])
    bar = ax.child_axes[0]
    assert bar.get_ylim() == pytest.approx((MAPS.min(), (MAPS[3] * 4).max()), rel=1) and 'one scale' in bar.get_ylabel()
    own = p.show_maps(X, MAPS, scale='image')
    assert not own.child_axes and 'own color scale' in own.get_title(loc='left') + own.get_title()


def test_common_scale_keeps_the_order_and_image_scale_does_not():
    maps = np.stack([np.eye(8) * .01, np.eye(8)])
    common, own = (p.show_maps(np.zeros((2, 8, 8)), maps, scale=s).images[0].get_array() for s in ('common', 'image'))
    darkest = lambda canvas: [canvas[10:18, left:left + 8].min() for left in (1, 10)]
    assert darkest(common)[0] > darkest(common)[1] + .3 and darkest(own)[0] == pytest.approx(darkest(own)[1])


def test_maps_take_a_detector_tensors_and_no_mask():
    class Detector:
        def anomaly_map(self, x): return MAPS
    a, b = (p.show_maps(torch.tensor(X), m).images[0].get_array() for m in (Detector(), torch.tensor(MAPS)))
    assert np.array_equal(a, b)
    p.show_maps(X, MAPS, np.zeros_like(MAPS), threshold=9); p.show_maps(X, 0 * MAPS)


@pytest.mark.parametrize('kw, message', [(dict(maps=MAPS[:2]), r'maps must be \(4, 8, 8\)'), (dict(maps=MAPS, masks=MAPS[:, :4]), 'masks must be'),
    (dict(maps=np.full_like(MAPS, np.nan)), '256 pixels'), (dict(maps=MAPS, scale='mine'), "'mine'")])
def test_wrong_maps_are_named(kw, message):
    with pytest.raises(ValueError, match=message): p.show_maps(X, **kw)


def test_training_curves():
    ax = p.training_curves(HISTORY | {'seconds': [9, 9, 9]})
    assert texts(ax) == ['sum', 'reconstruction', 'penalty'] and list(ax.lines[0].get_ydata()) == [3.1, 2.2, 1.3]
    assert ax.lines[0].get_linewidth() > ax.lines[1].get_linewidth() and ax.get_yscale() == 'linear'
    assert texts(p.training_curves({'loss': [1, .001], 'a': [.5, .0005]})) == ['loss', 'a']
    assert p.training_curves({'loss': [1, .001]}).get_yscale() == 'log' and p.training_curves({'loss': [1, -.001]}).get_yscale() == 'linear'
    sides = texts(p.training_curves({'critic/real': [1], 'critic/fake': [2], 'generator/adversarial': [3]}))
    assert sides == ['critic/sum', 'critic/real', 'critic/fake', 'generator/adversarial']
    detector = type('D', (), {'history_': HISTORY})()
    assert texts(p.training_curves(detector)) == ['sum', 'reconstruction', 'penalty']
    ax = p.training_curves({'loss': [1., np.nan, np.nan]})
    assert 'not finite from epoch 2' in ax.get_title(loc='left') + ax.get_title() and ax.get_xlim()[1] >= 3
    for empty in ({}, {'loss': []}, {'seconds': [1.]}):
        with pytest.raises(ValueError, match='empty'): p.training_curves(empty)


# --- the knob

def draw(k=1): plt.subplots(); CALLS.append(k)
CALLS = []


@pytest.fixture
def live(monkeypatch):
    "A kernel that is there, and what was displayed."
    monkeypatch.delenv('AD_COURSE_STATIC', raising=False)
    shown, kernel = [], type('Shell', (), {'kernel': object(), 'showtraceback': lambda self, *a, **k: shown.append(sys.exc_info()[1])})()
    monkeypatch.setattr('IPython.get_ipython', lambda: kernel)
    monkeypatch.setattr('ipywidgets.widgets.interaction.get_ipython', lambda: kernel)
    monkeypatch.setattr('ipywidgets.widgets.widget_output.get_ipython', lambda: None)
    monkeypatch.setattr('IPython.display.display', lambda *a, **k: shown.extend(a))
    CALLS.clear()
    return shown


def test_knob_is_static_without_a_kernel(monkeypatch):
    CALLS.clear()
    p.knob(draw, static=[dict(k=2), dict(k=3)], k=IntSlider(value=1)); p.knob(draw, k=IntSlider(value=7))
    assert CALLS == [2, 3, 7] and len(plt.get_fignums()) == 3
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    p.knob(draw, static=[dict(k=4)], k=(0, 9, 1))
    assert CALLS[-1] == 4


def test_knob_environment_variable_wins_over_a_kernel(live, monkeypatch):
    monkeypatch.setenv('AD_COURSE_STATIC', '1')
    p.knob(draw, static=[dict(k=2)], k=IntSlider(value=1))
    assert CALLS == [2] and not live


def test_knob_moves(live):
    sliders = dict(a=IntSlider(value=1), b=FloatSlider(value=.5), c=FloatLogSlider(value=1), d=SelectionSlider(options=['x', 'y']), e=(0, 9, 1))
    seen = []
    p.knob(lambda **values: (seen.append(values), plt.subplots()), **sliders)
    panel = live[-1]
    panel.update()
    assert all(not w.continuous_update for w in panel.children[:-1]) and seen[-1] == dict(a=1, b=.5, c=1, d='x', e=4)
    sliders['a'].value = 5
    assert seen[-1]['a'] == 5 and any(isinstance(o, mpl.figure.Figure) for o in live) and not plt.get_fignums()     # each shown once, then closed


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
    with pytest.raises(ValueError, match='same arguments'): p.knob(draw, static=[dict(z=1)], k=IntSlider())
    with pytest.raises(ZeroDivisionError): p.knob(lambda k: 1 / k, static=[dict(k=0)], k=IntSlider())


def test_a_figure_in_a_fresh_kernel_stays_shown():
    """The first figure of a kernel starts the inline backend inside of `style`, which must not undo what it switched on."""
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    code = 'from ad_course.pictures import training_curves', "training_curves({'a': [2., 1.]});", "training_curves({'a': [2., 1.]});"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in code])
    nbclient.NotebookClient(nb, timeout=120, kernel_name='python3').execute(env={k: v for k, v in os.environ.items() if k != 'MPLBACKEND'})
    assert [[o.output_type for o in c.outputs] for c in nb.cells] == [[], ['display_data'], ['display_data']]
