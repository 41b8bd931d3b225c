"""Pre-trained target networks from torchvision, timm, torch.hub or a user's function."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from torch import nn

from models.saved import load_matching
from utils import files
from utils.errors import UserError

# Mean and standard deviation of the input, for most pre-trained weights.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEFAULT_SIZE = 224  # pixels, for encoders that do not specify a size
FORMS = "torchvision:NAME[:WEIGHTS], timm:NAME, hub:OWNER/REPO:ENTRY or FILE.py:FUNCTION"


@dataclass
class Encoder:
    """Frozen network in eval mode.

    Attributes:
        module: maps its input (b, 3, E, E) to features (b, d).
        image_size: E, height and width of the input in pixels.
        mean, std: statistics that normalise the pixels in [0, 1], or None for no normalisation.
        facts: dict of plain values that identify the encoder: name, version of its code,
            preprocessing, and SHA-256 of its weights.
        outputs: (2, d) features of two random images with pixels from a fixed seed, which show
            whether the encoder has changed.
    """

    module: Callable
    image_size: int
    mean: tuple | None = None
    std: tuple | None = None
    facts: dict = field(default_factory=dict)
    outputs: torch.Tensor | None = None

    def __call__(self, pixels):
        """Return features (b, d) of pixels (b, 3, E, E) in [0, 1]."""
        if self.mean is not None:
            mean, std = (pixels.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
            pixels = (pixels - mean) / std
        with torch.no_grad():
            return self.module(pixels)


def load_encoder(what, device, weights="", size=0):
    """Load an encoder and check that it returns feature vectors.

    Args:
        what: name in one of the `FORMS`.
        device: torch device.
        weights: path of a state dict to use instead of a download by torchvision or timm.
        size: height and width of the input in pixels; 0 selects the encoder's own.

    Returns:
        `Encoder`.

    Raises:
        UserError: if the name is unknown, a package is missing, weights cannot be downloaded or do
            not fit, or the network does not return finite features (b, d).
    """
    kind, _, rest = what.partition(":")
    function = what.rpartition(":")[0].endswith(".py")
    if function:
        load = _from_file
    elif kind in LOADERS and rest:
        load = LOADERS[kind]
    else:
        raise UserError(f"--encoder {what}: must be {FORMS}")
    if weights and load not in (_from_torchvision, _from_timm):
        raise UserError(f"--weights requires a torchvision: or timm: encoder, not {what}")
    encoder = load(what if function else rest, weights, size)
    encoder.module = encoder.module.to(device).eval().requires_grad_(False)
    encoder.outputs = _compute_outputs(encoder, what, device)
    encoder.facts = dict(
        name=Path(what).name if function else what,
        **encoder.facts,
        image_size=encoder.image_size,
        mean=encoder.mean and list(encoder.mean),
        std=encoder.std and list(encoder.std),
        weights=state_digest(encoder.module),
    )
    return encoder


def state_digest(module):
    """Return the SHA-256 of a module's parameters and buffers, ordered by name."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}\0".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def _compute_outputs(encoder, what, device):
    """Return `Encoder.outputs`.

    Raises UserError unless the encoder maps the two images to two finite feature vectors.
    """
    size = encoder.image_size
    if not isinstance(size, int) or size < 1:
        raise UserError(
            f"--encoder {what}: its image_size must be a positive integer, not {size!r}; correct "
            "it, or use --encoder-size"
        )
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        features = encoder(images)
    except Exception as error:  # the user's code can raise any exception
        where = f"{type(error).__name__}: {_reason(error)}"
        raise UserError(
            f"--encoder {what}: fails on images of {size} px ({where}); if it needs another size, "
            "use --encoder-size"
        ) from error
    if not torch.is_tensor(features) or not features.is_floating_point():
        found = type(features).__name__ if not torch.is_tensor(features) else str(features.dtype)
        raise UserError(f"--encoder {what}: must return a float tensor of features, not {found}")
    if features.ndim != 2 or len(features) != 2 or not features.shape[1]:
        shape = tuple(features.shape)
        raise UserError(f"--encoder {what}: must return features (b, d); 2 images gave {shape}")
    if not features.isfinite().all():
        raise UserError(f"--encoder {what}: returns values that are not finite")
    return features.float().cpu()


def _reason(error):
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:160]


def _without_classifier(network, name):
    """Replace the last linear layer of a classification network by the identity."""
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"--encoder torchvision:{name}: has no linear classifier to remove")
    parent, _, last = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Identity())
    return network


