"""A training that goes on from its checkpoint ends as one without a pause, or is refused."""
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import nn

from ad_course import detector as spine
from ad_course.aae import AAE
from ad_course.achc import ACHC
from ad_course.ae import AE
from ad_course.baselines import PCA
from ad_course.cwdsvdd import Bank, CWDSVDD
from ad_course.dae import DAE, SDAE
from ad_course.deepsad import DeepSAD
from ad_course.deepsvdd import DeepSVDD
from ad_course.detector import Detector, load
from ad_course.networks import Critic, generator
from ad_course.rda import RDA

from .mutants import assert_caught, changed, mutant

X = np.random.default_rng(0).random((22, 1, 8, 8), dtype='float32')
Y = np.repeat([0, 1], [17, 5])
SMALL = dict(epochs=4, batch_size=8, code_dim=2, verbose=False)
TINY = dict(batch_size=8, code_dim=4, width=2, verbose=False)


class Duel(Detector):
    """A game: two players, one of which moves every second time; noise; averages; norms."""
    loss_falls = False

    def networks(self, shape):
        return dict(critic=Critic(shape, norm=True), generator=generator(shape, 4, norm=True))

    def optimizers(self):
        return {k: self.adam(k, betas=(.5, .999)) for k in ('critic', 'generator')}

    def turns(self): return [('critic', self.real), ('generator', self.fooling, 2)]
    def averaged(self): return dict(generator=.9, critic=.5)
    def fake(self, xb): return self.nets_.generator(torch.randn(len(xb), 4))
    def fooling(self, xb): return dict(fooling=(self.nets_.critic(self.fake(xb)) - 1).square())
    def real(self, xb):
        return dict(real=(self.nets_.critic(xb) - 1).square(),
                    fake=self.nets_.critic(self.fake(xb)).square())

    def image_score(self, xb): return -self.nets_.critic(xb)


class Phased(Duel):
    """Three phases; what one hands on is learned, or lies in an attribute of a private name."""
    resumes = True

    def train(self, data):
        self._drawn = torch.rand(3)
        self.run(data, 2, [('critic', self.real)], 'alone/')
        self.kept_ = {'norms': [p.norm() for p in self.nets_.critic.parameters()], 'n': (1, None)}
        self.run(data, 0, [('critic', self.real)], 'none/')
        self.run(data, 2, label='game/')
        self.run(data, 1, [('generator', self.fooling)], 'last/')

    def real(self, xb): return super().real(xb) | dict(drawn=self._drawn.mean())


class EarlyEnd(AE):
    """Ends by itself, by what it remembers of the last epoch."""
    def after_epoch(self, data, epoch):
        self._best = min(getattr(self, '_best', 9.), self.history_['reconstruction'][-1])
        return epoch == 3


class Rates(AE):
    """An optimizer with momentum, several groups, and a rate that falls."""
    def optimizers(self):
        first, second = self.nets_['encoder'], self.nets_['decoder']
        groups = [dict(params=first.parameters(), lr=.1), dict(params=second.parameters())]
        return dict(all=[torch.optim.SGD(groups, lr=.05, momentum=.9, nesterov=True), None])

    def after_epoch(self, data, epoch):
        for group in self.optimizers_['all'][0].param_groups: group['lr'] *= .7


