"""Deep SVDD and ACHC: `fit` against a plain PyTorch loop on the same network, PyOD's and DeepOD's.

Processor time, memory, AUROC.

    python tests/benchmarks/train_deepsvdd.py --digits 2 5 --epochs 20 --rounds 2

One digit is normal: 70 % of it among the 10,000 MNIST test images are for training; the rest of it
and all others are scored. Every measurement is a process of its own; the contestants take turns."""
import contextlib
import json
import statistics
import sys

import bench

CODE_DIM, WIDTH, BATCH, LR, PRETRAIN_LR, DECAY = 128, 16, 64, 3e-4, 1e-3, 1e-6

# Name -> who trains it. The first is what the others are compared with.
CONTESTANTS = {
    'plain loop, our network': 'loop',
    'ours': 'fit',
    'ours, ACHC': 'achc',
    'plain loop, no warm start': 'loop cold',
    'ours, no warm start': 'fit cold',
    "ours, PyOD's layers": 'fit layers',
    'PyOD DeepSVDD': 'pyod',
    'DeepOD DeepSVDD': 'deepod',
    'PCA, 30 components': 'pca',
}
PEERS = {
    'PyOD DeepSVDD': ('pyod.models.deep_svdd', "pip install -e '.[peers]'"),
    'DeepOD DeepSVDD': ('deepod.models.tabular',
                        'pip install pandas, then pip install --no-deps deepod'),
}


# ---------------------------------------------------------------- what is measured
def data(digit, limit=None):
    """(training images, test images, test labels, what they are)."""
    import numpy as np
    task = bench.mnist_task(digit)
    if not task:
        task, name = bench.made_up(limit or 300, seed=digit)
        return task.x_train, task.x_test, task.y_test, name
    x, y = bench.as_floats(task.x_test), task.y_test
    normal = np.random.default_rng(0).permutation(np.flatnonzero(y == 0))
    chosen = normal[:int(.7 * len(normal))]
    train, rest = chosen[:limit], np.setdiff1d(np.arange(len(x)), chosen)
    return x[train], x[rest], y[rest], 'MNIST test images, 70 % of a digit'


