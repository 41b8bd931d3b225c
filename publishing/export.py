"""Write a distilled set, or a network, as a folder that others can use without this package.

    python -m distillers export runs/cifar10/krr_st/seed0/distilled.pt sets/NAME
    python -m distillers export runs/cifar10/krr_st/seed0/convnet3/seed0/model.pt networks/NAME
    python -m distillers export sets/NAME --push USER/NAME    # upload an exported folder

The folder of a set contains distilled.safetensors (exact), images/ and preview.png (8 bits),
load.py (a loader and a pre-training; needs torch and safetensors), README.md (a dataset card) and
SHA256SUMS. It also contains a recipe for pre-training: the most frequent one among the finished
pre-trainings on the set, or the preset's if there are none.

The folder of a network contains model.safetensors, network.py (its code), README.md (a model card)
and SHA256SUMS.

--distilled of every script accepts the folder of a set, or hf:USER/NAME for a set on the Hugging
Face Hub. The checksums are verified.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

from torchvision.transforms.functional import to_pil_image

import models
from data import augment, exported
from data.distilled import load_distilled
from distillers import registry
from distillers.method import check_name, save_picture
from evaluation import results
from models import saved
from publishing import cards, dd_ranking, standalone
from utils import cli, files
from utils.errors import UserError
from utils.optional import import_optional
from utils.presets import preset, preset_name
from utils.run import shareable_command

NETWORK = "model.safetensors"


def choose_recipe(folder, distilled):
    """Return the recipe for pre-training on a set: a dict of settings with `arch` and `width`.

    The settings are the most frequent ones of the finished pre-trainings below the set's folder. If
    there are none, they are those of the preset, with the learned learning rate of the set, if any.
    The recipe of images without targets is empty.
    """
    if distilled.target_kind == "none":
        return {}
    name = preset_name(distilled.meta.get("preset"))
    usual = {key: preset(name, "distill")[key] for key in ("arch", "width")}
    usual |= preset(name, "pretrain", distilled.target_kind, usual["arch"])
    usual["lr"] = distilled.meta.get("learned_rate") or usual["lr"]
    found = Counter()
    for path in sorted(folder.glob("*/seed*/config.json")):
        settings = files.read_json(path, "settings file").get("settings", {})
        if path.with_name("model.pt").is_file() and usual.keys() <= settings.keys():
            found[json.dumps({key: settings[key] for key in usual})] += 1
    return json.loads(found.most_common(1)[0][0]) if found else usual


def describe_target_network(path, meta):
    """Describe the target network of the set in the file `path`; None if it has none."""
    wanted = meta.get("settings", {}).get("target_network")
    if not wanted:
        return None
    above = path.absolute().parents
    for each in sorted(above[2].glob("*/*/target.pt")) if len(above) > 3 else ():
        if files.digest(each) == wanted:
            content = files.load(each, "target", required=("source",))
            ours = content.get("name") or (
                f"{models.label(content['arch'], content['width'])}, Barlow Twins"
            )
            return f"{ours}, on {content['source']} (target.pt {wanted})"
    return f"target.pt {wanted}"


def find_untrained_results(path):
    """Return the results of untrained networks in the run root of the set in the file `path`."""
    above = path.absolute().parents  # seed, method, source, run root, ...
    return read_results_below(above[3] / "scratch") if len(above) > 4 else []


def describe_distance(meta):
    """Describe the distance of a set's images from the real images that they started from."""
    moved = meta.get("distance_from_initial")
    if moved == 0:
        return "0: the images are copies of real ones"
    return moved and f"{moved:.4f} standard deviations of the source (root mean square)"


def describe_origin(meta):
    """Return the facts about the origin of a set or a network, for its card."""
    changed = meta.get("deviations", {}).items()
    return {
        "source": meta.get("source"),
        "method": registry.title(str(meta.get("method"))),
        "seed": meta.get("seed"),
        "preset": meta.get("preset"),
        "deviations from the paper's settings": ", ".join(
            f"{name} {here} instead of {there}" for name, (here, there) in changed
        ),
    }


def save_tensors(path, tensors, **header):
    """Write tensors by name to a safetensors file; `header` is at most one plain value."""
    safetensors = import_optional("safetensors.torch", "export")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {name: json.dumps(value) for name, value in header.items()}
    path.write_bytes(safetensors.save(contiguous, metadata=header))


def write_set(path, folder, name, args):
    """Export the set in the distilled.pt at `path` to `folder`."""
    d, run = load_distilled(path), path.parent
    recipe = choose_recipe(run, d)
    header = dict(
        format=exported.FORMAT, name=name, target_kind=d.target_kind, recipe=recipe, meta=d.meta
    )
    tensors = {key: getattr(d, key) for key in exported.TENSORS}
    save_tensors(folder / exported.SET, tensors, **{exported.HEADER: header})
    save_picture(folder / "preview.png", d)
    write_images(folder / "images", d)
    code = [standalone.read_template("load.py")]
    if recipe:
        size = d.images.shape[-1]
        code += standalone.collect_network_code(
            recipe["arch"], size, d.num_outputs, recipe["width"]
        )
        code.append(standalone.read_template("pretrain.py"))
    about = f"{name}, a distilled data set. Needs torch and safetensors."
    standalone.write(folder / "load.py", about, code)
    if recipe.get("augment"):
        shutil.copy(augment.__file__, folder)
    sections = ""
    if args.dd_ranking:
        images, labels = dd_ranking.convert(d)
        save_tensors(folder / dd_ranking.FILE, {"images": images, "labels": labels})
        sections = dd_ranking.format_card_section(d, images, labels)
    facts = describe_origin(d.meta) | {
        "command": shareable_command(run),
        "target network": describe_target_network(path, d.meta),
        "distance from the initial images": describe_distance(d.meta),
        "pre-training": ", ".join(f"{key} {value}" for key, value in recipe.items()),
    }
    lines, untrained = read_results_below(run), find_untrained_results(path)
    card = cards.make_dataset_card(folder, name, args.license, d, facts, lines, untrained, sections)
    (folder / exported.CARD).write_text(card)
    exported.write_sums(folder, exported.SET)