make = {'AE': lambda: AE(**SMALL), 'DAE': lambda: DAE(**SMALL), 'AAE': lambda: AAE(**SMALL),
        'SDAE': lambda: SDAE(epochs=4, batch_size=8, verbose=False),
        'conv': lambda: AE(**SMALL, arch='conv', width=4),
        'DeepSAD': lambda: DeepSAD(epochs=2, pretrain_epochs=2, width=2, code_dim=4, batch_size=8,
                                   verbose=False),
        'CWDSVDD': lambda: CWDSVDD(epochs=3, pretrain_epochs=1, warm_up=2, wraps=40, redraw_every=2,
                                   **TINY),
        'CWDSVDD, components': lambda: CWDSVDD(epochs=2, pretrain_epochs=1, warm_up=1, wraps=40,
                                               features='pca', components=3, **TINY),
        'ACHC': lambda: ACHC(epochs=3, warm_up=1, wraps=40, redraw_every=2, latent_dim=2, **TINY),
        'soft': lambda: DeepSVDD(epochs=4, pretrain_epochs=2, width=2, code_dim=4, warm_up=1,
                                 objective='soft-boundary', batch_size=8, verbose=False),
        'Duel': lambda: Duel(epochs=4, batch_size=8, verbose=False),
        'Phased': lambda: Phased(batch_size=8, verbose=False),
        'RDA': lambda: RDA(epochs_per_round=2, sparse_weight=.25, **SMALL | dict(epochs=5)),
        'RDA features': lambda: RDA(penalty='l21 features', epochs_per_round=3, **SMALL),
        'EarlyEnd': lambda: EarlyEnd(**{**SMALL, 'epochs': 9}), 'Rates': lambda: Rates(**SMALL)}


def fit(d, **kw): return d.fit(X, Y, **kw) if d.uses_labels else d.fit(X, **kw)


def stopped_after(d, n):
    """A detector whose machine is taken away when n epochs are done, in the midst of a batch."""
    epochs, step, one = [], d.step, d._epoch
    def epoch(*args):
        one(*args)
        epochs.append(1)
    def batch(*args):
        found = step(*args)
        if len(epochs) == n: raise ConnectionError('gone')
        return found
    d._epoch, d.step = epoch, batch
    return d


def same_model(a, b):
    """Bit by bit: weights, learned attributes, and history (but for the seconds)."""
    p, q = a.nets_.state_dict(), b.nets_.state_dict()
    assert p.keys() == q.keys() and all(torch.equal(p[k], q[k]) for k in p), 'other weights'
    history = lambda d: {k: v for k, v in d.history_.items() if k != 'seconds'}
    assert history(a) == history(b), 'another history'
    assert len(a.history_['seconds']) == len(b.history_['seconds'])
    assert a.threshold_ == b.threshold_
    np.testing.assert_array_equal(a.decision_function(X), b.decision_function(X))
    names = lambda d: {k for k in vars(d) if k.endswith('_')}
    assert names(a) == names(b)


@pytest.fixture
def path(tmp_path): return tmp_path/'run'


@pytest.mark.parametrize('name', make)
def test_stopped_anywhere_and_continued(name, path):
    whole = fit(make[name]())
    for n in range(len(whole.history_['seconds']) + 1):
        path.unlink(missing_ok=True)
        if n < len(whole.history_['seconds']):
            with pytest.raises(ConnectionError):
                fit(stopped_after(make[name](), n), checkpoint=path)
            assert path.exists() == (n > 0)
        else: fit(make[name](), checkpoint=path)
        torch.rand(5)
        before = torch.get_rng_state()
        same_model(fit(make[name](), checkpoint=str(path)), whole)
        assert torch.equal(torch.get_rng_state(), before)
    same_model(fit(make[name](), checkpoint=path), whole)   # it has ended: nothing is left to do
    assert os.listdir(path.parent) == [path.name]


def test_stopped_many_times(path):
    whole = fit(make['Phased']())
    for n in (1, 0, 1, 2):
        with pytest.raises(ConnectionError):
            fit(stopped_after(make['Phased'](), n), checkpoint=path)
    same_model(fit(make['Phased'](), checkpoint=path), whole)


def test_the_stop_button_and_a_checkpoint(path):
    """The interrupted model may be used; the file holds the last whole epoch."""
    d, whole = make['AE'](), fit(make['AE']())
    one, epochs = d.step, []
    def step(xb):
        epochs.append(1)
        if len(epochs) == 8: raise KeyboardInterrupt
        return one(xb)
    d.step = step
    with pytest.warns(UserWarning, match='interrupted'): fit(d, checkpoint=path)
    assert len(d.history_['seconds']) == 2
    same_model(fit(make['AE'](), checkpoint=path), whole)