def train_plainly(x, epochs, warm):
    """The loop as people write it, with all rules of Deep SVDD; a function: images -> scores."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from ad_course.networks import decoder, encoder
    torch.manual_seed(0)
    def contrast(x):
        x = torch.from_numpy(x)
        x = x - x.mean((1, 2, 3), keepdim=True)
        return x / x.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
    z = contrast(x)
    low, high = z.min(), z.max()
    loader = DataLoader(TensorDataset((z - low) / (high - low)), batch_size=BATCH, shuffle=True)
    net = encoder(x.shape[1:], CODE_DIM, 'conv', WIDTH, bias=False)
    if warm:
        dec = decoder(x.shape[1:], CODE_DIM, 'conv', WIDTH)
        optimizer = torch.optim.Adam([*net.parameters(), *dec.parameters()], lr=PRETRAIN_LR)
        for epoch in range(epochs):
            running = 0.
            for (batch,) in loader:
                optimizer.zero_grad()
                loss = (dec(net(batch)) - batch).square().mean()
                loss.backward()
                optimizer.step()
                running += loss.item() * len(batch)
    net.eval()
    with torch.no_grad(): c = torch.cat([net(b) for (b,) in loader]).mean(0)
    c[(c.abs() < .1) & (c < 0)] = -.1
    c[(c.abs() < .1) & (c >= 0)] = .1
    optimizer = torch.optim.Adam(net.parameters(), lr=LR, weight_decay=DECAY)
    for epoch in range(epochs):
        net.train()
        running = 0.
        for (batch,) in loader:
            optimizer.zero_grad()
            loss = (net(batch) - c).square().sum(1).mean()
            loss.backward()
            optimizer.step()
            running += loss.item() * len(batch)
    net.eval()
    def score(images):
        scaled = lambda b: (contrast(b.numpy()) - low) / (high - low)
        squared_distances = lambda b: (net(scaled(b)) - c).square().sum(1)
        batches = torch.from_numpy(images).split(BATCH)
        with torch.no_grad(): return torch.cat([squared_distances(b) for b in batches]).numpy()
    np.quantile(score(x), .95)
    return score


def train_ours(how, x, epochs):
    """`fit` of the course: warm or 'cold', or with 'layers' as PyOD has them."""
    from ad_course.deepsvdd import DeepSVDD
    if how == 'layers':   # linear ones of 64 and 32 units, no warm start
        params = dict(epochs=2 * epochs, pretrain_epochs=0, arch='mlp', width=8, code_dim=32)
    else:
        params = dict(epochs=epochs, pretrain_epochs=0 if how == 'cold' else epochs, lr=LR,
                      pretrain_lr=PRETRAIN_LR, weight_decay=DECAY, code_dim=CODE_DIM, width=WIDTH)
    return DeepSVDD(batch_size=BATCH, device='cpu', verbose=False, **params).fit(x)


def train_achc(x, epochs):
    """As many passes over the images: half before the game, half in it."""
    from ad_course.achc import ACHC
    sizes = dict(batch_size=BATCH, width=WIDTH)
    return ACHC(epochs=epochs, warm_up=epochs, device='cpu', verbose=False, **sizes).fit(x)


def train_peer(kind, x, epochs):
    """PyOD's or DeepOD's; they have no warm start and get its epochs too."""
    if kind == 'pyod':
        from pyod.models.deep_svdd import DeepSVDD
        own = dict(n_features=bench.flat(x).shape[1], random_state=0)
    else:
        from deepod.models.tabular import DeepSVDD
        own = dict(device='cpu', random_state=42)
    return DeepSVDD(epochs=2 * epochs, batch_size=BATCH, verbose=0, **own).fit(bench.flat(x))


def train(who, x, epochs):
    """One contestant; a function from images to scores."""
    kind, _, how = who.partition(' ')
    if kind == 'loop': return train_plainly(x, epochs, warm=not how)
    if kind == 'fit': return train_ours(how, x, epochs).decision_function
    if kind == 'achc': return train_achc(x, epochs).decision_function
    if kind == 'pca':
        from ad_course.baselines import PCA
        return PCA(components=min(30, len(x) - 1), device='cpu').fit(x).decision_function
    peer = train_peer(kind, x, epochs)
    return lambda images: peer.decision_function(bench.flat(images))


def measure(contestant, digit, limit, epochs, threads):
    """All numbers of one contestant, as a dict."""
    import torch
    torch.set_num_threads(threads)
    from ad_course.metrics import auroc
    import ad_course.achc, ad_course.baselines  # imports count for nobody
    if contestant in PEERS: __import__(PEERS[contestant][0])
    x, x_test, y_test, name = data(digit, limit)
    one = lambda images, passes: train(CONTESTANTS[contestant], images, passes)
    with contextlib.redirect_stdout(sys.stderr):
        score, out = bench.measured(one, x, epochs, few=2 * BATCH)
        quality = auroc(y_test, score(x_test))
    return out | dict(auroc=quality, data=f'{name}: {len(x)} images')


# ---------------------------------------------------------------- the table
def present(args):
    """The contestants that can take part; a line about each that cannot."""
    return bench.without_missing(CONTESTANTS, PEERS, args.no_peers)


def table(results, digits):
    """Markdown. results: (digit, contestant) -> measurements, one a round."""
    head = ['contestant', 'its CPU s, min', 'ratio', 'whole fit, s, median', 'peak, MiB',
            *(f'AUROC {k}' for k in digits)]
    names, rows = list(dict.fromkeys(name for _, name in results)), []
    cpu = lambda name: statistics.mean(min(m['cpu'] for m in results[k, name]) for k in digits)
    for name in names:
        found = [m for k in digits for m in results[k, name]]
        base = 'plain loop, no warm start' if name == 'ours, no warm start' else names[0]
        whole, memory = bench.median(found, 'whole'), bench.median(found, 'memory')
        rows.append([name, f'{cpu(name):.2f}', f'{cpu(name) / cpu(base):.2f}', f'{whole:.2f}',
                     f'{memory:.0f}',
                     *(f'{bench.median(results[k, name], "auroc"):.3f}' for k in digits)])
    return bench.markdown(head, rows, left=0)


def main():
    """The command line."""
    parser = bench.arguments(__doc__, rounds=2)
    parser.add_argument('--digits', type=int, nargs='+', default=[2, 5],
                        help='each in turn is normal; the defaults were chosen on 3 and 8')
    parser.add_argument('--images', type=int, help='at most so many training images')
    parser.add_argument('--epochs', type=int, default=20, help='of the warm start, and as many of '
                        'Deep SVDD; the peers, which have none, get the sum')
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    if args.measure:
        found = measure(args.measure, args.digits[0], args.images, args.epochs, args.threads)
        return print(json.dumps(found))
    fresh = lambda digit, name: bench.in_a_process_of_its_own(
        __file__, name, args.threads, digits=digit, images=args.images, epochs=args.epochs)
    say = lambda found: f'{found["cpu"]:.2f} CPU s, AUROC {found["auroc"]:.3f}'
    contestants = present(args)
    keys = [(digit, name) for digit in args.digits for name in contestants]
    results = bench.rounds(args.rounds, keys, fresh, say)
    what = results[keys[-1]][-1]['data']
    import torch
    print(f'\n{what}, batches of {BATCH}, {args.epochs} + {args.epochs} epochs, '
          f'{args.rounds} rounds, {args.threads} thread(s); torch {torch.__version__}\n')
    print(table(results, args.digits))


if __name__ == '__main__': main()
