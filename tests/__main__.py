"""Everything that is to be proven, in order, stopping at the first stage that fails.   python -m tests [--fast]

  sync       notebooks, package and README agree (nothing is changed: a copy is compared)
  notebooks  nbdev_test runs every notebook, as users run it
  pytest     what cuts across chapters

--fast leaves out the notebooks and the tests marked slow. A stage in which nothing ran has failed."""
import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from .project import QUIET, ROOT, command, environment, notebook_paths
from .sync import ADVICE, differences


SAID = re.compile(r'(Starting|- Completed) (\S.*?\.ipynb)')


class Failed(Exception):
    """A stage did not pass; says what to look at."""


def sync(root=ROOT):
    """nbdev_clean, nbdev_export and the README would change no file."""
    found = differences(root)
    for name, reason in found.items(): print(f'{name}\n    ' + reason.replace('\n', '\n    '))
    if found: raise Failed(f'out of sync: {", ".join(found)}. To make them agree, {ADVICE}.')
    return f'{len(notebook_paths(root))} notebooks in sync'


def kill(process):
    """Ends a process and those that it started."""
    if os.name == 'posix': os.killpg(process.pid, signal.SIGKILL)
    else: subprocess.run(['taskkill', '/F', '/T', '/PID', str(process.pid)], capture_output=True)


def notebooks(root=ROOT, limit=3600):
    """`nbdev_test` over all notebooks, each once; its output is watched, because it succeeds also where it ran none."""
    expected = {p.relative_to(root).as_posix() for p in notebook_paths(root)}
    if not expected: raise Failed('there is no notebook to test')
    args = [command('nbdev_test'), '--n_workers', '2', '--do_print', '--timing']
    print('$ nbdev_test', *args[1:], flush=True)
    process = subprocess.Popen(args, cwd=root, text=True, encoding='utf8', errors='replace', stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=environment(**QUIET, PYTHONWARNINGS='ignore::DeprecationWarning'), start_new_session=True)
    late = threading.Event()
    clock = threading.Timer(limit, lambda: (late.set(), kill(process)))
    clock.start()
    begun, seconds = {}, {}
    try:
        for line in process.stdout:
            # The workers write to one pipe, and a line may hold the words of both.
            for word, path in SAID.findall(line):
                name = Path(path).resolve().relative_to(root.resolve()).as_posix()
                if word == 'Starting': begun[name] = time.time(); continue
                seconds[name] = time.time() - begun[name]
                print(f'{seconds[name]:7.1f} s  {name}', flush=True)
            # --timing says the same at the end, in whole seconds
            rest = SAID.sub('', line)
            if rest.strip() and not re.match(r'\S+\.ipynb: \d+ secs\s*$', rest): print(rest, end='', flush=True)
        code = process.wait()
    except BaseException:
        if process.poll() is None: kill(process)
        raise
    finally: clock.cancel()
    if late.is_set(): raise Failed(f'nbdev_test was stopped after {limit} s; unfinished: {sorted(begun.keys() - seconds.keys())}')
    if code: raise Failed('nbdev_test failed; it names the notebooks above')
    if missed := expected - begun.keys(): raise Failed(f'nbdev_test did not run {sorted(missed)} (a .notest file, skip_exec, or another kernel?)')
    return f'{len(begun)} notebooks ran'


def tests(root=ROOT, fast=False):
    """pytest over tests/; at least one test must have passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/'report.xml'
        args = [sys.executable, '-m', 'pytest', 'tests', '-ra', '--durations=10', '--durations-min=5', f'--junitxml={report}']
        if fast: args += ['-m', 'not slow']
        print('$ pytest tests', *args[8:], flush=True)
        code = subprocess.run(args, cwd=root, env=environment(**QUIET)).returncode
        if code: raise Failed({5: 'pytest found no test'}.get(code, 'pytest failed; it names the tests above'))
        suite = ET.parse(report).getroot().find('testsuite')
        count, skipped = int(suite.get('tests')), int(suite.get('skipped'))
    if count == skipped: raise Failed('every test was skipped')
    return f'{count - skipped} tests passed' + (f', {skipped} skipped' if skipped else '')


def main():
    """Runs the stages and prints a plain summary as the last line."""
    parser = argparse.ArgumentParser(prog='python -m tests', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fast', action='store_true', help='leave out the notebooks and the slow tests')
    fast = parser.parse_args().fast
    stages = [('sync', sync)] + ([] if fast else [('notebooks', notebooks)]) + [('pytest', lambda: tests(fast=fast))]
    began, done = time.time(), []
    for name, stage in stages:
        print(f'\n== {name} ==', flush=True)
        start = time.time()
        try: done.append(stage())
        except (Failed, RuntimeError, OSError, ValueError) as e:
            print(f'-- {name} failed after {time.time() - start:.0f} s', flush=True)
            sys.exit(f'\nFAILED in {name}: {e}')
        print(f'-- {name} passed in {time.time() - start:.0f} s', flush=True)
    print(f'\nPASSED in {time.time() - began:.0f} s: ' + '; '.join(done) + '.')


if __name__ == '__main__':
    for stream in (sys.stdout, sys.stderr): stream.reconfigure(encoding='utf8', errors='replace')
    main()
