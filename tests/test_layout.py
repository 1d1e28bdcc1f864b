"""The shape of the course: what a reader, a student who imports, and the site rely on, for every notebook and module."""
import ast
import configparser
import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .project import ROOT, Cell, environment, modules, notebooks, project_files, settings

NOTEBOOKS, MODULES, CONFIG = notebooks(), modules(), settings()
LIB = CONFIG['lib_path']

# The house, from the ground up: a module imports only from floors below its own. What is not named here is a method, and a
# method may build on another.
METHOD = 3
FLOORS = dict(data=1, surfaces=1.1, datasets=1.2, metrics=1, networks=1, detector=2, pictures=4, widgets=4, benchmark=5, cli=5)
# What a requirement is called in an import, where that differs.
IMPORT_NAMES = {'scikit-learn': {'sklearn'}, 'pillow': {'PIL'}, 'ipython': {'IPython'}}
MAX_BYTES = 300 * 1024

each_notebook = pytest.mark.parametrize('notebook', NOTEBOOKS, ids=str)
each_chapter = pytest.mark.parametrize('notebook', [n for n in NOTEBOOKS if n.is_chapter], ids=str)
each_module = pytest.mark.parametrize('name', MODULES)


# ---------------------------------------------------------------- the tree
def test_there_is_something_to_test():
    assert NOTEBOOKS and MODULES, f'no notebook under {CONFIG["nbs_path"]}/, or no module in {LIB}/'


def test_stems_are_unique():
    twice = [s for s, n in Counter(n.stem.lower() for n in NOTEBOOKS).items() if n > 1]
    assert not twice, f'the site and the package drop numbers, so these names collide: {twice}'


def test_every_module_comes_from_one_notebook():
    sources = Counter(n.module for n in NOTEBOOKS if n.module)
    assert sources.keys() >= MODULES.keys(), f'no notebook exports {sorted(MODULES.keys() - sources.keys())}'
    assert MODULES.keys() >= sources.keys(), f'not exported: {sorted(sources.keys() - MODULES.keys())} (nbdev_export)'
    assert max(sources.values()) == 1, f'exported by two notebooks: {[m for m, n in sources.items() if n > 1]}'


def test_no_file_that_nbdev_should_not_have_written():
    assert not (ROOT/'pyproject.toml').exists(), 'nbdev wrote a pyproject.toml: settings.ini needs update_pyproject = False'
    assert not any(p.name == '.notest' for p in project_files()), 'a .notest file makes nbdev_test skip a folder'


# Put together from halves, so that this file does not find itself.
FOLDERS = '|'.join(['wo' 'rk', 'ro' 'ot', 'tm' 'p', 'ho' 'me/[^/ ]+', 'Us' 'ers/[^/ ]+'])
MACHINE = re.compile(rf'(?<![\w./])/(?:{FOLDERS})/|[A-Z]:\\+Us' 'ers|sand' 'box')


def test_no_path_of_a_machine_in_any_file():
    found = []
    for path in project_files():
        if path.suffix in ('.png', '.jpg', '.ico', '.gif', '.pdf'): continue
        for number, line in enumerate((ROOT/path).read_text(encoding='utf8', errors='replace').splitlines(), 1):
            if re.search(r'"image/(png|jpeg)":', line): continue
            if match := MACHINE.search(line): found.append(f'{path.as_posix()}:{number}: {line[max(0, match.start() - 30):match.end() + 30].strip()}')
    assert not found, '\n'.join(found)


# ---------------------------------------------------------------- every notebook
@each_notebook
def test_opens_with_a_title_and_a_promise(notebook):
    first = notebook.cells[0]
    lines = [l for l in first.source.splitlines() if l.strip()]
    assert first.kind == 'markdown' and len(lines) == 2 and lines[0].startswith('# ') and lines[1].startswith('> '), \
        f'{notebook}: the first cell holds `# Title` and `> one line`, and nothing else (the site drops the rest):\n{first.source}'
    more = [c for c in notebook.markdown[1:] if re.search(r'^# \S', re.sub(r'^```.*?^```', '', c.source, flags=re.M | re.S), re.M)]
    assert not more, f'{notebook}: a second `# ` title in {more}'


