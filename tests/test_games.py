"""Players, turns and phases: what the house promises to every game, each asked of a tiny one."""
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from ad_course.check import BrokenPromise, check_detector
from ad_course.detector import Detector, _Training
from ad_course.networks import Critic, encoder, generator, gradient_penalty

X = np.random.default_rng(0).random((40, 1, 8, 8), dtype='float32')


@dataclass(kw_only=True, eq=False, repr=False)
class Duel(Detector):
    """Least-squares GAN with batch normalization on both sides; nothing is detached by hand."""
    epochs: int = 2
    batch_size: int = 8
    verbose: bool = False
    loss_falls = False

    def networks(self, shape):
        return dict(critic=Critic(shape, norm=True), generator=generator(shape, 4, norm=True))

    def optimizers(self):
        """One Adam each."""
        return {name: self.adam(name, betas=(.5, .999)) for name in ('critic', 'generator')}

    def turns(self):
        """Critic, then generator."""
        return [('critic', self.critic_loss), ('generator', self.generator_loss)]

    def fake(self, xb): return self.nets_.generator(torch.randn(len(xb), 4))

    def critic_loss(self, xb):
        return dict(real=(self.nets_.critic(xb) - 1).square(),
                    fake=self.nets_.critic(self.fake(xb)).square())

    def generator_loss(self, xb): return dict(fool=(self.nets_.critic(self.fake(xb)) - 1).square())
    def image_score(self, xb): return -self.nets_.critic(xb)


def state(net): return {k: v.clone() for k, v in net.state_dict().items()}


def changed(before, net):
    return {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}


class Watched(Duel):
    """Keeps, for every move, which tensors it has changed."""
    def descend(self, player, loss, xb, *yb):
        before = state(self.nets_)
        terms = super().descend(player, loss, xb, *yb)
        self.moves_ = getattr(self, 'moves_', []) + [[player, *sorted(changed(before, self.nets_))]]
        return terms


def owners(moves): return [(m[0], {k.split('.')[0] for k in m[1:]}) for m in moves]


def test_a_loss_moves_its_own_player_and_no_other_statistics_included():
    moves = Watched(epochs=1).fit(X).moves_
    assert owners(moves) == [('critic', {'critic'}), ('generator', {'generator'})] * 5
    names = {k for m in moves for k in m[1:]}
    assert any('running_mean' in k for k in names), 'the players move statistics of their own'


def test_mutants_of_the_move_are_seen():
    """Without `inputs=`, and without the guard of the statistics, the test above fails."""
    class Leaks(Watched):
        def optimizers(self):
            """Every optimizer holds both networks."""
            return {name: self.adam('critic', 'generator') for name in ('critic', 'generator')}
    assert owners(Leaks(epochs=1).fit(X).moves_)[0][1] == {'critic', 'generator'}
    with pytest.MonkeyPatch.context() as patch:
        from ad_course import detector
        patch.setattr(detector._Player, 'alone', lambda self: warnings.catch_warnings())
        assert owners(Watched(epochs=1).fit(X).moves_)[0][1] == {'critic', 'generator'}


def test_gradients_of_others_are_not_even_computed():
    class Looks(Duel):
        def descend(self, player, loss, xb, *yb):
            for net in self.nets_.values(): net.zero_grad()
            terms = super().descend(player, loss, xb, *yb)
            for name, net in self.nets_.items():
                for p in net.parameters(): assert (p.grad is not None) == (name == player)
            return terms
    Looks(epochs=1).fit(X)


def test_a_loss_that_does_not_reach_its_player_is_an_error():
    class Constant(Duel):
        def generator_loss(self, xb):
            return dict(fool=self.nets_.critic(self.fake(xb).detach()).detach())
    with pytest.raises(ValueError, match="loss of 'generator' must depend"): Constant().fit(X)


@pytest.mark.parametrize('turns, match', [
    ([], 'at least one player'), ([('nobody', len)], "one of 'critic', 'generator'; got 'nobody'"),
    *((turn, 'a turn must be') for turn in ([('critic',)], [('critic', 3)], ['critic'],
                                            [('critic', len, 0)], [('critic', len, True)]))])
