"""Steps of plain gradient descent, and the gradient through all of them in the memory of one (mtt,
ssl_bilevel)."""

import torch


def flatten_parameters(network):
    """All parameters as one vector (p,), in the order of `named_parameters`."""
    return torch.cat([value.detach().reshape(-1) for value in network.parameters()])


def unflatten_parameters(theta, network):
    """The vector (p,) as a dict of parameters for `functional_call`."""
    shapes = {name: value.shape for name, value in network.named_parameters()}
    parts = theta.split([shape.numel() for shape in shapes.values()])
    return {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def descend(gradient, start, batches, rate):
    """theta_0 = `start` (p,) and theta_{n+1} = theta_n - rate g_n for each of `batches`, as a list
    without a graph.

    `gradient(theta, batch, create_graph)` returns g_n (p,); a batch is a tuple of tensors.
    """
    thetas = [start.detach()]
    for batch in batches:
        theta = thetas[-1].detach().requires_grad_()
        thetas.append(
            thetas[-1] - rate * gradient(theta, [x.detach() for x in batch], create_graph=False)
        )
    return thetas


def backpropagate(gradient, thetas, batches, rate, v):
    """Take `v` (p,), the gradient by the last theta, back through the steps of `descend`.

    Returns, for each batch, a list of the gradients by its floating-point tensors; and the gradient
    by the rate. Only each theta_n is kept: with v the gradient by theta_{n+1}, that by theta_n is v
    - rate d(g_n v)/d theta_n, that by the batch -rate d(g_n v)/d batch, and the rate's grows by
    -g_n v. This is the gradient of the whole unrolled graph in the memory of one step.
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
