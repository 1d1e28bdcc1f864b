"""Where things are: the settings, the notebooks and their cells, the modules.

Nothing here knows what a test is."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from functools import cached_property, lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# One thread each, no windows, no bars and no live widgets: outputs are then the same everywhere and
# several notebooks share a small machine.
QUIET = dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MPLBACKEND='agg',
             TQDM_DISABLE='1', AD_COURSE_STATIC='1', PYTHONHASHSEED='0', PYTHONUNBUFFERED='1',
             PYTHONUTF8='1')
SMOKE_FLAGS = ('cuda', 'slow')


def environment(**changes):
    """A copy of the environment with `changes`; a value of None removes the name."""
    env = {**os.environ, **changes}
    return {k: v for k, v in env.items() if v is not None}


def command(name):
    """The program that pip installed beside this Python."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        advice = "run `make`, or pip install -e '.[dev,backbones]'"
        raise FileNotFoundError(f'{name} is not installed beside {sys.executable}: {advice}')
    return found


@lru_cache
def settings(root=ROOT):
    """settings.ini as a mapping."""
    config = ConfigParser(delimiters=['='])
    if not config.read(root/'settings.ini', encoding='utf8'):
        raise FileNotFoundError(f'no settings.ini in {root}')
    return config['DEFAULT']


def notebook_paths(root=ROOT):
    """The notebooks that nbdev sees: no name on the way begins with a dot or an underscore."""
    nbs = root/settings(root)['nbs_path']
    hidden = lambda p: any(part.startswith(('.', '_')) for part in p.relative_to(nbs).parts)
    return sorted(p for p in nbs.rglob('*.ipynb') if not hidden(p))


# Folders that are hidden or built, but for those that hold the project's own settings.
BUILT = re.compile(r'^(\.(?!ci$|github$|git(ignore|attributes)$).*|_proc|_docs|build|dist'
                   r'|__pycache__|.*\.egg-info)$')


def project_files(root=ROOT):
    """What git tracks or would add, as paths from the root.

    Without git, all files outside hidden and built folders."""
    git = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                         cwd=root, capture_output=True)
    if git.returncode == 0 and git.stdout:
        names = {Path(n) for n in git.stdout.decode('utf8').split('\0') if n}
        return sorted(p for p in names if (root/p).is_file())
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [d for d in folders if not BUILT.match(d)]
        found += [(Path(folder)/n).relative_to(root) for n in names if not BUILT.match(n)]
    return sorted(found)


def modules(root=ROOT):
    """The modules of the package by name, without the private ones."""
    paths = sorted((root/settings(root)['lib_path']).glob('*.py'))
    return {p.stem: p for p in paths if not p.stem.startswith('_')}


def own_imports(tree, lib=None):
    """The course's own modules that a syntax tree imports, anywhere in it."""
    lib, found = lib or settings()['lib_path'], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): full = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f'{lib}.{node.module or ""}'.strip('.') if node.level else node.module
            full = [f'{base}.{a.name}' for a in node.names] if base == lib else [base]
        else: continue
        found |= {name.split('.')[1] for name in full if name.startswith(f'{lib}.')}
    return found


def raw_notebook(path, name=None):
    """The JSON of a notebook; ValueError that names the file, and the line, where it is none."""
    what, data = f'{name or path} is not a notebook', Path(path).read_bytes()
    if found := re.search(rb'^(<{7}|>{7}) ', data, re.M):
        line = data.count(b'\n', 0, found.start()) + 1
        raise ValueError(f'{what}: git left a merge conflict in it, line {line}; take one side, '
                         f'as by git checkout --ours or --theirs, and edit that')
    try: raw = json.loads(data.decode('utf8'))
    except ValueError as e: raise ValueError(f'{what}: {e}') from e
    if not isinstance(raw, dict) or not isinstance(raw.get('cells'), list):
        raise ValueError(f'{what}: it is JSON without a list of cells')
    return raw


