"""The runner of cells for a GPU or for long minutes (`#| cuda`, `#| slow`), shrunk, on the CPU.

`python -m tests` runs those of every notebook, in a fork of the notebook's own run."""
import ast
import json
import subprocess
import sys

import pytest
import torch

from ad_course import datasets
from .project import QUIET, ROOT, Notebook, environment, notebooks, write_notebook
from .smoke import SHRUNK, forks, names, needed, reading, together


def smoke(path):
    """What `python -m tests.smoke` says of a notebook, run in a process of its own."""
    done = subprocess.run([sys.executable, '-m', 'tests.smoke', str(path)], cwd=ROOT, text=True,
                          capture_output=True, encoding='utf8', timeout=600,
                          env=environment(**QUIET, **SHRUNK))
    said = done.stdout.strip()
    assert said, f'{path} ended without a word (exit {done.returncode}):\n{done.stderr[-3000:]}'
    return done.returncode, json.loads(said.splitlines()[-1])


def test_runner_runs_the_flagged_cell_and_what_it_needs_alone(tmp_path):
    flagged = '#| cuda\nassert a == [1, 2] and os.environ["AD_COURSE_SMOKE"] == "1"'
    nb = write_notebook(tmp_path/'a.ipynb', 'import os', 'a = [1]', 'b = 1/0', 'a.append(2)',
                        '#| eval: false\nraise SystemExit', flagged, '#| notest\n1/0')
    code, result = smoke(nb)
    assert code == 0 and result['ran'] == [0, 1, 3, 5] and result['targets'] == [5]


@pytest.mark.parametrize('flag', ['cuda', 'slow'])
def test_runner_fails_where_the_flagged_cell_fails(tmp_path, flag):
    nb = write_notebook(tmp_path/'a.ipynb', 'a = 1', f'#| {flag}\nraise ValueError("rotten")')
    code, result = smoke(nb)
    assert code == 1 and result['cell'] == 1 and 'rotten' in result['error']


def test_runner_runs_the_whole_notebook_where_reading_it_was_too_short(tmp_path):
    sets, reads = 'globals()["hidden"] = 3', '#| slow\nassert hidden == 3'
    nb = write_notebook(tmp_path/'a.ipynb', sets, reads)
    code, result = smoke(nb)
    assert code == 0 and result['ran'] == [0, 1] and 'hidden' in result['whole']


def test_no_gpu_is_visible_to_the_runner(tmp_path):
    looks = '#| cuda\nassert not torch.cuda.is_available()'
    code, result = smoke(write_notebook(tmp_path/'a.ipynb', 'import torch', looks))
    assert code == 0, result


@pytest.mark.parametrize('code, before, called', [
    ('a = 1\nb = a', '', ''), ('a = a + 1', 'a', ''), ('a += 1', 'a', ''), ('d["k"] = 1', 'd', ''),
    ('for k in ks: b = k\nc = b', 'ks b', ''), ('if t: b = 1\nc = b', 't b', ''),
    ('for k in ks:\n    b = k\n    c = b', 'ks', ''), ('[k for k in ks]', 'ks', ''),
    ('with o as f: b = f\nc = b', 'o f b', ''), ('f = lambda k, d=d: k + g', 'd', 'g'),
    ('def f(a, b=d):\n    c = a\n    return c + g', 'd', 'g'),
    ('class A(B):\n    x = y\n    def f(self): return z', 'B', 'y z')])
def test_what_a_cell_reads_from_before_it_and_what_when_called(code, before, called):
    found_before, found_called, _ = reading(ast.parse(code).body)
    assert (found_before, found_called) == (set(before.split()), set(called.split()))


@pytest.mark.parametrize('cells, wanted', [
    (['a = slow()', 'a = 1', '#| slow\na'], [1, 2]),                     # set anew
    (['a = slow()', 'a = [1]', 'a.append(2)', '#| slow\na'], [1, 2, 3]),   # and changed since
    (['a = 1', 'if a: a = 2', '#| slow\na'], [0, 1, 2]),                 # perhaps
    (['a = 1', 'a = a + 1', '#| slow\na'], [0, 1, 2]),
    (['for k in range(9): k', '#| slow\nfor k in range(3): k'], [1]),    # a loop's own name
    (['a = 1', 'def f(): return a', 'a = 2', '#| slow\nf()', 'a = 3', '#| slow\nf()'],
     [0, 1, 2, 3, 4, 5]),                                               # whenever it is called
    (['a = 1', '#| slow\na', 'a = 2', 'b = a', '#| slow\nb = 3'], [0, 1, 4])])
