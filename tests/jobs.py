"""What is proven, a job at a time: a notebook, a file of tests, or that all agree with each other.

Each function runs in a process of its own (tests/pool.py) and returns a dict: `passed`, `failed`
and `skipped` hold names, with a reason where there is one, and `parts` says which cells or tests
took how many seconds of the processor."""
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

from . import smoke
from .pool import processor_time
from .project import ROOT, Notebook, notebook_paths

NAMES = ('passed', 'failed', 'skipped')


def sync(root=ROOT):
    """nbdev_clean, nbdev_export and the README would change no file."""
    from .sync import ADVICE, differences
    found = differences(Path(root))
    for name, reason in found.items(): print(f'{name}\n    ' + reason.replace('\n', '\n    '))
    if found: print(f'out of sync: {", ".join(found)}. To make them agree, {ADVICE}.')
    return dict(passed=[] if found else ['sync'], failed=list(found), skipped={}, parts={})


def forked(work, *args):
    """What `work` returns, as JSON, from a fork of this process.

    The fork sees all that is here and changes nothing of it."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    if not (child := os.fork()):
        try:
            os.close(reader)
            with open(writer, 'w', encoding='utf8') as out: json.dump(work(*args), out)
            os._exit(0)
        except BaseException as e:
            print(f'{type(e).__name__}: {e}', flush=True)
            os._exit(1)
    os.close(writer)
    with open(reader, encoding='utf8') as answer: said = answer.read()
    _, status = os.waitpid(child, 0)
    if said and not status: return json.loads(said)
    return dict(error=f'ended without a word (status {status})', cell=-1, ran=[], seconds={})


def can_fork():
    """Whether cells for a GPU can run in a fork of their notebook.

    Not where there is a GPU: CUDA does not survive a fork."""
    if not hasattr(os, 'fork') or sys.platform == 'darwin': return False
    import torch
    return not torch.cuda.is_available()


def watched(path, root, seen):
    """nbdev's shell for notebooks, which notes the cells that ran.

    It runs those for a GPU, shrunk, beside them: each in a fork, where all that it needs is there
    and changes nothing of the notebook's own run."""
    from nbdev import test
    notebook = Notebook(path, root)
    plan = smoke.forks(notebook) if can_fork() else {}

    class Shell(test.CaptureShell):
        def run_all(self, nb, exc_stop=False, preproc=None, **kwargs):
            def before(cell):
                if (only := plan.pop(cell.idx_, None)) is not None:
                    seen['smoke'].append(forked(smoke.beside, self, nb, notebook, only))
                left_out = preproc(cell)
                seen['since'] = processor_time()
                return left_out
            def after(cell):
                if cell.cell_type == 'code':
                    seen['cells'][cell.idx_] = processor_time() - seen['since']
            return super().run_all(nb, exc_stop=exc_stop, preproc=before, postproc=after, **kwargs)
    return Shell


def notebook(path, root=ROOT):
    """A notebook as nbdev_test runs it.

    In the same run, beside it and shrunk, its cells for a GPU or for long minutes."""
    from fastcore.xtras import working_directory
    from nbdev import test
    from nbdev.config import get_config
    path, root = Path(path), Path(root)
    nb, seen = Notebook(path, root), dict(cells={}, smoke=[], since=0.)
    name, out = nb.name, dict(passed=[], failed=[], skipped={}, parts={})
    with working_directory(root):
        config = get_config(path=root)
        test.CaptureShell = watched(path, root, seen)
        sys.path.insert(0, str(root))
        ok, _ = test.test_nb(path, skip_flags=config.tst_flags.split(), showerr=True, basepath=root)
    expected = {c.index for c in nb.code_cells if c.runs()}
    if ok and (missed := expected - seen['cells'].keys()):
        print(f'cells {sorted(missed)} did not run (skip_exec, or another kernel?)')
        ok = False
    out['passed' if ok else 'failed'].append(name)
    out['parts'] = {f'{name} cell {k}': s for k, s in seen['cells'].items()}
    if ok and smoke.flagged(nb):
        result = smoke.together(seen['smoke']) if seen['smoke'] else dict(error='no fork')
        if result['error'] and not result.get('missing_data'): result = smoke.apart(path)
        shrunk(nb, result, out)
    return out


def shrunk(nb, result, out):
    """Adds to `out` what became of the cells for a GPU, run shrunk."""
    name = f'{nb.name}, cells for a GPU, shrunk'
    missed = {c.index for c in smoke.flagged(nb)} - set(result.get('ran', []))
    out['parts'] |= {f'{nb.name} cell {k}, shrunk': s for k, s in result.get('seconds', {}).items()}
    if result.get('missing_data') and not os.environ.get('AD_COURSE_NEED_DATA'):
        out['skipped'][name] = result['error'][:300]
    elif result.get('error') or missed:
        error = result.get('error', f'{missed} did not run')
        print(f"{name}: cell {result.get('cell')}: {error}\n\n{result.get('source', '')}")
        out['failed'].append(name)
    else: out['passed'].append(name)


class Tally:
    """A plugin of pytest that counts, and measures each test.

    With the fixtures that it was the first to need."""
    def __init__(self): self.out = dict(passed=[], failed=[], skipped={}, parts={})

    def pytest_runtest_logstart(self, nodeid): self.since = processor_time()
    def pytest_runtest_logfinish(self, nodeid):
        self.out['parts'][nodeid] = processor_time() - self.since

    def pytest_runtest_logreport(self, report):
        name = report.nodeid
        if report.failed and name not in self.out['failed']: self.out['failed'].append(name)
        if report.skipped:
            where_and_why = report.longrepr   # (file, line, reason), or text
            if isinstance(where_and_why, tuple): where_and_why = where_and_why[2]
            self.out['skipped'][name] = str(where_and_why)
        if report.passed and report.when == 'call': self.out['passed'].append(name)

    def pytest_collectreport(self, report):
        if report.failed: self.out['failed'].append(report.nodeid)
        if report.skipped: self.out['skipped'][report.nodeid] = str(report.longrepr)


def tests(file, arguments=(), root=ROOT):
    """pytest over one file; a file in which nothing ran has failed."""
    import pytest
    os.chdir(root)
    sys.path.insert(0, str(root))
    tally = Tally()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = ['-q', '-p', 'no:cacheprovider', f'--basetemp={Path(folder)/"t"}', '--no-header',
                   *arguments]
        code = pytest.main([file, *options], plugins=[tally])
    out = tally.out
    # A test that passed and whose fixture then failed counts as failed only.
    out['passed'] = [n for n in out['passed'] if n not in out['failed']]
    if code == pytest.ExitCode.NO_TESTS_COLLECTED and arguments: return out
    if code and not out['failed']:
        out['failed'].append(f'{file}: {pytest.ExitCode(code).name.lower().replace("_", " ")}')
    return out
