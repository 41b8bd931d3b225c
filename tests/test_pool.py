"""The model pool. Departure D5 of the released code must not be the default."""

import torch

from distillers.pool import Pool

NETWORK = dict(
    arch="convnet3",
    image_size=32,
    num_outputs=4,
    width=0.01,
    device=torch.device("cpu"),
    lr=0.1,
    weight_decay=1e-3,
)


def make_set(m=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(m, 3, 32, 32, generator=g), torch.randn(m, 4, generator=g)


def draw_members(pool, draws, keep_count=False):
    """Draw members without training them; return the steps of the member at each draw."""
    g = torch.Generator().manual_seed(0)
    seen = []
    for member in pool.members:
        member.train_step = lambda x, y, member=member: setattr(member, "steps", member.steps + 1)
    untrained = set()
    for _ in range(draws):
        member = pool.draw(g)
        seen.append(0 if id(member) in untrained else member.steps)
        before = member.steps
        pool.advance(member, None, None, keep_count)
        if before >= pool.max_steps:
            untrained.add(id(member))
        else:
            untrained.discard(id(member))
    return seen


def test_step_counts_restart_and_untrained_members_stay_rare():
    t, size = 20, 4
    pool = Pool(size, t, torch.Generator().manual_seed(1), **NETWORK)
    for member, age in zip(pool.members, pool.ages, strict=True):
        member.steps = age
    seen = draw_members(pool, 10 * t * size)
    late = seen[len(seen) // 2 :]
    share = sum(steps == 0 for steps in late) / len(late)
    assert 0.5 / (t + 1) < share < 2 / (t + 1)
    assert set(late) == set(range(t + 1))  # every age occurs, including T


def test_released_pool_ends_with_untrained_members_only():
    t, size = 20, 4
    pool = Pool(size, t, torch.Generator().manual_seed(1), **NETWORK)
    seen = draw_members(pool, 10 * t * size, keep_count=True)
    assert set(seen[len(seen) // 2 :]) == {0}


def test_reset_reinitialises_network_optimiser_and_count():
    pool = Pool(1, 2, torch.Generator().manual_seed(0), **NETWORK)
    member, (x, y) = pool.members[0], make_set()
    first = member.network.fc.weight.detach().clone()
    for expected in (1, 2, 0, 1):
        pool.advance(member, x, y)
        assert member.steps == expected
        if expected == 0:
            assert not torch.equal(member.network.fc.weight, first)
            assert not member.optimizer.state  # no momentum from the previous network
            norm = member.network.features[1]
            assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()
    assert member.optimizer.state


def test_initial_ages_are_below_t():
    pool = Pool(50, 5, torch.Generator().manual_seed(0), **NETWORK)
    assert set(pool.ages) == {1, 2, 3, 4}
    assert Pool(3, 1, torch.Generator().manual_seed(0), **NETWORK).ages == [1, 1, 1]


def test_train_step_is_one_sgd_step_on_the_mean_squared_error():
    pool = Pool(1, 5, torch.Generator().manual_seed(0), **NETWORK)
    member, (x, y) = pool.members[0], make_set()
    before = {name: p.detach().clone() for name, p in member.network.named_parameters()}
    loss = (member.network.train()(x) - y).square().mean()
    grads = dict(
        zip(before, torch.autograd.grad(loss, list(member.network.parameters())), strict=True)
    )
    member.network.load_state_dict(before, strict=False)
    member.train_step(x, y)
    for name, p in member.network.named_parameters():
        torch.testing.assert_close(
            p.detach(), before[name] - 0.1 * (grads[name] + 1e-3 * before[name])
        )


def test_embedding_does_not_change_weights_or_running_statistics():
    pool = Pool(1, 5, torch.Generator().manual_seed(0), **NETWORK)
    member, (x, _) = pool.members[0], make_set()
    before = {name: value.clone() for name, value in member.network.state_dict().items()}
    x.requires_grad_()
    member.embed(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in member.network.parameters())
    assert all(
        torch.equal(value, before[name]) for name, value in member.network.state_dict().items()
    )