@each_notebook
def test_colab_badge_is_alone_and_right(notebook):
    badge = ('[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
             f"(https://colab.research.google.com/github/{CONFIG['user']}/{CONFIG['repo']}/blob/{CONFIG['branch']}/{notebook.name})")
    cells = [c for c in notebook.markdown if 'colab-badge' in c.source]
    if notebook.stem == 'index' and not cells: return
    assert [c.source.strip() for c in cells] == [badge], f'{notebook}: one cell should hold exactly\n{badge}'


@each_notebook
def test_install_cell_stands_before_all_imports(notebook):
    if notebook.stem == 'index': return
    line = f"! [ -e /content ] && pip install -q git+{CONFIG['git_url']}"
    found = [c.index for c in notebook.code_cells if c.source.split('\n')[1:] == [line] and not c.evaluated]
    assert found, f'{notebook}: a cell should hold exactly\n#| eval: false\n{line}'
    imports = [c.index for c in notebook.code_cells if any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(c.tree))]
    assert not imports or found[0] < imports[0], f'{notebook}: cell {imports[0]} imports before the course is installed'


@each_notebook
def test_module_has_the_notebooks_name(notebook):
    exports = any(c.exported for c in notebook.code_cells)
    assert not exports or notebook.module, f'{notebook} exports, but has no default_exp'
    if notebook.module: assert notebook.module == notebook.stem, f'{notebook} exports to {notebook.module}, not to {notebook.stem}'
    for cell in notebook.code_cells:
        for flag in ('export', 'exports', 'exporti'):
            assert not cell.flags.get(flag), f'{notebook}, {cell}: `#| {flag} {cell.flags[flag]}` writes to another module'


@each_notebook
def test_cells_that_import_hold_only_imports(notebook):
    """In a notebook that exports, the site's build runs every cell that imports, without the cells between."""
    if not any(c.exported for c in notebook.code_cells): return
    is_import = lambda n: isinstance(n, (ast.Import, ast.ImportFrom))
    for cell in notebook.code_cells:
        imports = any(map(is_import, cell.tree.body)) if cell.exported else any(map(is_import, ast.walk(cell.tree)))
        others = [n for n in cell.tree.body if not is_import(n)]
        assert not (imports and others), f'{notebook}, {cell}: imports and other code in one cell:\n{cell.source}'


@each_notebook
def test_outputs_are_there_true_and_small(notebook):
    size = notebook.path.stat().st_size
    assert size < MAX_BYTES, f'{notebook} has {size // 1024} KB'
    for cell in notebook.code_cells:
        for output in cell.outputs:
            assert output['output_type'] != 'error', f"{notebook}, {cell}: committed with {output['ename']}: {output['evalue']}"
            live = [k for k in output.get('data', {}) if 'widget' in k]
            assert not live, f'{notebook}, {cell}: a live widget among the outputs; use `make notebooks`, which draws it static'
            stderr = ''.join(output.get('text', '')) if output.get('name') == 'stderr' else ''
            assert 'Traceback' not in stderr and 'Warning' not in stderr, f'{notebook}, {cell}: {stderr[:300]}'
        if shows(cell): assert cell.outputs, f'{notebook}, {cell}: committed without its output; run `make notebooks ONLY={notebook}`'
    assert 'widgets' not in notebook.raw['metadata'], f'{notebook}: widget state in the metadata (nbdev_clean keeps it); use `make notebooks`'


def shows(cell):
    """Whether a cell surely prints or shows something when it runs."""
    if not cell.runs() or not cell.tree.body or cell.flags.keys() & {'hide', 'hide_output'} or cell.source.rstrip().endswith(';'): return False
    calls = [s.value for s in cell.tree.body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call)]
    if any(isinstance(c.func, ast.Name) and c.func.id == 'print' for c in calls): return True
    last = cell.tree.body[-1]
    return isinstance(last, ast.Expr) and isinstance(last.value, (ast.Name, ast.Attribute, ast.BinOp, ast.Compare, ast.Tuple, ast.List, ast.Dict))


