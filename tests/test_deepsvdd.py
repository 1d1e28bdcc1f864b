"""Deep SVDD: objectives, center and radius against hand values and autograd, collapse seen,
and mutants of every rule."""
import warnings
from math import prod

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from ad_course.data import digits
from ad_course.deepsvdd import (DeepSVDD, LeNetSVDD, code_spread, contrast_normalize,
                                contrast_range, guarded, guarded_mean, quantile_radius,
                                soft_boundary, spread, warm_start)
from ad_course.check import check_detector
from ad_course.detector import Detector, total_loss
from ad_course.metrics import auroc
from ad_course.networks import decoder, encoder, squared_weights
from tests.mutants import assert_caught, changed, each_mutant

TASK = digits(normal=8)
X = TASK.x_train
BATCH = torch.tensor(X)
PLAIN = dict(gcn=False, pretrain_epochs=0, verbose=False)
SOFT = dict(objective='soft-boundary', nu=.3)


# ---------------------------------------------------------------- the radius
@pytest.mark.parametrize('n', [1, 2, 7, 10, 12, 100, 997])
@pytest.mark.parametrize('nu', [.01, .05, .1, .3, .5, .9])
def test_radius_minimizes_the_objective_and_keeps_the_promise_of_nu(n, nu):
    d = np.random.default_rng(n).gamma(2, size=n)
    R2 = quantile_radius(d, nu)**2
    objective = lambda r: r + np.maximum(0, d - r).mean() / nu
    search = dict(bounds=(0, d.max()), method='bounded', options=dict(xatol=1e-10))
    best = minimize_scalar(objective, **search).fun
    assert objective(R2) <= min(best, objective(0), objective(d.max())) + 1e-9
    assert (d > R2 * (1 + 1e-9)).mean() <= nu <= (d >= R2 * (1 - 1e-9)).mean() + 1e-9


def test_radius_by_hand_and_without_images():
    d = np.array([10., 3, 1, 4, 2])
    assert [quantile_radius(d, nu)**2 for nu in (.19, .2, .4, .6)] == pytest.approx([10, 4, 3, 2])
    with pytest.raises(ValueError, match='at least one'): quantile_radius([], .1)


def test_soft_boundary_is_what_the_radius_minimizes():
    d = torch.tensor(np.random.default_rng(0).gamma(2, size=50))
    value = lambda R2: total_loss(soft_boundary(d, d.new_tensor(R2), .2), len(d))
    best = quantile_radius(d.numpy(), .2)**2
    assert all(value(best) <= value(best + step) + 1e-9 for step in (-.1, -1e-3, 1e-3, .1))


# ---------------------------------------------------------------- center, contrast, spread
def test_guard_moves_small_components_and_zeros():
    c = torch.tensor([0., -0., .02, -.02, .1, -.1, 3., -3.])
    torch.testing.assert_close(guarded(c, .1), torch.tensor([.1, .1, .1, -.1, .1, -.1, 3., -3.]))
    assert torch.equal(guarded(c, 0.), c)


def test_the_mean_is_taken_before_the_guard_and_the_guard_in_units_of_the_codes():
    codes = np.array([[.02, 5, -1], [.04, -5, -2]], 'float32')
    guard = .1 * float(np.sqrt((.01**2 + 5**2 + .5**2) / 3))
    torch.testing.assert_close(guarded_mean(codes, .1), torch.tensor([guard, guard, -1.5]))
    assert guarded_mean(codes, .1).dtype == torch.float32
    for scale in (1e-3, 1e3):
        torch.testing.assert_close(guarded_mean(scale * codes, .1), scale * guarded_mean(codes, .1))
    assert torch.equal(guarded_mean(codes, 0.), torch.tensor(codes.mean(0)))
    alike = np.full((3, 2), .05, 'float32')   # codes without any spread keep their mean
    torch.testing.assert_close(guarded_mean(alike, .1), torch.tensor([.05, .05]))


def test_whitened_features_keep_their_mean_as_center():
    """An absolute guard would move every component of the center of small codes by a tenth."""
    d = DeepSVDD(epochs=0, gcn=False, pretrain_epochs=0, arch='mlp', verbose=False).fit(X / 50)
    codes = d.encode(X / 50)
    off = np.abs(d.center_.numpy() - codes.mean(0)).max()
    assert off < .11 * np.sqrt(codes.var(0).mean()) < .02