def test_turns_that_are_none_are_refused(turns, match):
    class Wrong(Duel):
        def turns(self):
            """Not turns."""
            return turns
    with pytest.raises(ValueError, match=match): Wrong().fit(X)


# ---------------------------------------------------------------- who moves how often
def test_a_player_twice_on_a_batch_moves_twice_and_records_a_mean():
    class Twice(Watched):
        def turns(self):
            """The critic twice."""
            (critic, generator) = super().turns()
            return [critic, critic, generator]
    d = Twice(epochs=1, batch_size=40).fit(X)
    assert [m[0] for m in d.moves_] == ['critic', 'critic', 'generator']
    assert set(d.history_) == {'critic/real', 'critic/fake', 'generator/fool', 'seconds'}


def test_means_are_over_the_images_that_gave_the_term():
    """Twenty-one images in batches of 4, 4, 4, 4, 5; the generator moves on every second batch."""
    class Rare(Duel):
        def turns(self):
            """The generator on every second batch."""
            return [('critic', self.critic_loss), ('generator', self.counted, 2)]
        def counted(self, xb):
            self.seen_ = getattr(self, 'seen_', []) + [len(xb)]
            return dict(size=super().generator_loss(xb)['fool'] * 0 + len(xb))
    d = Rare(epochs=2, batch_size=4).fit(X[:21])
    assert d.seen_ == [4, 4, 4, 4, 5]
    np.testing.assert_allclose(d.history_['generator/size'], [4, (16 + 16 + 25) / 13])


def test_one_player_has_plain_names_and_several_have_their_own():
    class Alone(Duel):
        def turns(self):
            """The critic alone."""
            return [('critic', self.critic_loss)]
    assert set(Alone(epochs=1).fit(X).history_) == {'real', 'fake', 'seconds'}


def test_several_optimizers_of_one_player():
    """A network by Adam and a center by gradient descent, both moved by one loss."""
    class Center(Detector):
        def networks(self, shape): return dict(encoder=encoder(shape, 3))
        def optimizers(self):
            """Adam for the network, SGD for the center."""
            self.center_ = nn.Parameter(torch.ones(3))
            return dict(all=[self.adam('encoder'), torch.optim.SGD([self.center_], lr=.1)])
        def loss(self, xb):
            return dict(distance=(self.nets_.encoder(xb) - self.center_).square().sum(1))
        def image_score(self, xb):
            return (self.nets_.encoder(xb) - self.center_).square().sum(1).detach()
    d, raw = (Center(epochs=n, verbose=False).fit(X) for n in (2, 0))
    assert not torch.equal(d.center_, raw.center_) and changed(raw.nets_.state_dict(), d.nets_)
    by_hand = Center(epochs=0, verbose=False).fit(X)
    c, xb = nn.Parameter(by_hand.center_.detach().clone()), torch.tensor(X)
    optimizer = torch.optim.SGD([c], lr=.1)
    (by_hand.nets_.encoder(xb) - c).square().sum(1).mean().backward()
    optimizer.step()
    once = Center(epochs=1, verbose=False).fit(X)
    torch.testing.assert_close(once.center_.detach(), c.detach())


# ---------------------------------------------------------------- phases
class Phases(Duel):
    """The critic alone, then the game; looks at the generator while it must be still."""
    def train(self, data):
        """Two runs."""
        before = state(self.nets_.generator)
        self.run(data, 2, turns=[('critic', self.watching)], label='alone/', after_epoch=self.note)
        assert not changed(before, self.nets_.generator)
        self.run(data, self.epochs)

    def watching(self, xb):
        assert self.nets_.critic.training and not self.nets_.generator.training
        return self.critic_loss(xb)

    def note(self, data, epoch): self.noted_ = getattr(self, 'noted_', []) + [epoch]

    def after_epoch(self, data, epoch):
        """Of the game alone."""
        self.games_ = getattr(self, 'games_', []) + [epoch]


def test_phases():
    d = Phases(epochs=3).fit(X)
    assert d.noted_ == [1, 2] and d.games_ == [1, 2, 3]
    assert len(d.history_['alone/real']) == 2 and len(d.history_['critic/real']) == 3
    assert len(d.history_['seconds']) == 5


