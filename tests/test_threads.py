"""The library in other people's programs: several threads, and defaults of the program's own."""
import contextlib
import os
import threading
import warnings

import numpy as np
import pytest
import torch

from ad_course import detector as spine
from ad_course.ae import AE
from ad_course.batches import Disk, Memory, as_tensor, index_batches
from ad_course.check import BrokenPromise, check_detector
from ad_course.dae import DAE
from ad_course.detector import isolated, load, plain_defaults, write_atomically
from ad_course.vae import VAE

from .mutants import assert_caught, changed, mutant

X = np.random.default_rng(0).random((12, 1, 6, 6), dtype='float32')
SMALL = dict(epochs=2, code_dim=2, width=2, batch_size=4, verbose=False)


def together(f, n=2):
    """What f gives in n threads at once, or what it raises, in the order of their numbers."""
    found = [None] * n
    def work(i):
        try: found[i] = f(i)
        except Exception as e: found[i] = e
    threads = [threading.Thread(target=work, args=[i]) for i in range(n)]
    for t in threads: t.start()
    for t in threads: t.join()
    for e in found:
        if isinstance(e, Exception): raise e
    return found


@contextlib.contextmanager
def defaults(dtype=torch.float64, device='meta'):
    """A program's own defaults, set as programs set them."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try: yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


# ---------------------------------------------------------------- fits in threads

class Noisy(DAE):
    """Draws in its networks and in every batch, and lets the other thread in between."""
    def networks(self, shape):
        meet = lambda: contextlib.suppress(threading.BrokenBarrierError)
        with meet(): self.meeting.wait(timeout=.05)
        return super().networks(shape)


@pytest.mark.parametrize('cls, kw', [(DAE, {}), (VAE, {}), (Noisy, {})])
def test_fits_in_threads_are_the_fits_alone(cls, kw):
    """Also with other seeds beside them; the caller's random numbers stay."""
    Noisy.meeting = threading.Barrier(3)
    alone = [cls(**SMALL, seed=s, **kw).fit(X) for s in (0, 0, 1)]
    before = torch.get_rng_state()
    Noisy.meeting = threading.Barrier(3)
    beside = together(lambda i: cls(**SMALL, seed=(0, 0, 1)[i], **kw).fit(X), 3)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(alone, beside):
        np.testing.assert_array_equal(a.decision_function(X), b.decision_function(X))
        assert a.threshold_ == b.threshold_
    assert not np.array_equal(beside[0].decision_function(X), beside[2].decision_function(X))


class Open(spine._OneAtATime):
    """As it was: everybody may come in."""
    def __enter__(self): pass
    def __exit__(self, *_): pass


def threads_promise(lock):
    with mutant(spine, _one_at_a_time=lock):
        for _ in range(4):   # a busy machine may keep the two from meeting
            check_detector(AE(epochs=1, batch_size=32), only=['threads_do_not_matter'])


def test_without_the_lock_the_promise_is_broken():
    threads_promise(spine._one_at_a_time)
    assert_caught(threads_promise, Open(), 'threads_do_not_matter', BrokenPromise)


def test_scoring_waits_for_nobody():
    """A server that scores while it fits; also before and after the defaults are set back."""
    d, done = AE(**SMALL).fit(X), []
    s = d.decision_function(X)
    with isolated(0):   # as a fit of this thread
        t = threading.Thread(target=lambda: done.append(d.decision_function(X)))
        t.start()
        t.join(timeout=20)
        assert done, 'scoring waits for a fit'
    np.testing.assert_array_equal(done[0], s)


def test_who_waits_for_long_says_so():
    lock = spine._OneAtATime(patience=.01)
    def wait():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            with lock: return [str(w.message) for w in caught]
    with lock, lock:   # the same thread comes in again
        found = []
        t = threading.Thread(target=lambda: found.append(wait()))
        t.start()
        t.join(timeout=.2)
    t.join()
    assert len(found[0]) == 1 and 'waits' in found[0][0]
    assert wait() == []


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no processes of this kind here')
@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_a_process_forked_during_a_fit_may_fit():
    """The thread that held the lock does not exist in the copy."""
    inside, leave = threading.Event(), threading.Event()
    def hold():
        with isolated(0):
            inside.set()
            leave.wait(20)
    t = threading.Thread(target=hold)
    t.start()
    inside.wait(20)
    child = os.fork()
    if not child:
        free = spine._one_at_a_time.lock.acquire(timeout=1)
        os._exit(0 if free else 1)
    leave.set()
    t.join()
    assert os.waitpid(child, 0)[1] == 0


def test_an_error_in_one_thread_lets_the_others_in():
    def fit(i):
        d = AE(**SMALL) if i else AE(**{**SMALL, 'lr': 1e30})
        try: return d.fit(X)
        except FloatingPointError: return None
    found = together(fit, 3)
    assert found[0] is None and found[1].threshold_ == found[2].threshold_


# ---------------------------------------------------------------- files

def test_threads_that_save_to_one_path(tmp_path):
    """None fails, the file is always whole, nothing is left beside it."""
    models = [AE(**SMALL, seed=i).fit(X) for i in range(3)]
    scores = {d.decision_function(X).tobytes() for d in models}
    path = tmp_path/'model'
    models[0].save(path)
    def work(i):
        for _ in range(4):
            if i < 3: models[i].save(path)
            else: assert load(path).decision_function(X).tobytes() in scores
    together(work, 5)
    assert load(path).decision_function(X).tobytes() in scores
    assert os.listdir(tmp_path) == ['model']


