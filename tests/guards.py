"""What keeps the house in order, as functions of sources: each is seen to fail in test_layout.py.

They read syntax trees, so that a module that does not import is judged all the same."""
import ast
import re
from collections import Counter

WIDTH = 100
# Hooks of a detector whose meaning an override changes: `help` must not show the default's words.
HOOKS = ('optimizers', 'turns', 'train', 'after_epoch', 'threshold_rule')


def long_lines(text, width=WIDTH):
    """The numbers of the lines of code that are longer than `width`."""
    return [number for number, line in enumerate(text.splitlines(), 1) if len(line) > width]


def against(found, what):
    """AssertionError where anything is found: names, or name -> what is wrong with it."""
    why = lambda name: f'{name}: {found[name]}' if isinstance(found, dict) else name
    assert not found, f'{what}: ' + '; '.join(map(why, sorted(found)))


# ---------------------------------------------------------------- classes
def classes(trees):
    """The classes defined at the top of these trees: name -> its definition."""
    return {s.name: s for tree in trees for s in tree.body if isinstance(s, ast.ClassDef)}


def bases(definition):
    """The last names of a class's bases: `nn.Module` is 'Module'."""
    plain = [b.value if isinstance(b, ast.Subscript) else b for b in definition.bases]
    return [b.attr if isinstance(b, ast.Attribute) else getattr(b, 'id', '') for b in plain]


def used_alone(trees):
    """The names that are used, not as a base; a class counts outside its own definition."""
    found = set()
    for statement in (s for tree in trees for s in tree.body):
        nodes = list(ast.walk(statement))
        as_base = {id(b) for d in nodes if isinstance(d, ast.ClassDef) for b in d.bases}
        named = [n for n in nodes if isinstance(n, (ast.Name, ast.Attribute))]
        names = {getattr(n, 'id', None) or n.attr for n in named if id(n) not in as_base}
        found |= names - {statement.name if isinstance(statement, ast.ClassDef) else None}
    return found


def never_at_work(exported, cells):
    """The public classes of the exported cells that no cell uses on their own."""
    public = [name for name in classes(exported) if not name.startswith('_')]
    used = used_alone(cells)
    return [name for name in public if name not in used]


def slices(defined, everywhere):
    """The public classes that are a base of exactly one other and never used alone.

    defined: trees of the package's modules; everywhere: those of the notebooks' cells as well."""
    all_of = [s for tree in defined for s in tree.body if isinstance(s, ast.ClassDef)]
    below = Counter(base for definition in all_of for base in bases(definition))
    public = [c.name for c in all_of if not c.name.startswith('_')]
    used = used_alone(everywhere)
    return [name for name in public if below[name] == 1 and name not in used]


def without_words_of_their_own(tree, hooks=HOOKS):
    """The overridden hooks, as `Class.hook`, that only inherit a docstring."""
    return [f'{c.name}.{f.name}' for c in tree.body if isinstance(c, ast.ClassDef) for f in c.body
            if isinstance(f, ast.FunctionDef) and f.name in hooks and not ast.get_docstring(f)]


def warnings_with_a_path(tree):
    """Line numbers where `warnings.warn` is called: it shows a file of ours; see `batches.tell`."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call))
    return sorted(n.lineno for n in calls if ast.unparse(n.func) in ('warnings.warn', 'warn'))


def calls_now(tree, name):
    """Whether running these statements calls `name`: not where it waits in another function."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.Lambda)): continue
        if isinstance(node, ast.Call) and getattr(node.func, 'id', None) == name: return True
        todo += ast.iter_child_nodes(node)
    return False


# ---------------------------------------------------------------- rooms
def circle(graph):
    """The modules of a circle of imports, in order, or None. graph: module -> what it imports."""
    def walk(name, path):
        if name in path: return [*path[path.index(name):], name]
        found = (walk(other, [*path, name]) for other in sorted(graph.get(name, ())))
        return next(filter(None, found), None)
    return next(filter(None, (walk(name, []) for name in sorted(graph))), None)


def upward(graph, floors, method):
    """The imports (module, imported) that lead to no floor below; methods may build on methods."""
    floor = lambda name: floors.get(name, method)
    allowed = lambda a, b: floor(b) < floor(a) or floor(a) == floor(b) == method
    return [(a, b) for a in sorted(graph) for b in sorted(graph[a]) if not allowed(a, b)]


def drawing(graph, floors, method):
    """The house as text: each module under its floor, the highest first, with what it imports."""
    levels = sorted({floors.get(name, method) for name in graph}, reverse=True)
    lines = []
    for level in levels:
        lines.append(f'floor {level:g}')
        lines += [f'  {name:<14}{"-> " if graph[name] else ""}{", ".join(sorted(graph[name]))}'
                  for name in sorted(graph) if floors.get(name, method) == level]
    return '\n'.join(lines)


