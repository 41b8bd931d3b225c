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
from data.distilled import distilled_file, load_distilled
from distillers.method import save_picture
from models import saved
from publishing import cards, dd_ranking, standalone
from utils import cli, files
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
    for each in sorted(path.parents[1].parent.glob("target/*/target.pt")):
        if files.digest(each) == wanted:
            content = files.load(each, "target", required=("arch", "width", "source"))
            return f"{models.label(content['arch'], content['width'])} trained on {content['source']} (file {wanted})"
    return f"file {wanted}"


def facts_of(meta, command):
    """Rows of a card: what a set or a network was made from and how."""
    scale = meta.get("scale") or {}
    differing = ", ".join(f"{key} {here} ({there})" for key, (here, there) in scale.items())
    facts = {"source": meta.get("source"), "method": meta.get("method"), "seed": meta.get("seed")}
    facts |= {"command": f"`{command}`" if command else None, "preset": meta.get("preset")}
    facts["settings that differ from the preset (there)"] = differing or None
    return {name: value for name, value in facts.items() if value is not None}


def save_tensors(path, tensors, **header):
    """Write tensors by name as a safetensors file; `header` holds one plain value at most."""
    safetensors = optional("safetensors.torch", "export")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {name: json.dumps(value) for name, value in header.items()}
    path.write_bytes(safetensors.save(contiguous, metadata=header))


def write_set(path, folder, name, args):
    """Write the folder of the distilled set in the file at `path`."""
    d = load_distilled(path)
    recipe = d.meta.pop("recipe", None) or recipe_of(path.parent, d)
    d.meta.pop("name", None)
    header = dict(format=exported.FORMAT, name=name, target_kind=d.target_kind, recipe=recipe, meta=d.meta)
    tensors = {key: getattr(d, key) for key in exported.TENSORS}
    save_tensors(folder / exported.SET, tensors, **{exported.HEADER: header})
    save_picture(folder / "preview.png", d)
    (folder / "images").mkdir()
    lines, digits = [], max(4, len(str(len(d.images) - 1)))
    for index, pixels in enumerate(d.pixels()):
        file = f"{index:0{digits}}.png"
        to_pil_image(pixels).save(folder / "images" / file)
        target = d.targets[index].numpy()
        values = int(target) if d.target_kind == "class" else [float(str(value)) for value in target]  # the shortest
        lines.append(json.dumps({"file_name": file} | ({"target": values} if d.target_kind != "none" else {})) + "\n")
    (folder / "images" / "metadata.jsonl").write_text("".join(lines))
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
    facts = facts_of(d.meta, cards.command_of(path.parent))
    if target := target_network(path, d.meta):
        facts["target network"] = target
    lines = cards.results_below(path.parent)
    scratch = cards.results_below(path.parents[3] / "scratch") if len(path.parents) > 3 else []
    card = cards.of_set(folder, name, args.license, d, recipe, facts, lines, scratch, sections)
    (folder / "README.md").write_text(card)
    exported.write_sums(folder, last=exported.SET)


def write_network(path, folder, name, args):
    """Write the folder of the network in the model.pt at `path`."""
    content = saved.load_model(path)
    saved.rebuild(content)  # fails where the weights do not fit
    shape, meta = {key: content[key] for key in ("arch", "image_size", "num_outputs", "width")}, content["meta"]
    header = dict(format=exported.FORMAT, name=name, **shape, meta=meta)
    save_tensors(folder / NETWORK, content["network"], network=header)
    about = f"{name}: {models.label(content['arch'], content['width'])}, pre-trained. Needs torch and safetensors."
    standalone.write(
        folder / "network.py", about, [*standalone.network_code(**shape), standalone.template("network.py")]
    )
    facts = {"network": models.label(content["arch"], content["width"]), "outputs": content["num_outputs"]}
    facts["images"] = f"{content['image_size']} x {content['image_size']} pixels"
    facts["preprocessing"] = cards.preprocessing(*map(torch.tensor, meta["normalisation"]))
    own = [line for line in cards.results_below(path.parents[1]) if line.get("name") == path.parent.name]  # fine-tuned
    lines = cards.results_below(path.parent) or own
    card = cards.of_network(folder, NETWORK, name, args.license, facts | facts_of(meta, None), lines)
    (folder / "README.md").write_text(card)
    exported.write_sums(folder, last=NETWORK)


def push(folder, repository, kind):
    """Upload a folder to USER/NAME on the Hub, where a new repository is private. Raises UserError where that fails."""
    hub = optional("huggingface_hub", "--push")
    try:
        hub.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository, repo_type=kind, folder_path=folder, delete_patterns="*", commit_message="Export"
        )
    except Exception as error:  # of the Hub, the network, the account: any stops the upload
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"--push {repository}: not uploaded ({reason})") from error
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
    path = distilled_file(args.made)
    content = files.read_data(path, "file") if path.suffix == ".pt" and path.is_file() else {}
    kind = "model" if isinstance(content, dict) and content.get("kind") == "model" else "dataset"
    if kind == "model" and args.dd_ranking:
        raise UserError("--dd-ranking: goes with a distilled set")
    partial = args.out.with_name(f"{args.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        name = args.name or args.out.resolve().name
        {"dataset": write_set, "model": write_network}[kind](path, partial, name, args)
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
