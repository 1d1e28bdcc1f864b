"""Cells for a GPU or for long minutes (`#| cuda`, `#| slow`) run here shrunk, on the CPU, so that none rots unseen."""
import json
import os
import subprocess
import sys

import pytest

from .project import QUIET, ROOT, environment, notebooks, write_notebook
from .smoke import flagged

NOTEBOOKS = [n for n in notebooks() if flagged(n)]


def smoke(path, limit=600):
    """What `python -m tests.smoke` says of a notebook, run in a process of its own."""
    done = subprocess.run([sys.executable, '-m', 'tests.smoke', str(path)], cwd=ROOT, capture_output=True, text=True, encoding='utf8',
                          timeout=limit, env=environment(**QUIET, AD_COURSE_SMOKE='1', CUDA_VISIBLE_DEVICES=''))
    assert done.stdout.strip(), f'{path} ended without a word (exit {done.returncode}):\n{done.stderr[-3000:]}'
    return done.returncode, json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=str)
def test_cells_for_a_gpu_run_shrunk(notebook):
    code, result = smoke(notebook.path)
    if result.get('missing_data') and not os.environ.get('AD_COURSE_NEED_DATA'): pytest.skip(f"{notebook}: {result['error'][:300]}")
    assert code == 0, f"{notebook}, cell {result['cell']}: {result['error']}\n\n{result['source']}"
    missed = set(result['targets']) - set(result['ran'])
    assert result['targets'] and not missed, f'{notebook}: cells {missed} did not run'


def test_runner_runs_the_flagged_cell_and_what_it_needs_alone(tmp_path):
    nb = write_notebook(tmp_path/'a.ipynb', 'import os', 'a = [1]', 'b = 1/0', 'a.append(2)', '#| eval: false\nraise SystemExit',
               '#| cuda\nassert a == [1, 2] and os.environ["AD_COURSE_SMOKE"] == "1"', '#| notest\n1/0')
    code, result = smoke(nb)
    assert code == 0 and result['ran'] == [0, 1, 3, 5] and result['targets'] == [5]


@pytest.mark.parametrize('flag', ['cuda', 'slow'])
def test_runner_fails_where_the_flagged_cell_fails(tmp_path, flag):
    code, result = smoke(write_notebook(tmp_path/'a.ipynb', 'a = 1', f'#| {flag}\nraise ValueError("rotten")'))
    assert code == 1 and result['cell'] == 1 and 'rotten' in result['error']


def test_runner_runs_the_whole_notebook_where_reading_it_was_too_short(tmp_path):
    nb = write_notebook(tmp_path/'a.ipynb', 'globals()["hidden"] = 3', '#| slow\nassert hidden == 3')
    code, result = smoke(nb)
    assert code == 0 and result['ran'] == [0, 1] and 'hidden' in result['whole']


def test_no_gpu_is_visible_to_the_runner(tmp_path):
    code, result = smoke(write_notebook(tmp_path/'a.ipynb', 'import torch', '#| cuda\nassert not torch.cuda.is_available()'))
    assert code == 0, result