# ---------------------------------------------------------------- what is refused

def refused(d, path, match, *args, kinds=ValueError):
    """Neither the file nor the detector is touched."""
    before, state = path.read_bytes() if path.exists() else None, dict(vars(d))
    with pytest.raises(kinds, match=match) as caught: d.fit(*(args or (X,)), checkpoint=path)
    assert vars(d) == state and (before is None or path.read_bytes() == before)
    return str(caught.value)


def test_another_training_is_refused(path):
    fit(make['AE'](), checkpoint=path)
    for kw in (dict(epochs=9), dict(lr=.5), dict(code_dim=3), dict(seed=1)):
        name, = kw
        assert str(path) in refused(AE(**SMALL | kw), path, f'{name}=.*, now {kw[name]}')
    refused(DAE(**SMALL), path, 'another detector')
    mine = changed(AE, 'AE')
    mine.__qualname__ = 'AE'
    refused(mine(**SMALL), path, 'another module')
    refused(AE(**SMALL), path, 'another data', X[:-1])
    refused(AE(**SMALL), path, 'another data', np.where(X > .999, 0, X).astype('float32'))
    fit(DeepSAD(epochs=1, pretrain_epochs=0, width=2, code_dim=4), checkpoint=path.parent/'sad')
    refused(DeepSAD(epochs=1, pretrain_epochs=0, width=2, code_dim=4), path.parent/'sad',
            'another data', X, np.roll(Y, 1))
    same_model(AE(**SMALL | dict(verbose=True, workers=2)).fit(X, checkpoint=path),
               fit(make['AE']()))


def test_files_that_are_no_checkpoint_are_refused(path):
    d = fit(make['AE']())
    d.save(path)
    refused(make['AE'](), path, 'must be written by fit, as a checkpoint')
    for content in (b'', b'something else', path.read_bytes()[:-5]):
        path.write_bytes(content)
        refused(make['AE'](), path, 'damaged')
    refused(make['AE'](), path.parent/'no folder'/'run', 'no folder', kinds=FileNotFoundError)
    path.unlink()
    fit(make['AE'](), checkpoint=path)
    with pytest.raises(ValueError, match='holds a training, no detector yet'): load(path)


def test_methods_whose_phases_hand_on_more_are_refused(path):
    for d in (PCA(verbose=False), changed(Phased, 'Own', train=AE.train)()):
        refused(d, path, 'cannot go on from a checkpoint', kinds=NotImplementedError)
        assert not path.exists()


def test_an_object_of_its_own_is_put_back_by_its_state(path):
    """One that is not there when the training goes on is an error, never a dict in its place."""
    class Holds(AE):
        resumes = True
        def train(self, data):
            if not later: self._net = nn.Linear(2, 2)
            super().train(data)
    later = []
    with pytest.raises(ConnectionError): fit(stopped_after(Holds(**SMALL), 2), checkpoint=path)
    state = path.read_bytes()
    d = Holds(**SMALL)
    same_model(fit(Holds(**SMALL), checkpoint=path.with_name('other')), fit(d))
    later.append(True)
    path.write_bytes(state)
    refused(Holds(**SMALL), path, 'does not fit this version of Holds')


def test_what_no_file_can_hold_is_an_error(path):
    class Holds(AE):
        def after_epoch(self, data, epoch): self._found = {3, 4}
    with pytest.raises(TypeError, match='cannot be saved'): fit(Holds(**SMALL), checkpoint=path)
    assert not path.exists()


# ---------------------------------------------------------------- each piece of the state counts

