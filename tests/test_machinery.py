"""The machinery of `make test` and `make notebooks`, on tiny projects.

It must fail where something is wrong, and lose nothing."""
import json
import os
import shutil
import subprocess
import sys

import pytest

from . import __main__ as stages
from . import execute, jobs, scope, sync
from .project import (ROOT, Notebook, environment, notebook_paths, project_files, settings,
                      write_notebook)


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
    """A project of one notebook, in sync: only copies of it are used."""
    tmp_path = tmp_path_factory.mktemp('pristine')
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'ad_course').mkdir()
    (tmp_path/'ad_course'/'__init__.py').touch()
    one = '#| exports\ndef one():\n    "One."\n    return 1'
    write_notebook(tmp_path/'nbs'/'01_one.ipynb', '# One', '#| default_exp one', one,
                   'assert one() == 1', 'print(one())')
    write_notebook(tmp_path/'nbs'/'index.ipynb', '# Top', 'x = 1')
    (tmp_path/'tests').mkdir()
    (tmp_path/'tests'/'test_a.py').write_text('def test_a(): pass', encoding='utf8')
    sync.run_nbdev(tmp_path)
    sync.readme.write(tmp_path)
    return tmp_path


@pytest.fixture
def project(pristine, tmp_path):
    """A copy of that project, to be spoiled."""
    return shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)


def digests(root): return {p: p.read_bytes() for p in root.rglob('*') if p.is_file()}


def edit(path, old, new):
    text = path.read_text(encoding='utf8')
    path.write_text(text.replace(old, new), encoding='utf8')


# ---------------------------------------------------------------- sync
def test_in_sync_changes_nothing(project):
    before = digests(project)
    assert sync.differences(project) == {} and jobs.sync(project)['passed'] == ['sync']
    assert digests(project) == before


@pytest.mark.parametrize('name, old, new', [
    ('ad_course/one.py', 'return 1', 'return 2'),
    ('nbs/01_one.ipynb', 'return 1', 'return 3'),
    ('nbs/01_one.ipynb', '"execution_count": null', '"execution_count": 7'),
    ('README.md', 'Top', 'Bottom')])
def test_out_of_sync_is_named_and_nothing_is_lost(project, name, old, new, capsys):
    edit(project/name, old, new)
    before = digests(project)
    found = jobs.sync(project)
    assert digests(project) == before
    expected = 'ad_course/one.py' if 'return' in old else name
    assert found['failed'] == [expected] == list(sync.differences(project))
    assert expected in (said := capsys.readouterr().out) and 'make sync' in said


def test_a_module_that_was_never_exported_is_named(project):
    (project/'ad_course'/'one.py').unlink()
    assert sync.differences(project)['ad_course/one.py'] == 'would be new'


def test_line_ends_of_windows_are_no_difference(project):
    path = project/'ad_course'/'one.py'
    path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))
    assert sync.differences(project) == {}


CONFLICT = '{\n<<<<<<< HEAD\n "cells": []\n=======\n "cells": [1]\n>>>>>>> other\n}\n'


@pytest.mark.parametrize('text, why', [
    (CONFLICT, 'merge conflict in it, line 2'), (CONFLICT.replace('\n', '\r\n'), 'line 2'),
    ('{"cells": [', 'Expecting value'), ('', 'Expecting value'), ('[]', 'without a list of cells'),
    ('{"a": 1}', 'without a list of cells'), (b'{"cells": "\xff"}', 'codec')])
def test_a_damaged_notebook_is_named_and_nothing_is_touched(project, text, why):
    """Wherever notebooks are read: two damaged ones are both named."""
    bad = [project/'nbs'/f'0{i}_bad.ipynb' for i in (2, 3)]
    for path in bad: path.write_bytes(text if isinstance(text, bytes) else text.encode('utf8'))
    before = digests(project)
    for read in sync.differences, sync.run_nbdev, jobs.sync:
        with pytest.raises(ValueError, match=rf'nbs/02_bad.ipynb is .*{why}') as said:
            read(project)
        assert 'nbs/03_bad.ipynb is not a notebook' in str(said.value)
    with pytest.raises(ValueError, match=rf'02_bad.ipynb is .*{why}'): Notebook(bad[0], project)
    assert digests(project) == before


def test_sync_without_notebooks_has_failed(project):
    shutil.rmtree(project/'nbs')
    (project/'nbs').mkdir()
    with pytest.raises(RuntimeError, match='no notebook'): sync.differences(project)


# ---------------------------------------------------------------- jobs
def proven(project, *names, **options):
    """What `prove` finds for the jobs of a project whose names contain one of these words."""
    found = [job for job in stages.listed(project, **options) if any(n in job.name for n in names)]
    return stages.prove(found, workers=2)


