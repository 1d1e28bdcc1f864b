"""The site: what can be known of it without Quarto.

The notebooks are processed as for a build, and every link resolves."""
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import nbformat.v4 as v4
import pytest
import yaml

from . import readme, sync
from .project import QUIET, ROOT, Notebook, environment, notebooks, settings, write_notebook

NBS = ROOT/settings()['nbs_path']
NOTEBOOKS = notebooks()
each_notebook = pytest.mark.parametrize('notebook', NOTEBOOKS, ids=str)
# One after another in one process: it imports the large libraries once.
PROCESS = '''
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
refresh_quarto_yml()
proc_nbs(n_workers=0, force=True)
'''


def process(copy):
    """What nbdev does before it calls Quarto; the folder of processed pages."""
    quiet = dict(QUIET, PYTHONWARNINGS='ignore::DeprecationWarning')
    done = subprocess.run([sys.executable, '-c', PROCESS], cwd=copy, capture_output=True, text=True,
                          encoding='utf8', errors='replace',
                          env=environment(**quiet, PYTHONPATH=str(copy)))
    why = f'the notebooks cannot be processed for the site:\n{done.stderr[-4000:]}'
    assert done.returncode == 0, why
    return copy/'_proc', done.stdout + done.stderr


@pytest.mark.slow
def test_every_notebook_becomes_a_page(tmp_path):
    copy = tmp_path/'copy'
    copy.mkdir()
    pages, said = process(sync.copy_project(copy))
    assert 'imports and other code' not in said, said
    missing = [n.name for n in NOTEBOOKS if not (pages/n.path.relative_to(NBS)).is_file()]
    assert NOTEBOOKS and not missing, f'not processed: {missing}'
    for n in NOTEBOOKS:
        first = Notebook(pages/n.path.relative_to(NBS), pages).cells[0].source
        titled = f'output-file: {n.stem.lower()}.html' in first and 'title:' in first
        assert titled, f'{n}: the page has no title:\n{first}'
    for name in ('_quarto.yml', 'nbdev.yml', 'sidebar.yml', 'styles.css'):
        why = f'nbs/{name} is not what nbdev writes from settings.ini'
        assert sync.text(copy/'nbs'/name) == sync.text(NBS/name), why
        assert (pages/name).is_file(), f'{name} does not reach the site'


def test_processing_fails_where_a_cell_for_the_site_fails(tmp_path):
    copy = tmp_path/'copy'
    (copy/'nbs').mkdir(parents=True)
    shutil.copy(ROOT/'settings.ini', copy)
    write_notebook(copy/'nbs'/'01_a.ipynb', '#| default_exp a', '#| export\nimport no_such_module')
    with pytest.raises(AssertionError, match='no_such_module'): process(copy)


def test_quarto_files():
    text = 'metadata-files: [../_quarto.yml, nbdev.yml, sidebar.yml]\n'
    assert (NBS/'_quarto.yml').read_text(encoding='utf8') == text
    top = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf8'))
    assert top['project']['type'] == 'website' and (NBS/top['format']['html']['css']).is_file()
    assert 'custom_quarto_yml' not in settings(), 'nbdev would delete nbs/_quarto.yml'


def entries(contents):
    """The paths in a sidebar, in order."""
    for item in contents:
        if isinstance(item, str): yield item
        else:
            if 'href' in item: yield item['href']
            yield from entries(item.get('contents', []))


def test_sidebar_names_every_notebook_once():
    sidebar = yaml.safe_load((NBS/'sidebar.yml').read_text(encoding='utf8'))['website']['sidebar']
    named = Counter(entries(sidebar['contents']))
    there = {n.path.relative_to(NBS).as_posix() for n in NOTEBOOKS}
    missing, gone = sorted(there - named.keys()), sorted(named.keys() - there)
    assert not missing, f'nbs/sidebar.yml does not name {missing}'
    assert not gone, f'nbs/sidebar.yml names what is not there: {gone}'
    twice = [name for name, count in named.items() if count > 1]
    assert not twice, f'twice in nbs/sidebar.yml: {twice}'


# ---------------------------------------------------------------- links
CODE = re.compile(r'^(```|~~~).*?^\1|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$', re.M | re.S)
INLINE = re.compile(r'\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)')
REFERENCE = re.compile(r'^\s{0,3}\[[^\]^]+\]:\s*<?(\S+?)>?\s*$', re.M)
TAG, TARGET = r'<(?:a|img|source|video|iframe)\b', r'''(?:href|src)=["']([^"']+)["']'''
HTML = re.compile(rf'{TAG}[^>]*?\b{TARGET}', re.I)
HEADING = re.compile(r'^#{1,6}\s+(.+?)\s*(?:\{#([\w-]+)[^}]*\})?\s*$', re.M)
HOST = re.compile(r'[a-z0-9-]+(\.[a-z0-9-]+)+(:\d+)?', re.I)


def links(markdown):
    """The targets of links and images in markdown, code and formulas left out."""
    text = CODE.sub('', markdown)
    return INLINE.findall(text) + REFERENCE.findall(text) + HTML.findall(text)


def anchors(markdown):
    """The anchors of the headings, as JupyterLab and as Quarto write them, in small letters."""
    heads = HEADING.findall(re.sub(r'^```.*?^```', '', markdown, flags=re.M | re.S))
    plain = [re.sub(r'[`*_]', '', head).lower() for head, _ in heads]
    ids = {own.lower() for _, own in heads if own} | {h.replace(' ', '-') for h in plain}
    ids |= {re.sub(r'^[^a-z]+', '', re.sub(r'[^\w.\- ]', '', h).replace(' ', '-')) for h in plain}
    return ids | {i.lower() for i in re.findall(r'\bid=["\']([^"\']+)', markdown)}


