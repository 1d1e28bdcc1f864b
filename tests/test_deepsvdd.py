"""Deep SVDD: objectives, center and radius against hand values and autograd, collapse seen, and mutants of every rule."""
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from ad_course.data import digits
from ad_course.deepsvdd import (DeepSVDD, LeNetSVDD, contrast_normalize, guarded, lenet_decoder, lenet_encoder, quantile_radius)
from ad_course.check import check_detector
from ad_course.detector import Detector, total_loss
from ad_course.metrics import auroc

TASK = digits(normal=8)
X = TASK.x_train
PLAIN = dict(gcn=False, pretrain_epochs=0, verbose=False)
SOFT = dict(objective='soft-boundary', nu=.3)


# ---------------------------------------------------------------- the radius
@pytest.mark.parametrize('n', [1, 2, 7, 10, 12, 100, 997])
@pytest.mark.parametrize('nu', [.01, .05, .1, .3, .5, .9])
def test_radius_minimizes_the_objective_and_keeps_the_promise_of_nu(n, nu):
    d = np.random.default_rng(n).gamma(2, size=n)
    R2 = quantile_radius(d, nu)**2
    objective = lambda r: r + np.maximum(0, d - r).mean() / nu
    best = minimize_scalar(objective, bounds=(0, d.max()), method='bounded', options=dict(xatol=1e-10)).fun
    assert objective(R2) <= min(best, objective(0), objective(d.max())) + 1e-9
    assert (d > R2 * (1 + 1e-9)).mean() <= nu <= (d >= R2 * (1 - 1e-9)).mean() + 1e-9


def test_radius_by_hand_and_without_images():
    d = np.array([10., 3, 1, 4, 2])
    assert [quantile_radius(d, nu)**2 for nu in (.19, .2, .4, .6)] == pytest.approx([10, 4, 3, 2])
    with pytest.raises(ValueError, match='at least one'): quantile_radius([], .1)


# ---------------------------------------------------------------- center and contrast
def test_guard_moves_small_components_and_zeros():
    c = torch.tensor([0., -0., .02, -.02, .1, -.1, 3., -3.])
    torch.testing.assert_close(guarded(c, .1), torch.tensor([.1, .1, .1, -.1, .1, -.1, 3., -3.]))
    assert torch.equal(guarded(c, 0.), c)


def test_contrast_by_hand_and_what_it_ignores():
    x = torch.tensor([0., .2, .4, .6]).view(1, 1, 2, 2)
    torch.testing.assert_close(contrast_normalize(x).flatten(), torch.tensor([-1.5, -.5, .5, 1.5]))
    torch.testing.assert_close(contrast_normalize(x * .5 + .3), contrast_normalize(x))
    assert contrast_normalize(torch.full((2, 3, 5, 5), .7)).abs().max() < 1e-3


def test_prepared_training_images_fill_zero_to_one():
    d = DeepSVDD(epochs=0, batch_size=7, verbose=False).fit(X)
    z = d.prepare(torch.tensor(X))
    assert z.min().item() == pytest.approx(0, abs=1e-6) and z.max().item() == pytest.approx(1)


# ---------------------------------------------------------------- rules, as functions of the class
def linear(kind):
    """The class with one linear layer, for which everything has a closed form."""
    def networks(self, shape): return dict(encoder=nn.Sequential(nn.Flatten(), nn.Linear(64, self.code_dim, bias=False)))
    return type('Linear', (kind,), dict(networks=networks))


def check_objective(kind):
    """Terms and gradients of both objectives, in 64 bits."""
    rows = torch.tensor(X).double().flatten(1)
    for params, share in ((dict(), 1.), (SOFT, .3)):
        d = linear(kind)(code_dim=5, epochs=0, weight_decay=.2, **params, **PLAIN).fit(X)
        d.nets_.double()
        W, c, R2 = d.nets_.encoder[1].weight, d.center_.double(), d.radius_**2
        away = rows @ W.detach().T - c
        s = away.square().sum(1)
        terms = d.loss(torch.tensor(X).double())
        values = {k: float(v.detach().mean()) for k, v in terms.items()}
        assert values.pop('decay') == pytest.approx(.1 * float(W.detach().square().sum())), 'decay'
        want = dict(distance=float(s.mean())) if not params else dict(radius=R2, outside=float((s - R2).clamp(min=0).mean()) / .3)
        assert values == pytest.approx(want), 'terms'
        grad, = torch.autograd.grad(total_loss(terms, len(X)), W)
        pulled = (s > R2) if params else torch.ones_like(s, dtype=torch.bool)
        torch.testing.assert_close(grad, 2 / (share * len(X)) * (away * pulled[:, None]).T @ rows + .2 * W.detach())
        torch.testing.assert_close(d.image_score(torch.tensor(X).double()), s - (R2 if params else 0), msg='score')