def lost(*names):
    """A `_put_back` that is not given some of the state, but what a fresh fit has."""
    real = spine._Checkpoint._put_back
    def put_back(self, detector, **state):
        fresh = dict(random=torch.get_rng_state(), order=detector._progress.order.get_state(),
                     optimizers={}, batches=0,
                     averages={k: v.state_dict() for k, v in detector._progress.averages.items()},
                     learned={'history_': state['learned']['history_']}, held={},
                     nets=detector.nets_.state_dict())
        return real(self, detector, **state | {k: fresh[k] for k in names})
    return put_back


def check_resume(put_back, name='Duel', n=1):
    with mutant(spine._Checkpoint, _put_back=put_back):
        with tempfile.TemporaryDirectory() as folder:
            whole = fit(make[name]())
            with pytest.raises(ConnectionError):
                fit(stopped_after(make[name](), n), checkpoint=Path(folder)/'run')
            same_model(fit(make[name](), checkpoint=Path(folder)/'run'), whole)


def test_the_sparse_part_is_part_of_the_state():
    """A training of RDA that forgot S, or kept it in a local name, would go on from X itself."""
    def forgets(put_back):
        def without(self, detector, **state):
            s = detector._s
            put_back(self, detector, **state)
            detector._s = s
        return without
    check_resume(lost(), 'RDA', 3)
    assert_caught(lambda f: check_resume(f, 'RDA', 3), forgets(spine._Checkpoint._put_back))


@pytest.mark.parametrize('piece', ['random', 'order', 'optimizers', 'averages', 'nets', 'batches'])
def test_a_lost_piece_of_the_state_is_noticed(piece):
    check_resume(lost())
    assert_caught(check_resume, lost(piece))


@pytest.mark.parametrize('name, n, piece', [('ACHC', 2, 'learned'), ('CWDSVDD', 5, 'held')])
def test_a_lost_sphere_or_bank_is_noticed(name, n, piece):
    check_resume(lost(), name, n)
    assert_caught(partial(check_resume, name=name, n=n), lost(piece))


def detached(self, detector, learned, **state):
    """Attributes set anew, a parameter too, which its optimizer then moves no more."""
    real(self, detector, learned=learned, **state)
    for k, v in learned.items():
        if isinstance(getattr(detector, k), nn.Parameter): setattr(detector, k, nn.Parameter(v))


real = spine._Checkpoint._put_back
def test_a_parameter_outside_of_the_networks_stays_with_its_optimizer():
    assert_caught(partial(check_resume, name='ACHC', n=2), detached)


# ---------------------------------------------------------------- save in the midst

def test_save_in_the_midst_of_training(tmp_path):
    """The model that an interruption would leave; the training does not notice."""
    for name in ('AE', 'DAE', 'Duel', 'conv'):
        whole = fit(make[name]())
        d = make[name]()
        d.after_epoch = lambda data, epoch: d.save(tmp_path/f'{name} {epoch}')
        same_model(fit(d), whole)
        short = fit(make[name]().set_params(epochs=2))
        found = load(tmp_path/f'{name} 2')
        assert found.threshold_ == short.threshold_
        np.testing.assert_array_equal(found.decision_function(X), short.decision_function(X))
        assert not {'_progress', 'optimizers_'} & vars(found).keys()


def test_save_in_the_midst_of_an_epoch(tmp_path):
    d, whole = make['conv'](), fit(make['conv']())
    real, calls = d.loss, []
    def loss(xb):
        calls.append(1)
        if len(calls) == 5: d.save(tmp_path/'model')
        return real(xb)
    d.loss = loss
    same_model(fit(d), whole)
    assert np.isfinite(load(tmp_path/'model').decision_function(X)).all()


def test_save_before_there_is_anything_to_keep(tmp_path):
    d = make['Duel']()
    real, calls = d.real, []
    def first(xb):
        calls.append(1)
        if len(calls) == 1:
            with pytest.raises(NotFittedError, match='nothing to save yet: critic, generator'):
                d.save(tmp_path/'model')
        return real(xb)
    d.real = first
    same_model(fit(d), fit(make['Duel']()))
    assert not os.listdir(tmp_path)