def _from_torchvision(rest, weights, size):
    """Load NAME[:WEIGHTS] without its classifier, with the normalisation of its weights."""
    name, _, entry = rest.partition(":")
    try:
        known = torchvision.models.get_model_weights(name)
        chosen = known[entry] if entry else known.DEFAULT
    except KeyError:
        listed = ", ".join(each.name for each in known)
        raise UserError(
            f"--encoder torchvision:{name}: has no weights {entry}; available: {listed}"
        ) from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"--encoder torchvision:{name}: {_reason(error)}") from error
    preset = chosen.transforms()
    if not hasattr(preset, "crop_size"):  # detection, segmentation or optical flow
        raise UserError(f"--encoder torchvision:{name}: is not a classification network")
    network = _download(
        lambda: torchvision.models.get_model(name, weights=None if weights else chosen),
        f"torchvision:{rest}",
    )
    network = _without_classifier(network, name)
    if weights:
        load_matching(network, weights)
    own = preset.crop_size[0] if isinstance(preset.crop_size, (list, tuple)) else preset.crop_size
    facts = dict(version=f"torchvision {torchvision.__version__}")
    facts["entry"] = Path(weights).name if weights else str(chosen)
    return Encoder(network, size or own, tuple(preset.mean), tuple(preset.std), facts)


def _from_timm(name, weights, size):
    """Load NAME without its classifier, with the normalisation of its weights."""
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"--encoder timm:{name}: needs the package timm (pip install timm)"
        ) from error
    if not timm.is_model(name):
        raise UserError(f"--encoder timm:{name}: timm {timm.__version__} has no such model")
    options = dict(pretrained=not weights, num_classes=0)
    config = _download(lambda: timm.get_pretrained_cfg(name), f"timm:{name}")
    if size and config and config.fixed_input_size and size != config.input_size[-1]:
        options["img_size"] = size  # timm resizes a vision transformer's position embedding
    network = _download(lambda: timm.create_model(name, **options), f"timm:{name}")
    if weights:
        load_matching(network, weights)
    data = timm.data.resolve_model_data_config(network)
    facts = dict(version=f"timm {timm.__version__}")
    facts["entry"] = Path(weights).name if weights else config.tag
    own = size or data["input_size"][-1]
    return Encoder(network, own, tuple(data["mean"]), tuple(data["std"]), facts)


def _from_hub(rest, weights, size):
    """Load OWNER/REPO[/BRANCH]:ENTRY or FOLDER:ENTRY with torch.hub, which runs its code."""
    repository, _, entry = rest.rpartition(":")
    if not repository:
        raise UserError(f"--encoder hub:{rest}: must be hub:OWNER/REPO:ENTRY")
    local = Path(repository).is_dir()
    options = dict(source="local") if local else dict(trust_repo=True)
    network = _download(lambda: torch.hub.load(repository, entry, **options), f"hub:{rest}")
    if not isinstance(network, nn.Module):
        raise UserError(f"--encoder hub:{rest}: must be a network, not {type(network).__name__}")
    return Encoder(
        network, size or DEFAULT_SIZE, *IMAGENET, dict(version=f"torch.hub {repository}")
    )


def _from_file(what, weights, size):
    """Call FILE.py:FUNCTION, which returns a module that takes pixels in [0, 1].

    The module's attribute `image_size`, if any, is the height and width of its input.
    """
    path, _, name = what.rpartition(":")
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--encoder {what}: {path}: no such file")
    digest = files.digest(path)
    spec = importlib.util.spec_from_file_location(f"_encoder_{digest}", path)
    source = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = source  # dataclasses, among others, look up the module there
    try:
        spec.loader.exec_module(source)
        network = getattr(source, name)()
    except Exception as error:  # the user's code can raise any exception
        where = f"{type(error).__name__}: {_reason(error)}"
        raise UserError(f"--encoder {what}: its code raised an error ({where})") from error
    if not isinstance(network, nn.Module):
        found = type(network).__name__
        raise UserError(f"--encoder {what}: must return a torch.nn.Module, not {found}")
    own = getattr(network, "image_size", DEFAULT_SIZE)
    version = f"{path.name} sha256:{digest}"
    return Encoder(network, size or own, facts=dict(version=version))


def _download(build, what):
    """Return `build()`, which may download weights or code."""
    try:
        return build()
    except OSError as error:
        local = (
            "clone the repository and pass --encoder hub:FOLDER:ENTRY"
            if what.startswith("hub:")
            else "pass a local weights file with --weights"
        )
        raise UserError(
            f"--encoder {what}: cannot be downloaded ({_reason(error)}); {local}"
        ) from error
    except Exception as error:  # code from the hub can raise any exception
        raise UserError(f"--encoder {what}: {type(error).__name__}: {_reason(error)}") from error


LOADERS = {"torchvision": _from_torchvision, "timm": _from_timm, "hub": _from_hub}