def test_the_official_guard_is_absolute():
    x = np.random.default_rng(0).random((12, 1, 28, 28), dtype='float32')
    d = LeNetSVDD(epochs=0, pretrain_epochs=0, verbose=False).fit(x)
    mean = torch.as_tensor(d.encode(x).mean(0))
    torch.testing.assert_close(d.center_, guarded(mean, .1), atol=1e-5, rtol=1e-4)
    assert d.center_.abs().min() >= .1 > mean.abs().min()


def test_contrast_by_hand_and_what_it_ignores():
    x = torch.tensor([0., .2, .4, .6]).view(1, 1, 2, 2)
    torch.testing.assert_close(contrast_normalize(x).flatten(), torch.tensor([-1.5, -.5, .5, 1.5]))
    torch.testing.assert_close(contrast_normalize(x * .5 + .3), contrast_normalize(x))
    assert contrast_normalize(torch.full((2, 3, 5, 5), .7)).abs().max() < 1e-3


def test_range_is_that_of_all_batches():
    ends = contrast_range([(BATCH[i:i + 7], None) for i in range(0, len(X), 7)])
    assert ends == contrast_range([(BATCH, None)])
    with pytest.raises(ValueError, match='contrast.*gcn=False'):
        contrast_range([(torch.ones(3, 1, 4, 4), None)])


def test_prepared_training_images_fill_zero_to_one():
    d = DeepSVDD(epochs=0, batch_size=7, verbose=False).fit(X)
    z = d.prepare(BATCH)
    assert z.min().item() == pytest.approx(0, abs=1e-6) and z.max().item() == pytest.approx(1)


def test_spread_by_hand_and_wherever_the_codes_lie():
    z = np.array([[0., 0], [2, 0], [0, 2], [2, 2]])
    assert spread(z) == spread(z - 7) == pytest.approx(2**.5)


def test_spread_sees_mosaics_that_the_images_do_not_show():
    """A pixel that is black in all images, and lights up in their mosaics."""
    x = np.zeros((40, 1, 4, 4), 'float32')
    x[:, 0, :2, :2] = np.random.default_rng(0).random((40, 2, 2))
    class Corner(DeepSVDD):
        def networks(self, shape): return dict(encoder=nn.Flatten())
        def code(self, xb): return xb.flatten(1)[:, -4:]
    d = Corner(epochs=0, **PLAIN).fit(x)
    assert spread(d.encode(x)) == 0 and d.spread_start_ > .05


# ---------------------------------------------------------------- rules, as functions of the class
def linear(cls):
    """The class with one linear layer, for which everything has a closed form."""
    def networks(self, shape):
        layer = nn.Linear(64, self.code_dim, bias=False)
        return dict(encoder=nn.Sequential(nn.Flatten(), layer))
    return changed(cls, 'Linear', networks=networks)


def check_objective(cls):
    """Terms and gradients of both objectives, in 64 bits."""
    xb = BATCH.double()
    rows = xb.flatten(1)
    for params, share in ((dict(), 1.), (SOFT, .3)):
        d = linear(cls)(code_dim=5, epochs=0, weight_decay=.2, **params, **PLAIN).fit(X)
        d.nets_.double()
        W, c, R2 = d.nets_.encoder[1].weight, d.center_.double(), d.radius_**2
        away = rows @ W.detach().T - c
        s = away.square().sum(1)
        terms = d.loss(xb)
        values = {k: float(v.detach().mean()) for k, v in terms.items()}
        decay = .1 * float(W.detach().square().sum())
        assert values.pop('decay') == pytest.approx(decay), 'decay'
        soft = dict(radius=R2, outside=float((s - R2).clamp(min=0).mean()) / .3)
        assert values == pytest.approx(soft if params else dict(distance=float(s.mean()))), 'terms'
        grad, = torch.autograd.grad(total_loss(terms, len(X)), W)
        pulled = (s > R2) if params else torch.ones_like(s, dtype=torch.bool)
        want = 2 / (share * len(X)) * (away * pulled[:, None]).T @ rows + .2 * W.detach()
        torch.testing.assert_close(grad, want, msg='gradient')
        torch.testing.assert_close(d.image_score(xb), s - (R2 if params else 0), msg='score')


