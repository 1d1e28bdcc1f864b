"""check_detector catches broken detectors by the promise that they break.

Each mutant is a defect that some published code has, or had."""
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ad_course import achc, deepsvdd, rsrae
from ad_course.achc import free_sphere
from ad_course.baselines import PCA
from ad_course.check import BrokenPromise, check_detector, PROMISES
from ad_course.deepsvdd import warm_start
from ad_course.detector import Detector, total_loss
from ad_course.networks import encoder, decoder

from .mutants import mutant


@dataclass(kw_only=True, eq=False, repr=False)
class Sound(Detector):
    """The healthy parent of the mutants: a small autoencoder that keeps every promise."""
    epochs: int = 40
    batch_size: int = 32
    code_dim: int = 8
    norm: bool = False

    def networks(self, shape):
        return dict(encoder=encoder(shape, self.code_dim, norm=self.norm),
                    decoder=decoder(shape, self.code_dim, norm=self.norm))

    def errors(self, xb): return (xb - self.nets_.decoder(self.nets_.encoder(xb))).square()
    def loss(self, xb): return dict(reconstruction=self.errors(xb).mean())
    def image_score(self, xb): return self.errors(xb).flatten(1).mean(1)
    def pixel_score(self, xb): return self.errors(xb).sum(1)


@dataclass(kw_only=True, eq=False, repr=False)
class SoundLabelled(Detector):
    """The healthy parent of the labelled mutants: DevNet's deviation loss in its plainest form."""
    uses_labels = True
    epochs: int = 60
    batch_size: int = 32

    def networks(self, shape): return dict(scorer=encoder(shape, 1))
    def image_score(self, xb): return self.nets_.scorer(xb)[:, 0]
    def loss(self, xb, yb):
        s = self.image_score(xb)
        return dict(deviation=(1 - yb) * s.abs() + yb * F.relu(5 - s))


def test_the_healthy_parents_keep_every_promise():
    assert check_detector(Sound()) == list(PROMISES)
    assert check_detector(Sound(norm=True)) == list(PROMISES)
    assert check_detector(SoundLabelled()) == list(PROMISES)


class NoBackward(Sound):
    def step(self, xb): return self.loss(xb)


class NoStep(Sound):
    def step(self, xb):
        terms = self.loss(xb)
        total_loss(terms, len(xb)).backward()
        return terms


class FrozenDecoder(Sound):
    def optimizers(self): return dict(all=self.adam('encoder'))


class Ascends(Sound):
    def loss(self, xb): return dict(reconstruction=-self.errors(xb).mean())


class ConstantScore(Sound):
    def image_score(self, xb): return torch.ones(len(xb))


class WrongSign(Sound):
    def image_score(self, xb): return -super().image_score(xb)


class BatchStatistics(Sound):
    def networks(self, shape):
        return dict(encoder=encoder(shape, 8, norm=True), decoder=decoder(shape, 8, norm=True))
    def image_score(self, xb):
        self.nets_.train()
        return super().image_score(xb)


class DropoutOn(Sound):
    def image_score(self, xb): return super().image_score(F.dropout(xb, .2, training=True))


class SeededDropoutOn(Sound):
    """Hides behind a seed of its own: the same twice, but not the same alone."""
    def image_score(self, xb):
        keep = (torch.rand(xb.shape, generator=self.rng()) > .2).float()
        return super().image_score(xb * keep)


class ScaledByBatch(Sound):
    def image_score(self, xb):
        s = super().image_score(xb)
        return (s - s.min()) / (s.max() - s.min() + 1e-9)


class ScaledByCall(Sound):
    def decision_function(self, x):
        s = super().decision_function(x)
        return (s - s.min()) / (s.max() - s.min() + 1e-9) if len(s) else s


class Unseeded(Sound):
    def networks(self, shape):
        torch.seed()
        return super().networks(shape)


class IgnoresSeed(Sound):
    def fit(self, x, y=None):
        seed, self.seed = self.seed, 0
        try: return super().fit(x, y)
        finally: self.seed = seed


class SeedsTheWorld(Sound):
    def fit(self, x, y=None):
        torch.manual_seed(self.seed)
        return super().fit(x, y)


class DrawsFromNumpy(Sound):
    def loss(self, xb):
        return super().loss(xb + 0 * np.random.rand())


class SwitchesGradientsOff(Sound):
    def decision_function(self, x):
        torch.set_grad_enabled(False)
        return super().decision_function(x)


