"""f-AnoGAN and GANomaly: `fit` against a plain PyTorch loop on the same networks; PyOD's AnoGAN.

Seconds a batch, memory, AUROC.

    python tests/benchmarks/train_gans.py --tasks digits images --rounds 5

The plain loops have the networks, losses and rates of our detectors, the same seed and batches.
They differentiate only what the one who moves needs, and GANomaly's rebuilds each batch once, for
both players. Every measurement is a process of its own; the contestants take turns.

PyOD's AnoGAN has linear layers of its own, here of our widths, and no part in the comparison of
AUROC: as of 3.6.7 it scores without the search that is the method (all images are held against one
and the same reconstruction), and its search while it fits moves generator and critic too."""
import contextlib
import json
import statistics
import sys
import time

import bench

# Name -> (method, who trains it). The plain loop of a method is what it is compared with.
CONTESTANTS = {
    'f-AnoGAN, plain loop': ('fanogan', 'loop'),
    'f-AnoGAN, ours': ('fanogan', 'fit'),
    'GANomaly, plain loop': ('ganomaly', 'loop'),
    'GANomaly, ours': ('ganomaly', 'fit'),
    'PyOD AnoGAN': ('anogan', 'pyod'),
}
PEERS = {'PyOD AnoGAN': ('pyod.models.anogan', "pip install -e '.[peers]' pandas")}
EPOCHS = dict(digits=100, images=10)   # 200 and 80 batches each


# ---------------------------------------------------------------- what is measured
def data(task, n):
    """(training images, test images, test labels, what they are): 8x8 digits, or 28x28 images."""
    if task == 'digits':
        from ad_course.data import digits
        found, name = digits(3), '8x8 digits, 3 is normal'
    else:
        found, name = bench.mnist_task(3), 'MNIST, 3 is normal'
        if not found: found, name = bench.made_up(n)
    x, x_test = bench.as_floats(found.x_train[:n]), bench.as_floats(found.x_test[:1000])
    return x, x_test, found.y_test[:1000], f'{name}: {len(x)} images'


def detector(method, epochs):
    """Our detector; the plain loops read their settings from it."""
    from ad_course.fanogan import FAnoGAN
    from ad_course.ganomaly import GANomaly
    cls = dict(fanogan=FAnoGAN, ganomaly=GANomaly)[method]
    return cls(epochs=epochs, batch_size=64, device='cpu', verbose=False)


def adam(nets, d, lr, beta1=.9):
    """Adam over networks: all weights in one pass, as in our detectors."""
    import torch
    weights = [p for net in nets for p in net.parameters()]
    return torch.optim.Adam(weights, lr=lr, betas=(beta1, .999), fused=True)


def total(terms):
    """The sum of the means of a loss's terms."""
    return sum(term.mean() for term in terms.values())