class Cell:
    """One cell: its index, kind, source, outputs and nbdev flags."""
    def __init__(self, index, raw):
        self.index, self.raw, self.kind = index, raw, raw['cell_type']
        self.source = ''.join(raw['source'])
        self.outputs = raw.get('outputs', [])

    def __repr__(self):
        lines = self.code.strip().splitlines()
        return f'cell {self.index} ({lines[0][:60] if lines else "empty"})'

    @property
    def is_code(self): return self.kind == 'code' and bool(self.source.strip())

    @cached_property
    def flags(self):
        """Directives such as `#| export` or `#| eval: false`: name -> the words that follow."""
        if self.kind != 'code': return {}
        directive = r'^[ \t]*#[ \t]*\|[ \t]*([\w-]+)[ \t]*(:?)[ \t]*(.*)$'
        found = re.findall(directive, self.source, re.M)
        return {name + colon: rest.strip() for name, colon, rest in found}

    @property
    def exported(self): return bool(self.flags.keys() & {'export', 'exports', 'exporti'})

    @property
    def evaluated(self): return self.flags.get('eval:', '').lower() != 'false'

    def runs(self, skipped=('notest', *SMOKE_FLAGS)):
        """Whether `nbdev_test` executes it, where cells with the flags `skipped` are left out."""
        return self.is_code and self.evaluated and not self.flags.keys() & set(skipped)

    @cached_property
    def code(self):
        """The source without directives, with IPython's `!` and `%` lines turned into Python."""
        text = re.sub(r'^[ \t]*#[ \t]*\|.*$', '', self.source, flags=re.M)
        if self.kind != 'code' or not re.search(r'^\s*[!%]|=\s*[!%]|\?\s*$', text, re.M):
            return text
        from IPython.core.inputtransformer2 import TransformerManager
        return TransformerManager().transform_cell(text.strip('\n'))

    @cached_property
    def tree(self): return ast.parse(self.code if self.is_code else '')


class Notebook:
    """A notebook as it lies on disk."""
    def __init__(self, path, root=ROOT):
        self.path, self.root = Path(path), root
        self.raw = raw_notebook(self.path)
        self.cells = [Cell(i, c) for i, c in enumerate(self.raw['cells'])]

    def __repr__(self): return self.name

    @property
    def name(self): return self.path.relative_to(self.root).as_posix()

    @property
    def stem(self):
        """The file's name without its number: `11_ae` is `ae`, as on the site."""
        return re.sub(r'^\d+[a-zA-Z0-9]*_', '', self.path.stem)

    @property
    def part(self):
        """The folder under nbs/, or '' for the landing page."""
        folder = self.path.parent.name
        return '' if folder == settings(self.root)['nbs_path'] else folder

    @property
    def is_chapter(self): return bool(re.match(r'[1-6]_', self.part))

    @property
    def module(self):
        """The module that it exports to, or None."""
        return next((c.flags['default_exp'] for c in self.cells if 'default_exp' in c.flags), None)

    @property
    def code_cells(self): return [c for c in self.cells if c.is_code]

    @property
    def markdown(self): return [c for c in self.cells if c.kind == 'markdown']


def notebooks(root=ROOT):
    """All notebooks, read."""
    return [Notebook(p, root) for p in notebook_paths(root)]


def write_notebook(path, *sources):
    """A small notebook at `path` for a test: code cells, and markdown.

    Markdown is a source that begins with one or two `#` and a space."""
    cells = []
    for i, source in enumerate(sources):
        cell = dict(id=f'{i:08x}', metadata={}, source=source)
        if source.startswith(('# ', '## ')): cell |= dict(cell_type='markdown')
        else: cell |= dict(cell_type='code', outputs=[], execution_count=None)
        cells.append(cell)
    kernel = dict(name='python3', language='python', display_name='python3')
    raw = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw), encoding='utf8')
    return path