class ChangesItsInput(Sound):
    def fit(self, x, y=None):
        if isinstance(x, np.ndarray) and x.dtype == np.float32 and x.flags.writeable: x *= .99
        return super().fit(x, y)


class ForgetsAWeight(Sound):
    """A learned tensor without the final underscore: save does not see it."""
    def train(self, data):
        super().train(data)
        self.scale = 2.
    def image_score(self, xb): return super().image_score(xb) * self.scale


class ForgetsAWeightQuietly(Sound):
    """The same with a default that hides it."""
    def train(self, data):
        super().train(data)
        self.scale = 2.
    def image_score(self, xb): return super().image_score(xb) * getattr(self, 'scale', 1.)


class NetworkOutsideNets(Sound):
    """A network that the contract never sees: it is not saved."""
    def train(self, data):
        with torch.random.fork_rng(devices=[]): torch.manual_seed(5); self.extra = nn.Linear(64, 64)
        super().train(data)
    def image_score(self, xb):
        if not hasattr(self, 'extra'): self.extra = nn.Linear(64, 64)
        return super().image_score(xb) + self.extra(xb.flatten(1)).square().mean(1)


class ThresholdFromTest(Sound):
    def predict(self, x):
        s = self.decision_function(x)
        return (s > np.quantile(s, 1 - self.contamination)).astype(int) if len(s) else s.astype(int)


class ThresholdMoves(Sound):
    def decision_function(self, x):
        s = super().decision_function(x)
        if len(s): self.threshold_ = float(np.quantile(s, 1 - self.contamination))
        return s


class ThresholdTooHigh(Sound):
    def set_threshold(self, data):
        super().set_threshold(data)
        self.threshold_ *= 10


class NetworkMadeInInit(Sound):
    def __init__(self, **params):
        super().__init__(**params)
        self.nets_ = nn.ModuleDict()


class ReturnsNothing(Sound):
    def fit(self, x, y=None): super().fit(x, y)


class ChangesItsParameter(Sound):
    def train(self, data):
        super().train(data)
        self.epochs = 3


class RemembersTheFirstFit(Sound):
    def networks(self, shape):
        if not hasattr(self, 'kept'): self.kept = super().networks(shape)
        return self.kept


class ClipsBadInput(Sound):
    def fit(self, x, y=None): return super().fit(np.clip(np.nan_to_num(x), 0, 1), y)


class FirstImageOnly(Sound):
    """Compares every image with one reconstruction, as a well-known AnoGAN does."""
    def errors(self, xb):
        return (xb - self.nets_.decoder(self.nets_.encoder(xb))[:1]).square()


class Broadcast(Sound):
    """A (b, 1, h, w) image meets a (b, h, w) reconstruction: each image is compared with all."""
    def loss(self, xb):
        rebuilt = self.nets_.decoder(self.nets_.encoder(xb))[:, 0]
        return dict(reconstruction=(xb - rebuilt).square().mean())


class BroadcastLabels(SoundLabelled):
    """(b,) labels meet (b, 1) scores: (b, b)."""
    def loss(self, xb, yb):
        s = self.nets_.scorer(xb)
        return dict(deviation=((1 - yb) * s.abs() + yb * F.relu(5 - s)).mean())


class SwappedArguments(SoundLabelled):
    """Labels and predictions exchanged: the gradient no longer knows the labels."""
    def loss(self, xb, yb):
        y, s = self.image_score(xb), yb
        return dict(deviation=((1 - y) * s.abs() + y * F.relu(5 - s)).mean())


class IgnoresLabels(SoundLabelled):
    def loss(self, xb, yb): return super().loss(xb, torch.zeros_like(yb))


class LabelsFlipped(SoundLabelled):
    def loss(self, xb, yb): return super().loss(xb, 1 - yb)


class MainThreadOnly(Sound):
    """Handles a signal while it trains, which Python allows in the main thread alone."""
    def train(self, data):
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        super().train(data)


class MindsTheDefaultDtype(Sound):
    def decision_function(self, x):
        s = super().decision_function(x)
        return (torch.tensor(s.tolist()) / 3).numpy().astype('float32')


class CountsOutside(Sound):
    """Its loss grows with the calls, which no file holds."""
    def networks(self, shape):
        type(self).calls = 0
        return super().networks(shape)

    def loss(self, xb):
        type(self).calls += 1
        return dict(reconstruction=self.errors(xb).mean() * (1 + self.calls))


@dataclass(kw_only=True, eq=False, repr=False)
class IgnoresItsDecay(Sound):
    weight_decay: float = 0.


