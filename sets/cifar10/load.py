"""cifar10, a distilled data set. Needs torch and safetensors."""

import hashlib
import itertools
import json
import math
import torch
from pathlib import Path
from safetensors import safe_open
from torch import nn
from torch.utils.data import TensorDataset


FILE = "distilled.safetensors"


def load(folder=Path(__file__).parent):
    """Load the set.

    Returns:
        A TensorDataset of normalised images (m, 3, S, S) and their targets.
        A dictionary with `mean` and `std` (3,), `target_kind`, the `recipe` of the pre-training,
        and `meta`. Pixels in [0, 1] are images * std + mean.

    Raises:
        ValueError: if the file does not match its checksum in SHA256SUMS.
    """
    path, sums = Path(folder) / FILE, (Path(folder) / "SHA256SUMS").read_text()
    if f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {FILE}\n" not in sums:
        raise ValueError(f"{path}: damaged or altered")
    with safe_open(path, framework="pt") as file:
        info = json.loads(file.metadata()["distilled"])
        info |= {name: file.get_tensor(name) for name in ("mean", "std")}
        return TensorDataset(file.get_tensor("images"), file.get_tensor("targets")), info


def instance_norm(channels):
    """Return instance norm with learned scale and shift: each channel of an image on its own."""
    return nn.GroupNorm(channels, channels)


def convnet(widths, image_size, norm=nn.BatchNorm2d):
    """Return (features, feature width) of a ConvNet.

    Each of the k entries of `widths` is a block of 3x3 convolution, `norm`, ReLU and 2x2 average
    pooling. `features` maps (b, 3, S, S) to (b, widths[-1], S/2^k, S/2^k).
    """
    layers, c_in = [], 3
    for c_out in widths:
        layers += [
            nn.Conv2d(c_in, c_out, 3, padding=1),
            norm(c_out),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
        ]
        c_in = c_out
    side = image_size // 2 ** len(widths)
    return nn.Sequential(*layers), c_in * side * side


class Network(nn.Module):
    """Feature extractor f_omega with a linear head h_W.

    `embed` returns features (b, d_h) and `forward` outputs (b, num_outputs) of x (b, 3, S, S).

    Args:
        features: module of the feature extractor.
        feature_dim: d_h.
        num_outputs: outputs of the head; 0 means no head, and `forward` equals `embed`.
    """

    def __init__(self, features, feature_dim, num_outputs):
        super().__init__()
        self.features = features
        self.feature_dim = feature_dim
        self.fc = nn.Linear(feature_dim, num_outputs) if num_outputs else nn.Identity()

    def embed(self, x):
        return self.features(x).flatten(1)

    def forward(self, x):
        return self.fc(self.embed(x))


def build():
    """Return an untrained convnet3-x0.25 for images of 32 x 32 pixels."""
    network = Network(*convnet([32, 64, 128], 32), 256)
    return network.to(memory_format=torch.channels_last)


LOSSES = {
    "mse": nn.functional.mse_loss,
    "half_squared": lambda output, target: 0.5 * (output - target).square().sum(1).mean(),
    "cross_entropy": nn.functional.cross_entropy,
}
OPTIMIZERS = {
    "sgd": lambda params, lr, decay: torch.optim.SGD(params, lr, momentum=0.9, weight_decay=decay),
    "adamw": lambda params, lr, decay: torch.optim.AdamW(params, lr, weight_decay=decay),
}
SCHEDULES = {  # factor on the learning rate by the fraction of the steps done
    "constant": lambda done: 1.0,
    "halfway": lambda done: 1.0 if done < 0.5 else 0.1,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def pretrain(dataset, info, seed=0, device="cpu"):
    """Train a network on the set by its recipe; network.embed(x) returns features (b, d)."""
    recipe, (images, targets) = info["recipe"], (tensor.to(device) for tensor in dataset.tensors)
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    draws = torch.Generator(device).manual_seed(seed + 1)
    network = build().to(device).train()
    batch_size = min(recipe["batch_size"], len(images))
    steps = recipe["steps"] or recipe["epochs"] * -(-len(images) // batch_size)
    warmup, curve = recipe["warmup"], SCHEDULES[recipe["schedule"]]

    def rate(step):
        done = (step - warmup) / max(1, steps - warmup)
        return (step + 1) / warmup if step < warmup else curve(done)

    make = OPTIMIZERS[recipe["optimizer"]]
    optimizer = make(network.parameters(), recipe["lr"], recipe["weight_decay"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    orders = (torch.randperm(len(images), generator=order) for _ in itertools.count())
    batches = itertools.chain.from_iterable(each.split(batch_size) for each in orders)
    for batch in itertools.islice(batches, steps):
        x = images[batch]
        if recipe["augment"]:
            from augment import diff_augment  # augment.py in this folder

            x = diff_augment(x, draws)
        loss = LOSSES[recipe["loss"]](network(x), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return network.eval()


if __name__ == "__main__":
    torch.save(pretrain(*load()).state_dict(), "network.pt")
    print("wrote network.pt, a state dict")
