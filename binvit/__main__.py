"""The command line: `binvit COMMAND` or `python -m binvit COMMAND`.

Heavy modules are imported by the commands that need them, so that `--help` answers at once. Wrong input ends with one
sentence on stderr and exit code 2, failed work with exit code 1.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click


class _Path(click.Path):
    """A path in which `~` and environment variables are replaced, also where a shell leaves them: --out=~/results."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expandvars(os.path.expanduser(value)), param, ctx)


PATH = _Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="binvit")
def cli() -> None:
    """1-bit vision transformers: train, pack, and repeat the experiments of two papers."""


@cli.command()
@click.option(
    "--size", default="smoke", show_default=True, metavar="[smoke|cpu|paper]", help="Which parameters to run."
)
@click.option("--only", multiple=True, metavar="NN", help="Number of a notebook to run, such as 01; may be repeated.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Notebooks that run side by side.")
@click.option("--out", type=PATH, default="report", show_default=True, help="Folder of the report.")
@click.option("-p", "--parameter", "texts", type=(str, str), multiple=True, metavar="NAME VALUE",
              help="A parameter for all selected notebooks; lists as in YAML.")  # fmt: skip
@click.option("-f", "--file", "files", type=PATH, multiple=True, help="YAML file of parameters.")
@click.option("--notebooks", type=PATH, help="Folder of the notebooks.  [default: the clone's]")
def reproduce(
    size: str,
    only: tuple[str, ...],
    jobs: int,
    out: Path,
    texts: tuple[tuple[str, str], ...],
    files: tuple[Path, ...],
    notebooks: Path | None,
) -> None:
    """Run the notebooks and write executed copies and an HTML report.

    All parameters are checked, and files of images looked for, before anything runs. If a notebook fails, the others
    still run, and the exit code is 1.
    """
    from binvit.lab import project
    from binvit.lab.notebooks import plan as plan_
    from binvit.lab.notebooks import report, run
    from binvit.lab.notebooks.plan import check, read_values

    if out.exists() and not out.is_dir():
        raise ValueError(f"The folder of the report, {out}, is a file.")
    values: dict[str, Any] = {}
    for file in files:
        values |= read_values(file)
    plan = plan_.plan(notebooks or project.folder("notebooks"), size, only, values, dict(texts))
    check(plan)
    from binvit.lab.trials.train_trial import (
        compile_kernels,  # loads torch, which the refusal of a name need not wait for
    )

    click.echo(f"The kernels took {compile_kernels():.0f} s to compile or to load; no notebook's time includes it.")
    outcomes = run.run(plan, out / "notebooks", jobs)
    index = report.write_report(outcomes, out)
    click.echo(f"The report is {index}.")
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        click.echo(f"{outcome.name} failed: {outcome.error}", err=True)
    if failed:
        click.echo(f"{len(failed)} of {len(outcomes)} notebooks failed.", err=True)
        sys.exit(1)


@cli.command()
@click.option("--dataset", default="digits", show_default=True, help="A data set, or folder:PATH, or parquet:FILE.")
@click.option("--scheme", default="gsb", show_default=True, help="How to binarize; see binvit schemes.")
@click.option("--recipe", default="smoke", show_default=True, metavar="[smoke|cpu|paper]", help="How to train.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
              help="A field of the recipe, such as epochs=20 or lr=3e-4; may be repeated.")  # fmt: skip
@click.option("--model", metavar="TIMM", help="A timm vision transformer, in place of the recipe's own.")
@click.option("--weights", type=PATH, help="Weights to start from: a safetensors or .pth file in timm's layout.")
@click.option("--pretrained", is_flag=True, help="Start from timm's weights of the model, downloaded if need be.")
@click.option("--image-size", type=click.IntRange(1), help="Side of the images in pixels.  [default: as they are]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--samples-per-class", type=int, help="Training images per class.  [default: all]")
@click.option("--label-noise", type=float, default=0.0, show_default=True, help="Share of wrong training labels.")
@click.option("--root", type=PATH, help="Folder of the data set's files.")
@click.option("--device", metavar="[cpu|cuda|mps|cuda:N]", help="Where to train.  [default: a GPU if there is one]")
@click.option("--out", type=PATH, default="results", show_default=True, help="Folder of the result.")
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
    out: Path,
) -> None:
    """Train a model and keep it; a finished trial is read instead of trained again.

    Several processes train one model together: torchrun --nproc_per_node=N -m binvit train ...
    """
    from binvit.lab.training.devices import Team
    from binvit.lab.training.recipes import parse_options
    from binvit.lab.trials.pool import run_trials
    from binvit.lab.trials.store import model_path
    from binvit.lab.trials.trial import Trial

    options = parse_options(settings)
    named = {"model": model, "weights": weights and str(weights), "pretrained": pretrained, "image_size": image_size}
    for name, value in named.items():
        if value:
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
    row = run_trials([trial], out, keep_models=True, progress=sys.stderr.isatty(), device=device).iloc[0]
    if not Team(device).leads:
        return
    click.echo(f"test accuracy {row.test_accuracy:.4f}, train accuracy {row.train_accuracy:.4f}, {row.seconds:.0f} s")
    click.echo(f"The model is {model_path(trial, out)}.")