def test_the_batches_of_a_second_run_are_not_those_of_the_first():
    class Orders(Duel):
        def train(self, data):
            """Three runs of one epoch."""
            for _ in range(3): self.run(data, 1, turns=[('critic', self.noting)])
        def noting(self, xb):
            self.first_ = getattr(self, 'first_', []) + [xb.sum().item()]
            return self.critic_loss(xb)
    seen = np.array(Orders(batch_size=20).fit(X).first_).reshape(3, 2)
    assert len({tuple(row) for row in seen}) == 3, 'every run repeats the same order'


def test_without_batch_statistics_no_statistic_moves_and_weights_do():
    class Frozen(Duel):
        def train(self, data):
            """One run in eval mode."""
            before = state(self.nets_)
            self.run(data, 1, batch_statistics=False)
            self.moved_ = sorted(changed(before, self.nets_))
    moved = Frozen().fit(X).moved_
    assert moved and not any('running' in k or 'num_batches' in k for k in moved)


def test_after_epoch_of_a_renamed_term_still_counts():
    """Epochs were counted by the length of a list in the history, under a name."""
    class Stops(Duel):
        def after_epoch(self, data, epoch):
            """Ends after the second."""
            return epoch == 2
    assert len(Stops(epochs=9).fit(X).history_['seconds']) == 2


# ---------------------------------------------------------------- averages
def test_averages_score_and_are_exponential():
    """The average after n updates: w_1 first, then decay * average + (1 - decay) * w."""
    class Averaged(Duel):
        def averaged(self): return dict(critic=.75)
        def descend(self, player, loss, xb, *yb):
            terms = super().descend(player, loss, xb, *yb)
            if player == 'generator':
                self.path_ = getattr(self, 'path_', []) + [state(self.nets_.critic)]
            return terms
    d = Averaged(epochs=2).fit(X)
    assert len(d.path_) == 10
    for name, last in d.nets_.critic.state_dict().items():
        if not last.is_floating_point(): continue
        mean = d.path_[0][name]
        for step in d.path_[1:]: mean = .75 * mean + .25 * step[name]
        torch.testing.assert_close(last, mean)
    assert changed(d.path_[-1], d.nets_.critic), 'the last weights score, not their average'


# ---------------------------------------------------------------- interruptions
class Stopped(Phases):
    """The stop button at a move of the critic, in the phase and batch that `at` names."""
    at = 0
    def critic_loss(self, xb):
        self.moves_ = getattr(self, 'moves_', 0) + 1
        if self.moves_ == self.at: raise KeyboardInterrupt
        return super().critic_loss(xb)


@pytest.mark.parametrize('at', [1, 2, 10, 11])
def test_an_interruption_before_every_network_has_moved_goes_through(at):
    d, old = Stopped(), Stopped(epochs=1).fit(X)
    d.at, before = at, dict(vars(old))
    old.at = at
    for detector in (d, old):
        with pytest.raises(KeyboardInterrupt): detector.fit(X)
    assert not [k for k in vars(d) if k.endswith('_')]
    assert {k: v for k, v in vars(old).items() if k != 'at'} == before


def test_an_interruption_in_the_game_keeps_what_was_learned():
    d = Stopped()
    d.at = 12          # 2 epochs of 5 moves alone, one round of the game
    with pytest.warns(UserWarning, match='interrupted'): d.fit(X)
    assert np.isfinite(d.decision_function(X)).all() and np.isfinite(d.threshold_)


def test_a_network_that_never_learns_does_not_forbid_an_interruption():
    class Backbone(Duel):
        def networks(self, shape):
            frozen = encoder(shape, 2).requires_grad_(False)
            return super().networks(shape) | dict(backbone=frozen)
        def after_epoch(self, data, epoch):
            """Presses stop."""
            raise KeyboardInterrupt
    with pytest.warns(UserWarning, match='interrupted'): Backbone().fit(X)


