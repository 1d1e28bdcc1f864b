"""Bars of progress: they name what is going on, and none stays behind, in red or otherwise."""
import warnings

import numpy as np
import pytest
import tqdm.notebook

from ad_course import check, detector as spine
from ad_course.ae import AE
from ad_course.check import BrokenPromise, PROMISES, check_detector

X = np.random.default_rng(0).random((12, 1, 8, 8), dtype='float32')


@pytest.fixture
def bars(monkeypatch):
    """The bars of a notebook that were made, each with all the titles that it had."""
    made = []
    class Bar(tqdm.notebook.tqdm):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw, display=False)
            self.titles = [kw.get('desc')]
            made.append(self)

        def set_description(self, title=None, refresh=True):
            self.titles.append(title)
            super().set_description(title, refresh)
    monkeypatch.setenv('TQDM_DISABLE', '0')
    monkeypatch.setattr(spine, 'tqdm', Bar)
    return made


def gone(bar):
    """Hidden, and not red."""
    style = bar.container.children[1].bar_style
    return bar.container.layout.visibility == 'hidden' and style != 'danger'


def small(**kw): return AE(**dict(epochs=3, batch_size=4, code_dim=2, width=2) | kw)


def raising(error):
    def after(data, epoch): raise error
    return after


def test_no_bar_stays_whatever_ended_the_fit(bars):
    ends = [lambda data, epoch: None, lambda data, epoch: True, raising(KeyboardInterrupt()),
            raising(ValueError('of the method'))]
    for after in ends:
        d = small()
        d.after_epoch = after
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: d.fit(X)
            except ValueError: pass
    small(epochs=0).fit(X)
    assert len(bars) == 5 and all(bar.titles == ['AE'] for bar in bars)
    assert all(map(gone, bars)), [bar.container.children[1].bar_style for bar in bars]


def test_a_bar_that_is_iterated_over_stays_in_red(bars):
    """As it was: an early end leaves it there."""
    for _ in spine.tqdm(range(3), leave=False): break
    assert not gone(bars[-1])


def test_the_check_names_the_promise_that_it_examines(bars, monkeypatch):
    monkeypatch.setitem(PROMISES, 'breaks', lambda t: check.check(False, 'a reason'))
    names = ['explicit_parameters', 'breaks', 'fit_returns_self']
    with pytest.raises(BrokenPromise): check_detector(small(), only=names)
    assert bars[0].titles == ['', *names] and bars[0].n == 3 and gone(bars[0])
    assert all(bar.disable for bar in bars[1:]), 'the fits of the check show bars of their own'
    check_detector(small(verbose=False), only=names[:1])
    assert bars[-1].disable
