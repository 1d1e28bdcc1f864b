"""What the benchmarks share: data, a measurement in a process of its own, the rounds, the table.

The contestants take turns, round by round, so that a busy minute hits all alike."""
import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- one measurement
def mnist_task(digit):
    """MNIST where it lies, one digit normal; else None."""
    from ad_course.datasets import data_root, mnist
    return mnist(normal=digit) if (data_root()/'MNIST').exists() else None


def made_up(n, seed=0):
    """(task, what it is): surfaces of the size of MNIST's images."""
    from ad_course.surfaces import surfaces
    task = surfaces(n, 200, size=28, seed=seed)
    return task, 'surfaces of 28x28 (MNIST is not in AD_COURSE_DATA)'


def as_floats(x):
    """Images as float32 in [0, 1]."""
    return (x / 255 if x.dtype == 'uint8' else x).astype('float32')


def flat(images):
    """Images as rows, for those that know no images: (n, c, h, w) -> (n, c h w)."""
    return images.reshape(len(images), -1)


def forget_peak():
    """Gives back what the process does not use; from here on its peak counts anew (on Linux)."""
    gc.collect()
    try:
        ctypes.CDLL('libc.so.6').malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')
    except OSError: pass


def peak():
    """The largest resident size of this process so far, in MiB; NaN on Windows."""
    try: import resource
    except ImportError: return float('nan')
    unit = 2**20 if sys.platform == 'darwin' else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measured(train, x, epochs, few):
    """What `train(images, epochs)` returns, and its whole and cpu seconds, its memory in MiB."""
    forget_peak()
    before = peak()
    train(x[:few], 1)       # warm-up: kernels are chosen and buffers made at the first use
    start, cpu = time.perf_counter(), time.process_time()
    found = train(x, epochs)
    whole, cpu = time.perf_counter() - start, time.process_time() - cpu
    return found, dict(whole=whole, cpu=cpu, memory=peak() - before)


# ---------------------------------------------------------------- the rounds and the table
def arguments(description, **defaults):
    """A parser of the command line with what all benchmarks ask for."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    parser.add_argument('--rounds', type=int, help='measurements of each contestant')
    parser.add_argument('--no-peers', action='store_true', help='leave the other libraries out')
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    return parser


def words(contestant, threads, **options):
    """The command line that measures a contestant, with these options, `None` left out."""
    given = {'threads': threads, **{k: v for k, v in options.items() if v is not None}}
    pairs = [word for key, value in given.items() for word in (f'--{key}', str(value))]
    return ['--measure', contestant, *pairs]


def in_a_process_of_its_own(script, contestant, threads, **options):
    """What `script --measure contestant` prints."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=path, CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, script, *words(contestant, threads, **options)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode: raise SystemExit(f'{contestant} failed:\n{done.stderr}')
    return json.loads(done.stdout.splitlines()[-1])


def without_missing(contestants, peers, no_peers):
    """The contestants without the peers that are not wanted, or not installed: then with a line.

    peers: name -> (its module, how to install it)."""
    out = dict(contestants)
    for name, (module, install) in peers.items():
        command = [sys.executable, '-c', f'import {module}']
        if not no_peers:
            if not subprocess.run(command, capture_output=True).returncode: continue
            print(f'{name}: left out, it is not installed ({install})')
        del out[name]
    return out


def rounds(n, keys, measure, describe):
    """Key -> its n measurements. describe: a measurement -> what is said of it meanwhile."""
    results = {key: [] for key in keys}
    for turn in range(n):
        for key in results:
            found = measure(*key)
            results[key].append(found)
            said = f'round {turn + 1}, {", ".join(map(str, key))}: {describe(found)}'
            print(said, file=sys.stderr, flush=True)
    return results


def median(found, key):
    """The median of one number in several measurements."""
    return statistics.median(m[key] for m in found)


def markdown(head, rows, left=1):
    """A table; the column number `left` holds text, the others numbers."""
    rule = [':--' if i == left else '--:' for i in range(len(head))]
    line = lambda cells: f'| {" | ".join(map(str, cells))} |'
    return '\n'.join([line(head), f'|{"|".join(rule)}|', *map(line, rows)])