def test_notebooks_run_once_and_are_counted(project, capsys):
    total = proven(project, 'ipynb')
    assert sorted(total['passed']) == ['nbs/01_one.ipynb', 'nbs/index.ipynb']
    assert not total['failed']
    said = capsys.readouterr().out
    assert said.count('nbs/01_one.ipynb: 1 passed') == 1


def test_a_failing_notebook_fails_and_is_named(project, capsys):
    write_notebook(project/'nbs'/'02_two.ipynb', 'assert 1 == 2, "no"')
    total = proven(project, 'ipynb')
    assert total['failed'] == ['nbs/02_two.ipynb'] and len(total['passed']) == 2
    assert 'assert 1 == 2, "no"' in capsys.readouterr().out


def test_a_notebook_that_nbdev_leaves_out_is_a_failure(project):
    write_notebook(project/'nbs'/'part'/'02_two.ipynb', 'x = 1')
    (project/'nbs'/'part'/'.notest').touch()
    with pytest.raises(SystemExit, match='02_two'): stages.listed(project)


@pytest.mark.parametrize('what', ['notebook', 'tests'])
def test_nothing_to_run_is_a_failure(project, what):
    if what == 'notebook':
        for p in notebook_paths(project): p.unlink()
    else: shutil.rmtree(project/'tests')
    with pytest.raises(SystemExit, match=f'no .*{what}'): stages.listed(project)


def test_a_job_that_hangs_is_stopped_and_named(project):
    write_notebook(project/'nbs'/'02_two.ipynb', 'import time; time.sleep(600)')
    job, = (job for job in stages.listed(project) if '02_two' in job.name)
    job.limit = 3
    total = stages.prove([job])
    assert 'stopped after 3 s' in total['failed'][0] and not total['passed']


def test_a_job_that_dies_is_a_failure(project):
    write_notebook(project/'nbs'/'02_two.ipynb', 'import os; os._exit(0)')
    total = proven(project, '02_two')
    assert 'ended without an answer' in total['failed'][0] and not total['passed']


def test_a_cell_that_did_not_run_is_a_failure(project):
    front = '---\nskip_exec: true\n---'
    path = write_notebook(project/'nbs'/'02_two.ipynb', front, 'x = 1')
    raw = json.loads(path.read_text(encoding='utf8'))
    raw['cells'][0] = dict(cell_type='raw', id='a', metadata={}, source=[front])
    path.write_text(json.dumps(raw), encoding='utf8')
    assert proven(project, '02_two')['failed'] == ['nbs/02_two.ipynb']


@pytest.mark.parametrize('body, failed', [
    ('assert x == 1', False), ('raise ValueError("rotten")', True), ('x = 2', False)])
def test_cells_for_a_gpu_run_beside_the_notebook(project, body, failed):
    """In a fork: they see what stands above, and what they do is not seen below."""
    write_notebook(project/'nbs'/'02_two.ipynb', 'x = 1', f'#| cuda\n{body}', 'assert x == 1')
    total = proven(project, '02_two')
    shrunk = 'nbs/02_two.ipynb, cells for a GPU, shrunk'
    assert (shrunk in total['failed']) == failed and 'nbs/02_two.ipynb' in total['passed']


def test_what_stands_between_flagged_cells_runs_once(project):
    counts = 'open("times", "a").write("."); y = 2'
    write_notebook(project/'nbs'/'02_two.ipynb', '#| slow\na = 1', counts, '#| cuda\nassert y == 2')
    assert len(proven(project, '02_two')['passed']) == 2
    assert (project/'nbs'/'times').read_text() == '.'


@pytest.mark.parametrize('value, failed', [(3, False), (4, True)])
def test_where_reading_was_too_short_the_whole_notebook_decides(project, value, failed):
    cells = '#| slow\na = 1', 'globals()["hidden"] = 3', f'#| slow\nassert hidden == {value}'
    write_notebook(project/'nbs'/'02_two.ipynb', *cells)
    shrunk = 'nbs/02_two.ipynb, cells for a GPU, shrunk'
    assert shrunk in proven(project, '02_two')['failed' if failed else 'passed']


def test_a_sync_that_fails_ends_everything(project):
    edit(project/'ad_course'/'one.py', 'return 1', 'return 2')
    total = stages.prove(stages.listed(project), workers=1)
    assert total['failed'] == ['ad_course/one.py'] and not total['passed']


@pytest.mark.parametrize('body, outcome', [
    ('def test_a(): pass', 'passed'), ('def test_a(): assert 0', 'failed'), ('x = 1', 'failed'),
    ('import pytest\ndef test_a(): pytest.skip("why")', 'skipped'), ('x = 1/0', 'failed')])
