"""Sources of batches: processes that read, how long they live, and what can be sent to them."""
import gc
import multiprocessing
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset, get_worker_info

from ad_course import batches
from ad_course.batches import Disk, Memory, Part

from .project import ROOT, environment

X = torch.linspace(0, 1, 40)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()


class Who(Dataset):
    """Images whose brightness is the number of calls so far in this process, and who read them."""
    calls = 0
    def __init__(self, do=None): self.do = do
    def __len__(self): return 12
    def __getitem__(self, i):
        if self.do is not None: self.do(i)
        if get_worker_info() is None: return torch.zeros(1, 4, 4)
        self.calls += 1
        return torch.full((1, 4, 4), self.calls / 100)


def read(source, size=8, seed=None):
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.cat([x for x, _ in source.batches(size, rng)])


@pytest.mark.parametrize('workers', [0, 2])
def test_the_order_is_that_of_memory_in_every_epoch(workers):
    disk, memory = Disk(TensorDataset(X), workers=workers), Memory(X)
    for seed in (None, 0, 1):
        for size in (8, 13): assert torch.equal(read(disk, size, seed), read(memory, size, seed))


def test_a_tensor_whose_memory_moves_is_followed():
    """As when it is sent to a process that was not forked: its storage then lies elsewhere."""
    x = torch.rand(6, 1, 5, 5)
    memory, before = Memory(x), x.clone()
    x.share_memory_()
    torch.rand(10_000)                                   # may take the place that has become free
    assert torch.equal(memory.x, before) and memory.x.data_ptr() == x.data_ptr()


def test_the_processes_live_as_long_as_the_source():
    before, source, seen = {*multiprocessing.active_children()}, Disk(Who(), workers=1), []
    for _ in range(3):
        seen.append(100 * read(source, 4).max())
        alive = {*multiprocessing.active_children()} - before
        assert len(alive) == 1
    assert torch.equal(torch.stack(seen).round(), torch.tensor([12., 24., 36.])), 'one, not three'
    gc.disable()                                         # nothing holds the source in a circle
    try: del source
    finally: gc.enable()
    alive.pop().join(10)
    assert not {*multiprocessing.active_children()} - before


@pytest.mark.parametrize('workers', [0, 2])
def test_walks_beside_each_other_and_walks_left_early(workers):
    disk, want = Disk(TensorDataset(X), workers=workers), read(Memory(X))
    one, two = disk.batches(8), disk.batches(16)
    got = [next(one)], [next(two)]
    for walk, pairs in zip((one, two), got):
        pairs += walk
        assert torch.equal(torch.cat([x for x, _ in pairs]), want)
    left = disk.batches(8)
    next(left)
    left.close()
    assert torch.equal(read(disk), want)


def fails_once(folder, i):
    """Raises for image 9 until it has done so once."""
    if i == 9 and not (folder/'done').exists():
        (folder/'done').touch()
        raise OSError('image 9 cannot be read')


def test_after_an_error_of_the_dataset_the_next_walk_is_whole(tmp_path):
    disk = Disk(Who(partial(fails_once, tmp_path)), workers=1)
    with pytest.raises(OSError, match='image 9 cannot be read'): read(disk, 3)
    assert len(read(disk, 3)) == 12


def dies(i):
    if get_worker_info() is not None: os._exit(3)


def errs(i): raise RuntimeError('my own trouble')


def test_a_process_that_was_killed_is_said():
    with pytest.raises(RuntimeError, match='workers=1.*lack of memory.*workers=0 would show'):
        read(Disk(Who(dies), workers=1))


def test_an_error_of_the_dataset_is_not_taken_for_a_death():
    data = TensorDataset(X)
    disk = Disk(data, workers=1)
    disk.reader.dataset = Who(errs)
    with pytest.raises(RuntimeError, match='my own trouble'): read(disk)


