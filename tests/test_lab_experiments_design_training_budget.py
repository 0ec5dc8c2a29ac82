"""Trials with few images or wrong labels differ by nothing else, and their claims can fail."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from binvit.lab.analysis import statistics
from binvit.lab.data.datasets import load_data
from binvit.lab.data.label_noise import pixel_confusion
from binvit.lab.experiments import label_noise, limited_samples
from binvit.lab.experiments.design import baselines, training_budget
from binvit.lab.experiments.label_noise import confusion_map
from binvit.lab.notebooks import plan

CHANGES = "width 32, batch_size 20"


def trials(runs) -> list:
    return [run.trial for run in runs]


def test_few_images_are_trained_as_long_as_many():
    runs = limited_samples.conditions("digits", ["float", "gsb"], ["none"], [5, 20, 50], [0, 1], updates=120)
    assert len(runs) == 12
    for trial in trials(runs):
        given = trial.get_recipe()
        images = 10 * trial.samples_per_class
        steps = given.epochs * (images // min(given.batch_size, images))
        assert abs(steps - 120) <= 0.05 * 120
        assert given.eval_every == given.epochs
    whole = limited_samples.conditions("digits", ["float"], ["none"], [5], [0])
    assert trials(whole)[0].recipe_options == {}


def test_changes_of_the_recipe_count():
    runs = limited_samples.conditions("digits", ["float"], ["none"], [8], [0], changes=CHANGES, updates=40)
    given = trials(runs)[0].get_recipe()
    assert (given.width, given.batch_size, given.epochs) == (32, 20, 10)


def test_counts_that_a_data_set_lacks_are_left_out():
    runs = limited_samples.conditions("digits", ["float"], ["none"], [5, 1000], [0])
    assert [trial.samples_per_class for trial in trials(runs)] == [5]
    capped = limited_samples.conditions("digits, 10 per class", ["float"], ["none"], [5, 20], [0])
    assert [trial.samples_per_class for trial in trials(capped)] == [5]
    with pytest.raises(ValueError, match="fewer than the 200 asked for by samples_per_class"):
        limited_samples.conditions("digits", ["float"], ["none"], [200], [0])


def write_mixed_folder(folder):
    """Write ten images of two classes and of two sizes to each split."""
    for split in ("train", "test"):
        for name, shade in (("dark", 20), ("light", 200)):
            (folder / split / name).mkdir(parents=True)
            for index in range(5):
                image = Image.new("L", (12 + 4 * (index % 2), 12), shade + 5 * index)
                image.save(folder / split / name / f"{index}.png")
    return f"folder:{folder}"


def test_images_of_mixed_sizes_get_the_size_of_the_recipe(tmp_path):
    images = write_mixed_folder(tmp_path)
    few = limited_samples.conditions(images, ["float"], ["none"], [2], [0], changes="image_size 16")
    noisy = label_noise.conditions(images, ["float"], [0.2], [0.2], [0], changes="image_size 16")
    assert training_budget.plan_table(few)["training images"].tolist() == [4]
    assert training_budget.plan_table(noisy)["training images"].tolist() == [10, 10]
    with pytest.raises(ValueError, match="not squares of one size; give the image_size"):
        limited_samples.conditions(images, ["float"], ["none"], [2], [0])
    values = {
        "dataset": images,
        "schemes": ["float"],
        "samples_per_class": 0,
        "changes": "image_size 16",
        "archive": "",
    }
    done = run_cells("07_label_noise", values, until="confusion_map(")
    assert done["data"].image_size == 16
    plt.close("all")


def test_quickstart_looks_at_images_of_the_size_it_trains_on():
    done = run_cells("01_quickstart", {"changes": "global_pool avg, image_size 16"}, until="check_parameters(")
    assert done["data"].image_size == 16
    assert run_cells("01_quickstart", {}, until="check_parameters(")["data"].image_size == 8


def run_cells(name: str, values: dict, until: str) -> dict:
    """Run a notebook's cells with other parameters, up to the first one that holds a text, and return its names."""
    path = Path(__file__).parents[1] / "notebooks" / f"{name}.ipynb"
    namespace: dict = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            exec(source, namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace.update(values)
            if until in source:
                break
    return namespace


def test_kinds_that_differ_in_their_number_of_images_stay_apart():
    text = "digits, 5 per class; digits, 7 per class"
    runs = label_noise.conditions(text, ["float"], [0.2], [0.0], [0])
    assert [run.data for run in runs] == ["digits, 5 per class", "digits, 7 per class"]
    sentence = "Two kinds of images of the experiment are 'digits'; .*'digits, 5 per class' is no kind of its own"
    with pytest.raises(ValueError, match=sentence):
        limited_samples.conditions(text, ["float"], ["none"], [5], [0])
    notebooks = Path(__file__).parents[1] / "notebooks"
    with pytest.raises(ValueError, match=f"06_limited_samples.ipynb: .*{sentence}"):
        plan.check(plan.plan(notebooks, only=["06"], texts={"dataset": text}))
    plan.check(plan.plan(notebooks, only=["07"], texts={"dataset": text}))


def test_images_choose_their_recipe_and_seeds():
    text = "digits, recipe cpu, 1 seeds"
    (run,) = limited_samples.conditions(text, ["gsb"], ["none"], [5], [3, 4], recipe="smoke")
    assert (run.trial.recipe, run.trial.seed, run.data, run.condition) == ("cpu", 3, "digits", "gsb")


def test_noise_runs_cover_both_kinds_once():
    runs = label_noise.conditions("digits, 5 per class", ["float", "gsb"], [0.0, 0.4], [0.0, 0.4], [0, 1])
    kinds = {(trial.label_noise, isinstance(trial.noise, str)) for trial in trials(runs)}
    assert kinds == {(0.0, True), (0.4, True), (0.4, False)}
    assert len(runs) == len(set(trials(runs))) == 12
    matrix = next(trial.noise for trial in trials(runs) if not isinstance(trial.noise, str))
    assert matrix == pixel_confusion(load_data("digits").train, 10)


def test_pixel_confusion_is_the_leave_one_out_nearest_mean():
    data = load_data("digits", samples_per_class=4)
    matrix = np.array(pixel_confusion(data.train, 10))
    x = np.stack([np.asarray(image, dtype=float).ravel() for image, _ in (data.train[i] for i in range(40))])
    expected = np.zeros((10, 10))
    for i, label in enumerate(data.train.labels):
        kept = np.arange(40) != i
        means = [x[kept & (data.train.labels == c)].mean(0) for c in range(10)]
        expected[label, np.argmin([np.linalg.norm(x[i] - mean) for mean in means])] += 0.25
    np.testing.assert_allclose(matrix, expected, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1)
    assert 0 < np.trace(matrix) < 10


def test_pixel_confusion_of_single_images_never_finds_the_own_class():
    matrix = np.array(pixel_confusion(load_data("digits", samples_per_class=1).train, 10))
    assert not np.diag(matrix).any()
    np.testing.assert_allclose(matrix.sum(1), 1)


def test_class_conditional_labels_go_where_classes_look_alike():
    matrix = np.array(pixel_confusion(load_data("digits").train, 10))
    train = load_data("digits", label_noise=0.3, noise=matrix).train
    wrong = train.labels != train.clean_labels
    assert wrong.sum() == round(0.3 * len(train))
    for row in range(10):
        if matrix[row].sum() > matrix[row, row]:
            assert set(train.labels[wrong & (train.clean_labels == row)]) <= set(np.flatnonzero(matrix[row]))


def test_plan_counts_images_and_wrong_labels():
    runs = label_noise.conditions("digits, 5 per class", ["float", "gsb"], [0.0, 0.5], [0.3], [0, 1], updates=60)
    table = training_budget.plan_table(runs)
    assert table["wrong labels"].tolist() == [0, 25, 15]
    assert table["noise"].tolist() == ["", "symmetric", "class-conditional"]
    assert table["training images"].tolist() == [50] * 3
    assert table["steps"].tolist() == [60] * 3
    assert table["trainings"].tolist() == [4] * 3
    whole = training_budget.plan_table(label_noise.conditions("digits", ["float"], [0.1], [0.0], [0]))
    assert whole["training images"].tolist() == [1078]


def test_table_of_a_run(tmp_path, monkeypatch):
    def finished(trials, results_dir, jobs):
        return pd.DataFrame([{"noise": t.noise, "train_accuracy": 0.9, "test_accuracy": 0.6} for t in trials])

    monkeypatch.setattr(training_budget, "run_trials", finished)
    runs = label_noise.conditions("digits, 5 per class", ["float"], [0.2], [0.2], [0])
    table = training_budget.run(runs, tmp_path)
    assert table["labels"].tolist() == ["symmetric", "class-conditional"]
    assert table["data"].tolist() == ["digits, 5 per class"] * 2
    np.testing.assert_allclose(table["gap"], 0.3)


def sample_table(few: dict[str, float], many: dict[str, float]) -> pd.DataFrame:
    rows = [
        {
            "scheme": s,
            "condition": s,
            "samples_per_class": n,
            "seed": k,
            "test_accuracy": a + 0.001 * k,
            "gap": 0.9 - a,
            "data": "digits",
        }
        for n, level in ((5, few), (50, many))
        for s, a in level.items()
        for k in range(3)
    ]
    return pd.DataFrame(rows)


def test_claims_about_few_images_can_come_out_either_way():
    good = sample_table({"float": 0.4, "elastic": 0.5, "gsb": 0.7}, {"float": 0.9, "elastic": 0.8, "gsb": 0.9})
    assert [claim.verdict for claim in limited_samples.claims(good)] == ["yes"] * 3
    bad = sample_table({"float": 0.7, "elastic": 0.6, "gsb": 0.5}, {"float": 0.8, "elastic": 0.8, "gsb": 0.9})
    assert [claim.verdict for claim in limited_samples.claims(bad)] == ["no"] * 3
    fewer = limited_samples.claims(good[good["scheme"] != "float"])
    assert [claim.verdict for claim in fewer] == ["undecided", "undecided", "yes"]
    one = limited_samples.claims(good[good["samples_per_class"] == 5])
    assert len(one) == 2
    assert {claim.kind for claim in one} == {"confirmatory"}


def test_few_images_with_and_without_bias_are_conditions_of_their_own():
    runs = limited_samples.conditions("digits", ["float", "gsb"], ["none", "full"], [5], [0, 1])
    assert len({run.trial for run in runs}) == len(runs) == 8
    biases = {run.condition: run.trial.get_scheme().attention_bias for run in runs}
    assert biases == {"float": "none", "float + bias": "full", "gsb": "none", "gsb + bias": "full"}
    assert {run.trial.get_scheme().activation_limit for run in runs} == {None}  # for all or for none


def test_baselines_know_nothing_but_pixels():
    runs = limited_samples.conditions("digits", ["float", "gsb"], ["none", "full"], [2, 5], [0, 1])
    table = baselines.baselines(runs).set_index(["condition", "samples_per_class", "seed"])
    assert len(table) == 2 * 2 * 2
    train, test = (getattr(load_data("digits", 5, seed=1), part) for part in ("train", "test"))
    x, y = (np.stack([np.asarray(part[i][0], float).ravel() for i in range(len(part))]) for part in (train, test))
    nearest = [train.labels[np.argmin(((x - image) ** 2).sum(1))] for image in y]
    row = table.loc[("nearest neighbour", 5, 1)]
    assert row["test_accuracy"] == pytest.approx(np.mean(nearest == test.labels), abs=0.003)  # ties
    assert row["train_accuracy"] == 1
    assert (table["gap"] == table["train_accuracy"] - table["test_accuracy"]).all()


def noise_table(noisy: dict[str, tuple[float, float]]) -> pd.DataFrame:
    rows = []
    for k in range(3):
        for s, (accuracy, memorized) in noisy.items():
            base = {"scheme": s, "seed": k, "data": "digits"}
            rows.append(base | {"label_noise": 0.0, "labels": "symmetric", "test_accuracy": 0.9, "memorized": np.nan})
            for kind in ("symmetric", "class-conditional"):
                found = {"label_noise": 0.4, "labels": kind, "test_accuracy": accuracy + 0.001 * k}
                rows.append(base | found | {"memorized": memorized})
    return pd.DataFrame(rows)


def test_claims_about_wrong_labels_can_come_out_either_way():
    good = noise_table({"float": (0.5, 0.6), "elastic": (0.6, 0.3), "gsb": (0.7, 0.2)})
    assert [claim.verdict for claim in label_noise.claims(good)] == ["yes"] * 7
    bad = noise_table({"float": (0.7, 0.6), "elastic": (0.6, 0.3), "gsb": (0.5, 0.7)})
    assert [claim.verdict for claim in label_noise.claims(bad)] == ["no"] * 7
    assert label_noise.claims(good[good["label_noise"] == 0]) == []


def test_memory_is_compared_only_where_float_fitted_the_noise():
    unfitted = noise_table({"float": (0.5, 0.4), "elastic": (0.6, 0.3), "gsb": (0.7, 0.2)})
    memory = [claim for claim in label_noise.claims(unfitted) if "memorizes" in claim.sentence]
    assert {(claim.verdict, claim.evidence) for claim in memory} == {
        ("undecided", "float did not fit the noise: it reproduces 40% of the wrong labels")
    }
    assert label_noise.fitted(unfitted)["fitted"].tolist() == [False, False]


def test_differences_are_paired_within_each_setting():
    table = sample_table({"float": 0.4, "gsb": 0.7}, {"float": 0.9, "gsb": 0.8})
    found = statistics.differences(table, "samples_per_class")
    assert found["scheme"].tolist() == ["gsb", "gsb"]
    np.testing.assert_allclose(found["mean"], [0.3, -0.1])
    np.testing.assert_allclose(found["low"], found["high"])
    assert statistics.differences(table[table["scheme"] == "gsb"], "samples_per_class").empty


def test_change_is_paired_and_refuses_what_is_ambiguous():
    table = sample_table({"float": 0.4}, {"float": 0.9})
    np.testing.assert_allclose(statistics.change(table, "samples_per_class", 5, 50)["change"], 0.5)
    with pytest.raises(ValueError, match="samples_per_class = 7; there are"):
        statistics.change(table, "samples_per_class", 5, 7)
    with pytest.raises(ValueError, match="select one data set"):
        statistics.change(pd.concat([table, table]), "samples_per_class", 5, 50)


def test_a_colour_means_the_same_in_all_panels():
    names = {"float": 0.4, "elastic": 0.5, "nearest neighbour": 0.6, "logistic regression": 0.7}
    table = sample_table(names, dict.fromkeys(names, 0.8))
    fewer = table[~table["scheme"].isin(["elastic", "nearest neighbour"])]
    figure = limited_samples.draw(pd.concat([table, fewer.assign(data="cifar100")]))
    colors = [{t.get_text(): t.get_color() for t in ax.texts if t.get_text() in names} for ax in figure.axes]
    assert [len(found) for found in colors] == [4, 4, 2, 2]
    assert all(color == colors[0][name] for found in colors for name, color in found.items())
    plt.close("all")


def test_what_does_not_train_is_crossed_out():
    table = noise_table({"float": (0.5, 0.6), "gsb": (0.2, 0.2)}).assign(chance=0.1)  # with 40 % wrong labels
    trained = label_noise.with_training(table)
    untrained = trained[trained["training"] == "does not train"]
    assert set(untrained["scheme"]) == {"gsb"}
    assert set(untrained["label_noise"]) == {0.4}
    figure = label_noise.draw(table)
    for ax in figure.axes:
        crosses = [line for line in ax.lines if line.get_marker() == "x"]
        assert [line.get_xdata() for line in crosses] == [[0.4], [0.4]]  # one of each kind of noise
        hollow = [line for line in ax.lines if line.get_marker() == "o" and line.get_color() == "white"]
        assert [line.get_xdata() for line in hollow] == [[0.4]]
    assert "×: does not train" in figure.get_supxlabel()
    assert "×" not in label_noise.draw(table.assign(chance=0.01)).get_supxlabel()
    one_share = table[table["label_noise"] == 0].assign(data="photographs")
    assert len(label_noise.draw(pd.concat([table, one_share])).axes) == len(figure.axes)
    assert len(label_noise.draw(one_share).axes) > 0  # there are no others
    plt.close("all")


def test_few_images_cross_out_what_is_near_chance():
    table = sample_table({"float": 0.2, "gsb": 0.5}, {"float": 0.6, "gsb": 0.7})
    figure = limited_samples.draw(table.assign(chance=0.1))
    crosses = [[line.get_xdata() for line in ax.lines if line.get_marker() == "x"] for ax in figure.axes]
    assert crosses == [[[5]], [[5]]]
    assert "×: mean test accuracy below 3 times chance" in figure.get_supxlabel()
    assert "×" not in limited_samples.draw(table).get_supxlabel()  # chance is not known
    plt.close("all")


def test_few_seeds_of_class_conditional_noise_are_drawn():
    table = noise_table({"float": (0.5, 0.6), "gsb": (0.7, 0.2)})
    figure = label_noise.draw(table)
    for ax, value in zip(figure.axes, ("test_accuracy", "memorized"), strict=True):
        small = [line for line in ax.lines if line.get_marker() == "D" and line.get_markersize() < 3]
        conditional = table[table["labels"] == "class-conditional"]
        assert [list(line.get_ydata()) for line in small] == [
            list(100 * conditional.loc[conditional["scheme"] == name, value]) for name in ("float", "gsb")
        ]
    plt.close("all")


def test_figures_have_a_row_for_each_kind_of_images():
    table = sample_table({"float": 0.4, "gsb": 0.5}, {"float": 0.6, "gsb": 0.7})
    both = pd.concat([table, table.assign(data="cifar100")])
    assert len(limited_samples.draw(table).axes) == 2
    assert [ax.get_title(loc="left") for ax in limited_samples.draw(both).axes] == ["digits", "", "cifar100", ""]
    noisy = noise_table({"float": (0.5, 0.6), "gsb": (0.7, 0.2)})
    figure = label_noise.draw(noisy)
    assert "class-conditional" in figure._supxlabel.get_text()
    diamonds = [line for line in figure.axes[0].lines if line.get_marker() == "D" and line.get_markersize() > 3]
    assert [line.get_xdata() for line in diamonds] == [[0.4], [0.4]]  # at their true share
    assert len(figure.axes) == 2
    matrix = pixel_confusion(load_data("digits").train, 10)
    assert len(confusion_map(matrix, [str(i) for i in range(10)]).axes[0].texts) > 10
    plt.close("all")