def test_a_file_that_is_replaced_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    """Head and tensors come from one and the same file, the one that was there at first."""
    old, new = (AE(**SMALL, seed=i).fit(X) for i in range(2))
    path, parse = tmp_path/'model', spine.from_safetensors
    old.save(path)
    def late(content):
        new.save(path)
        return parse(content)
    monkeypatch.setattr(spine, 'from_safetensors', late)
    np.testing.assert_array_equal(load(path).decision_function(X), old.decision_function(X))


def test_threads_that_write_one_file_have_temporaries_of_their_own(tmp_path, monkeypatch):
    """They meet at the worst moment, after writing and before moving into place."""
    meeting, replace, names = threading.Barrier(4), os.replace, []
    def slow(a, b):
        names.append(a.name)
        meeting.wait(timeout=20)
        replace(a, b)
    monkeypatch.setattr(spine.os, 'replace', slow)
    path = tmp_path/('n' * 250)   # as long as names may be
    together(lambda i: write_atomically(path, bytes([i]) * 100), 4)
    assert len(set(names)) == 4 and len(set(path.read_bytes())) == 1
    assert os.listdir(tmp_path) == [path.name]


# ---------------------------------------------------------------- defaults of the program

@pytest.mark.parametrize('cls', [AE, DAE, VAE])
def test_defaults_of_the_program_neither_matter_nor_change(cls, tmp_path):
    plain = cls(**SMALL).fit(X)
    s, m = plain.decision_function(X), plain.anomaly_map(X)
    drawn = plain.sample(2) if cls is VAE else None
    with defaults():
        d = cls(**SMALL, device='cpu').fit(X)
        d.save(tmp_path/'model')
        for one in (d, load(tmp_path/'model', device='cpu'), plain):
            np.testing.assert_array_equal(one.decision_function(X), s)
            np.testing.assert_array_equal(one.anomaly_map(X), m)
            assert one.calibrate(X).threshold_ == plain.calibrate(X).threshold_
            np.testing.assert_array_equal(one.reconstruct(X), plain.reconstruct(X))
        if cls is VAE: np.testing.assert_array_equal(d.sample(2), drawn)
        assert torch.zeros(1).dtype == torch.float64 and torch.zeros(1).is_meta
    np.testing.assert_array_equal(d.decision_function(X), s)


def test_batches_lie_where_they_are_asked_to():
    data = torch.utils.data.TensorDataset(torch.from_numpy(X))
    with defaults():
        for source in (Memory(X), Disk(data), Disk(data, labelled=True)):
            for rng in (None, torch.Generator('cpu').manual_seed(0)):
                for xb, yb in source.batches(5, rng):
                    assert (xb.device.type, yb.device.type) == ('cpu', 'cpu')
                    assert xb.dtype == torch.float32 and yb.dtype == torch.long
        assert all(i.device.type == 'cpu' for i in index_batches(7, 3))


def test_the_first_in_and_the_last_out_of_many_threads():
    """Threads overlap in all ways, and the program's default dtype comes back."""
    start, first_out = threading.Barrier(2), threading.Event()
    def work(i):
        with plain_defaults():
            start.wait(20)
            if i: first_out.wait(20)   # the other has left by then
            seen = torch.get_default_dtype()
        first_out.set()
        return seen
    with defaults(device='cpu'):
        assert together(work) == [torch.float32] * 2
        assert torch.get_default_dtype() == torch.float64


def defaults_promise(cls):
    check_detector(cls(epochs=1, batch_size=32, verbose=False), only=['defaults_do_not_matter'])


class Reads64(AE):
    """A score that the program's default dtype changes."""
    def decision_function(self, x):
        s = super().decision_function(x)
        return s + (torch.get_default_dtype() == torch.float64) * np.float32(1e-3)


class Sets32(AE):
    """Leaves a default of its own."""
    def fit(self, x, y=None):
        super().fit(x, y)
        torch.set_default_dtype(torch.float32)
        return self


def test_detectors_that_mind_the_defaults_are_caught():
    defaults_promise(AE)
    for broken in (Reads64, Sets32):
        assert_caught(defaults_promise, broken, 'defaults', BrokenPromise)
    with mutant(spine, plain_defaults=contextlib.nullcontext):
        bare = changed(AE, 'Bare', fit=AE.fit.__wrapped__, for_each=AE.for_each.__wrapped__)
        assert_caught(defaults_promise, bare, 'defaults', BrokenPromise)


# ---------------------------------------------------------------- filters of warnings

def test_a_read_only_array_does_not_touch_the_filters(monkeypatch):
    """Two threads that overlap in catch_warnings leave the filters of one behind."""
    x = X.copy()
    x.flags.writeable = False
    def never(*args, **kw): raise AssertionError('the filters of all threads were changed')
    with monkeypatch.context() as strict:
        strict.setattr(warnings, 'catch_warnings', never)
        strict.setattr(warnings, 'warn', never)
        t = as_tensor(x)
    assert t.data_ptr() == x.__array_interface__['data'][0] and torch.equal(t, torch.tensor(x))
    small = as_tensor(np.broadcast_to(np.float32(.5), (2, 1, 3, 3)))   # no memory of its own size
    assert small.shape == (2, 1, 3, 3) and (small == .5).all()
    del x
    assert t.sum().isfinite()
