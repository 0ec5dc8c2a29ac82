"""Commands that make and use models: train, pack, predict, export, count."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from binvit.cli.group import FOLDER, PATH, RECIPES, cli, printable

if TYPE_CHECKING:
    from binvit.lab.trials.trial import Trial


@cli.command()
@click.option("--dataset", default="digits", show_default=True, help="A data set, or folder:PATH, or parquet:FILE.")
@click.option("--scheme", default="gsb", show_default=True, help="How to binarize; see binvit schemes.")
@click.option("--recipe", default="smoke", show_default=True, metavar=RECIPES, help="How to train.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
              help="A field of the recipe, such as epochs=20 or lr=3e-4; may be repeated.")  # fmt: skip
@click.option("--model", metavar="TIMM", help="A timm vision transformer, in place of the recipe's own.")
@click.option("--weights", type=PATH, help="Weights to start from: a safetensors or .pth file in timm's layout.")
@click.option("--pretrained", is_flag=True, help="Start from timm's weights of the model, downloaded if need be.")
@click.option("--image-size", type=click.IntRange(1), help="Side of the images in pixels.  [default: as they are]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--samples-per-class", type=int, help="Training images per class.  [default: all]")
@click.option("--label-noise", type=float, default=0.0, show_default=True, help="Share of wrong training labels.")
@click.option("--root", type=FOLDER, help="Folder of the data set's files.")
@click.option("--device", metavar="[cpu|cuda|mps|cuda:N]", help="Where to train.  [default: a GPU if there is one]")
@click.option("--trial", "file", type=PATH, help="File of a plan, a result or a trial, in place of all options above.")
@click.option("--id", "identities", multiple=True, help="Which trial of the plan; may be repeated.")
@click.option("--out", type=FOLDER, default="results", show_default=True, help="Folder of the result.")
def train(
    dataset: str,
    scheme: str,
    recipe: str,
    settings: tuple[str, ...],
    model: str | None,
    weights: Path | None,
    pretrained: bool,
    image_size: int | None,
    seed: int,
    samples_per_class: int | None,
    label_noise: float,
    root: Path | None,
    device: str | None,
    file: Path | None,
    identities: tuple[str, ...],
    out: Path,
) -> None:
    """Train a model and keep it; a finished trial is read instead of trained again.

    Several processes train one model together: torchrun --nproc_per_node=N -m binvit train ...
    """
    from binvit.lab.training.recipes import parse_options
    from binvit.lab.trials.trial import Trial

    if file is not None:
        from binvit.lab.notebooks.grid import read_planned

        context = click.get_current_context()
        others = [name for name in context.params if name not in ("device", "file", "identities", "out")]
        if told := [name for name in others if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]:
            raise ValueError(f"The file {file} says all about the trial; leave out {', '.join(told)}.")
        planned = [read_planned(file, identity) for identity in identities or (None,)]
        _train([trial for trial, _ in planned], any(keep_model for _, keep_model in planned), device, out)
        return
    if identities:
        raise ValueError(f"The identity {identities[0]} needs the file of a plan, --trial FILE.")
    options = parse_options(settings)
    named = {"model": model, "weights": weights and str(weights), "pretrained": pretrained, "image_size": image_size}
    for name, value in named.items():
        if value not in (None, False):
            if name in options:
                raise ValueError(f"The recipe's {name} is given twice, by an option of its own and by --set.")
            options[name] = value
    trial = Trial(
        dataset=dataset,
        scheme=scheme,
        recipe=recipe,
        recipe_options=options,
        seed=seed,
        samples_per_class=samples_per_class,
        label_noise=label_noise,
        root=None if root is None else str(root),
    )
    trial.get_scheme()  # refuses an unknown name before anything is written
    _train([trial], True, device, out)


def _train(trials: list[Trial], keep_models: bool, device: str | None, out: Path) -> None:
    from binvit.lab.training.devices import Team, keep_freed_memory
    from binvit.lab.trials.pool import run_trials
    from binvit.lab.trials.store import model_path

    keep_freed_memory()
    table = run_trials(trials, out, keep_models=keep_models, progress=sys.stderr.isatty(), device=device)
    if not Team(device).leads:
        return
    for trial, row in zip(trials, table.itertuples(), strict=True):
        name = f"{row.id}: " if len(trials) > 1 else ""
        accuracies = f"test accuracy {row.test_accuracy:.4f}, train accuracy {row.train_accuracy:.4f}"
        click.echo(f"{name}{accuracies}, {row.seconds:.0f} s")
        if keep_models:
            click.echo(f"The model is {model_path(trial, out)}.")


@cli.command()
@click.argument("model", type=PATH)
@click.option("--out", type=PATH, help="The packed file.  [default: MODEL with .packed in its name]")
@click.option("--exact", is_flag=True, help="Logits equal the trained model's bit for bit, at the price of speed.")
@click.option("--float16", is_flag=True, help="Round shifts, biases, norms and positions: smaller, some other answers.")
@click.option("--licence", default="", metavar="TEXT", help="Licence of the weights, for the model card.")
def pack(model: Path, out: Path | None, exact: bool, float16: bool, licence: str) -> None:
    """Fold a trained model into bits.

    MODEL is a file that binvit train has written.
    """
    from binvit.files import require_writable
    from binvit.lab.predict import pack_checkpoint

    out = out or model.with_suffix(f".packed{model.suffix}")
    if out.resolve() == model.resolve():
        raise ValueError(f"The packed file would replace the model {model}; choose another --out.")
    require_writable(out)
    click.echo(repr(pack_checkpoint(model, out, exact, float16, licence)))
    share = out.stat().st_size / model.stat().st_size
    click.echo(f"The packed model is {out}, {share:.1%} of the trained model's file.")


@cli.command()
def models() -> None:
    """Print the trained models that come with the package: name, bytes, and what is known of each."""
    import binvit
    from binvit.packed.shipped import find_model

    for name in binvit.list_models():
        click.echo(f"{name}  {find_model(name).stat().st_size:,} bytes  {binvit.load(name).blueprint.card}")


@cli.command()
@click.argument("model", type=PATH)
@click.argument("images", type=PATH, metavar="IMAGE_OR_FOLDER")
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Classes to print per image.")
@click.option("--csv", "table", is_flag=True, help="Print image, rank, class and probability as CSV.")
@click.option("--json", "objects", is_flag=True, help="Print a list of images with their classes as JSON.")
def predict(model: Path, images: Path, top: int, table: bool, objects: bool) -> None:
    """Print class names and probabilities for an image file or for all images of a folder.

    MODEL is a file that binvit train or binvit pack has written, or a name that binvit models prints. What is no image
    is skipped with a word on stderr, where a progress bar is shown as well.
    """
    from tqdm import tqdm

    from binvit.lab.predict import image_files, open_model, predict_files, written

    if table and objects:
        raise ValueError("Give --csv or --json, not both.")
    form = "csv" if table else "json" if objects else None
    skip = (lambda sentence: tqdm.write(printable(sentence), file=sys.stderr)) if images.is_dir() else None
    files = image_files(images, skip)
    predictions = predict_files(open_model(model), files, top, skip)
    hidden = len(files) == 1 or not sys.stderr.isatty()
    for line in written(tqdm(predictions, total=len(files), unit="image", disable=hidden), form):
        tqdm.write(line if form else printable(line), file=sys.stdout)


@cli.command()
@click.argument("model", type=PATH)
@click.argument("out", type=PATH, metavar="MODEL.onnx")
def export(model: Path, out: Path) -> None:
    """Write a model as ONNX, for other runtimes.

    MODEL is a file that binvit train or binvit pack has written, or a name that binvit models prints. Its bits are
    floats in ONNX, which has no products of bits: the answers are the same, size and speed those of a float model.
    """
    from binvit.files import require_writable
    from binvit.lab.predict import open_packed
    from binvit.packed import export_onnx

    if out.resolve() == model.resolve():
        raise ValueError(f"The exported file would replace the model {model}; choose another name.")
    require_writable(out)
    export_onnx(open_packed(model), out)
    click.echo(f"The exported model is {out}, {out.stat().st_size / 1e6:.2f} MB.")


@cli.command()
@click.argument("model", type=PATH)
def audit(model: Path) -> None:
    """Print where a model's bytes and operations are, part by part.

    MODEL is a file that binvit train or binvit pack has written, or a name that binvit models prints.
    """
    from binvit.lab.predict import open_packed
    from binvit.packed.audit import audit as count

    click.echo(str(count(open_packed(model))))


@cli.command()
def schemes() -> None:
    """List the schemes: what each binarizes and where it was published."""
    import binvit

    names = binvit.list_schemes()
    wide = max(map(len, names))
    for name in names:
        scheme = binvit.scheme(name)
        click.echo(f"{name:<{wide}}  {scheme.description}")
        click.echo(f"{'':<{wide}}  {scheme.reference}")


@cli.command("warm-up")
@click.argument("model", required=False, type=PATH)
def warm_up(model: Path | None) -> None:
    """Compile ahead what the packed MODEL needs, by default what training and prediction need.

    The compiled code is kept beside the package, or in the folder that NUMBA_CACHE_DIR names.
    """
    import timm
    import torch

    import binvit
    from binvit import bits
    from binvit.lab.predict import open_packed
    from binvit.lab.trials.train_trial import ALL_KERNELS
    from binvit.nn.fused.float_products import multiply_by

    if model is None:
        seconds = bits.warm_up()
        float_model = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=2)
        trained = {name: binvit.binarize(float_model, name).train() for name in ALL_KERNELS}
        with multiply_by("oneDNN"):  # and with tiles, as on most processors
            for binary in trained.values():
                for images in (2, 2, 128):  # the first batch sets scales; small products are of floats, large of bytes
                    binary(torch.randn(images, 3, 32, 32)).sum().backward()
        packed = binvit.pack(trained["gsb"].eval())
    else:
        seconds, packed = 0.0, open_packed(model)
    click.echo(f"ready after {seconds + packed.warm_up():.1f} seconds")
