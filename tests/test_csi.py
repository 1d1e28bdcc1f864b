"""CSI: turned images, both losses, the parts of the score and their weights; mutants of each."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from ad_course.csi import CSI, balanced_sum, length_times_cosine, shifted
from ad_course.data import digits
from ad_course.detector import isolated, load
from ad_course.simclr import SimCLR, nt_xent

from .mutants import assert_caught, each_mutant
from .players import check_explosion, check_refused

G = np.random.default_rng(0)
X, NEW = (G.random((n, 1, 4, 4), dtype='float32') for n in (15, 6))
SMALL = dict(width=2, code_dim=5, head_dim=4, verbose=False)


def rot(x, m): return np.ascontiguousarray(np.rot90(x, m, (2, 3)))


# ---------------------------------------------------------------- turns
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_turns_are_numpys_and_come_one_after_the_other(n, c, side):
    x = torch.rand(n, c, side, side)
    for shifts in (1, 2, 4):
        parts = shifted(x, shifts).unflatten(0, (shifts, n)).numpy()
        for s in range(shifts): assert np.array_equal(parts[s], rot(x.numpy(), s * 4 // shifts))


# ---------------------------------------------------------------- the losses
def check_loss(cls):
    """Both terms again, from views of turned images that were noted."""
    d, seen = cls(**SMALL, epochs=0, shift_weight=.3).fit(X), []
    view = d.view
    def watched(xb, rng=None): seen.append((xb, view(xb, rng))); return seen[-1][1]
    d.view = watched
    xb = torch.tensor(NEW)
    with isolated(2): terms = {k: v.detach() for k, v in d.loss(xb).items()}
    assert terms.keys() == {'contrast', 'shift'}, 'terms'
    for x, _ in seen:
        wanted = np.concatenate([rot(NEW, m) for m in range(4)])
        assert x.shape == wanted.shape and np.array_equal(x.numpy(), wanted), 'what is viewed'
    with torch.no_grad(): code = [d.nets_.encoder(v) for _, v in seen]
    with torch.no_grad(): value = nt_xent(*(d.nets_.head(c) for c in code))
    assert torch.isclose(terms['contrast'], value, rtol=1e-4), 'contrast'
    with torch.no_grad(): p = d.nets_.shift(torch.cat(code)).double().softmax(1).numpy()
    turn = np.tile(np.repeat(range(4), len(NEW)), 2)
    wanted = .3 * -np.log(p[np.arange(len(p)), turn]).mean()
    assert math.isclose(terms['shift'], wanted, rel_tol=1e-4), 'shift'


def loss_of(change, name):
    """A class with another loss: change(self, xb, code, x) -> terms."""
    def loss(self, xb):
        x = shifted(xb, self.shifts)
        code = self.nets_.encoder(torch.cat([self.view(x), self.view(x)]))
        return change(self, xb, code)
    return type(name, (CSI,), dict(loss=loss))

def shift_term(self, xb, code, turn):
    return self.shift_weight * F.cross_entropy(self.nets_.shift(code), turn)

def right(self, b): return torch.arange(self.shifts).repeat_interleave(b).repeat(2)

def apart(self, xb, code):
    """The contrast within each turn only: turned images are no negatives."""
    a, b = (v.unflatten(0, (self.shifts, -1)) for v in self.nets_.head(code).chunk(2))
    return dict(contrast=torch.stack([nt_xent(p, q) for p, q in zip(a, b)]).mean(),
                shift=shift_term(self, xb, code, right(self, len(xb))))

def interleaved(self, xb, code):
    """Labels for another order of the turned images."""
    return dict(contrast=nt_xent(*self.nets_.head(code).chunk(2)),
                shift=shift_term(self, xb, code, torch.arange(self.shifts).repeat(2 * len(xb))))

def unweighted(self, xb, code):
    turn = right(self, len(xb))
    return dict(contrast=nt_xent(*self.nets_.head(code).chunk(2)),
                shift=F.cross_entropy(self.nets_.shift(code), turn))

def on_code(self, xb, code):
    return dict(contrast=nt_xent(*code.chunk(2)),
                shift=shift_term(self, xb, code, right(self, len(xb))))

def no_classifier(self, xb, code): return dict(contrast=nt_xent(*self.nets_.head(code).chunk(2)))

class Positives(CSI):
    """Each view is turned by itself: turned images are one instance."""
    def loss(self, xb):
        x = shifted(xb, self.shifts)
        code = self.nets_.encoder(torch.cat([self.view(x), self.view(x.roll(len(xb), 0))]))
        return unweighted(self, xb, code)

APART, INTERLEAVED, UNWEIGHTED, ON_CODE, NO_CLASSIFIER = (
    loss_of(f, f.__name__) for f in (apart, interleaved, unweighted, on_code, no_classifier))


def test_losses(): check_loss(CSI)


@each_mutant({'terms': (NO_CLASSIFIER,), 'what is viewed': (Positives,),
              'contrast': (APART, ON_CODE), 'shift': (INTERLEAVED, UNWEIGHTED)})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_loss, broken, why)


# ---------------------------------------------------------------- the score
KINDS = 'cosine', 'length', 'contrast', 'shift', 'csi'


def score_again(d, x, bank, kind, own=False):
    """The parts of the score from their equations, float64; own: x is the bank, left out."""
    total = np.zeros(len(x))
    for m in range(4):
        def rows(images):
            with torch.no_grad():
                c = d.nets_.encoder(torch.tensor(rot(images, m)))
                z = d.nets_.head(c) if d.layer == 'head' else c
                return z.double().numpy(), d.nets_.shift(c).double().numpy()[:, m]
        (z, logit), (known, known_logit) = rows(x), rows(bank)
        size, known_size = (np.linalg.norm(v, axis=1) for v in (z, known))
        cosine = (z @ known.T) / size[:, None] / known_size
        if own: np.fill_diagonal(cosine, -9)
        near, w_con, w_cls = cosine.max(1), 1 / known_size.mean(), 1 / abs(known_logit.mean())
        total += dict(cosine=near, length=w_con * size, contrast=w_con * near * size,
                      shift=w_cls * logit, csi=w_con * near * size + w_cls * logit)[kind]
    return -total


def check_score(cls):
    """Each way to score, in both layers, and the threshold by images left out."""
    d = cls(**SMALL, epochs=3, batch_size=8).fit(X)
    for kind in ('cosine', 'csi'):
        d.set_params(scoring=kind).set_threshold(d.as_batches(X))
        wanted = np.quantile(score_again(d, X, X, kind, own=True), .95)
        rtol = 1e-5 if kind == 'cosine' else 1e-3
        assert np.isclose(d.threshold_, wanted, rtol=rtol), f'threshold of {kind}'
    for layer in ('head', 'encoder'):
        d.set_params(layer=layer).set_threshold(d.as_batches(X))
        for kind in KINDS:
            found = d.set_params(scoring=kind).decision_function(NEW)
            assert np.allclose(found, score_again(d, NEW, X, kind), rtol=2e-3, atol=2e-3), kind
        d.set_params(scoring='csi')


class Turned(CSI):
    """High is normal."""
    def combine(self, *parts): return -super().combine(*parts)

class NoWeights(CSI):
    """The turns are summed as they are."""
    def combine(self, z, logit, near):
        self.means_ = torch.ones_like(self.means_)
        return super().combine(z, logit, near)

class TimesMean(CSI):
    """Multiplied by the mean in place of divided."""
    def combine(self, z, logit, near):
        kept, self.means_ = self.means_, 1 / self.means_
        try: return super().combine(z, logit, near)
        finally: self.means_ = kept

class Upright(CSI):
    """Only the image as it is."""
    def combine(self, z, logit, near):
        z, logit, near = z.clone(), logit.clone(), near.clone()
        logit[1:], near[1:] = 0, 0
        return super().combine(z, logit, near)

class OtherLogit(CSI):
    """The logit of the next turn."""
    def describe(self, xb):
        """As CSI, with the classifier's answers exchanged."""
        kept = self.nets_.shift.state_dict()
        kept = {k: v.clone() for k, v in kept.items()}
        self.nets_.shift.load_state_dict({k: v.roll(1, 0) for k, v in kept.items()})
        try: return super().describe(xb)
        finally: self.nets_.shift.load_state_dict(kept)