# ---------------------------------------------------------------- processes that start anew
@pytest.fixture
def anew(monkeypatch):
    """As on Windows, in a notebook: nobody can import __main__."""
    monkeypatch.setattr(multiprocessing, 'get_start_method', lambda allow_none=False: 'spawn')
    monkeypatch.setitem(sys.modules, '__main__', SimpleNamespace())
    return monkeypatch


def of_a_notebook(kind, name='Mine'):
    """A class or function as a cell of a notebook would define it, to be found there."""
    kind.__module__, kind.__qualname__ = '__main__', name
    setattr(sys.modules['__main__'], name, kind)
    return kind


def mine(): return of_a_notebook(type('Mine', (Who,), {}))
def flips(): return of_a_notebook(lambda i: i, 'flips')


@pytest.mark.parametrize('make, what', [
    (lambda: mine()(), 'Mine is defined in the notebook'),
    (lambda: Who(flips()), 'flips is defined in the notebook'),
    (lambda: Who(partial(flips(), 3)), 'flips is defined'),
    (lambda: torch.utils.data.Subset(mine()(), [0, 1]), 'Mine is defined'),
    (lambda: torch.utils.data.ConcatDataset([Who(), Who([flips()].count)]), 'flips is defined'),
    (lambda: Who(lambda i: i), 'lambda'), (lambda: Who(sys.stdout.write), 'Error: ')])
def test_what_could_not_be_made_again_is_named_before_anything_starts(anew, make, what):
    data, before = make(), {*multiprocessing.active_children()}
    with pytest.raises(ValueError, match=rf'workers must be 0 for this Dataset.*{what}.*py file'):
        Disk(data, workers=1)
    assert not {*multiprocessing.active_children()} - before


def test_what_can_be_imported_passes(anew):
    for data in Who(), TensorDataset(X), Who(partial(fails_once, ROOT)): Disk(data, workers=1)
    program = SimpleNamespace(__file__='program.py')     # a file that its processes import
    anew.setitem(sys.modules, '__main__', program)
    Disk(mine()(), workers=1)


def test_where_processes_are_copies_everything_passes(anew):
    anew.setattr(multiprocessing, 'get_start_method', lambda allow_none=False: 'fork')
    batches._check_sent(Who(lambda i: i))


def test_asking_for_the_way_to_start_does_not_choose_one():
    """In another process, since here it has been chosen; and a real prompt, with real spawn."""
    code = '''
import multiprocessing as mp, torch
from torch.utils.data import Dataset
from ad_course.batches import Disk, _check_sent
class Mine(Dataset):
    def __len__(self): return 2
    def __getitem__(self, i): return torch.zeros(1, 4, 4)
if mp.get_all_start_methods()[0] == 'fork': _check_sent(Mine())
assert mp.get_start_method(allow_none=True) is None
mp.set_start_method('spawn')
try: Disk(Mine(), workers=1)
except ValueError as e: print(e)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
                          env=environment(PYTHONPATH=str(ROOT)))
    assert 'Mine is defined in the notebook or at the prompt' in done.stdout, done.stderr


# ---------------------------------------------------------------- a part of a source
@pytest.mark.parametrize('seed', [None, 0, 1])
def test_part_gives_the_kept_images_with_their_labels(seed):
    """In the order of the source underneath, however it is shuffled, and no other image."""
    x, y = torch.rand(11, 1, 4, 4), torch.arange(11) % 2
    kept = torch.arange(11) % 3 > 0
    rng = lambda: None if seed is None else torch.Generator().manual_seed(seed)
    whole = list(Memory(x, y).batches(4, rng()))
    xs, ys = map(torch.cat, zip(*whole))
    place = (xs[:, None] == x).flatten(2).all(2).int().argmax(1)
    got_x, got_y = map(torch.cat, zip(*Part(Memory(x, y), kept).batches(4, rng())))
    assert torch.equal(got_x, xs[kept[place]]) and torch.equal(got_y, ys[kept[place]])
    assert len(Part(Memory(x, y), kept)) == len(got_x) == 7