def move(optimizer, loss):
    """One update."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@contextlib.contextmanager
def still(*nets):
    """Inside, gradients pass through these networks and are not computed for their weights."""
    for net in nets: net.requires_grad_(False)
    try: yield
    finally:
        for net in nets: net.requires_grad_(True)


def passes(x, d, epochs, order, update):
    """`update(batch, number)` for all batches of so many epochs; seconds a batch, by epoch."""
    import torch
    seconds, number = [], 0
    for epoch in range(epochs):
        start, running = time.perf_counter(), 0.
        batches = torch.randperm(len(x), generator=order).split(d.batch_size)
        for index in batches:
            number += 1
            running += update(x[index].contiguous(memory_format=torch.channels_last), number)
        seconds.append((time.perf_counter() - start) / len(batches))
    return seconds


def networks(d, shape):
    """The networks of our detector, with its seed and in its memory order."""
    import torch
    torch.manual_seed(d.seed)
    return torch.nn.ModuleDict(d.networks(shape)).to(memory_format=torch.channels_last)


def fanogan_plainly(d, x):
    """f-AnoGAN; (seconds a batch of each phase, a function of a batch: its scores)."""
    import torch
    from ad_course.fanogan import residual
    from ad_course.networks import gradient_penalty
    from ad_course.wgan import wasserstein_critic, wasserstein_generator
    nets = networks(d, x.shape[1:])
    generator, critic, encoder = nets.generator, nets.critic, nets.encoder
    of_critic = adam([critic], d, d.critic_lr, d.beta1)
    of_generator = adam([generator], d, d.lr, d.beta1)
    of_encoder = adam([encoder], d, d.encoder_lr)
    def game(xb, number):
        with torch.no_grad(): fake = generator(torch.randn(len(xb), d.latent_dim))
        loss = total(wasserstein_critic(critic(xb), critic(fake)))
        loss = loss + d.penalty_weight * gradient_penalty(critic, xb, fake).mean()
        running = move(of_critic, loss)
        if number % d.n_critic: return running
        with still(critic):
            fake = generator(torch.randn(len(xb), d.latent_dim))
            return running + move(of_generator, total(wasserstein_generator(critic(fake))))
    def parts(xb):
        rebuilt = generator(encoder(xb))
        with torch.no_grad(): seen = critic.features(xb)
        return residual(xb, rebuilt), residual(seen, critic.features(rebuilt))
    def score(xb):
        image, features = parts(xb)
        return image + d.feature_weight * features
    order = torch.Generator().manual_seed(d.seed)
    seconds = dict(game=passes(x, d, d.epochs, order, game))
    generator.eval(), critic.eval()
    with still(generator, critic):
        learn = lambda xb, number: move(of_encoder, score(xb).mean())
        seconds['encoder'] = passes(x, d, d.epochs, order, learn)
    nets.eval()
    return seconds, score


def ganomaly_plainly(d, x):
    """GANomaly; (seconds a batch, a function of a batch: its scores)."""
    import torch
    from ad_course.gan import cross_entropy_critic
    from ad_course.ganomaly import contextual, feature_matching, latent_difference
    nets = networks(d, x.shape[1:])
    encoder, decoder, second, critic = (
        nets[k] for k in ('encoder', 'decoder', 'second_encoder', 'critic'))
    of_critic = adam([critic], d, d.critic_lr, d.beta1)
    of_generator = adam([encoder, decoder, second], d, d.lr, d.beta1)
    def game(xb, number):
        code = encoder(xb)
        rebuilt = decoder(code)
        loss = total(cross_entropy_critic(critic(xb), critic(rebuilt.detach())))
        running = move(of_critic, loss)
        with torch.no_grad(): seen = critic.features(xb)
        with still(critic):
            matched = feature_matching(seen, critic.features(rebuilt))
            loss = (d.adversarial_weight * matched
                    + d.contextual_weight * contextual(xb, rebuilt)
                    + d.encoder_weight * latent_difference(code, second(rebuilt), 2)).mean()
            return running + move(of_generator, loss)
    def score(xb):
        code = encoder(xb)
        return latent_difference(code, second(decoder(code)), d.score_power)
    seconds = dict(game=passes(x, d, d.epochs, torch.Generator().manual_seed(d.seed), game))
    nets.eval()
    return seconds, score


def train_plainly(method, x, epochs):
    """A plain loop; (seconds a batch of each phase, a function from images to scores)."""
    import numpy as np
    import torch
    d = detector(method, epochs)
    train = dict(fanogan=fanogan_plainly, ganomaly=ganomaly_plainly)[method]
    seconds, of_batch = train(d, torch.from_numpy(x))
    @torch.no_grad()
    def score(images):
        batches = torch.from_numpy(images).split(d.batch_size)
        return torch.cat([of_batch(b) for b in batches]).numpy()
    np.quantile(score(x), 1 - d.contamination)   # the others set a threshold too
    return seconds, score


def train_ours(method, x, epochs):
    """`fit` of the course."""
    d = detector(method, epochs).fit(x)
    a_batch = [s / -(-len(x) // d.batch_size) for s in d.history_['seconds']]
    parts = dict(game=a_batch[:epochs], encoder=a_batch[epochs:])
    return {name: seconds for name, seconds in parts.items() if seconds}, d.decision_function


class Ticks(list):
    """A list that notes when something is appended."""
    def __init__(self): self.times = []
    def append(self, value):
        self.times.append(time.perf_counter())
        super().append(value)


def train_pyod(x, epochs):
    """PyOD's AnoGAN, its layers as wide as our linear ones, without dropout, as many epochs."""
    import torch
    from pyod.models.anogan import AnoGAN
    ours = detector('fanogan', epochs)
    torch.manual_seed(0)
    hidden, rates = 8 * ours.width, dict(learning_rate=ours.lr, dropout_rate=0.)
    d = AnoGAN(epochs=epochs, batch_size=ours.batch_size, latent_dim_G=ours.latent_dim,
               G_layers=[hidden], D_layers=[hidden, 64], activation_hidden='relu',
               output_activation='sigmoid', device='cpu', **rates)
    d.hist_loss_generator = ticks = Ticks()
    d.fit(bench.flat(x))
    seconds = [b - a for a, b in zip(ticks.times, ticks.times[1:])]
    return dict(game=seconds or [0.]), lambda images: d.decision_function(bench.flat(images))