@each_notebook
def test_nbdev_test_runs_it(notebook):
    assert any(c.runs() for c in notebook.code_cells) or notebook.stem == 'index', f'{notebook}: no cell that nbdev_test would run'
    kernel = notebook.raw['metadata'].get('kernelspec', {})
    assert kernel.get('name') == 'python3' and kernel.get('language', 'python') == 'python', f'{notebook}: its kernel is {kernel}'
    assert not any(re.search(r'skip_(exec|showdoc)\s*:', c.source) for c in notebook.cells if c.kind != 'code'), f'{notebook}: front matter skips it'
    assert not any('nbdev_export(' in c.source for c in notebook.code_cells), f'{notebook}: nbdev leaves out cells that call nbdev_export'


# ---------------------------------------------------------------- every chapter
ASSERTS = re.compile(r'^\s*(assert\b|raises\(|with (pytest\.)?raises|(torch|np|numpy)\.testing\.|check_\w+\()', re.M)


@each_chapter
def test_chapter_has_exercises_proofs_and_a_picture(notebook):
    heads = [l for c in notebook.markdown for l in re.findall(r'^#{2,}\s.*$', c.source, re.M)]
    assert any('exercise' in h.lower() for h in heads), f'{notebook}: no section with exercises'
    proofs = sum(bool(ASSERTS.search(c.code)) for c in notebook.code_cells if c.runs())
    assert proofs >= 3, f'{notebook}: only {proofs} cells assert anything'
    assert any(k.startswith('image/') for c in notebook.code_cells for o in c.outputs for k in o.get('data', {})), f'{notebook}: no picture'


# ---------------------------------------------------------------- every module
def imported(name):
    """The packages that a module imports, and the course's own modules, anywhere in it."""
    packages, own = set(), set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding='utf8'))):
        if isinstance(node, ast.Import): found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level: found = [f'{LIB}.{node.module}'] if node.module else [f'{LIB}.{a.name}' for a in node.names]
        elif isinstance(node, ast.ImportFrom): found = [f'{LIB}.{a.name}' for a in node.names] if node.module == LIB else [node.module]
        else: continue
        for full in found:
            top, _, rest = full.partition('.')
            if top == LIB: own.add(rest.split('.')[0])
            else: packages.add(top)
    return packages, own


@each_module
def test_module_imports_only_what_the_course_requires(name):
    required = [re.split(r'[<>=!~\[;]', r)[0].lower() for r in CONFIG['requirements'].split()]
    allowed = set().union(*(IMPORT_NAMES.get(r, {r}) for r in required))
    foreign = imported(name)[0] - allowed - sys.stdlib_module_names
    assert not foreign, f'{LIB}.{name} imports {sorted(foreign)}, not among the requirements in settings.ini'


@each_module
def test_module_imports_from_floors_below(name):
    floor = FLOORS.get(name, METHOD)
    wrong = {other: FLOORS.get(other, METHOD) for other in imported(name)[1] - {name}
             if FLOORS.get(other, METHOD) >= floor and not FLOORS.get(other, METHOD) == floor == METHOD}
    assert not wrong, f'{LIB}.{name}, on floor {floor}, imports from floors {wrong}'


def test_no_circular_imports():
    graph = {name: imported(name)[1] & MODULES.keys() for name in MODULES}
    def walk(name, path):
        assert name not in path, 'imports in a circle: ' + ' -> '.join([*path[path.index(name):], name])
        for other in sorted(graph[name]): walk(other, [*path, name])
    for name in graph: walk(name, [])


def test_modules_import_from_another_folder(tmp_path):
    """The package as installed, not the folder beside us: a bad install shows here and nowhere else."""
    code = 'import importlib, sys; sys.path = [p for p in sys.path if p]; print([importlib.import_module(m).__file__ for m in sys.argv[1:]])'
    done = subprocess.run([sys.executable, '-I', '-c', code, *(f'{LIB}.{m}' for m in MODULES)], cwd=tmp_path, capture_output=True, text=True,
                          env=environment(PYTHONPATH=None))
    assert done.returncode == 0, f'the installed package does not import: {done.stderr[-2000:]}\nrun `make`, or pip install -e .'
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
            if inspect.isfunction(value) or isinstance(value, property): yield f'{key}.{attribute}', getattr(thing, attribute)