def test_what_flagged_cells_need(tmp_path, cells, wanted):
    notebook = Notebook(write_notebook(tmp_path/'a.ipynb', *cells), tmp_path)
    assert sorted(needed(notebook)) == wanted


@pytest.mark.parametrize('cells, plan', [
    (['x = 1', '#| slow\na = x', 'y = 2', '#| cuda\nb = x'], {1: [1, 3]}),
    (['#| slow\na = 1', 'x = 2', '#| slow\nb = x', '#| slow\nx'], {0: [0], 2: [2, 3]}),
    (['#| slow\na = 1', 'x = 2', '#| slow\nb = x + a'], {0: [0], 2: [0, 2]}),
    (['#| slow\ndef f(): return x', 'x = 2', '#| slow\nf()'], {0: [0], 2: [0, 2]}),
    (['x = 1'], {})])
def test_where_the_run_of_a_notebook_forks(tmp_path, cells, plan):
    assert forks(Notebook(write_notebook(tmp_path/'a.ipynb', *cells), tmp_path)) == plan


def test_an_error_in_one_fork_is_the_verdict():
    well = dict(ran=[1, 2], seconds={1: 1., 2: 2.}, error=None)
    missing = dict(ran=[3], seconds={3: 1.}, error='no file', missing_data=True)
    bad = dict(ran=[2, 4], seconds={2: 1., 4: 0.}, error='rotten', missing_data=False)
    assert together([well, missing])['missing_data']
    worst = together([well, missing, bad])
    assert worst['error'] == 'rotten' and worst['ran'] == [1, 2, 3, 4]
    assert worst['seconds'] == {1: 1., 2: 3., 3: 1., 4: 0.} and not together([well])['error']


