"""Write a distilled set, or a network, as a folder that other people can use without this package; upload it.

    python -m distillers export runs/cifar10/krr_st/seed0/distilled.pt sets/cifar10_krr_st
    python -m distillers export runs/cifar10/krr_st/seed0/convnet3/seed0/model.pt networks/cifar10_krr_st
    python -m distillers export sets/cifar10_krr_st --push USER/NAME      # a folder that was exported before

A set's folder holds distilled.safetensors (exact), images/ and preview.png (rounded to 8 bits), load.py (a loader and
a pre-training that need torch and safetensors only), README.md (a dataset card) and SHA256SUMS; a network's folder
holds model.safetensors, network.py (its code), README.md (a model card) and SHA256SUMS. `--distilled` of every script
takes a set's folder, or hf:USER/NAME once it is on the Hugging Face Hub, and verifies its checksums. The recipe that
goes along is that of the pre-trainings found beside the set, else the preset's.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

import models
from data import augment, exported
from data.distilled import load_distilled
from distillers.method import check_name, save_picture
from models import saved
from publishing import cards, dd_ranking, standalone
from utils import cli, files, results
from utils.errors import UserError
from utils.optional import optional
from utils.presets import preset

NETWORK = "model.safetensors"


def recipe_of(folder, distilled):
    """How to pre-train on a set: the most frequent settings of the finished pre-trainings below its folder, else those
    of its preset; as plain values, the network's `arch` and `width` among them. Empty for images without targets."""
    if distilled.target_kind == "none":
        return {}
    name = cli.preset_name(distilled.meta.get("preset"))
    usual = {key: preset(name, "distill")[key] for key in ("arch", "width")}
    usual |= preset(name, "pretrain", distilled.target_kind, usual["arch"])
    found = Counter()
    for path in sorted(folder.glob("*/seed*/config.json")):
        settings = files.read_json(path, "settings file").get("settings", {})
        if path.with_name("model.pt").is_file() and usual.keys() <= settings.keys():
            found[json.dumps({key: settings[key] for key in usual})] += 1
    return json.loads(found.most_common(1)[0][0]) if found else usual


def target_network(path, meta):
    """In words, the target network that the set in the file at `path` learned from; None where it took none."""
    wanted = meta.get("settings", {}).get("target")
    if not wanted:
        return None
    for each in sorted(path.absolute().parents[2].glob("*/*/target.pt")):
        if files.digest(each) == wanted:
            content = files.load(each, "target", required=("source",))
            name = content.get("name") or f"{models.label(content['arch'], content['width'])}, Barlow Twins"
            return f"{name}, on {content['source']} (target.pt {wanted})"
    return f"target.pt {wanted}"


def facts_of(meta):
    """Rows of a card: what a set or a network was made from."""
    facts = {"source": meta.get("source"), "method": meta.get("method"), "seed": meta.get("seed")}
    scale = [f"{key} {here} ({there})" for key, (here, there) in (meta.get("scale") or {}).items()]
    return facts | {"preset": meta.get("preset"), "settings that differ from it (there)": ", ".join(scale)}


def save_tensors(path, tensors, **header):
    """Write tensors by name as a safetensors file; `header` holds one plain value at most."""
    safetensors = optional("safetensors.torch", "export")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {name: json.dumps(value) for name, value in header.items()}
    path.write_bytes(safetensors.save(contiguous, metadata=header))


def write_set(path, folder, name, args):
    """Write the folder of the set in the distilled.pt at `path`."""
    d, run = load_distilled(path), path.parent
    recipe = recipe_of(run, d)
    header = dict(format=exported.FORMAT, name=name, target_kind=d.target_kind, recipe=recipe, meta=d.meta)
    tensors = {key: getattr(d, key) for key in exported.TENSORS}
    save_tensors(folder / exported.SET, tensors, **{exported.HEADER: header})
    save_picture(folder / "preview.png", d)
    write_images(folder / "images", d)
    code = [standalone.template("load.py")]
    if recipe:
        code += standalone.network_code(recipe["arch"], d.images.shape[-1], d.num_outputs, recipe["width"])
        code.append(standalone.template("pretrain.py"))
    standalone.write(folder / "load.py", f"{name}, a distilled data set. Needs torch and safetensors only.", code)
    if recipe.get("augment"):
        shutil.copy(augment.__file__, folder)
    sections = ""
    if args.dd_ranking:
        images, labels = dd_ranking.converted(d)
        save_tensors(folder / dd_ranking.FILE, {"images": images, "labels": labels})
        sections = dd_ranking.section(d, images, labels)
    facts = facts_of(d.meta) | {
        "command": cards.command_of(run),
        "target network": target_network(path, d.meta),
        "distance from the initial images": cards.distance(d.meta),
    }
    scratch = results_below(path.absolute().parents[3] / "scratch")
    card = cards.of_set(folder, name, args.license, d, recipe, facts, results_below(run), scratch, sections)
    (folder / "README.md").write_text(card)
    exported.write_sums(folder, last=exported.SET)