def lacks(thing, doc):
    """What a docstring lacks, or None."""
    if not doc.strip() or doc.startswith(f'{getattr(thing, "__name__", "")}('): return 'has none'
    first, *rest = doc.splitlines()
    if not first.strip(): return 'begins with an empty line'
    if len(first) > 140: return f'has a first line of {len(first)} characters'
    if rest and rest[0].strip() and not first.rstrip().endswith(('.', ':', ';', '?', '!')): return 'has a first line that goes on in the second'


@each_module
def test_public_things_have_docstrings(name):
    """Their first line is a whole sentence. A method that overrides one with a docstring inherits it, as in `help`."""
    docs = {dotted: (thing, (inspect.getdoc(thing) if '.' in dotted else thing.__doc__) or '') for dotted, thing in public(name)}
    wrong = [f'{dotted} {fault}' for dotted, (thing, doc) in docs.items() if (fault := lacks(thing, doc))]
    assert not wrong, f'docstrings in {LIB}.{name}: ' + '; '.join(wrong)


def test_public_functions_and_classes_are_used():
    """Each stands in a cell or a test beyond its own definition, or is handed to a decorator that keeps it."""
    used, own_names = Counter(), {key for name in MODULES for key, _ in public(name)}
    sources = [c.tree for n in NOTEBOOKS for c in n.code_cells]
    sources += [ast.parse(p.read_text(encoding='utf8')) for p in (ROOT/'tests').rglob('*.py')]
    for tree in sources:
        for statement in tree.body:
            found = Counter(n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(statement) if isinstance(n, (ast.Name, ast.Attribute)))
            own = getattr(statement, 'name', None)
            found.pop(own, None)
            if any(isinstance(d, ast.Name) and d.id in own_names for d in getattr(statement, 'decorator_list', [])): found[own] += 1
            used += found
    unused = [f'{LIB}.{name}.{key}' for name in MODULES for key, _ in public(name) if '.' not in key and not used[key]]
    assert not unused, f'exported and used nowhere: {unused}'


# ---------------------------------------------------------------- the checks themselves
def test_settings_hold_what_the_tools_need():
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf8')
    assert not config['DEFAULT'].getboolean('update_pyproject') and config['DEFAULT'].getboolean('custom_sidebar')
    assert {'notest', 'slow', 'cuda'} <= set(CONFIG['tst_flags'].split())
    assert not {'nbdev', 'fastcore', 'execnb'} & {r.split('<')[0].split('>')[0] for r in CONFIG['requirements'].split()}


@pytest.mark.parametrize('text, found', [('see /' + 'work/x', True), ('/' + 'home/ann/x', True), ('https://a.b/' + 'work/x', False),
    ('frame' + 'work/x', False), ('a sand' + 'box', True), ('../shared/x', False), ('C:\\' + 'Users', True)])
def test_machine_paths_are_recognised(text, found): assert bool(MACHINE.search(text)) == found


def test_cells_are_read_as_nbdev_reads_them():
    cell = Cell(0, dict(cell_type='code', source=['#| eval: false\n', '! ls'], outputs=[]))
    assert not cell.evaluated and not cell.runs() and 'system' in cell.code
    cell = Cell(1, dict(cell_type='code', source='#|exports\ndef f(): pass', outputs=[]))
    assert cell.exported and cell.runs() and isinstance(cell.tree.body[0], ast.FunctionDef)
    assert not Cell(2, dict(cell_type='code', source='#| cuda\nx', outputs=[])).runs()
    assert shows(Cell(3, dict(cell_type='code', source='print(1)', outputs=[]))) and not shows(Cell(4, dict(cell_type='code', source='x = 1', outputs=[])))
