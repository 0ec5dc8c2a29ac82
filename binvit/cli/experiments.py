"""Commands that repeat the papers: notebooks, rates, the archive, its data and measurements."""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import click

from binvit.cli.group import FOLDER, PATH, RECIPES, cli, in_words, printable


@cli.command()
@click.option("--size", default="archive", show_default=True, metavar="[archive|smoke|cpu|paper]",
              help="Published results from the archive, or what is trained anew.")  # fmt: skip
@click.option("--only", multiple=True, metavar="NN", help="Number of a notebook to run, such as 01; may be repeated.")
@click.option(
    "--jobs", type=click.IntRange(1), help="Notebooks that run side by side.  [default: 2 that read the archive]"
)
@click.option("--out", type=FOLDER, default="report", show_default=True, help="Folder of the report.")
@click.option("-p", "--parameter", "texts", type=(str, str), multiple=True, metavar="NAME VALUE",
              help="A parameter for all selected notebooks; lists as in YAML.")  # fmt: skip
@click.option("-f", "--file", "files", type=PATH, multiple=True, help="YAML file of parameters.")
@click.option("--notebooks", type=PATH, help="Folder of the notebooks.  [default: the clone's]")
@click.option("--check", "count", type=click.IntRange(0), metavar="N",
              help="Archived trials to train again.  [default: one per notebook, and for three minutes]")  # fmt: skip
@click.option("--sample-seed", type=int, default=0, show_default=True, help="Decides which trials these are.")
def reproduce(
    size: str,
    only: tuple[str, ...],
    jobs: int | None,
    out: Path,
    texts: tuple[tuple[str, str], ...],
    files: tuple[Path, ...],
    notebooks: Path | None,
    count: int | None,
    sample_seed: int,
) -> None:
    """Run the notebooks and write executed copies and an HTML report.

    At the size "archive" they show the published results, and a sample of the archived trials is trained again from
    nothing and compared. The size "smoke" shows that everything runs, "cpu" trains all that is published, and "paper"
    has the size of the papers.

    All parameters are checked, and files of images looked for, before anything runs. If a notebook fails, the others
    still run, and the exit code is 1; so it is if a trial does not give what the archive says, or if the sample or a
    part of the report cannot be written, for instance on a full disk.
    """
    from binvit.lab import project
    from binvit.lab.notebooks import plan as plan_
    from binvit.lab.notebooks import published, report, run
    from binvit.lab.notebooks.plan import check, read_values
    from binvit.threads import cores

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
    start = time.time()
    outcomes = run.run(plan, out / "notebooks", jobs or (min(2, cores()) if size == "archive" else 1))
    with suppress(OSError, ValueError):  # told below, if it lasts
        report.write_report(outcomes, out)  # the sample takes minutes and may fail
    checked, problems = [], []
    try:
        trained = published.seconds_trained(plan, start)
        table = published.check_sample(plan, out, sample_seed, count, sys.stderr.isatty(), trained)
        checked = table.to_dict("records")
    except (OSError, ValueError) as error:
        problems.append(f"No sample of the archived trials could be trained again and kept: {in_words(error)}")
    try:
        click.echo(f"The report is {report.write_report(outcomes, out)}.")
    except (OSError, ValueError) as error:
        problems.append(f"The report in {out} could not be written in full: {in_words(error)}")
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        click.echo(f"{outcome.name} failed: {outcome.error}", err=True)
    if failed:
        click.echo(f"{len(failed)} of {len(outcomes)} notebooks failed.", err=True)
    beyond = [row for row in checked if row["verdict"].startswith("no")]
    for row in beyond:
        click.echo(f"{row['trial']} does not give what the archive says: {row['verdict']}", err=True)
    if checked:
        undecided = sum(row["verdict"].startswith("undecided") for row in checked)
        agree = len(checked) - len(beyond) - undecided
        text = f"{agree} of {len(checked)} trials that were trained again agree"
        click.echo(f"{text}; of {undecided} the seeds tell too little." if undecided else f"{text}.")
    for problem in problems:
        click.echo(printable(problem), err=True)
    if failed or beyond or problems:
        sys.exit(1)