# ---------------------------------------------------------------- a penalty with a gradient in it
@dataclass(kw_only=True, eq=False, repr=False)
class WGANGP(Duel):
    """A critic of Wasserstein distance with gradient penalty, four times for each generator."""
    penalty_weight: float = 10.

    def networks(self, shape):
        return dict(critic=Critic(shape), generator=generator(shape, 4))

    def turns(self):
        """Four moves of the critic, one of the generator."""
        return [('critic', self.critic_loss)] * 4 + [('generator', self.generator_loss)]

    def critic_loss(self, xb):
        fake = self.fake(xb)
        penalty = gradient_penalty(self.nets_.critic, xb, fake)
        return dict(wasserstein=self.nets_.critic(fake) - self.nets_.critic(xb),
                    penalty=self.penalty_weight * penalty)

    def generator_loss(self, xb): return dict(fool=-self.nets_.critic(self.fake(xb)))


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_a_wgan_gp_trains_and_its_critic_has_slope_one(precision):
    d = WGANGP(epochs=30, lr=2e-3, precision=precision).fit(X)
    penalty = d.history_['critic/penalty']
    assert penalty[-1] < .5 * max(penalty[:3]) and penalty[-1] < 1
    d.nets_.requires_grad_(True)
    x = torch.tensor(X, requires_grad=True)
    slope, = torch.autograd.grad(d.nets_.critic(x).sum(), x)
    assert .5 < slope.flatten(1).norm(dim=1).mean() < 1.5


def test_without_the_penalty_the_slope_runs_away():
    d = WGANGP(epochs=30, lr=2e-3, penalty_weight=0.).fit(X)
    x = torch.tensor(X, requires_grad=True)
    slope, = torch.autograd.grad(d.nets_.critic(x).sum(), x)
    assert slope.flatten(1).norm(dim=1).mean() > 3


# ---------------------------------------------------------------- check_detector and games
def test_which_losses_must_fall_can_be_said_by_phase_and_player():
    from ad_course.check import falling_losses
    d = Phases(epochs=2)
    d.history_ = {'alone/real': [3., 1.], 'alone/fake': [1., 2.], 'critic/real': [1., 4.],
                  'generator/fool': [1., 5.], 'seconds': [1., 9.]}
    assert falling_losses(d) == {}
    d.loss_falls = True
    assert falling_losses(d) == dict(alone=(4., 3.), critic=(1., 4.), generator=(1., 5.))
    d.loss_falls = ('alone',)
    assert falling_losses(d) == dict(alone=(4., 3.))


class MixesInATurn(Duel):
    """No `loss` at all, and a loss in `turns` in which images meet."""
    def turns(self):
        """The critic alone, on differences of images."""
        return [('critic', self.mixed)]
    def mixed(self, xb):
        opinion = self.nets_.critic(xb)
        return dict(difference=(opinion - opinion[:1]).square())


def test_images_that_mix_in_a_turn_are_seen():
    only = ['images_do_not_mix']
    with pytest.raises(BrokenPromise) as caught: check_detector(MixesInATurn(), only)
    assert list(caught.value.broken) == only == check_detector(Duel(), only)


def test_a_player_that_does_not_move_is_seen():
    class Lazy(Duel):
        def turns(self):
            """The generator never moves."""
            return [('critic', self.critic_loss)]
    with pytest.raises(BrokenPromise, match="'generator' did not move"):
        check_detector(Lazy(), ['learns'])


def test_the_floors_of_the_detector_use_only_what_lies_below():
    """Every `self.name` in a floor is defined there or below: an editor can follow it."""
    import ast, inspect, textwrap
    allowed = {'nets_', 'optimizers_', 'shape_', 'history_', 'threshold_', '_progress', '__dict__'}
    for cls in reversed(Detector.__mro__):
        if cls.__module__ != Detector.__module__: continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
                and isinstance(n.value, ast.Name) and n.value.id == 'self'}
        known = {name for base in cls.__mro__ for name in vars(base)}
        fields = set(getattr(cls, '__dataclass_fields__', {}))
        unknown = used - known - fields - allowed
        assert not unknown, f'{cls.__name__}: {unknown}'
    assert _Training in Detector.__mro__
