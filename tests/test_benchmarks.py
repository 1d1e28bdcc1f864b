"""The benchmarks run, and their tables have a line for every contestant.

What they measure is nobody's test."""
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .jobs import can_fork, forked

FOLDER = Path(__file__).parent/'benchmarks'


def said(main, script, words):
    """What a script prints when its `main` gets these words."""
    out, before = io.StringIO(), sys.argv
    sys.argv = [script, *words]
    try:
        with contextlib.redirect_stdout(out): main()
    finally: sys.argv = before
    return out.getvalue()


def run(script, options, folder, monkeypatch):
    """What a benchmark prints, run small, without peers, where no MNIST lies.

    The first contestant is measured in a new process, as always; the others in forks of this one,
    which spares them their imports."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv('AD_COURSE_DATA', str(folder))
    bench, main = (importlib.import_module(name) for name in ('bench', script.removesuffix('.py')))
    for name in ('ae', 'achc', 'baselines', 'fanogan', 'feature_maps', 'ganomaly'):
        importlib.import_module(f'ad_course.{name}')
    in_new_process, new, in_forks = bench.in_a_process_of_its_own, [], []
    def measured(*args, **options):
        if not new or not can_fork():
            new.append(args)
            return in_new_process(*args, **options)
        in_forks.append(args)
        script, *who = args
        answer = forked(lambda: said(main.main, script, bench.words(*who, **options)))
        return json.loads(answer.splitlines()[-1])
    monkeypatch.setattr(bench, 'in_a_process_of_its_own', measured)
    out = said(main.main, script, [*options.split(), '--no-peers'])
    assert new and (in_forks or not can_fork())
    return out


def rows(out):
    """The cells of a table, line by line."""
    lines = [line.strip('|') for line in out.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.split('|')] for line in lines]


@pytest.mark.slow
def test_train_ae(tmp_path, monkeypatch):
    """On the made-up images: everybody learns, and nobody is left out unseen."""
    out = run('train_ae.py', '--images 64 --epochs 1 --rounds 1 --threads 1', tmp_path,
              monkeypatch)
    head, _, *lines = rows(out)
    assert head == ['threads', 'contestant', 's an epoch, median', 'min', 'ratio', 'whole fit, s',
                    'its CPU s, min', 'peak, MiB', 'AUROC']
    names = {line[1] for line in lines}
    expected = {'plain loop, our networks', 'ours, float32', 'plain loop, plain autoencoder',
                'plain loop, our MLP', 'ours, MLP'}
    assert expected <= names <= expected | {'ours, bfloat16'}
    assert ('ours, bfloat16' in names) != ('left out, this processor' in out)
    for threads, name, median, least, ratio, *_, auroc in lines:
        assert threads == '1' and 0 < float(least) <= float(median) and 0 <= float(auroc) <= 1
        if name in ('plain loop, our networks', 'plain loop, our MLP'): assert ratio == '1.00'
    assert 'surfaces of 28x28' in out and re.search(r': 64 images, batches of 128', out)


# Where the processor computes in bfloat16 is not the question: here it does not.
PRESENT = f'''
import argparse, sys
sys.path.insert(0, {str(FOLDER)!r})
import train_ae
train_ae.has_bfloat16 = lambda: False
print(list(train_ae.present(argparse.Namespace(no_peers=False))))
'''


def test_a_missing_peer_is_named(tmp_path):
    """Run where pyod cannot be imported, the benchmark says how to install it."""
    (tmp_path/'pyod.py').write_text('raise ImportError("hidden")')
    done = subprocess.run([sys.executable, '-c', PRESENT], capture_output=True, text=True,
                          timeout=60, env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    said, last = done.stdout, done.stdout.splitlines()[-1:]
    for words in ('PyOD AutoEncoder: left out', "pip install -e '.[peers]'", 'this processor'):
        assert words in said, done.stderr
    assert 'ours, bfloat16' not in last[0] and 'PyOD' not in last[0]


@pytest.mark.slow
def test_train_deepsvdd(tmp_path, monkeypatch):
    """On the made-up images: a line for every contestant."""
    out = run('train_deepsvdd.py', '--digits 2 --images 64 --epochs 2 --rounds 1', tmp_path,
              monkeypatch)
    head, _, *lines = rows(out)
    assert head == ['contestant', 'its CPU s, min', 'ratio', 'whole fit, s, median', 'peak, MiB',
                    'AUROC 2']
    assert {line[0] for line in lines} == {
        'plain loop, our network', 'ours', 'ours, ACHC', 'plain loop, no warm start',
        'ours, no warm start', "ours, PyOD's layers", 'PCA, 30 components'}
    for _, cpu, *_, auroc in lines: assert float(cpu) >= 0 and 0 <= float(auroc) <= 1


@pytest.mark.slow
def test_train_gans(tmp_path, monkeypatch):
    """A line for every contestant; on the digits the loops train what `fit` trains."""
    out = run('train_gans.py', '--images 80 --epochs 2 --rounds 1', tmp_path, monkeypatch)
    head, _, *lines = rows(out)
    assert head == ['task', 'contestant', 'ms a batch, median', 'min', 'ratio', "of the encoder's",
                    'ratio', 'CPU s of fit, min', 'ratio', 'peak, MiB', 'AUROC']
    names = [f'{method}, {who}' for method in ('f-AnoGAN', 'GANomaly')
             for who in ('plain loop', 'ours')]
    assert [line[:2] for line in lines] == [[t, n] for t in ('digits', 'images') for n in names]
    for _, name, median, least, ratio, encoder, *_, auroc in lines:
        assert 0 < float(least) <= float(median) and 0 <= float(auroc) <= 1
        assert bool(encoder) == name.startswith('f-AnoGAN')
        if 'plain' in name: assert ratio == '1.00'
    differences = dict(re.findall(r'([\w-]+ on \w+): ([\d.e+-]+)', out))
    assert len(differences) == 4
    for which, most in differences.items():   # with batch normalization rounding grows
        if 'digits' in which: assert float(most) < 1e-3, which


def test_make_cutmix(monkeypatch):
    """A line for each size."""
    monkeypatch.syspath_prepend(str(FOLDER))
    main = importlib.import_module('make_cutmix').main
    words = '--images 4 --sizes 16 24 --rounds 1'.split()
    head, _, *lines = rows(said(main, 'make_cutmix.py', words))
    assert head[:3] == ['size', 'ours, images a second', 'PIL, to a batch'] and len(head) == 6
    assert [line[0] for line in lines] == ['16', '24']
    assert all(float(cell) > 0 for line in lines for cell in line[1:3])


def test_look(tmp_path, monkeypatch):
    """Ours and the plain loops see the same, and each has a line."""
    out = run('look.py', '--images 3 --sizes 32 --rounds 1', tmp_path, monkeypatch)
    head, _, *lines = rows(out)
    assert head[:5] == ['pixels', 'contestant', 'images a second', 'best', 'ratio']
    assert [line[1] for line in lines] == ['features, plain timm', 'features, ours',
                                           'maps, plain timm', 'maps, ours']
    answers = [float(line[-1]) for line in lines]
    assert answers[0] == pytest.approx(answers[1], rel=1e-3) and answers[0] > 0
    assert answers[2] == pytest.approx(answers[3], rel=1e-3) and answers[2] > 0