@cli.command()
@click.option("--dataset", default="digits", show_default=True, help="A data set, or folder:PATH, or parquet:FILE.")
@click.option("--scheme", "schemes", multiple=True, help="May be repeated.  [default: all]")
@click.option("--recipe", default="smoke", show_default=True, metavar="[smoke|cpu|paper]", help="How to train.")
@click.option("--bias", "biases", type=click.Choice(["none", "full", "relative"]), multiple=True, default=["none"],
              show_default=True, help="Learned bias of the attention map; may be repeated.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Trainings side by side.")
@click.option("--root", type=PATH, help="Folder of the data set's files.")
@click.option("--out", type=PATH, default="results", show_default=True,
              help="Folder of the results.")  # fmt: skip
@click.option("--rates", type=PATH, help="File of the rates.  [default: the package's own]")
def tune(
    dataset: str,
    schemes: tuple[str, ...],
    recipe: str,
    biases: tuple[Literal["none", "full", "relative"], ...],
    jobs: int,
    root: Path | None,
    out: Path,
    rates: Path | None,
) -> None:
    """Choose the learning rate of each scheme on validation images; recipes take it from then on.

    Every scheme gets the same rates and seeds, and test images are not loaded.
    """
    import binvit
    from binvit.lab.training.rates import RATES, write_rates
    from binvit.lab.trials.tune import tune as search
    from binvit.lab.trials.tune import tuning_table

    names = schemes or tuple(binvit.list_schemes())
    progress = sys.stderr.isatty()
    chosen = search(names, dataset, recipe, biases=biases, root=root, results_dir=out, jobs=jobs, progress=progress)
    click.echo(tuning_table(chosen).round(3).to_string())
    click.echo(f"The rates are written to {write_rates(chosen, rates or RATES)}.")


@cli.command()
@click.argument("results_dir", type=PATH)
@click.option("--out", type=PATH, help="Folder of the archive.  [default: paper_figures]")
def archive(results_dir: Path, out: Path | None) -> None:
    """Add the finished trials of a results folder to the archive.

    The archive has one line per trial, sorted, and a table of data sets; a trial that is there already stays as it is.
    """
    from binvit.lab import project
    from binvit.lab.trials.archive import add
    from binvit.lab.trials.store import read_results

    found, damaged = read_results(results_dir)
    out = out or project.folder("paper_figures")
    new = add(found, out)
    click.echo(f"{new} trials are new in {out}, {len(found) - new} were there.")
    for sentence in damaged:
        click.echo(sentence, err=True)
    if damaged:
        sys.exit(1)


@cli.command()
@click.argument("name")
@click.option("--out", type=PATH, required=True, help="The Parquet file to write.")
@click.option("--size", type=click.IntRange(1, 2**14), help="Side in pixels.  [default: images stay as they are]")
@click.option("--per-class", type=click.IntRange(1), help="Training images of every class.  [default: all]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Decides which images are drawn.")
@click.option("--root", type=PATH, default="data", show_default=True,
              help="Folder of the official files, which are downloaded to it if they are absent.")  # fmt: skip
def data(name: str, out: Path, size: int | None, per_class: int | None, seed: int, root: Path) -> None:
    """Make a Parquet file of an official data set, as archived trials name it.

    NAME is cifar10, cifar100, fashion_mnist, flowers102 or pets.
    """
    from binvit.lab.data.fingerprint import fingerprint
    from binvit.lab.data.write import write_parquet

    source = write_parquet(name, out, root, size, per_class, seed)
    counts = ", ".join(f"{len(images)} {split}" for split, images in source.splits.items())
    click.echo(f"{out} holds {counts} images of {len(source.classes)} classes; its fingerprint is "
               f"{fingerprint(f'parquet:{out}')}.")  # fmt: skip


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
    from binvit.lab.predict import pack_checkpoint

    out = out or model.with_suffix(f".packed{model.suffix}")
    if out.resolve() == model.resolve():
        raise ValueError(f"The packed file would replace the model {model}; choose another --out.")
    click.echo(repr(pack_checkpoint(model, out, exact, float16, licence)))
    share = out.stat().st_size / model.stat().st_size
    click.echo(f"The packed model is {out}, {share:.1%} of the trained model's file.")


@cli.command()
@click.option("--part", "parts", multiple=True, metavar="[kernels|models|growth|memory]",
              help="What to measure; may be repeated.  [default: kernels, models, memory]")  # fmt: skip