class AllTurnsOneBank(CSI):
    """Each turn is compared with the images that are not turned."""
    def set_threshold(self, data):
        """With axes of the first turn only."""
        super().set_threshold(data)
        self.axes_ = self.axes_[:1].expand_as(self.axes_).clone()

class OwnAxes(CSI):
    """A training image may be its own nearest."""
    def training_scores(self, data):
        """As for new images."""
        s = np.concatenate([self.image_score(xb).detach().numpy() for xb, _ in data.batches(5)])
        return s, np.zeros(len(s), int)


def test_scores(): check_score(CSI)


@each_mutant({'threshold of cosine': (Turned, Upright, OwnAxes),
              'threshold of csi': (NoWeights, TimesMean, OtherLogit),
              '^cosine': (AllTurnsOneBank,)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


def test_the_parts_by_hand():
    axes, z = torch.eye(2), torch.tensor([[3., 4.], [-2., 0.], [.6, .8]])
    assert torch.allclose(length_times_cosine(z, axes), torch.tensor([4., 0., .8]))
    parts, means = torch.tensor([[2., 4.], [30., 10.]]), torch.tensor([2., 10.])
    assert torch.allclose(balanced_sum(parts, means), torch.tensor([4., 3.]))
    assert torch.allclose(balanced_sum(parts, -means), torch.tensor([4., 3.]))   # no flipped sign
    assert balanced_sum(parts, torch.zeros(2)).isfinite().all()


def test_without_turns_and_classifier_it_is_simclr_with_another_score():
    kw = dict(**SMALL, epochs=2, batch_size=8)
    a = CSI(**kw, shifts=1, shift_weight=0., scoring='cosine').fit(X)
    b = SimCLR(**kw, layer='head').fit(X)
    assert all(torch.equal(p, q) for p, q in zip(a.nets_.parameters(), b.nets_.parameters()))
    assert np.allclose(1 + a.decision_function(NEW), b.decision_function(NEW), atol=1e-5)


def test_views_at_scoring_are_the_same_for_all_images():
    d = CSI(**SMALL, epochs=2, score_views=5).fit(X)
    s = d.decision_function(NEW)
    assert np.array_equal(s, d.decision_function(NEW))
    assert np.allclose(s, np.concatenate([d.decision_function(v[None]) for v in NEW]), rtol=1e-4)
    assert not np.allclose(s, d.set_params(score_views=0).decision_function(NEW))


@pytest.mark.parametrize('params, message', [
    (dict(shifts=3), 'shifts must be one of 1, 2, 4'), (dict(shift_weight=-1.), 'shift_weight'),
    (dict(scoring='norm'), "scoring must be one of 'csi'"), (dict(score_views=-1), 'score_views'),
    (dict(shift_weight=0.), 'scoring must be a part without classifier')])
def test_wrong_settings_are_named(params, message): check_refused(CSI, message, **SMALL | params)


def test_only_squares_are_turned_and_half_turns_fit_all(tmp_path):
    x = np.random.default_rng(0).random((8, 3, 5, 7), dtype='float32')
    with pytest.raises(ValueError, match='must be square .*got 5x7'): CSI(**SMALL).fit(x)
    d = CSI(**SMALL, shifts=2, epochs=1, batch_size=4).fit(x)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(x), d.decision_function(x))


def test_an_exploding_training_names_the_rate():
    check_explosion(CSI, 'lr=1e\\+30', **SMALL, lr=1e30)


def test_it_learns_which_way_up_a_seven_is():
    """An upright seven is normal, one on its head is not: training tells, no training does not."""
    t = digits(normal=7)
    x = t.x_test[t.y_test == 0]
    wrong = rot(x, 2)
    def told(**kw):
        d = CSI(**dict(epochs=25, flip=0., verbose=False, scoring='shift') | kw).fit(t.x_train)
        return float((d.decision_function(wrong) > d.threshold_).mean())
    assert told() > .5 > told(epochs=0)