# ---------------------------------------------------------------- Run All
@pytest.fixture
def unasked(monkeypatch):
    """A student's environment without a GPU, in which nothing has been asked for."""
    for name in ('AD_COURSE_RUN', 'AD_COURSE_SMOKE'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    return monkeypatch


def run_all(*sources, teach=datasets._teach):
    """What the cells print, in a shell that has imported the course, and the error of one."""
    from execnb.shell import CaptureShell
    shell, said = CaptureShell(), []
    teach(shell)
    for source in ('from ad_course.datasets import when_asked', *sources):
        outputs = shell.run(source)
        said.append(''.join(t for o in outputs if 'text' in o for t in o['text']))
    return said[1:], shell.exc


CELL = "#| {0}\n# why it is long\nwhen_asked('{0}')\nx = 1\nprint('ran')"


@pytest.mark.parametrize('flag', ['slow', 'cuda'])
def test_run_all_passes_over_what_nobody_asked_for(unasked, flag):
    (said, after), error = run_all(CELL.format(flag), "print('on', 'x' in globals())")
    assert error is None and after == 'on False\n', 'the cells below are still to run'
    assert said.count('\n') == 1 and f'%env AD_COURSE_RUN={flag} ' in said and 'ran' not in said


@pytest.mark.parametrize('asked, ran', [
    ('slow', ['slow']), ('cuda', ['cuda']), ('slow cuda', ['slow', 'cuda']),
    ('cuda,slow', ['slow', 'cuda']), ('', [])])
def test_a_student_asks_in_a_cell_or_in_the_environment(unasked, asked, ran):
    cells = [CELL.format(flag) for flag in ('slow', 'cuda')]
    unasked.setenv('AD_COURSE_RUN', asked)
    outside, _ = run_all(*cells)
    unasked.setenv('AD_COURSE_RUN', '')
    (_, *inside), _ = run_all(f'%env AD_COURSE_RUN={asked or None}' if asked else 'pass', *cells)
    assert outside == inside
    assert [f for f, s in zip(('slow', 'cuda'), inside) if s == 'ran\n'] == ran


def test_a_gpu_asks_for_its_cells_and_a_shrunk_run_for_all(unasked):
    cells = [CELL.format(flag) for flag in ('slow', 'cuda')]
    unasked.setattr(torch.cuda, 'is_available', lambda: True)
    assert [s == 'ran\n' for s in run_all(*cells)[0]] == [False, True]
    unasked.setattr(torch.cuda, 'is_available', lambda: False)
    unasked.setenv('AD_COURSE_SMOKE', '1')
    assert run_all(*cells)[0] == ['ran\n', 'ran\n']


def test_a_second_wish_keeps_the_first(unasked):
    unasked.setenv('AD_COURSE_RUN', 'cuda')
    assert 'AD_COURSE_RUN=cuda slow ' in run_all(CELL.format('slow'))[0][0]


@pytest.mark.parametrize('variable, flag, what', [
    ('slwo', 'slow', 'AD_COURSE_RUN must be .*got slwo'), ('', 'fast', 'flag must be .*got fast')])
def test_a_misspelled_wish_is_an_error(unasked, variable, flag, what):
    unasked.setenv('AD_COURSE_RUN', variable)
    (said,), error = run_all(CELL.format(flag))
    with pytest.raises(ValueError, match=what): raise error
    assert 'ran' not in said.splitlines()


def test_other_cells_and_programs_are_left_alone(unasked):
    cells = "print(1)", "def f():\n    when_asked('slow')\n    print(2)\nf()", '#| slow\nprint(3)'
    assert run_all(*cells)[0] == ['1\n', '2\n', '3\n']
    assert run_all(CELL.format('slow'), teach=lambda shell: None)[0] == ['ran\n']
    datasets._teach(None)


def test_a_shell_is_taught_once():
    from execnb.shell import CaptureShell
    shell = CaptureShell()
    before = len(shell.ast_transformers)
    for _ in range(3): datasets._teach(shell)
    assert len(shell.ast_transformers) == before + 1


def test_in_a_kernel_importing_the_course_is_enough(unasked, tmp_path):
    import nbformat
    from nbclient import NotebookClient
    path = write_notebook(tmp_path/'a.ipynb', 'from ad_course.datasets import when_asked',
                          CELL.format('slow'), "print('after')")
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=120, kernel_name='python3').execute(
        env=environment(**QUIET, AD_COURSE_RUN=None, AD_COURSE_SMOKE=None, CUDA_VISIBLE_DEVICES=''))
    passed_over, after = (''.join(o['text'] for o in c.outputs) for c in nb.cells[1:])
    assert 'Passed over' in passed_over and 'ran' not in passed_over and after == 'after\n'


each_notebook = pytest.mark.parametrize('notebook', notebooks(), ids=str)


@each_notebook
def test_cells_with_a_flag_wait_until_they_are_asked(notebook):
    for cell in notebook.code_cells:
        flag = next((f for f in ('cuda', 'slow') if f in cell.flags), None)
        first = cell.code.strip().partition('\n')[0]
        asks = first if first.startswith('when_asked(') else None
        assert asks == (flag and f"when_asked('{flag}')"), \
            f'{notebook}, {cell}: below `#| {flag}` comes `when_asked({flag!r})`, and only there'


def of_the_other(cells):
    """The names that a flagged cell reads, and that only cells with the other flag set."""
    have, by, found = set(), dict(slow=set(), cuda=set()), {}
    for cell in cells:
        sets, reads = names(cell.tree)
        flag = next((f for f in by if f in cell.flags), None)
        if flag is None and cell.evaluated: have |= sets
        if flag is None: continue
        lacks = (reads - sets - have - by[flag]) & (by['slow'] | by['cuda'])
        if lacks: found[cell.index] = lacks
        by[flag] |= sets
    return found


@each_notebook
def test_slow_cells_and_cells_for_a_gpu_do_not_need_each_other(notebook):
    """On a machine with a GPU the one kind runs and the other is passed over."""
    found = of_the_other(notebook.code_cells)
    assert not found, f'{notebook}: set in a cell without a flag what several need: {found}'


def test_what_only_the_other_kind_sets_is_seen(tmp_path):
    cells = 'a = 1', '#| slow\nb = a', '#| slow\nc = b', '#| cuda\nd = a + c', '#| slow\nd'
    nb = Notebook(write_notebook(tmp_path/'a.ipynb', *cells), tmp_path)
    assert of_the_other(nb.code_cells) == {3: {'c'}, 4: {'d'}}