def measure(contestant, task, images, epochs, threads):
    """All numbers of one contestant, as a dict."""
    import torch
    torch.set_num_threads(threads)
    from ad_course.metrics import auroc
    import ad_course.fanogan, ad_course.ganomaly    # imports count for nobody
    if contestant in PEERS: __import__(PEERS[contestant][0])
    method, who = CONTESTANTS[contestant]
    x, x_test, y_test, what = data(task, images)
    trainers = dict(loop=train_plainly, fit=train_ours)
    def train(images, passes):
        if who == 'pyod': return train_pyod(images, passes)
        return trainers[who](method, images, passes)
    (seconds, score), out = bench.measured(train, x, epochs or EPOCHS[task], few=128)
    scores = score(x_test)
    return out | seconds | dict(auroc=auroc(y_test, scores), data=what, scores=scores.tolist())


# ---------------------------------------------------------------- the table
HEAD = ['task', 'contestant', 'ms a batch, median', 'min', 'ratio', "of the encoder's", 'ratio',
        'CPU s of fit, min', 'ratio', 'peak, MiB', 'AUROC']


def table(results):
    """Markdown. results: (task, contestant) -> measurements, one a round."""
    rows = []
    pooled = lambda found, part: [s for m in found for s in m.get(part, [])]
    for (task, name), found in results.items():
        base = results.get((task, f'{name.split(",")[0]}, plain loop'))
        def middle(part):
            """Median milliseconds, and their ratio to the plain loop's."""
            if not (own := pooled(found, part)): return ['', '']
            own = statistics.median(own)
            ratio = base and f'{own / statistics.median(pooled(base, part)):.2f}'
            return [f'{1000 * own:.2f}', ratio or '']
        ms, ratio = middle('game')
        cpu = min(m['cpu'] for m in found)
        of_base = f'{cpu / min(m["cpu"] for m in base):.2f}' if base else ''
        memory, auroc = (bench.median(found, k) for k in ('memory', 'auroc'))
        rows.append([task, name, ms, f'{1000 * min(pooled(found, "game")):.2f}', ratio,
                     *middle('encoder'), f'{cpu:.2f}', of_base, f'{memory:.0f}', f'{auroc:.3f}'])
    return bench.markdown(HEAD, rows)


def apart(results, task, method):
    """How far the scores of ours and of the plain loop lie apart at most, relative to the mean."""
    ours, plain = (results[task, f'{method}, {who}'][-1]['scores']
                   for who in ('ours', 'plain loop'))
    most = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    return f'{method} on {task}: {most / statistics.mean(plain):.1e}'


def main():
    """The command line."""
    parser = bench.arguments(__doc__, rounds=5)
    parser.add_argument('--tasks', nargs='+', default=list(EPOCHS), choices=EPOCHS)
    parser.add_argument('--images', type=int, default=512, help='at most so many for training')
    parser.add_argument('--epochs', type=int, help=f'of the game and of the encoder: {EPOCHS}')
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    if args.measure:
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(args.measure, args.tasks[0], args.images, args.epochs, args.threads)
        return print(json.dumps(found))
    fresh = lambda task, name: bench.in_a_process_of_its_own(
        __file__, name, args.threads, tasks=task, images=args.images, epochs=args.epochs)
    say = lambda found: f'{1000 * statistics.median(found["game"]):.2f} ms a batch'
    contestants = bench.without_missing(CONTESTANTS, PEERS, args.no_peers)
    keys = [(task, name) for task in args.tasks for name in contestants]
    results = bench.rounds(args.rounds, keys, fresh, say)
    import torch
    what = '; '.join(results[task, 'GANomaly, ours'][0]['data'] for task in args.tasks)
    print(f'\n{what}; batches of 64, {args.rounds} rounds, {args.threads} thread(s); '
          f'torch {torch.__version__}\n')
    print(table(results))
    print('\nLargest difference of a score to that of the plain loop, relative to its mean: '
          + ', '.join(apart(results, t, m) for t in args.tasks for m in ('f-AnoGAN', 'GANomaly')))


if __name__ == '__main__': main()
