"""The features of a network in eval mode, whose weights stay as they are: what the ridge head
stands on."""

import copy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.checkpoint import checkpoint

# images at a time on a CPU, so that a layer's output is still in its cache when the next layer
# reads it
PIECE = 64


class Frozen:
    """f_omega(x) of a `Network` as its weights are at the call, in eval mode: differentiable in x,
    not in the weights.

    Each batch norm that follows a convolution is folded into it. (In this package's networks one
    that is registered right after a convolution is applied right after it.)
    """

    def __init__(self, network):
        self.network = network
        self.skeleton = copy.deepcopy(network.features).eval().requires_grad_(False).to("meta")
        self.pairs = []  # names of a convolution and of its batch norm
        for path, module in list(self.skeleton.named_modules()):
            for (name, conv), (following, norm) in pairwise(list(module.named_children())):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    self.pairs.append(
                        tuple(f"{path}.{each}".lstrip(".") for each in (name, following))
                    )
                    conv.bias = nn.Parameter(
                        torch.empty(conv.out_channels, device="meta"), requires_grad=False
                    )
                    setattr(module, following, nn.Identity())

    def _folded(self):
        """The tensors of `skeleton` by name."""
        features = self.network.features
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

    def __call__(self, x, chunk=0):
        """Features (b, d_h) of x (b, 3, S, S). With `chunk`, that many images at a time, and where
        a gradient is asked for, their layers are computed again in the backward pass instead of
        being kept."""
        tensors = self._folded()

        def embed(part):
            return torch.func.functional_call(self.skeleton, tensors, (part,)).flatten(1)

        pieces = x.split(chunk or (PIECE if x.device.type == "cpu" else max(1, len(x))))
        if chunk and torch.is_grad_enabled() and x.requires_grad:
            again = dict(use_reentrant=False, preserve_rng_state=False)
            return torch.cat([checkpoint(embed, part, **again) for part in pieces])
        return torch.cat([embed(part) for part in pieces])