def check_place(cls):
    """Center and radius come from all training images in eval mode, and nu is kept.

    The center stays where it is; the encoder has no constants.
    """
    seen = {}
    class Watched(cls):
        def find_center(self, data):
            super().find_center(data)
            self.nets_.eval()
            with torch.no_grad(): z = self.code(BATCH)
            seen.update(codes=z.numpy(), center=self.center_.clone())
    small = dict(epochs=6, pretrain_epochs=2, batch_size=32, warm_up=2, code_dim=16, verbose=False)
    for params in (dict(), SOFT):
        d = Watched(**small, **params).fit(X)
        mean = guarded_mean(seen['codes'], d.center_guard)
        torch.testing.assert_close(seen['center'], mean, msg='center is not the guarded mean')
        assert torch.equal(d.center_, seen['center']), 'the center moved in training'
        with torch.no_grad(): s = d.squared_distances(BATCH).numpy()
        assert d.radius_ == pytest.approx(quantile_radius(s, d.nu), rel=1e-4), 'radius'
        outside = (s > d.radius_**2 * (1 + 1e-4)).mean()
        assert d.nu - 1 / len(X) < outside <= d.nu, f'radius: {outside} outside'
        if params:
            radii = d.history_['radius']
            assert radii[:2] == [0, 0] and min(radii[2:]) > 0, 'warm-up'
        assert not any('bias' in name for name, _ in d.nets_.named_parameters()), 'a bias'
        assert set(d.nets_) == {'encoder'}, 'the decoder was kept'


def check_warm_start(cls):
    """The reconstruction is learned, and training starts from the encoder of the autoencoder."""
    started = {}
    class Watched(cls):
        def place_sphere(self, data):
            started.update({k: v.clone() for k, v in self.nets_.encoder.named_parameters()})
            super().place_sphere(data)
    d = Watched(epochs=1, pretrain_epochs=15, batch_size=16, verbose=False).fit(X)
    raw = cls(epochs=0, verbose=False).fit(X)
    error = d.history_.get('pretrain/reconstruction', [1, 1])
    assert len(error) == 15 and error[-1] < .7 * error[0], 'nothing was pretrained'
    first = raw.nets_.encoder.state_dict()
    assert all(not torch.equal(v, first[k]) for k, v in started.items()), 'the encoder did not move'
    assert 'pretrain/reconstruction' not in raw.history_ and len(d.history_['distance']) == 1


def check_rates(cls):
    """The first step of Adam is as long as its rate: pretrain_lr, then lr."""
    steps = {}
    class Watched(cls):
        def descend(self, player, *rest):
            weight = self.nets_.encoder[-1].weight
            before = weight.detach().clone()
            terms = super().descend(player, *rest)
            steps[player] = float((weight.detach() - before).abs().max())
            return terms
    once = dict(epochs=1, pretrain_epochs=1, batch_size=len(X), arch='mlp', verbose=False)
    Watched(lr=2e-3, pretrain_lr=5e-3, **once).fit(X)
    assert steps['autoencoder'] == pytest.approx(5e-3, rel=.01), 'pretrain_lr'
    assert steps['all'] == pytest.approx(2e-3, rel=.01), 'lr'