@dataclass(kw_only=True, eq=False, repr=False)
class IgnoresItsChoice(Sound):
    activation: str = 'relu'

    def check_params(self):
        super().check_params()
        self.require_choice('activation', ('relu', 'tanh'))


@dataclass(kw_only=True, eq=False, repr=False)
class IgnoresItsNone(Sound):
    clip: float = None


@dataclass(kw_only=True, eq=False, repr=False)
class IgnoresItsTuple(Sound):
    widths: tuple = (64, 16)


class IgnoresItsRate(Sound):
    def adam(self, *names, lr=None, **kw): return super().adam(*names, lr=1e-3, **kw)


class IgnoresItsContamination(Sound):
    def threshold_rule(self, scores): return np.quantile(scores, .95)


@dataclass(kw_only=True, eq=False, repr=False)
class IgnoresItsSwitch(Sound):
    """Says what its rate needs, and is believed no more than that."""
    noise: float = .1
    noisy: bool = False
    acts_with = dict(noise=dict(noisy=True))


MUTANTS = {
    NoBackward: 'learns',
    NoStep: 'learns',
    FrozenDecoder: 'learns',
    Ascends: 'learns',
    ConstantScore: 'scores_are_numbers',
    WrongSign: 'higher_is_anomalous',
    BatchStatistics: 'alone_as_in_a_batch',
    DropoutOn: 'same_twice',
    SeededDropoutOn: 'alone_as_in_a_batch',
    ScaledByBatch: 'alone_as_in_a_batch',
    ScaledByCall: 'alone_as_in_a_batch',
    Unseeded: 'seed_decides',
    IgnoresSeed: 'seed_decides',
    SeedsTheWorld: 'leaves_global_state',
    DrawsFromNumpy: 'leaves_global_state',
    SwitchesGradientsOff: 'leaves_global_state',
    ChangesItsInput: 'leaves_global_state',
    ForgetsAWeight: 'save_and_load',
    ForgetsAWeightQuietly: 'save_and_load',
    NetworkOutsideNets: 'save_and_load',
    ThresholdFromTest: 'threshold_from_training',
    ThresholdMoves: 'threshold_from_training',
    ThresholdTooHigh: 'threshold_from_training',
    NetworkMadeInInit: 'explicit_parameters',
    ReturnsNothing: 'fit_returns_self',
    ChangesItsParameter: 'explicit_parameters',
    RemembersTheFirstFit: 'refit_starts_anew',
    ClipsBadInput: 'bad_input_is_refused',
    FirstImageOnly: 'alone_as_in_a_batch',
    Broadcast: 'images_do_not_mix',
    BroadcastLabels: 'labels_matter',
    SwappedArguments: 'labels_matter',
    IgnoresLabels: 'labels_matter',
    LabelsFlipped: 'higher_is_anomalous',
    CountsOutside: 'resumes_where_it_stopped',
    MainThreadOnly: 'threads_do_not_matter',
    MindsTheDefaultDtype: 'defaults_do_not_matter',
    IgnoresItsDecay: 'parameters_act',
    IgnoresItsChoice: 'parameters_act',
    IgnoresItsNone: 'parameters_act',
    IgnoresItsTuple: 'parameters_act',
    IgnoresItsRate: 'parameters_act',
    IgnoresItsContamination: 'parameters_act',
    IgnoresItsSwitch: 'parameters_act',
}


@pytest.mark.parametrize('broken', MUTANTS, ids=lambda m: m.__name__)
def test_mutant_is_caught(broken):
    with torch.random.fork_rng(), pytest.raises(BrokenPromise) as caught:
        try: check_detector(broken(), only=[MUTANTS[broken]])
        finally: torch.set_grad_enabled(True)
    assert list(caught.value.broken) == [MUTANTS[broken]]


def test_what_the_first_fit_leaves_is_not_laid_to_the_seed():
    both = ['refit_starts_anew', 'seed_decides']
    with pytest.raises(BrokenPromise) as caught: check_detector(RemembersTheFirstFit(), only=both)
    assert list(caught.value.broken) == both[:1]


def test_a_loss_of_shape_b_b_is_refused_by_the_loop():
    class Matrix(SoundLabelled):
        def loss(self, xb, yb): return dict(deviation=(self.nets_.scorer(xb) - yb).square())
    x = np.random.default_rng(0).random((20, 1, 8, 8), dtype='float32')
    with pytest.raises(ValueError, match=r"'deviation' must have shape .* got \(20, 20\)"):
        Matrix(verbose=False).fit(x, np.repeat([0, 1], 10))