def fault(target, folder, own='', root=ROOT):
    """What is wrong with a link that stands in a file of `folder`, or None."""
    parts = urlsplit(target)
    if parts.scheme or target.startswith('//'):
        secure = parts.scheme == 'https' and HOST.fullmatch(parts.netloc)
        well = parts.scheme == 'mailto' or secure
        return None if well else 'is not a well-formed https address'
    anchor = unquote(parts.fragment).lower()
    if not parts.path: return None if anchor in anchors(own) else 'is an anchor that no heading has'
    path = Path(os.path.normpath(folder/unquote(parts.path)))
    if not path.is_relative_to(root): return 'leads out of the repository'
    if not path.exists(): return 'does not exist'
    if path != root and path.name not in os.listdir(path.parent):
        return 'is written with other capitals'
    if anchor and path.suffix == '.ipynb':
        there = '\n\n'.join(c.source for c in Notebook(path, root).markdown)
        if anchor not in anchors(there): return 'is an anchor that no heading there has'


@each_notebook
def test_links_and_images_resolve(notebook):
    whole, folder = '\n\n'.join(c.source for c in notebook.markdown), notebook.path.parent
    wrong = [f'cell {c.index}: {target} {why}' for c in notebook.markdown
             for target in links(c.source) if (why := fault(target, folder, whole))]
    assert not wrong, f'{notebook}: ' + '; '.join(wrong)
    attached = [c.index for c in notebook.cells if c.raw.get('attachments')]
    why = 'carry attachments, which neither the site nor the README shows'
    assert not attached, f'{notebook}: cells {attached} {why}'


def test_links_of_the_readme_resolve():
    if not (ROOT/'README.md').exists():
        pytest.skip('README.md is made from nbs/index.ipynb, which is not there yet')
    text = (ROOT/'README.md').read_text(encoding='utf8')
    wrong = [f'{t} {f}' for t in links(text) if (f := fault(t, ROOT, text))]
    assert not wrong, '; '.join(wrong)


@pytest.mark.parametrize('target, wrong', [
    ('b.ipynb', None), ('./b.ipynb', None), ('B.ipynb', 'capitals|exist'), ('c.ipynb', 'exist'),
    ('../../x', 'out of'), ('#head-two', None), ('#Head-two', None), ('#none', 'anchor'),
    ('https://a.b/c', None), ('http://a.b', 'https'), ('https:/a.b', 'https'),
    ('https://a b', 'https'), ('mailto:a@b.c', None),
    ('b.ipynb#there', None), ('b.ipynb#gone', 'anchor')])
def test_faults_of_links_are_found(tmp_path, target, wrong):
    shutil.copy(ROOT/'settings.ini', tmp_path)
    write_notebook(tmp_path/'nbs'/'b.ipynb', '## There')
    found = fault(target, tmp_path/'nbs', '## Head two', tmp_path)
    assert (found is None) if wrong is None else re.search(wrong, found or ''), found


def test_links_are_read_outside_code_and_formulas():
    lines = ['a [b](c.ipynb) ![d](e.png "title") `[f](g)` $x[i](j)$', '```', '[h](k)', '```',
             '[l]: https://m.n', '<img src="o.png">']
    text = '\n'.join(lines)
    assert links(text) == ['c.ipynb', 'e.png', 'https://m.n', 'o.png']


# ---------------------------------------------------------------- the README
def test_readme_keeps_links_right_from_the_root():
    text = ('a [b](0_foundations/01_data.ipynb#x) ![c](images/d.png) <img src="images/e.png"> '
            '[f](../tests) [g](https://h.i) [j](#k) `[l](m)`')
    want = ('a [b](nbs/0_foundations/01_data.ipynb#x) ![c](nbs/images/d.png) '
            '<img src="nbs/images/e.png"> [f](tests) [g](https://h.i) [j](#k) `[l](m)`')
    assert readme.rebase(text, 'nbs') == want


def test_readme_of_a_small_notebook(tmp_path):
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'nbs').mkdir()
    png = b'\x89PNG picture'
    data = {'image/png': base64.b64encode(png).decode(), 'text/plain': 'fig'}
    shown = v4.new_output('display_data', data)
    cells = [v4.new_markdown_cell('# T\n> promise'), v4.new_code_cell('#| eval: false\nimport x'),
             v4.new_code_cell('#| hide\nsecret'), v4.new_markdown_cell('[a](b.ipynb)'),
             v4.new_code_cell('#| echo: false\nplot()', id='abc', outputs=[shown])]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path/'nbs'/'index.ipynb')
    made = readme.render(tmp_path)
    text = made['README.md'].decode()
    for there in ('# T\n\npromise\n', '```python\nimport x\n```', '[a](nbs/b.ipynb)'):
        assert there in text, text
    for gone in ('secret', 'plot()', '#|'): assert gone not in text, text
    assert text.endswith('![](nbs/images/index_abc_0.png)\n'), text
    assert made['nbs/images/index_abc_0.png'] == png and text.count('```') == 2
    readme.write(tmp_path)
    assert (tmp_path/'README.md').read_text(encoding='utf8') == text