@click.option("--training", is_flag=True, help="Measure a training step instead.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True,
              help="Images per run; may be repeated.  [default: 1, 8, 32; of a training step 8]")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Threads of every contender.  [default: torch's number]")
@click.option("--seconds", type=click.FloatRange(0.01), default=2.0, show_default=True, help="Time per measurement.")
@click.option("--out", type=PATH, default="bench", show_default=True, help="Folder of tables and figures.")
def bench(
    parts: tuple[str, ...], training: bool, batches: tuple[int, ...], threads: int | None, seconds: float, out: Path
) -> None:
    """Measure bits against their float peers, side by side in this process.

    Prints tables with medians and ratios, and writes them as CSV, with a roofline of the kernels.
    """
    from binvit.lab.benchmark.run import run_benchmarks

    if training and parts:
        raise ValueError("--training is a measurement of its own; leave --part out.")
    run_benchmarks(("training",) if training else parts or ("kernels", "models", "memory"), out,
                   batches=batches, threads=threads, seconds=seconds, say=click.echo)  # fmt: skip


@cli.command()
@click.argument("model", type=PATH)
@click.argument("images", type=PATH, metavar="IMAGE_OR_FOLDER")
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Classes to print per image.")
@click.option("--csv", "form", flag_value="csv", help="Print image, rank, class and probability as CSV.")
@click.option("--json", "form", flag_value="json", help="Print a list of images with their classes as JSON.")
def predict(model: Path, images: Path, top: int, form: str | None) -> None:
    """Print class names and probabilities for an image file or for all images of a folder.

    MODEL is a file that binvit train or binvit pack has written. What is no image is skipped with a word on stderr,
    where a progress bar is shown as well.
    """
    from tqdm import tqdm

    from binvit.lab.predict import image_files, open_model, predict_files, written

    skip = (lambda sentence: tqdm.write(sentence, file=sys.stderr)) if images.is_dir() else None
    files = image_files(images, skip)
    predictions = predict_files(open_model(model), files, top, skip)
    hidden = len(files) == 1 or not sys.stderr.isatty()
    for line in written(tqdm(predictions, total=len(files), unit="image", disable=hidden), form):
        tqdm.write(line, file=sys.stdout)


@cli.command()
@click.argument("model", type=PATH)
@click.argument("out", type=PATH, metavar="MODEL.onnx")
def export(model: Path, out: Path) -> None:
    """Write a model as ONNX, for other runtimes.

    MODEL is a file that binvit train or binvit pack has written. Its bits are floats in ONNX, which has no products of
    bits: the answers are the same, size and speed those of a float model.
    """
    from binvit.lab.predict import open_packed
    from binvit.packed import export_onnx

    if out.resolve() == model.resolve():
        raise ValueError(f"The exported file would replace the model {model}; choose another name.")
    export_onnx(open_packed(model), out)
    click.echo(f"The exported model is {out}, {out.stat().st_size / 1e6:.2f} MB.")


@cli.command()
@click.argument("model", type=PATH)
def audit(model: Path) -> None:
    """Print where a model's bytes and operations are, part by part.

    MODEL is a file that binvit train or binvit pack has written.
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
@click.argument("model", required=False, type=click.Path(path_type=Path))
def warm_up(model: Path | None) -> None:
    """Compile ahead what the packed MODEL needs, by default what training and prediction need.

    The compiled code is kept beside the package, or in the folder that NUMBA_CACHE_DIR names.
    """
    import timm
    import torch

    import binvit
    from binvit import bits
    from binvit.lab.predict import open_packed

    if model is None:
        seconds = bits.warm_up()
        float_model = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=2)
        trained = binvit.binarize(float_model, binvit.scheme("gsb")).train()
        for _ in range(2):  # the first batch sets the scales, which the kernels of the second read
            trained(torch.randn(2, 3, 32, 32)).sum().backward()
        packed = binvit.pack(trained.eval())
    else:
        seconds, packed = 0.0, open_packed(model)
    click.echo(f"ready after {seconds + packed.warm_up():.1f} seconds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 if all is well, 1 if work failed, 2 if the input was wrong."""
    try:
        code = cli.main(args=arguments, prog_name="binvit", standalone_mode=False)
    except click.Abort:
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        _refuse(error.format_message())
    except OSError as error:
        # Our own sentences come without an error number.
        sentence = str(error) if error.errno is None else f"{error.strerror}: {error.filename}."
        _refuse(sentence, 1 if error.errno in _FAILED_WORK else 2)
    except (ValueError, ModuleNotFoundError) as error:
        _refuse(str(error), 2 if getattr(error, "wrong_input", True) else 1)  # trials can fail at their work
    sys.exit(code if isinstance(code, int) else 0)


_FAILED_WORK = (errno.EDQUOT, errno.EIO, errno.ENOSPC)  # a full or broken disk; other numbers tell of a wrong path


def _refuse(sentence: str, code: int = 2) -> None:
    click.echo(f"Error: {sentence}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
