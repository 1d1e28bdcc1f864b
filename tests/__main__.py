"""Everything that is to be proven, on all cores.   python -m tests [--fast] [NOTEBOOK ...]

  sync       notebooks, package and README agree (a copy is compared), or nothing else is run
  notebooks  every notebook as nbdev_test runs it, and its cells for a GPU, shrunk
  tests      what cuts across chapters: the files of tests/, by pytest

With notebooks named, only these, the tests of their modules, and the notebooks and tests of what
imports those modules. --fast leaves out the notebooks and the tests marked slow. A notebook or a
file in which nothing ran has failed."""
import argparse
import json
import os
import sys
import time
from pathlib import Path

from . import jobs, pool
from .project import QUIET, ROOT, notebook_paths, settings
from .scope import concerned, expected_seconds

SLOWEST = 12


def listed(root=ROOT, fast=False, only=()):
    """The jobs: sync first, then the longest first, so that no core is idle at the end."""
    root = Path(root)
    books, files = notebook_paths(root), sorted((root/'tests').glob('test_*.py'))
    if not books: raise SystemExit('FAILED: there is no notebook to test')
    if not files: raise SystemExit('FAILED: there is no file of tests')
    if left_out := set(books) - set(of_nbdev(root)):
        names = sorted(p.name for p in left_out)
        raise SystemExit(f'FAILED: nbdev_test would not run {names} (a .notest file?)')
    words = {}
    if only: books, files, words = concerned(only, root)

    def of_notebook(path):
        return pool.Job(path.relative_to(root).as_posix(), jobs.notebook, (str(path), str(root)))

    def of_tests(path):
        name, options = path.relative_to(root).as_posix(), []
        if fast: options = ['-m', 'not slow']
        elif path in words: options = ['-k', words[path]]
        return pool.Job(name, jobs.tests, (name, options, str(root)))

    found = [] if fast else [of_notebook(p) for p in books]
    found += [of_tests(p) for p in files]
    longest_first = sorted(found, key=lambda job: -expected_seconds(job.name))
    return [pool.Job('sync', jobs.sync, (str(root),)), *longest_first]


def of_nbdev(root=ROOT):
    """The notebooks that the command nbdev_test would run."""
    from nbdev.doclinks import nbglob
    from nbdev.test import _keep_file
    found = nbglob(Path(root)/settings(root)['nbs_path'], as_path=True)
    return [p.absolute() for p in found if _keep_file(p, '.notest')]


def prove(found, say=print, workers=None):
    """Runs the jobs, says how each ended, returns what they found; a sync that fails ends all."""
    total = dict(passed=[], failed=[], skipped={}, parts={}, jobs={})
    for done in pool.run(found, workers):
        name, value = done.job.name, done.value
        if value is None:
            value = dict(passed=[], failed=[f'{name}: {done.why}'], skipped={}, parts={})
        if not (value['passed'] or value['failed'] or value['skipped']):
            say(f'{done.seconds:7.1f} s  {name}: nothing of it was asked for')
        else:
            counts = ', '.join(f'{len(value[k])} {k}' for k in jobs.NAMES if value[k])
            say(f'{done.seconds:7.1f} s  {name}: {counts}')
        if value['failed']:
            failed = f'{done.why or "failed"}: {", ".join(value["failed"])}'
            say(f'---- {name}\n{done.said.strip()}\n---- {failed}\n')
        for key in ('passed', 'failed'): total[key] += value[key]
        for key in ('skipped', 'parts'): total[key] |= value[key]
        total['jobs'][name] = done.cpu
        if name == 'sync' and value['failed']: break
    return total


def summary(total, seconds, say=print):
    """The last lines; whether all went well."""
    reasons, cpu = {}, sum(total['jobs'].values())
    for name, why in total['skipped'].items(): reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        more = f' and {len(names) - 1} more' if len(names) > 1 else ''
        say(f'skipped: {names[0]}{more}: {why}')
    slowest = sorted(total['parts'].items(), key=lambda part: -part[1])[:SLOWEST]
    say(f'\nthe slowest parts, in seconds of the processor (of {cpu:.0f} in all):')
    for name, spent in slowest: say(f'{spent:7.1f} s  {name}')
    books = sum(name.endswith('.ipynb') for name in total['passed'])
    ran = bool(total['passed']) and not total['failed']
    say(f'\n{"PASSED" if ran else "FAILED"} in {seconds:.0f} s; {books} notebooks ran.')
    for name in total['failed']: say(f'  failed: {name}')
    say(', '.join(f'{len(total[key])} {key}' for key in jobs.NAMES))
    return ran


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog='python -m tests', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fast', action='store_true',
                        help='leave out the notebooks and the slow tests')
    parser.add_argument('--workers', type=int,
                        help='how many jobs at once (the cores of the machine)')
    parser.add_argument('--times',
                        help='a file, .md or .json, for the seconds that everything took')
    parser.add_argument('only', nargs='*', metavar='NOTEBOOK',
                        help='only this notebook and what imports it')
    args = parser.parse_args()
    os.environ.update(QUIET, PYTHONWARNINGS='ignore::DeprecationWarning')
    began = time.time()
    say = lambda text: print(text, flush=True)
    total = prove(listed(fast=args.fast, only=args.only), say, args.workers)
    well = summary(total, time.time() - began)
    if args.times:
        Path(args.times).write_text(times(total, args.times.endswith('.json')), encoding='utf8')
    sys.exit(not well)


def times(total, as_json):
    """Seconds of the processor of every job as JSON; or as Markdown, with every cell and test.

    Of cells and tests only those above a fifth of a second."""
    if as_json:
        rounded = {name: round(cpu) for name, cpu in sorted(total['jobs'].items())}
        return json.dumps(rounded, indent=0) + '\n'
    longest = lambda found: sorted(found.items(), key=lambda item: -item[1])
    parts = {name: cpu for name, cpu in total['parts'].items() if cpu > .2}
    rows = [f'| {name} | {cpu:.1f} |' for found in (total['jobs'], parts)
            for name, cpu in longest(found)]
    return '\n'.join(['| notebook, file, cell or test | CPU s |', '|:--|--:|', *rows]) + '\n'


if __name__ == '__main__':
    for stream in (sys.stdout, sys.stderr): stream.reconfigure(encoding='utf8', errors='replace')
    main()