def test_every_promise_is_broken_by_some_mutant_or_named_test():
    elsewhere = {'form_does_not_matter', 'empty_is_empty', 'constant_images_do_no_harm',
                 'maps_are_images'}
    assert set(PROMISES) - set(MUTANTS.values()) == elsewhere


class FormMatters(Sound):
    def decision_function(self, x):
        s = super().decision_function(x)
        return s * 2 if isinstance(x, np.ndarray) and x.dtype == np.uint8 else s


class EmptyFails(Sound):
    def decision_function(self, x): return super().decision_function(x) / min(1, int(1e9 / len(x)))


class ConstantHarms(Sound):
    def image_score(self, xb): return super().image_score(xb) / self.spread_
    def train(self, data):
        super().train(data)
        self.spread_ = float(torch.cat([xb for xb, _ in data.batches(64)]).std())
        if self.spread_ == 0: self.spread_ = float('nan')


class MapOfWrongShape(Sound):
    def pixel_score(self, xb): return self.errors(xb).sum(1)[:, ::2, ::2]


class MapOfNormal(Sound):
    def pixel_score(self, xb): return -super().pixel_score(xb)


@pytest.mark.parametrize('broken, promise', [
    (FormMatters, 'form_does_not_matter'), (EmptyFails, 'empty_is_empty'),
    (ConstantHarms, 'constant_images_do_no_harm'), (MapOfWrongShape, 'maps_are_images'),
    (MapOfNormal, 'maps_are_images')])
def test_the_rarer_promises(broken, promise):
    with pytest.raises(BrokenPromise) as caught: check_detector(broken(), only=[promise])
    assert promise in caught.value.broken


# ---------------------------------------------------------------- every hyper-parameter acts

@dataclass(kw_only=True, eq=False, repr=False)
class Noisy(Sound):
    """A hyper-parameter beside another; one that is refused; one of which nothing is expected."""
    noise: float = .1
    noisy: bool = False
    order: int = 1
    note: str = ''
    acts_with = dict(noise=dict(noisy=True), note=None)

    def check_params(self):
        super().check_params()
        self.require_choice('order', (1,))

    def loss(self, xb):
        return super().loss(xb + self.noisy * self.noise * torch.randn_like(xb))


class SaysNothing(Noisy):
    acts_with = dict(noise={})


def test_what_acts_beside_others_is_tried_beside_them():
    check_detector(Noisy(), only=['parameters_act'])
    with pytest.raises(BrokenPromise, match='noise does nothing: 0.1 or 0.05 .*acts_with'):
        check_detector(SaysNothing(), only=['parameters_act'])
    check_detector(SaysNothing(noisy=True), only=['parameters_act'])


def no_decay_in_turn(self, xb):
    return dict(reconstruction=rsrae.norms(xb - self.reconstruction(xb)))


def rate_of_the_warm_start(self, data, net, epochs, lr, *more):
    return warm_start(self, data, net, epochs, 1e-3, *more)


def rate_of_the_sphere(detector, lr): return free_sphere(detector, .01)


PUBLISHED = {   # what this course itself, or other code, once had: owner, hook, what it was
    'weight_decay': (rsrae.RSRAE, 'reconstruction_loss', no_decay_in_turn,
                     lambda: rsrae.RSRAE(alternate=True, weight_decay=1e-5)),
    'pretrain_lr': (deepsvdd, 'warm_start', rate_of_the_warm_start, lambda: deepsvdd.DeepSVDD()),
    'sphere_lr': (achc, 'free_sphere', rate_of_the_sphere,
                  lambda: achc.ACHC(width=8, wraps=500, warm_up=10)),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_hyper_parameters_that_were_ignored_are_noticed(name):
    owner, hook, broken, make = PUBLISHED[name]
    with mutant(owner, **{hook: broken}), pytest.raises(BrokenPromise) as caught:
        check_detector(make(), only=['parameters_act'])
    assert caught.value.broken['parameters_act'].startswith(f'{name} does nothing')


def test_a_reason_names_no_folder_that_is_gone(monkeypatch):
    def refuses(trial): raise ValueError(r'C:\a\run.safetensors and /b/c/model.safetensors differ')
    monkeypatch.setitem(PROMISES, 'refuses', refuses)
    with pytest.raises(BrokenPromise) as caught: check_detector(PCA(verbose=False), ['refuses'])
    assert caught.value.broken == {'refuses': 'ValueError: run.safetensors and model.safetensors '
                                              'differ'}
