"""Gradient descent, and the gradient through all its steps with the memory of one step.

Used by mtt, mkdt and ssl_bilevel.
"""

import torch


def flatten_parameters(network):
    """Return all parameters as one vector (p,), in the order of `named_parameters`."""
    return torch.cat([value.detach().reshape(-1) for value in network.parameters()])


def unflatten_parameters(theta, network):
    """Return the vector (p,) as a dict of parameters for `functional_call`."""
    shapes = {name: value.shape for name, value in network.named_parameters()}
    parts = theta.split([shape.numel() for shape in shapes.values()])
    return {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def descend(gradient, start, batches, rate):
    """Return theta_0 = `start` and theta_{n+1} = theta_n - rate g_n, one step per batch.

    Args:
        gradient: `gradient(theta, batch, create_graph)` returns g_n (p,).
        start: initial parameters (p,).
        batches: list of tuples of tensors.
        rate: learning rate.

    Returns:
        List of all theta_n (p,), detached.
    """
    thetas = [start.detach()]
    for batch in batches:
        theta = thetas[-1].detach().requires_grad_()
        thetas.append(
            thetas[-1] - rate * gradient(theta, [x.detach() for x in batch], create_graph=False)
        )
    return thetas


def backpropagate(gradient, thetas, batches, rate, v):
    """Backpropagate a gradient through the steps of `descend`.

    The result is the gradient of the whole unrolled graph. Only the theta_n are stored, so the
    memory is that of one step. If v is the gradient with respect to theta_{n+1}, then

    - the gradient with respect to theta_n is v - rate d(g_n v)/d theta_n,
    - the gradient with respect to the batch is -rate d(g_n v)/d batch,
    - the step adds -g_n v to the gradient with respect to the rate.

    Args:
        gradient, batches, rate: as for `descend`.
        thetas: result of `descend`.
        v: gradient (p,) with respect to the last theta.

    Returns:
        For each batch, the list of gradients with respect to its floating-point tensors. The
        gradient () with respect to the rate.
    """
    by_rate, by_batch = torch.zeros((), dtype=v.dtype, device=v.device), []
    for theta, batch in zip(reversed(thetas[:-1]), reversed(batches), strict=True):
        theta = theta.detach().requires_grad_()
        batch = [x.detach().requires_grad_(x.is_floating_point()) for x in batch]
        product = gradient(theta, batch, create_graph=True) @ v
        by_theta, *parts = torch.autograd.grad(
            product, (theta, *(x for x in batch if x.requires_grad))
        )
        by_rate = by_rate - product.detach()
        by_batch.append([-rate * part for part in parts])
        v = v - rate * by_theta
    return by_batch[::-1], by_rate