def _finite(context: click.Context, option: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number.", context, option)
    return value


@cli.command()
@click.argument("numbers", nargs=-1, metavar="[NN]...")
@click.option("--size", default="archive", show_default=True, metavar="[archive|smoke|cpu|paper]",
              help="Which parameters; those of the archive are what is published.")  # fmt: skip
@click.option("-p", "--parameter", "texts", type=(str, str), multiple=True, metavar="NAME VALUE",
              help="A parameter for all of these notebooks; lists as in YAML.")  # fmt: skip
@click.option("-f", "--file", "files", type=PATH, multiple=True, help="YAML file of parameters.")
@click.option("--notebooks", type=PATH, help="Folder of the notebooks.  [default: the clone's]")
@click.option("--teraflops", type=click.FloatRange(0, min_open=True), callback=_finite, default=10.0, show_default=True,
              help="1e12 operations per second that a GPU sustains; an A100 has 19.5 at most in float32.")  # fmt: skip
@click.option("--out", type=PATH, help="File of the plan, a line per trial; binvit train --trial reads it.")
def plan(
    numbers: tuple[str, ...],
    size: str,
    texts: tuple[tuple[str, str], ...],
    files: tuple[Path, ...],
    notebooks: Path | None,
    teraflops: float,
    out: Path | None,
) -> None:
    """Print what the trials of notebooks cost, and write them for other machines.

    NN is the number of a notebook, such as 04; none means all. Where an official data set is not there, its published
    number of images is counted, and no plan can be written.
    """
    from binvit.files import require_writable
    from binvit.lab import project
    from binvit.lab.notebooks import grid
    from binvit.lab.notebooks import plan as plan_

    if out is not None:
        require_writable(out)
    values: dict[str, Any] = {}
    for file in files:
        values |= plan_.read_values(file)
    jobs = plan_.plan(notebooks or project.folder("notebooks"), size, numbers, values, dict(texts))
    plan_.check(jobs, files=False)  # also those of notebooks that train nothing
    trials = grid.grid(jobs)
    if out is not None:
        grid.write_plan(out, jobs, trials)
    click.echo(grid.written(grid.totals(trials, teraflops)))
    click.echo(f"GPU hours at {teraflops:g}e12 FLOP a second.")


@cli.command()
@click.option("--dataset", default="digits", show_default=True, help="A data set, or folder:PATH, or parquet:FILE.")
@click.option("--scheme", "schemes", multiple=True, help="May be repeated.  [default: all]")
@click.option("--samples-per-class", type=click.IntRange(1), help="Training images of each class.  [default: all]")
@click.option("--recipe", default="smoke", show_default=True, metavar=RECIPES, help="How to train.")
@click.option("--bias", "biases", type=click.Choice(["none", "full", "relative"]), multiple=True, default=["none"],
              show_default=True, help="Learned bias of the attention map; may be repeated.")  # fmt: skip
@click.option("--rate", "grid", type=float, multiple=True, default=[1e-3, 2e-3, 4e-3, 8e-3], show_default=True,
              help="A rate to try first; may be repeated.")  # fmt: skip
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, default=[0, 1], show_default=True,
              help="Trainings per rate; may be repeated.")  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
              help="The width of the models, whose rate it then is, or their heads; may be repeated.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Trainings side by side.")
@click.option("--device", metavar="[cpu|cuda|mps|cuda:N]", help="Where to train.  [default: a GPU if there is one]")
@click.option("--root", type=FOLDER, help="Folder of the data set's files.")
@click.option("--out", type=FOLDER, default="results", show_default=True,
              help="Folder of the results.")  # fmt: skip
@click.option("--rates", type=PATH, help="File of the rates.  [default: the package's own]")
def tune(
    dataset: str,
    schemes: tuple[str, ...],
    samples_per_class: int | None,
    recipe: str,
    biases: tuple[Literal["none", "full", "relative"], ...],
    grid: tuple[float, ...],
    seeds: tuple[int, ...],
    settings: tuple[str, ...],
    jobs: int,
    device: str | None,
    root: Path | None,
    out: Path,
    rates: Path | None,
) -> None:
    """Choose the learning rate of each scheme on validation images; recipes take it from then on.

    Every scheme gets the same rates and seeds, and nothing looks at test images. Where the best rate lies at an end of
    those tried, the next one by a factor of two is tried as well.
    """
    import binvit
    from binvit.files import require_writable
    from binvit.lab.training.devices import keep_freed_memory
    from binvit.lab.training.rates import RATES, read_rates, write_rates
    from binvit.lab.training.recipes import parse_options
    from binvit.lab.trials.tune import tune as search
    from binvit.lab.trials.tune import tuning_table

    keep_freed_memory()
    options = parse_options(settings)
    if other := [name for name in options if name not in ("width", "heads")]:  # it would pass for the recipe's own rate
        raise ValueError(f"A rate is kept by recipe and width; a search with another {other[0]} is one of lab.tune().")
    require_writable(rates or RATES)
    read_rates(rates or RATES)  # a file that cannot be added to is told before the trainings, not after
    names = schemes or tuple(binvit.list_schemes())
    progress = sys.stderr.isatty()
    given: dict[str, Any] = {
        "samples_per_class": samples_per_class,
        "grid": grid,
        "seeds": seeds,
        "recipe_options": options,
        "root": root,
        "results_dir": out,
        "jobs": jobs,
    }
    chosen = search(names, dataset, recipe, biases=biases, progress=progress, device=device, **given)
    click.echo(tuning_table(chosen).round(3).to_string())
    click.echo(f"The rates are written to {write_rates(chosen, rates or RATES)}.")