def check_place(kind):
    """Center and radius come from all training images in eval mode; the center stays; nu is kept; the encoder has no constants."""
    seen = {}
    class Watched(kind):
        def find_center(self, data):
            super().find_center(data)
            self.nets_.eval()
            with torch.no_grad(): z = self.code(torch.tensor(X))
            seen.update(mean=z.mean(0), center=self.center_.clone())
    for params in (dict(), SOFT):
        d = Watched(epochs=6, pretrain_epochs=2, batch_size=32, warm_up=2, code_dim=16, verbose=False, **params).fit(X)
        torch.testing.assert_close(seen['center'], guarded(seen['mean'], d.guard), msg='center is not the guarded mean')
        assert torch.equal(d.center_, seen['center']), 'the center moved in training'
        with torch.no_grad(): s = d.distances(torch.tensor(X)).numpy()
        assert d.radius_ == pytest.approx(quantile_radius(s, d.nu), rel=1e-4), 'radius'
        outside = (s > d.radius_**2 * (1 + 1e-4)).mean()
        assert d.nu - 1 / len(X) < outside <= d.nu, f'{outside} outside'
        if params: assert d.history_['radius'][:2] == [0, 0] and min(d.history_['radius'][2:]) > 0, 'warm-up'
        assert not any('bias' in name for name, _ in d.nets_.named_parameters()), 'a bias'
        assert set(d.nets_) == {'encoder'}, 'the decoder was kept'


def check_warm_start(kind):
    """The reconstruction is learned, and the encoder that Deep SVDD starts from is that of the autoencoder."""
    started = {}
    class Watched(kind):
        def place_sphere(self, data):
            started.update({k: v.clone() for k, v in self.nets_.encoder.named_parameters()})
            super().place_sphere(data)
    d = Watched(epochs=1, pretrain_epochs=15, batch_size=16, verbose=False).fit(X)
    raw = kind(epochs=0, verbose=False).fit(X)
    error = d.history_.get('pretrain/reconstruction', [1, 1])
    assert len(error) == 15 and error[-1] < .7 * error[0], 'nothing was pretrained'
    assert all(not torch.equal(v, raw.nets_.encoder.state_dict()[k]) for k, v in started.items()), 'the encoder did not move'
    assert 'pretrain/reconstruction' not in raw.history_ and len(d.history_['distance']) == 1


