"""Features of a network in eval mode with fixed weights, the input of the ridge head."""

import copy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.checkpoint import checkpoint

# Images per pass on a CPU, so that a layer's output is still in the CPU cache for the next layer.
PIECE = 64


class Skeleton:
    """Features of all networks of one architecture, as a function of their tensors.

    Args:
        network: a `Network` of the architecture, which is not changed.
        compiled: compile the function, once for all networks.
    """

    def __init__(self, network, compiled=False):
        self.module = copy.deepcopy(network.features).eval().requires_grad_(False).to("meta")
        self.pairs = []  # names of convolutions and their batch norms
        for path, module in list(self.module.named_modules()):
            for (name, conv), (following, norm) in pairwise(list(module.named_children())):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    self.pairs.append(
                        tuple(f"{path}.{each}".lstrip(".") for each in (name, following))
                    )
                    conv.bias = nn.Parameter(
                        torch.empty(conv.out_channels, device="meta"), requires_grad=False
                    )
                    setattr(module, following, nn.Identity())
        self.embed = torch.compile(self._embed, dynamic=False) if compiled else self._embed

    def _embed(self, tensors, x):
        return torch.func.functional_call(self.module, tensors, (x,)).flatten(1)

    def fold(self, features):
        """Return the tensors of `module` by name, for the module `features` of a network."""
        tensors = features.state_dict()  # without a graph
        for conv, norm in self.pairs:
            mean, var, weight, bias = (
                tensors.pop(f"{norm}.{name}")
                for name in ("running_mean", "running_var", "weight", "bias")
            )
            tensors.pop(f"{norm}.num_batches_tracked")
            tensors[f"{conv}.weight"], tensors[f"{conv}.bias"] = fuse_conv_bn_weights(
                tensors[f"{conv}.weight"],
                tensors.get(f"{conv}.bias"),
                mean,
                var,
                features.get_submodule(norm).eps,
                weight,
                bias,
            )
        return tensors


class Frozen:
    """Feature extractor f_omega of a `Network` in eval mode, with the network's current weights.

    Differentiable in the input, not in the weights. Each batch norm is folded into the convolution
    before it. In this package's networks, the order of registration is that of application. The
    result of folding is kept until a weight or a running statistic changes.

    Args:
        network: `Network`, which is not changed.
        skeleton: `Skeleton` of its architecture; by default a new one.
    """

    def __init__(self, network, skeleton=None):
        self.network, self.skeleton = network, skeleton or Skeleton(network)
        self._versions = self._tensors = None

    def _folded(self):
        """Return the tensors of the skeleton by name."""
        features = self.network.features
        state = [*features.parameters(), *features.buffers()]
        versions = [(each.data_ptr(), each._version) for each in state]
        if versions != self._versions:
            self._versions, self._tensors = versions, self.skeleton.fold(features)
        return self._tensors

    def __call__(self, x, chunk=0):
        """Return features (b, d_h) of x (b, 3, S, S).

        With `chunk`, processes that many images at a time. The backward pass then recomputes their
        activations instead of storing them.
        """
        tensors = self._folded()

        def embed(part):
            return self.skeleton.embed(tensors, part)

        pieces = x.split(chunk or (PIECE if x.device.type == "cpu" else max(1, len(x))))
        if chunk and torch.is_grad_enabled() and x.requires_grad:
            again = dict(use_reentrant=False, preserve_rng_state=False)
            return torch.cat([checkpoint(embed, part, **again) for part in pieces])
        return torch.cat([embed(part) for part in pieces])
