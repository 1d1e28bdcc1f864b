"""Notebooks run as a person runs them: in JupyterLab, in a browser, all cells, then every slider.

Needs Playwright (`make browser`) and a Chromium; without them it skips and says so, and fails where
AD_COURSE_NEED_BROWSER is set. AD_COURSE_BROWSER=all runs all notebooks. The notebooks served are
copies: yours are not written."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from .project import (ROOT, Cell, Notebook, environment, notebooks, settings,
                      write_notebook)

pytestmark = [pytest.mark.browser, pytest.mark.slow]
LIMIT = 300 * 1000
FLAGS = ['--no-sand' 'box', '--no-first-run', *(f'--disable-{what}' for what in (
    'gpu', 'quic', 'background-networking', 'component-update', 'sync'))]
LAB_SETTINGS = {
    'docmanager-extension/plugin': {'autosave': False},
    'notebook-extension/tracker': {'windowingMode': 'none'},
    'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False}}
BROWSERS = 'chromium', 'google-chrome', 'chromium-browser'


def chosen():
    """The notebooks to run: all, or the first chapter and the first foundation with a slider."""
    found = notebooks()
    if os.environ.get('AD_COURSE_BROWSER') == 'all': return found
    slider = lambda n: any(w in c.source for c in n.code_cells for w in ('interact', 'Slider'))
    chapters = [n for n in found if n.stem == 'ae'] or [n for n in found if n.is_chapter][:1]
    foundations = [n for n in found if n.part.startswith('0_')]
    return chapters + ([n for n in foundations if slider(n)] or foundations)[:1]


def unavailable(reason):
    """Skips, or fails where a browser is promised."""
    if not os.environ.get('AD_COURSE_NEED_BROWSER'): pytest.skip(reason)
    pytest.fail(f'{reason}, and AD_COURSE_NEED_BROWSER is set')


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def drop_untested_cells(folder):
    """Takes `#| notest` cells out of the copies; slow ones, and those for a GPU, pass by."""
    for path in folder.rglob('*.ipynb'):
        raw = json.loads(path.read_text(encoding='utf8'))
        cells = Notebook(path, folder).cells
        raw['cells'] = [c.raw for c in cells if 'notest' not in c.flags]
        path.write_text(json.dumps(raw), encoding='utf8')


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """One JupyterLab over a copy of the notebooks, and one page of one browser."""
    try: from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("Playwright is not installed (make browser, or pip install -e '.[browser]')")
    chromium = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, BROWSERS)), None)
    home = tmp_path_factory.mktemp('lab')
    served, port, nbs = home/'course', free_port(), settings()['nbs_path']
    left_out = shutil.ignore_patterns('.ipynb_checkpoints', '.last_checked')
    shutil.copytree(ROOT/nbs, served/nbs, ignore=left_out)
    drop_untested_cells(served)
    imports = 'import ipywidgets as w'
    write_notebook(served/'bad.ipynb', '1/0', 'x = 1')
    write_notebook(served/'deaf.ipynb', imports,
                   'w.interact(lambda k: print("same"), k=w.IntSlider(1));')
    write_notebook(served/'broken.ipynb', imports,
                   'w.interact(lambda k: print(1/(k - 2)), k=w.IntSlider(1, 0, 9));')
    for key, value in LAB_SETTINGS.items():
        file = home/'settings'/'@jupyterlab'/f'{key}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value), encoding='utf8')
    # As on a student's machine: live widgets, the inline backend, no smoke; the threads stay few.
    env = environment(AD_COURSE_STATIC=None, AD_COURSE_SMOKE=None, AD_COURSE_RUN=None,
                      MPLBACKEND=None, TQDM_DISABLE=None, IN_TEST=None, CUDA_VISIBLE_DEVICES='')
    args = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root',
            '--ip=127.0.0.1', f'--port={port}', '--expose-app-in-browser',
            '--IdentityProvider.token=', f'--ServerApp.root_dir={served}',
            f'--LabApp.user_settings_dir={home/"settings"}',
            f'--LabApp.workspaces_dir={home/"spaces"}']
    log = home/'server.log'
    address = f'http://127.0.0.1:{port}/'
    with open(log, 'w') as out:
        server = subprocess.Popen(args, cwd=served, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        wait_for(server, address, log)
        with sync_playwright() as play:
            own = play.chromium.executable_path
            if not chromium and Path(own).exists(): chromium = own
            if not chromium:
                unavailable('no Chromium was found (install it, name it in CHROMIUM, or run '
                            '`playwright install chromium`)')
            browser = play.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
            page = browser.new_page(viewport=dict(width=1400, height=1000))
            page.set_default_timeout(LIMIT)
            page.goto(address + 'lab')
            page.wait_for_function('window.jupyterapp !== undefined')
            page.evaluate('async () => { await jupyterapp.restored }')
            yield page
            browser.close()
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


def wait_for(server, address, log, seconds=90):
    """Until the server answers."""
    for _ in range(seconds * 2):
        try: return urllib.request.urlopen(address + 'api/status', timeout=2)
        except OSError: time.sleep(.5)
        if server.poll() is not None: break
    pytest.fail(f'JupyterLab did not start:\n{log.read_text(errors="replace")[-2000:]}')


OPEN = '''async path => {
    const {commands, shell} = jupyterapp;
    const widget = await commands.execute('docmanager:open', {path, factory: 'Notebook'});
    await widget.context.ready;
    await widget.sessionContext.ready;
    shell.activateById(widget.id);
    window.notebook = widget;
    if (shell.leftCollapsed === false) await commands.execute('application:toggle-left-area');
}'''
CLOSE = '''async () => {
    await window.notebook.sessionContext.shutdown();
    window.notebook.context.model.dirty = false;
    window.notebook.dispose();
}'''
RUN = "async () => { await jupyterapp.commands.execute('notebook:run-all-cells'); }"
IDLE = "() => window.notebook.sessionContext.session?.kernel?.status === 'idle'"
CELLS = '() => window.notebook.content.model.toJSON().cells'
# An exception in a slider's callback is raised nowhere, only printed into the widget's output.
ERRORS = ', '.join(f'[data-mime-type="application/vnd.jupyter.{what}"]'
                   for what in ('error', 'stderr'))
WIDGET_ERRORS = f'''() => [...window.notebook.node.querySelectorAll('{ERRORS}')]
    .filter(e => e.closest('.jupyter-widgets, .jp-OutputArea .jp-OutputArea'))
    .map(e => e.innerText.trim().slice(-300))'''
# What a callback drew: pictures, and text in nested outputs and HTML widgets; not the slider's own
# readout.
PICTURES = ('img, canvas, .jp-OutputArea .jp-OutputArea .jp-OutputArea-output, '
            '.widget-html-content, .widget-label')
DRAWN = f'''() => [...window.notebook.node.querySelectorAll('{PICTURES}')]
    .filter(e => !e.closest('.widget-slider'))
    .map(e => e.src || (e.toDataURL ? e.toDataURL() : e.innerText)).join()'''


def settle(page):
    """Until the kernel has had nothing to do for a moment."""
    page.wait_for_function(IDLE)
    page.wait_for_timeout(700)
    page.wait_for_function(IDLE)


def move(page, handle):
    """Moves a slider by keys until what it draws changes; whether it did. At its end it turns.

    A look after each key, one more when all is quiet: a drawing that comes late is not missed."""
    handle.scroll_into_view_if_needed()
    before, changed = page.evaluate(DRAWN), False
    handle.focus()
    for key in ('ArrowRight', 'ArrowRight', 'ArrowLeft', 'ArrowLeft', 'ArrowLeft', 'End', 'Home'):
        page.keyboard.press(key)
        page.wait_for_timeout(300)
        page.wait_for_function(IDLE)
        changed = page.evaluate(DRAWN) != before
        if changed: break
    settle(page)
    return changed or page.evaluate(DRAWN) != before


def complaints(page, path):
    """Runs the notebook at `path` and moves its sliders.

    What a person would complain of, and how many cells and sliders there were."""
    page.evaluate(OPEN, path)
    try:
        page.evaluate(RUN)
        settle(page)
        cells = [Cell(i, raw) for i, raw in enumerate(page.evaluate(CELLS))]
        code = [c for c in cells if c.is_code]
        said = [f"cell {c.index}: {o['ename']}: {o['evalue'][:300]}"
                for c in code for o in c.outputs if o['output_type'] == 'error']
        said += [f'cell {c.index} did not run' for c in code if c.raw['execution_count'] is None]
        handles = page.locator('.jp-NotebookPanel:not(.lm-mod-hidden) .noUi-handle')
        sliders = [handles.nth(i) for i in range(handles.count())]
        for number, handle in enumerate(sliders):
            still = handle.is_visible() and not move(page, handle)
            if still: said.append(f'moving slider {number} changed nothing')
        said += [f'in a widget: {e}' for e in page.evaluate(WIDGET_ERRORS)]
        return said, dict(cells=len(code), sliders=len(sliders))
    finally: page.evaluate(CLOSE)


@pytest.mark.parametrize('notebook', chosen(), ids=str)
def test_notebook_runs_in_jupyterlab(lab, notebook):
    said, seen = complaints(lab, notebook.name)
    assert not said, f'{notebook}: ' + '\n'.join(said)
    assert seen['cells'], f'{notebook}: no cell was there to run'
    promised = any('Slider' in c.source for c in notebook.code_cells if c.runs())
    assert seen['sliders'] or not promised, f'{notebook}: its code has a slider, the page has none'


@pytest.mark.parametrize('name, complaint', [
    ('bad', 'ZeroDivisionError'), ('deaf', 'slider 0 changed nothing'),
    ('broken', 'in a widget: .*division by zero')])
def test_a_persons_complaints_are_heard(lab, name, complaint):
    said, _ = complaints(lab, f'{name}.ipynb')
    assert re.search(complaint, '\n'.join(said), re.S), said
