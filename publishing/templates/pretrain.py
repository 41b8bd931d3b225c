import itertools
import math

import torch
from load import load
from network import build
from torch import nn

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
