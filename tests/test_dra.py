"""DRA: equations (1) to (9), each held against something independent, and independent heads."""
import numpy as np
import pytest
import torch
from torch import nn

from ad_course.check import check_detector
from ad_course.data import label_anomalies
from ad_course.detector import load
from ad_course.deviation import DevNet, deviation_loss, deviations
from ad_course.dra import (
    DRA, HEADS, cutmix, draw_colors, draw_patches, head_loss, place_head, reference_map,
    residual_map, signed_sum)
from ad_course.feature_maps import MapView
from ad_course.metrics import auroc
from ad_course.surfaces import surfaces
from tests.labelled import check_labels_needed
from tests.mutants import assert_caught

SMALL = dict(backbone=None, epochs=20, batch_size=32, width=8, hidden=8, device='cpu',
             verbose=False)
QUICK = dict(epochs=3, hidden=8, device='cpu', verbose=False)


def rng(seed=0): return torch.Generator().manual_seed(seed)
def draws(*shape, seed=0): return torch.rand(shape, generator=rng(seed))


@pytest.fixture(scope='module')
def cloth():
    """Surfaces with six labelled anomalies of the two seen kinds."""
    return label_anomalies(surfaces(n_train=60, n_test=80, size=32, seed=0), 6, seed=0)


@pytest.fixture(scope='module')
def fitted(cloth): return DRA(**QUICK).fit(cloth.x_train, cloth.y_train)


# ---------------------------------------------------------------- equation (4)
def word_for_word(f):
    """R, T and C as arrays, image by image."""
    for c, h, w in ((1, 20, 31), (3, 8, 8)):
        x = draws(6, c, h, w)
        made, there = f(x, rng(1), (.05, .4), .2)
        g = rng(1)
        sides, start, end = (a.numpy() for a in draw_patches(6, h, w, g, (.05, .4)))
        a, b = draw_colors(x, g, .2)
        colored = (a * x + b).clamp(0, 1).numpy()
        for i in range(6):
            R = np.zeros((h, w), 'f4')
            R[start[i, 0]:start[i, 0] + sides[i, 0], start[i, 1]:start[i, 1] + sides[i, 1]] = 1
            T = lambda a: np.roll(a, end[i] - start[i], (-2, -1))
            wanted = T(R * colored[i]) + (1 - T(R)) * x[i].numpy()
            np.testing.assert_allclose(made[i], wanted, atol=1e-6)
            assert np.array_equal(there[i], T(R) == 1), 'the mask is T(R)'


def nothing_else_changes(f):
    x = draws(20, 1, 24, 24)
    made, there = f(x, rng(2))
    assert not ((made != x).any(1) & ~there).any()
    assert (made != x).flatten(1).any(1).all() and made.min() >= 0 and made.max() <= 1


def images_stay_apart(f):
    """A patch comes from its own image."""
    x = (torch.arange(10.) / 10).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)
    made, _ = f(x, rng(3), (.1, .3), 0.)
    torch.testing.assert_close(made, x.contiguous())


CUTMIX = [word_for_word, nothing_else_changes, images_stay_apart]


@pytest.mark.parametrize('promise', CUTMIX, ids=lambda f: f.__name__)
def test_cutmix(promise): promise(cutmix)


def without_bracket(x, g, *more):
    made, there = cutmix(x, g, *more)
    return torch.where(there[:, None], made, 1.), there

def from_the_neighbor(x, g, *more):
    made, there = cutmix(x, g, *more)
    return torch.where(there[:, None], made.roll(1, 0), x), there

def where_it_was_cut(x, g, *more):
    """T moves the mask and not what is in it."""
    made, there = cutmix(x, g, *more)
    return torch.where(there[:, None], (x * 1.05).clamp(0, 1), x), there

def mask_of_the_source(x, g, *more):
    made, there = cutmix(x, g, *more)
    return made, there.roll(1, 1)

def everywhere(x, g, *more):
    made, there = cutmix(x, g, *more)
    return made * .999, there


@pytest.mark.parametrize('mutant, promise', [
    (without_bracket, word_for_word), (without_bracket, nothing_else_changes),
    (from_the_neighbor, images_stay_apart), (where_it_was_cut, word_for_word),
    (mask_of_the_source, word_for_word), (everywhere, nothing_else_changes)])
def test_mutant_of_cutmix_is_caught(mutant, promise): assert_caught(promise, mutant)