def test_files_of_tests(project, body, outcome):
    (project/'tests'/'test_a.py').write_text(body, encoding='utf8')
    total = proven(project, 'tests/test_a.py')
    assert len(total[outcome]) == 1 and sum(len(total[k]) for k in jobs.NAMES) == 1


@pytest.mark.parametrize('passed, failed, well', [
    (['a'], [], True), (['a'], ['b'], False), ([], [], False)])
def test_the_last_line_counts(passed, failed, well):
    said = []
    total = dict(passed=passed, failed=failed, skipped={'c': 'no data'}, parts={}, jobs={})
    assert stages.summary(total, 1., said.append) == well
    assert said[-1] == f'{len(passed)} passed, {len(failed)} failed, 1 skipped'


def test_the_longest_begin_first():
    """By the seconds in tests/seconds.json; what nobody has measured begins before all others."""
    first, *names = [job.name for job in stages.listed()]
    expected = [scope.expected_seconds(name) for name in names]
    assert first == 'sync' and expected == sorted(expected, reverse=True)
    known = scope.known_seconds()
    advice = 'python -m tests --times tests/seconds.json'
    assert len(set(names) & known.keys()) > len(names) / 2, advice
    assert scope.expected_seconds('tests/test_new.py') > max(known.values())


def test_only_what_a_notebook_concerns():
    """The chapter, its tests, what imports it: a change of the sparse autoencoder reaches CAE."""
    sae = next(str(p) for p in notebook_paths() if p.stem == '13_sae')
    names = {job.name for job in stages.listed(only=[sae])}
    inside = {'sync', 'nbs/1_autoencoders/13_sae.ipynb', 'nbs/1_autoencoders/14_cae.ipynb',
              'tests/test_sae.py', 'tests/test_layout.py'}
    assert inside <= names and 'nbs/1_autoencoders/17_aae.ipynb' not in names
    with pytest.raises(SystemExit, match='no such notebook'): stages.listed(only=['nbs/none.ipynb'])


# ---------------------------------------------------------------- make notebooks
def test_executing_keeps_outputs_of_cells_left_out(tmp_path, monkeypatch):
    monkeypatch.delenv('AD_COURSE_RUN', raising=False)
    path = write_notebook(tmp_path/'a.ipynb', 'print("new")', '#| cuda\nprint("on a GPU")',
                          '#| eval: false\n1/0', 'import os; print(os.getcwd())')
    raw = json.loads(path.read_text(encoding='utf8'))
    raw['cells'][1]['outputs'] = [dict(output_type='stream', name='stdout', text='on a GPU\n')]
    path.write_text(json.dumps(raw), encoding='utf8')
    execute.execute(path)
    new = Notebook(path, tmp_path)
    outputs = [[''.join(o['text']).strip() for o in c.outputs] for c in new.cells]
    assert outputs[:3] == [['new'], ['on a GPU'], []] and os.path.samefile(outputs[3][0], tmp_path)
    assert 'widgets' not in new.raw['metadata'] and os.listdir(tmp_path) == ['a.ipynb']


def test_executing_runs_the_slow_cells_that_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv('AD_COURSE_RUN', 'slow')
    cells = '#| slow\nprint("slow")', '#| cuda\nprint("cuda")', '#| slow\n#| notest\nprint(1)'
    path = write_notebook(tmp_path/'a.ipynb', *cells)
    execute.execute(path)
    ran = [bool(c.outputs) for c in Notebook(path, tmp_path).cells]
    assert ran == [True, False, False]


def test_a_notebook_that_fails_stays_as_it_was(tmp_path):
    path = write_notebook(tmp_path/'a.ipynb', 'print(1)', '1/0')
    before = digests(tmp_path)
    with pytest.raises(Exception, match='ZeroDivisionError'): execute.execute(path)
    assert digests(tmp_path) == before


# ---------------------------------------------------------------- the tree
def test_project_files_with_and_without_git(tmp_path):
    ours = ['.ci/run', 'nbs/a.ipynb', 'settings.ini']
    for name in (*ours, '.venv/x', '_proc/y', 'tests/__pycache__/z'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    found = lambda: [p.as_posix() for p in project_files(tmp_path)]
    assert found() == ours
    if not shutil.which('git'): return
    (tmp_path/'.gitignore').write_text('.venv/\n_proc/\n__pycache__/\n', encoding='utf8')
    env = environment(GIT_DIR=None, GIT_WORK_TREE=None)
    subprocess.run(['git', 'init', '-q', str(tmp_path)], check=True, env=env)
    assert found() == sorted([*ours, '.gitignore'])


def test_the_command_says_what_it_does():
    command = [sys.executable, '-m', 'tests', '--help']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'sync' in done.stdout and settings()['lib_name']