@cli.command()
@click.argument("results_dir", type=PATH)
@click.option("--out", type=FOLDER, help="Folder of the archive.  [default: paper_figures]")
@click.option("--bench", "measured", type=PATH, help="Also add the tables that binvit bench has written to a folder.")
def archive(results_dir: Path, out: Path | None, measured: Path | None) -> None:
    """Add the finished trials of a results folder to the archive, and what notebooks measure on its models.

    The archive has one line per trial, sorted, and a table of data sets; a trial that is there already stays as it is.
    """
    from binvit.lab import project
    from binvit.lab.notebooks import plan as plan_
    from binvit.lab.notebooks.published import take_measurements
    from binvit.lab.trials.archive import add
    from binvit.lab.trials.store import read_results

    found, damaged = read_results(results_dir)
    out = out or project.folder("paper_figures")
    if measured:
        from binvit.lab.benchmark.archived import archive_bench

        click.echo(f"Measurements of {', '.join(archive_bench(measured, out))} are in {out}.")
    new = add(found, out)
    click.echo(f"{new} trials are new in {out}, {len(found) - new} were there.")
    with suppress(FileNotFoundError):  # without a clone there are no notebooks, and nothing that they measure
        jobs = plan_.plan(project.folder("notebooks"), "archive")
        if count := take_measurements(jobs, results_dir, out):
            click.echo(f"{count} models and sets of images were measured for it.")
    for sentence in damaged:
        click.echo(sentence, err=True)
    if damaged:
        sys.exit(1)


@cli.command()
@click.option("--archive", type=PATH, help="Folder of the archive.  [default: paper_figures]")
@click.option("--out", type=FOLDER, help="Folder of figures and tables.  [default: the archive's]")
@click.option("--readme", type=PATH, help="File whose table of results is written.  [default: README.md of the clone]")
def figures(archive: Path | None, out: Path | None, readme: Path | None) -> None:
    """Draw all published figures and tables anew from the archive; nothing is trained."""
    from binvit.lab import project
    from binvit.lab.notebooks.plan import plan
    from binvit.lab.notebooks.published import redraw_all

    archive = archive or project.folder("paper_figures")
    readme = readme or project.folder("README.md")
    redraw_all(plan(project.folder("notebooks"), "archive"), archive, out or archive, readme)
    click.echo(f"The figures and tables of {out or archive} and the results of {readme} are written anew.")


@cli.command()
@click.argument("name")
@click.option("--out", type=PATH, required=True, help="The Parquet file to write.")
@click.option("--size", type=click.IntRange(1, 2**14), help="Side in pixels.  [default: images stay as they are]")
@click.option("--per-class", type=click.IntRange(1), help="Training images of every class.  [default: all]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Decides which images are drawn.")
@click.option("--root", type=FOLDER, default="data", show_default=True,
              help="Folder of the official files, which are downloaded to it if they are absent.")  # fmt: skip
def data(name: str, out: Path, size: int | None, per_class: int | None, seed: int, root: Path) -> None:
    """Make a Parquet file of an official data set, as archived trials name it.

    NAME is cifar10, cifar100, fashion_mnist, flowers102 or pets.
    """
    from binvit.files import require_writable
    from binvit.lab.data.fingerprint import fingerprint
    from binvit.lab.data.write import write_parquet

    require_writable(out)
    source = write_parquet(name, out, root, size, per_class, seed)
    counts = ", ".join(f"{len(images)} {split}" for split, images in source.splits.items())
    click.echo(f"{out} holds {counts} images of {len(source.classes)} classes; its fingerprint is "
               f"{fingerprint(f'parquet:{out}')}.")  # fmt: skip


@cli.command()
@click.option("--part", "parts", multiple=True, metavar="[kernels|models|growth|memory]",
              help="What to measure; may be repeated.  [default: kernels, models, memory]")  # fmt: skip
@click.option("--training", is_flag=True, help="Measure training steps instead.")
@click.option("--size", "sizes", multiple=True, metavar="[smoke|cpu|DeiT-S]", help="Of training steps.  [default: all]")
@click.option("--scheme", "schemes", multiple=True, help="Whose steps; both may be repeated.  [default: all]")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True,
              help="Images per run; may be repeated.  [default: 1, 8, 32; of training steps the size's]")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Threads of every contender.  [default: torch's number]")
@click.option("--seconds", type=click.FloatRange(0.01), default=2.0, show_default=True, help="Time per measurement.")
@click.option("--out", type=FOLDER, default="bench", show_default=True, help="Folder of tables and figures.")
def bench(
    parts: tuple[str, ...],
    training: bool,
    sizes: tuple[str, ...],
    schemes: tuple[str, ...],
    batches: tuple[int, ...],
    threads: int | None,
    seconds: float,
    out: Path,
) -> None:
    """Measure bits against their float peers, side by side in this process.

    Prints tables with medians and ratios, and writes them as CSV, with a roofline of the kernels.
    """
    from binvit.lab.benchmark.run import run_benchmarks
    from binvit.lab.training.devices import keep_freed_memory

    if training and parts:
        raise ValueError("--training is a measurement of its own; leave --part out.")
    if (sizes or schemes) and not training:
        raise ValueError("--size and --scheme choose training steps; add --training.")
    if training:
        keep_freed_memory()  # as in a training
    run_benchmarks(("training",) if training else parts or ("kernels", "models", "memory"), out, batches=batches,
                   threads=threads, seconds=seconds, sizes=sizes, schemes=schemes, say=click.echo)  # fmt: skip