@pytest.mark.parametrize('area', [(.02, .15), (.3, .3), (1., 1.), (1e-6, 1e-6)])
def test_patches_lie_inside_and_have_their_area(area):
    sides, start, end = draw_patches(500, 40, 60, rng(), area)
    whole = torch.tensor([40, 60])
    assert (sides >= 1).all() and (start >= 0).all() and (end >= 0).all()
    assert (start + sides <= whole).all() and (end + sides <= whole).all()
    share = sides.prod(1) / 2400
    assert (share <= area[1] * 1.15 + 1 / 2400).all()
    if area[1] < .2: assert (share >= .8 * area[0] - 1 / 2400).all()
    if area == (1., 1.): assert share.min() >= .57, 'more cut off than the text says'
    ratio = sides[:, 0] / 40 / (sides[:, 1] / 60)
    if area == (.02, .15): assert ratio.min() > .25 and ratio.max() < 4


def test_the_same_generator_gives_the_same_and_global_state_is_left():
    x, before = draws(4, 1, 16, 16), torch.get_rng_state()
    assert torch.equal(cutmix(x, rng(5))[0], cutmix(x, rng(5))[0])
    assert not torch.equal(cutmix(x, rng(5))[0], cutmix(x, rng(6))[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_color():
    """Brightness times contrast about the mean, each within 1 ± amount."""
    x = draws(400, 3, 8, 8)
    a, b = draw_colors(x, rng(), 0.)
    assert torch.allclose(a, torch.ones(())) and torch.allclose(b, torch.zeros(()), atol=1e-6)
    a, b = draw_colors(x, rng(), .1)
    mean = x.mean((1, 2, 3), keepdim=True)
    light = (a * mean + b) / mean                       # the mean only feels the brightness
    contrast = a / light
    for factor in (light, contrast):
        assert .9 <= factor.min() < .91 and 1.09 < factor.max() <= 1.1001
    assert abs(np.corrcoef(light.flatten(), contrast.flatten())[0, 1]) < .2


# ---------------------------------------------------------------- equations (6) to (8)
def test_reference_and_residual_by_hand():
    normal = torch.tensor([[[[1., 2]]], [[[3., 6]]]])                          # (2, 1, 1, 2)
    reference = reference_map(normal)
    assert reference.tolist() == [[[[2, 4]]]]
    assert residual_map(reference, torch.tensor([[[[5., 4]]]])).tolist() == [[[[-3, 0]]]]


def test_a_linear_head_of_residuals_is_a_linear_head_with_a_bias_for_each_place():
    head, m, r = place_head(5), draws(4, 5, 3, 3), draws(1, 5, 3, 3, seed=1)
    scores = head(residual_map(r, m))
    bias = scores + nn.functional.conv2d(m, head.weight)
    torch.testing.assert_close(bias, bias[:1].expand_as(bias))


# ---------------------------------------------------------------- who learns from whom
def costs_by_hand(f):
    y, s, unit = torch.tensor([0, 1, 2]), torch.tensor([2., 2, 2]), torch.tensor([-1., 0, 1])
    costs = {name: f(name, s, y, unit).tolist() for name in HEADS}
    assert costs == dict(seen=[2, 3, 0], pseudo=[2, 0, 3], residual=[2, 3, 3],
                         normality=[3, 2, 2])
    assert f('normality', s + 5, y, unit).tolist() == [0, 7, 7]
    assert f('seen', s, y, unit, margin=4., power=2).tolist() == [4, 4, 0]


def not_reversed(name, *a, **k): return head_loss('residual' if name == 'normality' else name,
                                                  *a, **k)
def all_learn_from_all(name, *a, **k): return head_loss('residual' if name == 'seen' else name,
                                                        *a, **k)
def exchanged(name, *a, **k):
    return head_loss(dict(seen='pseudo', pseudo='seen').get(name, name), *a, **k)
def absolute(name, s, *a, **k): return head_loss(name, (s - 3).abs(), *a, **k)


def test_who_learns_from_whom(): costs_by_hand(head_loss)


@pytest.mark.parametrize('mutant', [not_reversed, all_learn_from_all, exchanged, absolute])
def test_mutant_of_the_head_loss_is_caught(mutant): assert_caught(costs_by_hand, mutant)


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="name must be one of .*; got 'sen'"):
        head_loss('sen', torch.zeros(1), torch.zeros(1), torch.randn(5))


def test_scores_are_not_made_absolute(fitted, cloth):
    """Places may score below zero: no equation has an absolute value."""
    maps = fitted.head_maps(fitted.nets_.view(torch.tensor(cloth.x_test)))
    assert all((s < 0).any() for s in maps.values())


def test_normality_is_subtracted_and_is_the_score_of_the_mean_place(fitted, cloth):
    m = fitted.nets_.view(torch.tensor(cloth.x_test[:9]))
    scores = fitted.head_scores(m)
    mean = m.mean((2, 3), keepdim=True)
    torch.testing.assert_close(scores['normality'], fitted.nets_.normality(mean)[:, 0, 0, 0],
                               rtol=1e-4, atol=1e-5)
    wanted = scores['seen'] + scores['pseudo'] + scores['residual'] - scores['normality']
    torch.testing.assert_close(signed_sum(scores), wanted)
    np.testing.assert_allclose(fitted.decision_function(cloth.x_test[:9]), wanted.detach(),
                               rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- independent heads
@pytest.mark.parametrize('thaw', [0, 1])
def test_no_head_moves_another(cloth, thaw):
    d = DRA(**QUICK | dict(thaw=thaw, epochs=0)).fit(cloth.x_train, cloth.y_train)
    xb, yb = torch.tensor(cloth.x_train[-12:]), torch.tensor(cloth.y_train[-12:])
    yb[:3] = 2
    for name in HEADS:
        d.nets_.zero_grad()
        d.loss(xb, yb)[name].mean().backward()
        moved = {n for n, net in d.nets_.items() for p in net.parameters()
                 if p.grad is not None and p.grad.any()}
        assert moved == ({'view', name} if thaw else {name})


def test_a_head_learns_the_same_whoever_else_is_there(cloth, fitted):
    for heads in (('seen',), ('normality', 'pseudo'), ('residual',)):
        d = DRA(**QUICK, heads=heads).fit(cloth.x_train, cloth.y_train)
        for name in heads:
            pairs = zip(d.nets_[name].parameters(), fitted.nets_[name].parameters())
            assert all(torch.equal(p, q) for p, q in pairs)


def test_with_the_first_head_alone_it_is_devnet(cloth):
    """Linear, and without pseudo-anomalies."""
    settings = dict(epochs=5, device='cpu', verbose=False)
    d = DRA(**settings, heads=('seen',), n_pseudo=0, hidden=0).fit(cloth.x_train, cloth.y_train)
    dev = DevNet(**settings).fit(cloth.x_train, cloth.y_train)
    np.testing.assert_allclose(d.decision_function(cloth.x_test),
                               dev.decision_function(cloth.x_test), rtol=1e-5, atol=1e-5)


def test_the_loss_of_rows_is_the_loss_of_images(cloth, fitted):
    xb, yb = torch.tensor(cloth.x_train[-9:]), torch.tensor(cloth.y_train[-9:])
    with torch.no_grad():
        one, two = fitted.loss(xb, yb), fitted.row_loss(fitted.nets_.view.frozen(xb), yb)
    scores = fitted.head_scores(fitted.nets_.view(xb))
    dev = deviation_loss(deviations(scores['residual'], fitted.reference_), yb)
    torch.testing.assert_close(one['residual'], sum(dev.values()), rtol=1e-4, atol=1e-4)
    for name in HEADS: torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- references and pseudo-anomalies
def normal_rows(d, cloth):
    return d.nets_.view.frozen(torch.tensor(cloth.x_train[cloth.y_train == 0]))


def references_are_normal_images(cls):
    t = label_anomalies(surfaces(n_train=30, n_test=10, size=32, seed=0), 6, seed=0)
    d = cls(**QUICK, n_reference_images=28).fit(t.x_train, t.y_train)
    gaps = (d.reference_rows_[:, None] - normal_rows(d, t)[None]).abs().amax((2, 3, 4))
    assert len(d.reference_rows_) == 28
    assert (gaps.amin(1) < 1e-3).all(), 'a reference is no normal image'
    assert len(set(gaps.argmin(1).tolist())) == 28, 'an image twice'


class Labelled(DRA):
    """References are the last images, the labelled ones among them."""
    def pseudo_rows(self, data, rng):
        self.reference_rows_ = self.nets_.view.frozen(data.x[-28:])
        return super().pseudo_rows(data, rng)

class Mixed(DRA):
    """Half of the references are pseudo-anomalies, as in the official code."""
    def pseudo_rows(self, data, rng):
        rows = super().pseudo_rows(data, rng)
        self.reference_rows_[::2] = rows[:14]
        return rows


def test_references(): references_are_normal_images(DRA)


@pytest.mark.parametrize('cls', [Labelled, Mixed])
def test_mutant_of_the_references_is_caught(cls):
    assert_caught(references_are_normal_images, cls)


def scores_do_not_depend_on_the_call(cls):
    t = label_anomalies(surfaces(n_train=30, n_test=20, size=32, seed=0), 6, seed=0)
    d = cls(**QUICK | dict(epochs=1)).fit(t.x_train, t.y_train)
    one, two = (d.decision_function(t.x_test) for _ in range(2))
    assert np.array_equal(one, two), 'another score at the second call'


class DrawnAnew(DRA):
    """Another reference at each call; the official code draws some, which may be the same."""
    calls = 0

    def head_maps(self, m):
        rows, place = self.reference_rows_, DrawnAnew.calls % len(self.reference_rows_)
        DrawnAnew.calls += 1
        self.reference_rows_ = rows[place:place + 1]
        maps, self.reference_rows_ = super().head_maps(m), rows
        return maps


def test_scores_are_deterministic():
    scores_do_not_depend_on_the_call(DRA)
    assert_caught(scores_do_not_depend_on_the_call, DrawnAnew, 'another score')


def test_fewer_normal_images_than_references(cloth):
    d = DRA(**QUICK, n_reference_images=500).fit(cloth.x_train, cloth.y_train)
    assert len(d.reference_rows_) == (cloth.y_train == 0).sum()


def sources(monkeypatch, cloth, **settings):
    """The labels and rows from which a detector learns, epoch by epoch."""
    seen, run = [], DRA.run
    def spy(self, data, epochs, turns, after_epoch=None):
        seen.append((data.y.clone(), data.rows.clone(), len(data)))
        for epoch in range(2): after_epoch and after_epoch(data, epoch)
        seen.append((data.y.clone(), data.rows.clone(), len(data)))
        return run(self, data, epochs, turns, after_epoch=after_epoch)
    monkeypatch.setattr(DRA, 'run', spy)
    DRA(**QUICK | settings).fit(cloth.x_train, cloth.y_train)
    return seen


@pytest.mark.parametrize('n', [1, 3])
def test_there_are_so_many_pseudo_anomalies(cloth, monkeypatch, n):
    (y, rows, length), _ = sources(monkeypatch, cloth, n_pseudo=n)
    normal = int((y == 0).sum())
    assert [(y == k).sum() for k in (1, 2)] == [6, n * normal] and len(rows) == len(y)
    assert length == pytest.approx((2 + n) * normal, abs=6), 'as many labelled ones as normal ones'


def test_pseudo_anomalies_are_renewed_where_nothing_is_frozen(cloth, monkeypatch):
    for backbone, same in ((None, False), ('efficientnet_lite0', True)):
        (y, before, _), (_, after, _) = sources(monkeypatch, cloth, backbone=backbone)
        assert torch.equal(before[y < 2], after[y < 2])
        assert torch.equal(before[y == 2], after[y == 2]) == same
        monkeypatch.undo()


def test_pseudo_anomalies_are_made_from_normal_images(cloth, monkeypatch):
    (y, rows, _), _ = sources(monkeypatch, cloth, backbone=None, patch_area=(.05, .05), jitter=0.)
    made, normal = rows[y == 2], rows[y == 0]
    assert (made != normal).flatten(1).float().mean(1).max() < .2


# ---------------------------------------------------------------- the detector
def test_finds_what_was_made_and_what_was_shown():
    t = label_anomalies(surfaces(n_train=120, n_test=160, size=64, seed=0), 6, seed=0)
    raw, d = (DRA(epochs=n, device='cpu', verbose=False).fit(t.x_train, t.y_train)
              for n in (0, 15))
    made = cutmix(torch.tensor(t.x_test[t.y_test == 0]), rng(7))[0].numpy()
    x = np.concatenate([t.x_test[t.y_test == 0], made])
    y = np.repeat([0, 1], len(made))
    pseudo = [auroc(y, m.decision_function(x)) for m in (raw, d)]
    real = [auroc(t.y_test, m.decision_function(t.x_test)) for m in (raw, d)]
    assert pseudo[1] > .9 and pseudo[1] > pseudo[0] + .1
    assert real[1] > .88 and real[1] > real[0] + .1


def test_a_file_holds_the_references(cloth, fitted, tmp_path, monkeypatch):
    fitted.save(tmp_path/'d.safetensors')
    monkeypatch.setattr('ad_course.backbones.load_packaged', lambda *a: pytest.fail('loaded'))
    again = load(tmp_path/'d.safetensors')
    assert torch.equal(again.reference_rows_, fitted.reference_rows_) and again.heads == HEADS
    assert np.array_equal(again.decision_function(cloth.x_test),
                          fitted.decision_function(cloth.x_test))


def test_thawed_the_references_pass_through_the_view_that_learned(cloth):
    d = DRA(**QUICK | dict(thaw=1, epochs=1, size=32)).fit(cloth.x_train, cloth.y_train)
    xb = torch.tensor(cloth.x_test[:4])
    m = d.nets_.view(xb)
    reference = d.nets_.view.learned(d.reference_rows_).mean(0)
    wanted = d.nets_.residual(reference - m)[:, 0]
    torch.testing.assert_close(d.head_maps(m)['residual'], wanted, rtol=1e-4, atol=1e-5)
    d.nets_.zero_grad()
    d.head_maps(m.detach())['residual'].sum().backward()
    grads = [p.grad for p in d.nets_.view.parameters() if p.grad is not None]
    assert any(g.any() for g in grads), 'no gradient passes through the references'


@pytest.mark.parametrize('head', HEADS)
def test_each_head_alone_keeps_promises(head):
    settings = dict(heads=(head,), epochs=30)
    check_detector(DRA(**SMALL | settings), shape=(1, 16, 16),
                   only=['scores_are_numbers', 'alone_as_in_a_batch', 'maps_are_images'])


def test_labels_are_needed(cloth): check_labels_needed(DRA, cloth.x_train[:20], **SMALL)


@pytest.mark.parametrize('settings, name', [
    (dict(heads=()), 'heads'), (dict(heads=['seen']), 'heads'), (dict(heads='seen'), 'heads'),
    (dict(heads=('seen', 'seen')), 'heads'), (dict(heads=('sen',)), 'heads'),
    (dict(n_pseudo=0), 'n_pseudo'), (dict(n_pseudo=-1, heads=('seen',)), 'n_pseudo'),
    (dict(patch_area=(.2, .1)), 'patch_area'), (dict(patch_area=(0, .1)), 'patch_area'),
    (dict(patch_area=(.1, 1.1)), 'patch_area'), (dict(patch_area=(.1,)), 'patch_area'),
    (dict(patch_area=.1), 'patch_area'), (dict(patch_area=('a', 'b')), 'patch_area'),
    (dict(jitter=-.1), 'jitter'), (dict(jitter=1.1), 'jitter'), (dict(hidden=-1), 'hidden'),
    (dict(n_reference_images=0), 'n_reference_images'), (dict(top_share=0), 'top_share')], ids=str)
def test_wrong_settings(cloth, settings, name):
    with pytest.raises(ValueError, match=f'DRA: {name} must be .*; got'):
        DRA(**SMALL | settings).fit(cloth.x_train, cloth.y_train)


class Added(DRA):
    """Normality added, though its labels are reversed: alone it ranks the wrong way round."""
    def image_score(self, xb): return -super().image_score(xb)

class Deaf(DRA):
    """Labels of the neighbor."""
    def map_loss(self, m, yb): return super().map_loss(m, yb.roll(1))

class BatchReference(DRA):
    """The reference is the mean of the batch."""
    def head_maps(self, m):
        residual = self.nets_.residual(residual_map(reference_map(m), m))[:, 0]
        return super().head_maps(m) | dict(residual=residual)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('cls, promises, heads', [
    (Added, ['higher_is_anomalous'], ('normality',)),
    (Deaf, ['labels_matter', 'learns'], ('seen',)),
    (BatchReference, ['alone_as_in_a_batch', 'images_do_not_mix'], HEADS)])
def test_mutant_of_the_detector_is_caught(cls, promises, heads):
    with pytest.raises(AssertionError, match='breaks'):
        check_detector(cls(**SMALL, heads=heads), only=promises, shape=(1, 16, 16))


def test_the_view_is_one(fitted):
    views = [net for net in fitted.nets_.values() if isinstance(net, MapView)]
    assert len(views) == 1 and set(fitted.nets_) == {'view', *HEADS}