def check_no_collapse(kind):
    """With strong decay: the network still responds, ranks, and nobody warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        d = kind(arch='mlp', code_dim=32, epochs=200, lr=1e-3, weight_decay=1., pretrain_epochs=0, verbose=False).fit(X)
    assert d.response_ > .1, f'response {d.response_:.1e}'
    assert auroc(TASK.y_test, d.decision_function(TASK.x_test)) > .9
    assert not [w for w in caught if 'collapsed' in str(w.message)]


CHECKS = dict(objective=check_objective, place=check_place, warm_start=check_warm_start, no_collapse=check_no_collapse)


@pytest.mark.parametrize('name', CHECKS)
def test_rule(name): CHECKS[name](DeepSVDD)


# ---------------------------------------------------------------- mutants
def changed(name, f):
    """One term of the loss replaced by f(detector, xb, term), where it occurs."""
    def loss(self, xb):
        terms = DeepSVDD.loss(self, xb)
        return {**terms, name: f(self, xb, terms[name])} if name in terms else terms
    return type('Mutant', (DeepSVDD,), dict(loss=loss))


def method(**methods): return type('Mutant', (DeepSVDD,), methods)


def biased(self, shape):
    from ad_course.networks import encoder
    return dict(encoder=encoder(shape, self.code_dim, self.arch, self.width))


def last_batch(self, data):
    *_, (xb, _) = data.batches(self.batch_size)
    with torch.no_grad(): self.radius_ = quantile_radius(self.distances(xb).numpy(), self.nu)


def train_mode_center(self, data):
    self.nets_.train()
    with torch.no_grad(): z = torch.cat([self.code(xb) for xb, _ in data.batches(self.batch_size)])
    self.center_ = guarded(z.mean(0), self.guard)


def moving_center(self, data):
    DeepSVDD.after_epoch(self, data)
    if hasattr(self, 'center_'): self.center_ = self.center_ * .99


def official_guard(self, data):
    DeepSVDD.find_center(self, data)
    c = torch.as_tensor(self.of_normal(self.code, data).mean(0))
    self.center_ = c


MUTANTS = {
    'R² dropped from the loss': ('objective', changed('radius', lambda self, xb, t: 0 * t)),
    'R in place of R²': ('objective', changed('radius', lambda self, xb, t: t**.5)),
    'sign of the hinge': ('objective', changed('outside', lambda self, xb, t: (self.radius_**2 - self.distances(xb)).clamp(min=0) / self.nu)),
    'no hinge': ('objective', changed('outside', lambda self, xb, t: (self.distances(xb) - self.radius_**2) / self.nu)),
    '1/nu dropped': ('objective', changed('outside', lambda self, xb, t: t * self.nu)),
    '1/n dropped': ('objective', changed('outside', lambda self, xb, t: t.sum())),
    'distance not squared': ('objective', changed('distance', lambda self, xb, t: t.sqrt())),
    'sign of the distance': ('objective', changed('distance', lambda self, xb, t: -t)),
    'decay dropped': ('objective', changed('decay', lambda self, xb, t: 0 * t)),
    'decay without its half': ('objective', changed('decay', lambda self, xb, t: 2 * t)),
    'score without R²': ('objective', method(score=lambda self, xb: self.distances(xb))),
    'mean over the code': ('objective', method(distances=lambda self, xb: (self.code(xb) - self.center_).square().mean(1))),
    'center moves': ('place', method(after_epoch=moving_center)),
    'center 0 in find_center': ('place', method(find_center=lambda self, data: setattr(self, 'center_', torch.zeros(self.code_dim)))),
    'center without the guard': ('place', method(find_center=official_guard)),
    'center in training mode': ('place', method(find_center=train_mode_center)),
    'radius from the last batch': ('place', method(find_radius=last_batch)),
    'radius squared': ('place', method(find_radius=lambda self, data: (DeepSVDD.find_radius(self, data), setattr(self, 'radius_', self.radius_**2)))),
    'radius frozen at 0': ('place', method(find_radius=lambda self, data: setattr(self, 'radius_', 0.))),
    'no warm-up': ('place', method(after_epoch=lambda self, data: hasattr(self, 'center_') and self.find_radius(data))),
    'biases': ('place', method(networks=biased)),
    'decoder kept': ('place', method(networks=lambda self, shape: {**DeepSVDD.networks(self, shape), 'decoder': self.pretrain_decoder(shape)},
                                     pretrain=lambda self, data: None)),
    'warm start skipped': ('warm_start', method(pretrain=lambda self, data: None)),
    'warm start of the decoder only': ('warm_start', method(pretrain_loss=lambda self, xb: dict(
        reconstruction=(self.nets_.decoder(self.code(xb).detach()) - self.prepare(xb)).square().mean()))),
    'collapse by biases': ('no_collapse', method(networks=biased)),
    'collapse by a center of 0': ('no_collapse', method(find_center=lambda self, data: setattr(self, 'center_', torch.zeros(self.code_dim)))),
    'collapse by a bounded end': ('no_collapse', method(networks=lambda self, shape: dict(encoder=nn.Sequential(DeepSVDD.networks(self, shape)['encoder'], nn.Sigmoid())))),
}


@pytest.mark.parametrize('name', MUTANTS)
def test_mutant_is_caught(name):
    check, kind = MUTANTS[name]
    with pytest.raises(AssertionError): CHECKS[check](kind)


def test_fit_warns_of_collapse_and_says_what_to_try():
    kind = MUTANTS['collapse by biases'][1]
    with pytest.warns(UserWarning, match='has collapsed.*without biases'):
        d = kind(arch='mlp', code_dim=32, epochs=200, lr=1e-3, weight_decay=1., pretrain_epochs=0, verbose=False).fit(X)
    assert d.response_ < 1e-4


def test_collapse_is_seen_whatever_the_scale_of_the_codes():
    d = DeepSVDD(epochs=1, verbose=False).fit(X)
    data = d.as_batches(X)
    before = d.spread(data)
    with torch.no_grad(): d.nets_.encoder[-1].weight.mul_(1e-3)
    assert d.spread(data) == pytest.approx(1e-3 * before, rel=1e-3)


# ---------------------------------------------------------------- interruptions, files, contract
@pytest.mark.parametrize('phase', ['pretrain', 'train'])
@pytest.mark.parametrize('objective', ['one-class', 'soft-boundary'])
def test_interrupted_training_leaves_a_detector(phase, objective, tmp_path):
    class Interrupted(DeepSVDD):
        def after_epoch(self, data, epoch):
            super().after_epoch(data, epoch)
            term = 'pretrain/reconstruction' if phase == 'pretrain' else 'outside' if self.soft() else 'distance'
            if len(self.history_.get(term, ())) == 2: raise KeyboardInterrupt
    Interrupted.__name__ = f'Interrupted{phase}{objective[:3]}'  # files find a class by its name
    with pytest.warns(UserWarning, match='interrupted'): d = Interrupted(epochs=5, pretrain_epochs=4, objective=objective, verbose=False).fit(X)
    assert np.isfinite(d.decision_function(X)).all() and d.radius_ > 0 and set(d.nets_) == {'encoder'}
    d.save(tmp_path/'d.safetensors')
    np.testing.assert_array_equal(Detector.load(tmp_path/'d.safetensors').decision_function(X), d.decision_function(X))


def test_contamination_nu_puts_the_threshold_on_the_sphere():
    d = DeepSVDD(**SOFT, contamination=.3, epochs=3, verbose=False).fit(X)
    assert abs(d.threshold_) < .05 * d.radius_**2
    before = d.threshold_
    assert d.calibrate(TASK.x_test[TASK.y_test == 0]).threshold_ != before


@pytest.mark.filterwarnings('ignore:DeepSVDD has collapsed')
def test_contract(): check_detector(DeepSVDD(objective='soft-boundary', warm_up=0, pretrain_epochs=5))


@pytest.mark.parametrize('params', [dict(nu=0), dict(nu=1), dict(nu='a'), dict(nu=float('nan')), dict(objective='hard'), dict(guard=-1), dict(collapse=None), dict(weight_decay=-1),
                                    dict(code_dim=0), dict(pretrain_epochs=-1), dict(pretrain_lr=0), dict(warm_up=1.5), dict(gcn=1), dict(width=0)], ids=str)
def test_wrong_parameters_are_named(params):
    with pytest.raises(ValueError, match=next(iter(params))): DeepSVDD(**params).fit(X)


@pytest.mark.parametrize('images, what', [(np.full((9, 8, 8), .4), 'contrast'), (X[:1], 'at least 2')])
def test_images_that_cannot_be_learned_from(images, what):
    with pytest.raises(ValueError, match=what): DeepSVDD().fit(images)


def test_duplicates_and_few_images_are_fine():
    for x in (np.repeat(X[:1], 5, 0), X[:2]):
        assert np.isfinite(DeepSVDD(epochs=2, pretrain_epochs=2, verbose=False).fit(x).decision_function(TASK.x_test)).all()


@pytest.mark.parametrize('shape', [(1, 28, 28), (3, 32, 32), (1, 5, 7)])
def test_defaults_work_on_other_shapes(shape):
    x = np.random.default_rng(0).random((12, *shape), dtype='float32')
    d = DeepSVDD(epochs=1, pretrain_epochs=1, verbose=False).fit(x)
    assert d.encode(x).shape == (12, 128) and d.center_.shape == (128,)


# ---------------------------------------------------------------- the official networks
@pytest.mark.parametrize('shape, settings, weights', [((1, 28, 28), dict(), 200 + 800 + 196 * 32), ((3, 32, 32), dict(code_dim=128, chans=(32, 64, 128)), 2400 + 51200 + 204800 + 2048 * 128)])
def test_lenet_has_the_official_layers(shape, settings, weights):
    d = LeNetSVDD(**settings)
    f = d.networks(shape)['encoder']
    assert sum(p.numel() for p in f.parameters()) == weights and not any('bias' in n for n, _ in f.named_parameters())
    z = f(torch.rand(3, *shape))
    assert z.shape == (3, d.code_dim) and d.pretrain_decoder(shape)(z).shape == (3, *shape)


def test_lenet_lowers_its_rates_after_the_drop():
    rates = []
    class Watched(LeNetSVDD):
        def after_epoch(self, data, epoch):
            super().after_epoch(data, epoch)
            rates.append({k: o.param_groups[0]['lr'] for k, o in self.optimizers_.items()})
    x = np.random.default_rng(0).random((12, 1, 28, 28), dtype='float32')
    for objective in ('one-class', 'soft-boundary'):
        rates.clear()
        d = Watched(objective=objective, epochs=3, pretrain_epochs=3, drop=2, pretrain_drop=1, verbose=False).fit(x)
        assert [r.get('pretrain') for r in rates] == pytest.approx([1e-5, 1e-5, 1e-5, None, None, None])
        assert [r['all'] for r in rates] == pytest.approx([1e-4] * 4 + [1e-5] * 2)
        assert 'pretrain/decay' in d.history_


@pytest.mark.parametrize('shape, settings, what', [((1, 8, 8), dict(), '28x28'), ((3, 32, 32), dict(), 'chans'), ((1, 28, 28), dict(code_dim=20), 'multiple')])
def test_lenet_says_what_it_cannot_take(shape, settings, what):
    with pytest.raises(ValueError, match=what): LeNetSVDD(verbose=False, **settings).fit(np.random.default_rng(0).random((4, *shape)))