# ---------------------------------------------------------------- words
def marks(tree):
    """What a tree calls things, as 'def x', 'class x', 'field x', 'param x', 'key x', 'name x'.

    A call without arguments is '.x()' as well: `d.generator()`, but not `nets.generator(z)`."""
    found = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Name): found.add(f'name {n.id}')
        elif isinstance(n, ast.Attribute): found.add(f'name {n.attr}')
        elif isinstance(n, ast.alias): found.add(f'name {(n.asname or n.name).split(".")[0]}')
        elif isinstance(n, ast.arg): found.add(f'param {n.arg}')
        elif isinstance(n, ast.keyword) and n.arg: found.add(f'key {n.arg}')
        elif isinstance(n, ast.FunctionDef): found.add(f'def {n.name}')
        elif isinstance(n, ast.ClassDef):
            fields = [getattr(s.target, 'id', '') for s in n.body if isinstance(s, ast.AnnAssign)]
            found |= {f'class {n.name}', *(f'field {name}' for name in fields)}
        elif isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute):
            if not n.args and not n.keywords: found.add(f'.{n.func.attr}()')
    return found


# What a thing was called -> what it is called. The pattern must match the whole of 'module: mark'
# (see `marks`), the module being that of the notebook or of the file of tests. Words that are
# common otherwise are old only where the thing lives.
ANY = r'\w*: (def|class|field|param|key|name) '
OLD_WORDS = {
    r'\w*: \.generator\(\)': 'rng()',
    r'(advae|deepsvdd|cwdsvdd|deepsad|achc): def distances?': 'squared_distance(s)',
    ANY + '(closed|exact|random)_norm|cae: def norms': 'squared_norm(s)',
    r'\w*: field kind|networks: param kind': 'arch',
    r'\w*: field (draws|samples)|vae: key samples': 'n_draws, max_samples',
    r'(cae|advae): def draw': 'decode',
    r'\w*: field (sparsity|contraction|consistency|kl)': '<term>_weight',
    r'\w*: field balance|advae: key balance': 'decoder_weight',
    r'\w*: field lam': 'sparse_weight',
    ANY + 'lambda1': 'subspace_weight',
    ANY + 'lambda2': 'orthogonality_weight',
    ANY + 'omega1': 'generated_weight',
    ANY + 'omega2': 'similarity_weight',
    ANY + '(invent|invented)': 'generate, fake',
    r'(advae|achc|cwdsvdd): def (game|play)': 'adversarial_terms, train_game',
    r'(cwdsvdd|achc|deepsvdd): def settle|\w*: \.settle\(\)': 'update_radius, at_rest',
    ANY + 'Places?|detector: def place': 'torch_device',
    r'detector: def source|\w*: name source_of': 'as_batches',
    r'(detector|check): def world|\w*: name leaves_the_world_alone': 'global_state',
    ANY + 'of_normal': 'map_normal',
    r'cwdsvdd: def view|' + ANY + 'Views|(cwdsvdd|batches): class Rows':
        'feature_rows, FeatureRows',
    ANY + 'look_at_labels': 'labelled_share',
    r'\w*: field guard|(deepsvdd|deepsad|cwdsvdd|achc): key guard': 'center_guard',
    r'\w*: field collapse|(deepsvdd|deepsad|cwdsvdd|achc): key collapse': 'collapse_below',
    r'\w*: field room': 'max_gb',
    r'\w*: field inner': 'epochs_per_round',
    r'\w*: field pace': 'penalty_lr_factor',
    r'classical: def keep|\w*: name unit_': 'as_learned, path_unit_',
    r'wrapping: def (joins|pieces)': 'single_linkage, n_pieces',
    r'wrapping: def (visiting|survivors)': 'candidate_order, outside_cover',
    r'\w*: field (floor|mixtures|trees)': 'variance_floor, n_components, n_trees',
    ANY + 'strangeness': 'prior_kl',
    ANY + '(first|second)_terms': 'decoder_terms, encoder_terms',
    r'(advae|achc|aae|cwdsvdd): key (near|passes|apart|exposed|caught|rebuilt)':
        'latent, recon_kl, margin_x, margin_z, fake_kl, reconstruction',
    r'vae: def weigh|\w*: \.weigh\(\)': 'log_joint',
    r'vae: def rates': 'kl_per_unit',
    r'cwdsvdd: def shares': 'label_weights',
    ANY + 'of_bank': 'bank_distances',
    ANY + '(make_wraps|some_wraps|_bank)': 'draw_bank, bank',
    ANY + '(look_for_collapse|response_)': 'check_collapse, spread_ratio_',
    r'\w*: field (reach|refresh)|(cwdsvdd|achc): key (reach|refresh)':
        'epsilon_factor, redraw_every',
    r'\w*: (field|param) chans|\w*: field drop': 'channels, lr_step',
    r'classical: def gaps': 'pairwise_distances',
    ANY + 'generator_of': 'numpy_rng',
    r'(data|surfaces): def shift|cae: class Shift': 'roll_patch, Bias',
    r'\w*: class (Terms|Reconstructs|Corrupts|Judged|Players|Wishes|Alternates)':
        'a noun, or nothing',
}


def old_words(tree, module, table=OLD_WORDS):
    """The words of a tree that have been replaced, each with what to write."""
    any_old = '|'.join(f'(?:{old})' for old in table)   # one search for a mark that is not old
    return {f'{mark}: write {new}' for mark in marks(tree)
            if re.fullmatch(any_old, f'{module}: {mark}') for old, new in table.items()
            if re.fullmatch(old, f'{module}: {mark}')}