def write_images(folder, distilled):
    """Write the images as PNGs, with the targets in metadata.jsonl: what `datasets.load_dataset` reads."""
    folder.mkdir()
    digits, lines = max(4, len(str(len(distilled.images) - 1))), []
    for index, (pixels, target) in enumerate(zip(distilled.pixels(), distilled.targets.numpy(), strict=True)):
        line = {"file_name": f"{index:0{digits}}.png"}
        to_pil_image(pixels).save(folder / line["file_name"])
        if distilled.target_kind == "class":
            line["target"] = int(target)
        elif distilled.target_kind != "none":
            line["target"] = [float(str(value)) for value in target]  # the fewest digits that give the same float32
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def write_network(path, folder, name, args):
    """Write the folder of the network in the model.pt at `path`."""
    content = saved.load_model(path)
    saved.rebuild(content)  # fails where the weights do not fit
    shape, meta = {key: content[key] for key in ("arch", "image_size", "num_outputs", "width")}, content["meta"]
    header = dict(format=exported.FORMAT, name=name, **shape, meta=meta)
    save_tensors(folder / NETWORK, content["network"], network=header)
    label, size = models.label(content["arch"], content["width"]), content["image_size"]
    code = [*standalone.network_code(**shape), standalone.template("network.py")]
    standalone.write(folder / "network.py", f"{name}, a trained {label}. Needs torch and safetensors.", code)
    facts = {"network": label, "outputs": content["num_outputs"], "images": f"{size} x {size} pixels"}
    if "normalisation" in meta:
        facts["preprocessing"] = cards.preprocessing(*map(torch.tensor, meta["normalisation"]))
    facts |= facts_of(meta) | {"fine-tuned on": meta.get("target")}
    lines = results_below(path.parent)
    if not lines:  # a fine-tuned network: its result is beside the network that it started from
        lines = [line for line in results_below(path.absolute().parents[1]) if line.get("name") == path.parent.name]
    (folder / "README.md").write_text(cards.of_network(folder, NETWORK, name, args.license, facts, lines))
    exported.write_sums(folder, last=NETWORK)


def results_below(folder):
    return [line for path in sorted(folder.rglob("results.jsonl")) for line in results.read(path)]


def push(folder, repository, kind):
    """Upload a folder to USER/NAME on the Hub, where a new repository is private. Raises UserError where that fails."""
    hub = optional("huggingface_hub", "--push")
    try:
        api = hub.HfApi()
        api.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, repo_type=kind, folder_path=folder, delete_patterns="*", commit_message="Export"
        )
    except Exception as error:  # of the Hub, the network, the account: any stops the upload
        raise UserError(f"--push {repository}: not uploaded ({exported.reason(error)})") from error
    print(f"uploaded {folder} to {repository} ({kind}); a new repository is private until you change that on the Hub")


def exported_kind(folder):
    """`dataset` or `model` for a whole exported folder, else None. Raises UserError where its files are damaged."""
    for file, kind in ((exported.SET, "dataset"), (NETWORK, "model")):
        if (folder / file).is_file() and (folder / exported.SUMS).is_file():
            exported.verify(folder, file)
            return kind


def main(argv):
    args = parse_args(argv)
    kind = exported_kind(args.made) if args.out is None else None
    if kind:
        folder = args.made
    elif args.out is None:
        raise UserError(f"{args.made}: not an exported folder; name the folder to write after it")
    else:
        folder, kind = args.out, write(args)
        todo = f"; fill in the licence in {folder / 'README.md'}" if args.license == "unknown" else ""
        print(f"wrote {folder}{todo}")
    if args.push:
        push(folder, args.push, kind)


def write(args):
    """Write `args.out`, whole or not at all; `dataset` or `model`."""
    if args.out.exists():
        raise UserError(f"{args.out}: is there already; choose another folder, or delete it")
    if args.made.is_dir():
        raise UserError(f"{args.made}: a folder; give a distilled.pt or a model.pt to write {args.out} from")
    content = files.read_data(args.made, "file") if args.made.is_file() else None
    kind = "model" if isinstance(content, dict) and content.get("kind") == "model" else "dataset"
    if kind == "model" and args.dd_ranking:
        raise UserError("--dd-ranking: goes with a distilled set")
    name = args.name or args.out.resolve().name
    check_name("--name", name, reserved=())
    partial = args.out.with_name(f"{args.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        {"dataset": write_set, "model": write_network}[kind](args.made, partial, name, args)
        partial.rename(args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return kind


def parse_args(argv):
    parser = cli.Parser(__doc__)
    parser.add_argument("made", type=Path, metavar="FILE", help="distilled.pt, model.pt, or an exported folder")
    parser.add_argument("out", type=Path, nargs="?", metavar="FOLDER", help="the folder to write")
    parser.add_argument("--name", help="of the set or the network, on its card (default: the folder's name)")
    parser.add_argument("--license", default="unknown", metavar="ID", help="the card's licence, as the Hub names it")
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to the Hugging Face Hub")
    parser.add_argument("--dd-ranking", action="store_true", help="add a class-labelled set's form for DD-Ranking")
    return parser.parse_args(argv)