def write_images(folder, distilled):
    """Write the images as PNGs and the targets as metadata.jsonl, for `datasets.load_dataset`."""
    folder.mkdir()
    digits, lines = max(4, len(str(len(distilled.images) - 1))), []
    pairs = zip(distilled.pixels(), distilled.targets.numpy(), strict=True)
    for index, (pixels, target) in enumerate(pairs):
        line = {"file_name": f"{index:0{digits}}.png"}
        to_pil_image(pixels).save(folder / line["file_name"])
        if distilled.target_kind == "class":
            line["target"] = int(target)
        elif distilled.target_kind != "none":
            line["target"] = [
                float(str(value)) for value in target
            ]  # shortest text of the float32 value
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def write_network(path, folder, name, args):
    """Export the network in the model.pt at `path` to `folder`."""
    content = saved.load_model(path)
    saved.rebuild(content)  # raises UserError if the weights do not fit
    shape = {key: content[key] for key in ("arch", "image_size", "num_outputs", "width")}
    meta, size = content["meta"], content["image_size"]
    label = models.label(content["arch"], content["width"])
    header = dict(format=exported.FORMAT, name=name, **shape, meta=meta)
    save_tensors(folder / NETWORK, content["network"], network=header)
    code = [*standalone.collect_network_code(**shape), standalone.read_template("network.py")]
    about = f"{name}, a trained {label}. Needs {cards.required_packages(label)}."
    standalone.write(folder / "network.py", about, code)
    facts = {
        "network": label,
        "outputs": content["num_outputs"],
        "images": f"{size} x {size} pixels",
        "fine-tuned on": meta.get("dataset"),
    }
    if "normalisation" in meta:
        facts["preprocessing"] = cards.describe_preprocessing(*meta["normalisation"])
    lines = read_results_below(path.parent)
    if not lines:  # a fine-tuned network: they are in the folder of its initial network
        lines = read_results_below(path.absolute().parents[1])
        lines = [line for line in lines if line.get("name") == path.parent.name]
    facts |= describe_origin(meta)
    card = cards.make_model_card(folder, NETWORK, name, args.license, facts, lines)
    (folder / exported.CARD).write_text(card)
    exported.write_sums(folder, NETWORK)


def read_results_below(folder):
    """Return all results in a folder and its subfolders."""
    paths = sorted(folder.rglob("results.jsonl"))
    return [line for path in paths for line in results.read(path)]


def push(folder, repository, kind):
    """Upload a folder to the Hub. A new repository USER/NAME is private.

    Raises UserError if the upload fails.
    """
    hub = import_optional("huggingface_hub", "--push")
    try:
        api = hub.HfApi()
        api.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            delete_patterns="*",
            commit_message="Export",
        )
    except Exception as error:  # error of the Hub, the network or the account
        raise UserError(
            f"--push {repository}: failed ({exported.describe_error(error)})"
        ) from error
    print(f"uploaded {folder} to {repository} ({kind}); new repositories are private")


def find_exported(folder):
    """Return the kind of an exported folder, `dataset` or `model`, or None if it is not one.

    Raises UserError if the folder is damaged.
    """
    for file, kind in ((exported.SET, "dataset"), (NETWORK, "model")):
        if (folder / file).is_file() and (folder / exported.SUMS).is_file():
            exported.verify(folder, file)
            return kind


def write(args):
    """Export `args.file` to `args.folder`, completely or not at all; return its kind."""
    if args.folder.exists():
        raise UserError(f"{args.folder}: exists; choose another folder, or delete it")
    if args.file.is_dir():
        raise UserError(f"{args.file}: a folder; give a distilled.pt or a model.pt")
    content = files.read_data(args.file, "file") if args.file.is_file() else None
    kind = "dataset"
    if isinstance(content, dict) and content.get("kind") == "model":
        kind = "model"
    if kind == "model" and args.dd_ranking:
        raise UserError("--dd-ranking requires a distilled set")
    name = args.name or args.folder.resolve().name
    check_name("--name", name, reserved=())
    partial = args.folder.with_name(f"{args.folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        {"dataset": write_set, "model": write_network}[kind](args.file, partial, name, args)
        partial.rename(args.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return kind


def main(argv, prog=None):
    args = parse_args(argv, prog)
    if args.folder is None:
        folder, kind = args.file, find_exported(args.file)
        if kind is None:
            raise UserError(
                f"{folder}: not an exported folder; to export, also give the FOLDER to write"
            )
    else:
        folder, kind = args.folder, write(args)
        todo = "; fill in the licence in its README.md" if args.license == "unknown" else ""
        print(f"wrote {folder}{todo}")
    if args.push:
        push(folder, args.push, kind)


def parse_args(argv, prog):
    parser = cli.Parser(__doc__, prog)
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="distilled.pt, model.pt, or an exported folder"
    )
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="folder to write")
    parser.add_argument("--name", help="name on the card (default: name of the folder)")
    parser.add_argument(
        "--license",
        default="unknown",
        metavar="ID",
        help="licence on the card, as an identifier of the Hub (default: unknown)",
    )
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to the Hub")
    parser.add_argument(
        "--dd-ranking", action="store_true", help="add the file for the score of DD-Ranking"
    )
    return parser.parse_args(argv)