def check_no_collapse(cls):
    """With strong decay: the network still responds, ranks, and nobody warns."""
    long = dict(arch='mlp', code_dim=32, epochs=200, lr=1e-3, weight_decay=1., pretrain_epochs=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        d = cls(**long, verbose=False).fit(X)
    assert d.spread_ratio_ > .1, f'spread ratio {d.spread_ratio_:.1e}'
    assert auroc(TASK.y_test, d.decision_function(TASK.x_test)) > .9
    assert not [w for w in caught if 'collapsed' in str(w.message)]


CHECKS = dict(objective=check_objective, place=check_place, warm_start=check_warm_start,
              rates=check_rates, no_collapse=check_no_collapse)


@pytest.mark.parametrize('name', CHECKS)
def test_rule(name): CHECKS[name](DeepSVDD)


# ---------------------------------------------------------------- mutants
def method(name, **methods): return changed(DeepSVDD, name, **methods)


def term(name, term, f):
    """One term of the loss replaced by f(detector, xb, term), where it occurs."""
    def loss(self, xb):
        terms = DeepSVDD.loss(self, xb)
        return {**terms, term: f(self, xb, terms[term])} if term in terms else terms
    return method(name, loss=loss)


def inside(self, xb): return self.radius_**2 - self.squared_distances(xb)


def wrong_side(self, xb, t): return inside(self, xb).clamp(min=0) / self.nu


def biased(self, shape):
    return dict(encoder=encoder(shape, self.code_dim, self.arch, self.width))


def bounded(self, shape):
    return dict(encoder=nn.Sequential(DeepSVDD.networks(self, shape)['encoder'], nn.Sigmoid()))


def with_decoder(self, shape):
    mirror = decoder(shape, self.code_dim, self.arch, self.width)
    return {**DeepSVDD.networks(self, shape), 'decoder': mirror}


def center_0(self, data): self.center_ = torch.zeros(self.code_dim)


def unguarded(self, data):
    self.center_ = torch.as_tensor(self.map_normal(self.code, data).mean(0))


def train_mode_center(self, data):
    self.nets_.train()
    with torch.no_grad():
        z = torch.cat([self.code(xb) for xb, _ in data.batches(self.batch_size)])
    self.center_ = guarded_mean(z.numpy(), self.center_guard)


def moving_center(self, data, epoch):
    DeepSVDD.after_epoch(self, data, epoch)
    self.center_ = self.center_ * .99


def last_batch(self, data):
    *_, (xb, _) = data.batches(self.batch_size)
    with torch.no_grad(): d = self.squared_distances(xb).numpy()
    self.radius_ = quantile_radius(d, self.nu)


def other_nu(self, data):
    d = self.map_normal(self.squared_distances, data)
    self.radius_ = quantile_radius(d, self.nu / 2)


def squared_radius(self, data):
    DeepSVDD.find_radius(self, data)
    self.radius_ **= 2


def from_the_start(self, data, epoch): self.find_radius(data)


def only_the_decoder(self, data):
    self.nets_.encoder.requires_grad_(False)
    DeepSVDD.pretrain(self, data)
    self.nets_.encoder.requires_grad_(True)


def by_lr(self, data):
    mirror = decoder(self.shape_, self.code_dim, self.arch, self.width)
    warm_start(self, data, mirror, self.pretrain_epochs, self.lr)


def by_pretrain_lr(self): return dict(all=self.adam('encoder', lr=self.pretrain_lr))


NOT_AT_ALL = lambda self, data: None
MUTANTS = dict(
    objective=(
        term('R2Dropped', 'radius', lambda self, xb, t: 0 * t),
        term('RInPlaceOfR2', 'radius', lambda self, xb, t: t**.5),
        term('SignOfTheHinge', 'outside', wrong_side),
        term('NoHinge', 'outside', lambda self, xb, t: -inside(self, xb) / self.nu),
        term('NuDropped', 'outside', lambda self, xb, t: t * self.nu),
        term('SumOverTheBatch', 'outside', lambda self, xb, t: t.sum()),
        term('DistanceNotSquared', 'distance', lambda self, xb, t: t.sqrt()),
        term('SignOfTheDistance', 'distance', lambda self, xb, t: -t),
        term('DecayDropped', 'decay', lambda self, xb, t: 0 * t),
        term('DecayWithoutItsHalf', 'decay', lambda self, xb, t: 2 * t),
        method('ScoreWithoutR2', image_score=lambda self, xb: self.squared_distances(xb)),
        method('MeanOverTheCode', squared_distances=lambda self, xb: (
            self.code(xb) - self.center_).square().mean(1))),
    place=(
        method('CenterMoves', after_epoch=moving_center), method('Center0', find_center=center_0),
        method('CenterUnguarded', find_center=unguarded),
        method('CenterInTrainingMode', find_center=train_mode_center),
        method('RadiusOfTheLastBatch', find_radius=last_batch),
        method('RadiusWithAnotherNu', find_radius=other_nu),
        method('RadiusSquared', find_radius=squared_radius),
        method('RadiusStays0', find_radius=lambda self, data: setattr(self, 'radius_', 0.)),
        method('NoWarmUp', after_epoch=from_the_start), method('Biases', networks=biased),
        method('DecoderKept', networks=with_decoder, pretrain=NOT_AT_ALL)),
    warm_start=(
        method('ColdStart', pretrain=NOT_AT_ALL),
        method('WarmDecoderOnly', pretrain=only_the_decoder)),
    rates=(
        method('PretrainLrIgnored', pretrain=by_lr),
        method('LrIgnored', optimizers=by_pretrain_lr)),
    no_collapse=(
        method('CollapseByBiases', networks=biased),
        method('CollapseByCenter0', find_center=center_0),
        method('CollapseByABoundedEnd', networks=bounded)))
WHY = dict(objective='decay|terms|gradient|score', place='center|radius|warm-up|a bias|decoder',
           warm_start='pretrained|did not move', rates='lr', no_collapse='spread ratio')


@each_mutant(MUTANTS)
def test_mutant_is_caught(why, broken): assert_caught(CHECKS[why], broken, WHY[why])


def test_fit_warns_of_collapse_and_says_what_to_try():
    cls = changed(DeepSVDD, networks=biased)
    long = dict(arch='mlp', code_dim=32, epochs=200, lr=1e-3, weight_decay=1., pretrain_epochs=0)
    with pytest.warns(UserWarning, match='has collapsed.*without biases'):
        d = cls(**long, verbose=False).fit(X)
    assert d.spread_ratio_ < 1e-4


def test_collapse_below_is_where_fit_warns():
    small = dict(epochs=1, verbose=False)
    ratio = DeepSVDD(**small).fit(X).spread_ratio_
    with pytest.warns(UserWarning, match='has collapsed'):
        DeepSVDD(collapse_below=ratio * 1.01, **small).fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        DeepSVDD(collapse_below=ratio * .99, **small).fit(X)


def test_collapse_is_seen_whatever_the_scale_of_the_codes():
    d = DeepSVDD(epochs=1, verbose=False).fit(X)
    data = d.as_batches(X)
    before = code_spread(d, data)
    with torch.no_grad(): d.nets_.encoder[-1].weight.mul_(1e-3)
    assert code_spread(d, data) == pytest.approx(1e-3 * before, rel=1e-3)


# ---------------------------------------------------------------- interruptions, files, contract
@pytest.mark.parametrize('phase', ['pretrain', 'train'])
@pytest.mark.parametrize('objective', ['one-class', 'soft-boundary'])
def test_interrupted_training_leaves_a_detector(phase, objective, tmp_path):
    class Interrupted(DeepSVDD):
        def code(self, xb):
            term = 'outside' if self.objective == 'soft-boundary' else 'distance'
            term = 'pretrain/reconstruction' if phase == 'pretrain' else term
            learning = hasattr(self, '_progress') and self.nets_.encoder.training
            if learning and len(self.history_.get(term, ())) == 2: raise KeyboardInterrupt
            return super().code(xb)
    Interrupted.__name__ = f'Interrupted{phase}{objective[:3]}'  # files find a class by its name
    small = dict(epochs=5, pretrain_epochs=4, objective=objective, verbose=False)
    with pytest.warns(UserWarning, match='interrupted'): d = Interrupted(**small).fit(X)
    scores = d.decision_function(X)
    assert np.isfinite(scores).all() and d.radius_ > 0 and set(d.nets_) == {'encoder'}
    d.save(tmp_path/'d.safetensors')
    again = Detector.load(tmp_path/'d.safetensors')
    np.testing.assert_array_equal(again.decision_function(X), scores)


def test_contamination_nu_puts_the_threshold_on_the_sphere():
    d = DeepSVDD(**SOFT, contamination=.3, epochs=3, verbose=False).fit(X)
    assert abs(d.threshold_) < .05 * d.radius_**2
    before = d.threshold_
    assert d.calibrate(TASK.x_test[TASK.y_test == 0]).threshold_ != before


@pytest.mark.filterwarnings('ignore:DeepSVDD has collapsed')
def test_contract_without_a_warm_up():
    check_detector(DeepSVDD(objective='soft-boundary', warm_up=0, pretrain_epochs=5))


@pytest.mark.parametrize('params', [
    dict(nu=0), dict(nu=1), dict(nu='a'), dict(nu=float('nan')), dict(objective='hard'),
    dict(center_guard=-1), dict(collapse_below=None), dict(weight_decay=-1), dict(code_dim=0),
    dict(pretrain_epochs=-1), dict(pretrain_lr=0), dict(pretrain_lr=True), dict(warm_up=1.5),
    dict(gcn=1), dict(width=0)], ids=str)
def test_wrong_parameters_are_named(params):
    with pytest.raises(ValueError, match=next(iter(params))): DeepSVDD(**params).fit(X)


@pytest.mark.parametrize('images, what', [
    (np.full((9, 8, 8), .4), 'contrast'), (X[:1], 'at least 2')])
def test_images_that_cannot_be_learned_from(images, what):
    with pytest.raises(ValueError, match=what): DeepSVDD().fit(images)


def test_duplicates_and_few_images_are_fine():
    for x in (np.repeat(X[:1], 5, 0), X[:2]):
        d = DeepSVDD(epochs=2, pretrain_epochs=2, verbose=False).fit(x)
        assert np.isfinite(d.decision_function(TASK.x_test)).all()


@pytest.mark.parametrize('shape', [(1, 28, 28), (3, 32, 32), (1, 5, 7)])
def test_defaults_work_on_other_shapes(shape):
    x = np.random.default_rng(0).random((12, *shape), dtype='float32')
    d = DeepSVDD(epochs=1, pretrain_epochs=1, verbose=False).fit(x)
    assert d.encode(x).shape == (12, 128) and d.center_.shape == (128,)


# ---------------------------------------------------------------- the official networks
LARGE = np.random.default_rng(0).random((12, 1, 28, 28), dtype='float32')
CIFAR = dict(code_dim=128, channels=(32, 64, 128))


@pytest.mark.parametrize('shape, settings, weights', [
    ((1, 28, 28), dict(), 200 + 800 + 196 * 32),
    ((3, 32, 32), CIFAR, 2400 + 51200 + 204800 + 2048 * 128)])
def test_lenet_has_the_official_layers(shape, settings, weights):
    d = LeNetSVDD(**settings)
    f = d.networks(shape)['encoder']
    assert sum(p.numel() for p in f.parameters()) == weights
    assert not any('bias' in n for n, _ in f.named_parameters())
    assert f(torch.rand(3, *shape)).shape == (3, d.code_dim)


@pytest.mark.parametrize('objective', ['one-class', 'soft-boundary'])
def test_lenet_lowers_its_rates_after_the_step(objective):
    rates = []
    class Watched(LeNetSVDD):
        def descend(self, player, *rest):
            rates.append((player, self.optimizers_[player].param_groups[0]['lr']))
            return super().descend(player, *rest)
    Watched(objective=objective, epochs=3, pretrain_epochs=3, lr=2e-4, lr_step=2, pretrain_lr=1e-4,
            pretrain_lr_step=1, warm_up=1, verbose=False).fit(LARGE)
    assert [name for name, _ in rates] == ['autoencoder'] * 3 + ['all'] * 3
    assert [lr for _, lr in rates] == pytest.approx([1e-4, 1e-5, 1e-5, 2e-4, 2e-4, 2e-5])


def test_lenet_weighs_its_decay_as_the_official_autoencoder():
    """The official loss is a sum over the pixels, with lambda / 2 times all squared weights."""
    seen = []
    class Watched(LeNetSVDD):
        def descend(self, player, loss, xb):
            terms = super().descend(player, loss, xb)
            if player != 'autoencoder': return terms
            weights = float(squared_weights(self.nets_).detach())
            self.nets_.eval()
            with torch.no_grad():
                now = {k: float(v) for k, v in loss(xb).items()}
                rebuilt = self.nets_.decoder(self.code(xb))
                summed = (rebuilt - self.prepare(xb)).square().flatten(1).sum(1).mean()
            seen.append((now, float(summed), weights))
            return terms
    once = dict(epochs=1, pretrain_epochs=1, pretrain_lr=1e-9, verbose=False)
    Watched(pretrain_decay=.3, **once).fit(LARGE)
    now, summed, weights = seen[0]
    assert now['reconstruction'] * prod(LARGE.shape[1:]) == pytest.approx(summed)
    assert now['decay'] / now['reconstruction'] == pytest.approx(.15 * weights / summed, rel=1e-4)


@pytest.mark.parametrize('shape, settings, what', [
    ((1, 8, 8), dict(), '28x28'), ((3, 32, 32), dict(), 'channels'),
    ((1, 28, 28), dict(channels=(8, 0)), 'channels'), ((1, 28, 28), dict(channels=8), 'channels'),
    ((1, 28, 28), dict(lr_step=-1), 'lr_step'),
    ((1, 28, 28), dict(pretrain_decay=-1), 'pretrain_decay'),
    ((1, 28, 28), dict(code_dim=20), 'multiple')])
def test_lenet_says_what_it_cannot_take(shape, settings, what):
    x = np.random.default_rng(0).random((4, *shape))
    with pytest.raises(ValueError, match=what): LeNetSVDD(verbose=False, **settings).fit(x)
