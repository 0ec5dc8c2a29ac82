"""Benchmarks on tiny models: what the tables say of themselves, not how fast this machine is."""

import gc
import subprocess
import sys
import time
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import binvit
from binvit.__main__ import cli, main
from binvit.lab.benchmark import machine, memory, peers, roofline, run, steps, timing
from binvit.lab.benchmark.kernels import benchmark_kernels
from binvit.lab.benchmark.models import VARIANTS, benchmark_models, benchmark_training, calibrated_model, random_model
from binvit.lab.benchmark.steps import benchmark_steps
from binvit.lab.experiments import efficiency
from binvit.packed import pack
from binvit.packed.audit import audit

TINY = {"width": 64, "image_size": 32, "depth": 1}


def test_every_contender_has_its_turn_in_every_round_and_first_runs_do_not_count():
    calls = {"a": 0, "b": 0}

    def run(name):
        calls[name] += 1

    times = timing.interleave({name: lambda name=name: run(name) for name in calls}, least=5, most=5)
    assert {name: len(values) for name, values in times.items()} == {"a": 15, "b": 15}
    assert all(count >= 22 for count in calls.values())  # two before all rounds, one or more and three in each
    assert all((values >= 0).all() for values in times.values())


def test_threads_are_set_for_both_runtimes_and_restored():
    before = torch.get_num_threads()
    with timing.use_threads(1) as threads:
        assert (threads, torch.get_num_threads(), timing.bits.get_threads()) == (1, 1, 1)
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="at least 1"), timing.use_threads(0):
        pass
    with pytest.raises(ValueError, match="4096 threads were asked for"), timing.use_threads(4096):
        pass


def test_kernel_table_holds_rates_that_follow_from_its_seconds():
    table = benchmark_kernels(["DeiT-T"], threads=1, seconds=0.01)
    assert set(table["layer"]) == {"qkv", "proj", "fc1", "fc2"}
    assert set(table["contender"]) == {"torch float32", "torch bfloat16", "torch int8", "binvit 1-bit"}
    np.testing.assert_allclose(table["rate"], table["m"] * table["k"] * table["n"] / table["seconds"] / 1e9)
    ours = table[table["contender"] == "binvit 1-bit"]
    assert (ours["times"] == 1).all()
    assert ours["share_of_limit"].between(0, 1.5).all()
    assert roofline.draw_roofline(table).axes


def test_table_of_whole_models_names_every_peer_or_says_why_not():
    said = []
    some = [name for name in peers.PEERS if "compiled" not in name]  # which takes minutes to compile
    table = benchmark_models((1, 2), some, threads=1, seconds=0.01, say=said.append, **TINY)
    names = set(table["contender"])
    assert {"timm float32", "timm bfloat16", "torch dynamic int8", *VARIANTS} <= names
    assert names | {sentence.split(" is left out")[0] for sentence in said} == {*some, *VARIANTS}
    assert (table["low"] <= table["seconds"]).all()
    assert (table["seconds"] <= table["high"]).all()
    np.testing.assert_allclose(table["per_image"] * table["batch"], table["seconds"])
    assert efficiency.draw(table).axes


@pytest.mark.parametrize("name", [name for name in peers.PEERS if "compiled" not in name])
def test_peers_compute_the_float_model(name):
    model = random_model(**TINY)
    images = torch.randn(2, 3, 32, 32)
    try:
        run = peers.PEERS[name](model, images, 1)
    except peers.NotAvailable as reason:
        pytest.skip(str(reason))
    result = run()
    result = (
        result
        if isinstance(result, torch.Tensor)
        else next(iter(result.values()) if hasattr(result, "values") else iter(result))
    )
    expected = model(images).detach()
    got = torch.as_tensor(np.asarray(result.float() if isinstance(result, torch.Tensor) else result))
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 0.1 * expected.abs().max() + 0.02


def test_openvino_leaves_the_process_able_to_take_signals():
    pytest.importorskip("openvino")
    code = """
import faulthandler, os, signal, torch
from binvit.lab.benchmark import peers
faulthandler.enable()  # has a signal stack, as OpenVINO has
model, images = torch.nn.Linear(8, 8).eval(), torch.zeros(1, 8)
runs = [peer(model, images, 1) for peer in (peers.openvino_float32, peers.openvino_bfloat16)]
while runs:
    runs.pop(0)()
taken = []
signal.signal(signal.SIGUSR1, lambda *_: taken.append(1))
os.kill(os.getpid(), signal.SIGUSR1)
assert taken == [1]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_training_steps_are_compared_with_the_float_step():
    table = benchmark_training(2, ["binvit gsb"], threads=1, rounds=2, depth=1, image_size=32)
    assert list(table["contender"]) == ["timm float32", "binvit gsb"]
    assert table["times"].iloc[0] == 1
    assert (table["seconds"] > 0).all()


def test_steps_of_schemes_are_compared_at_each_size():
    table = benchmark_steps(["smoke"], ["float", "xnor"], threads=1, rounds=1, batch=2)
    assert table[["size", "scheme", "batch", "threads"]].to_numpy().tolist() == [
        ["smoke", "float", 2, 1],
        ["smoke", "xnor", 2, 1],
    ]
    assert table["times"].iloc[0] == 1
    assert (table[["first_ms", "ms"]] > 0).all().all()
    many = benchmark_steps(["smoke"], ["xnor"], threads=1, batch=2, seconds=0.2).set_index("scheme").loc["xnor"]
    assert 0 < many["low"] <= many["high"]
    with pytest.raises(ValueError, match="Unknown size 'huge'; valid are smoke, cpu, DeiT-S"):
        benchmark_steps(["huge"])


def test_steps_are_measured_one_model_after_the_other(monkeypatch):
    """Sixteen models of DeiT-S at once would take 12 GB."""
    made = []

    def binarized(model, scheme):
        gc.collect()
        alive = [known() for known in made]
        assert alive.count(None) >= len(alive) - 1  # the one before may still be bound to its step
        binary = binvit.binarize(model, scheme)
        made.append(weakref.ref(binary))
        return binary

    monkeypatch.setattr(steps, "binarize", binarized)
    table = benchmark_steps(["smoke"], ["xnor", "elastic", "bnn", "bit"], threads=1, rounds=1, batch=2)
    assert table["scheme"].tolist() == ["float", "xnor", "elastic", "bnn", "bit"]
    assert len(made) == 4


def test_memory_is_measured_in_processes_of_their_own():
    pages = np.ones(2**27)  # a gigabyte here must not hide what the models need there
    table = memory.benchmark_memory(width=192, depth=4).set_index("contender")
    assert table.loc["binvit gsb", "file_bytes"] < table.loc["timm float32", "file_bytes"]
    assert table.loc["timm float32", "peak_bytes"] > table.loc["timm float32", "file_bytes"]
    assert 1e6 < table.loc["binvit gsb", "peak_bytes"] < 1e9
    assert pages[0] == 1


def ratios(**times):
    """Return a table of ratios with intervals of 5 % to both sides."""
    rows = [{"contender": name.replace("_", " "), "times": t} for name, t in times.items()]
    table = pd.DataFrame(rows)
    return table.assign(times_low=0.95 * table["times"], times_high=1.05 * table["times"], share_of_limit=0.9)


def test_claims_about_speed_can_fail():
    kernels, models = ratios(torch_float32=3.0, torch_int8=1.95), ratios(timm_float32=7.0, binvit_gsb=1.0)
    verdicts = [claim.verdict for claim in efficiency.claims(kernels, models)]
    # Not measured, and an interval that crosses the bound, are both undecided.
    assert verdicts == ["no", "undecided", "undecided", "yes", "yes", "yes"]
    for step, verdict in ((1.6, "no"), (1.5, "undecided"), (1.4, "yes")):
        training = ratios(timm_float32=1.0, binvit_gsb=step)
        assert efficiency.claims(kernels, models, training)[-1].verdict == verdict


def test_a_busy_machine_decides_nothing_about_speed():
    kernels, models = ratios(torch_float32=3.0, torch_int8=9.0), ratios(timm_float32=7.0, binvit_gsb=1.0)
    found = efficiency.claims(kernels, models, others=0.3)
    assert {claim.verdict for claim in found} == {"undecided"}
    assert "other programs used 30% of the cores" in found[0].evidence


def test_long_runs_are_counted_once_a_turn_and_short_ones_three_times():
    times = timing.interleave({"long": lambda: time.sleep(0.11), "short": lambda: time.sleep(0.001)}, least=2, most=2)
    assert {name: len(values) for name, values in times.items()} == {"long": 2, "short": 6}
    assert min(times["long"]) >= 0.11


def test_claims_about_size_follow_the_audit():
    model = calibrated_model(random_model(**TINY), "binvit gsb")
    counted = audit(pack(model))
    rounded = audit(pack(binvit.round_vectors(model)))
    claims = efficiency.size_claims(rounded, np.array([0.0, 1e-7]), counted)
    assert [claim.verdict for claim in claims[:2]] == ["no", "no"]  # so small a model is mostly float residue
    assert "With float16 vectors" in claims[0].sentence
    assert "rounded model's logits" in claims[1].sentence
    assert claims[0].evidence.startswith(f"{100 * rounded.share:.1f} % (at most 5 % demanded")
    assert f"{100 * counted.share:.1f} % with float32 vectors" in claims[0].evidence
    (ax,) = efficiency.draw_bytes(counted).axes
    assert [label.get_text() for label in ax.get_yticklabels()][-1] == "total"


def test_figures_of_times_name_their_cpu():
    growth = pd.DataFrame({"contender": "binvit gsb", "grows": "width", "width": [64, 128], "seconds": [0.1, 0.2]})
    assert efficiency.draw_growth(growth).get_suptitle() == machine.describe_cpu()
    another = {"cpu": "another", "kernels": machine.kernels_version()}
    assert efficiency.draw_growth(growth.assign(**another)).get_suptitle() == "another"
    models = pd.DataFrame({"batch": [1], "contender": "binvit gsb", "per_image": 0.1, "low": 0.1, "high": 0.1})
    assert efficiency.draw(models.assign(**another), "DeiT-S").get_suptitle() == "DeiT-S\nanother"
    for told in ({"kernels": "sha256:0"}, {"kernels": float("nan")}):  # measured before kernels changed, or unknown
        older = efficiency.draw(models.assign(**another | told), "DeiT-S").get_suptitle()
        assert older == "DeiT-S\nanother (kernels of another version)"
    plt.close("all")


def test_a_version_of_the_kernels_is_what_they_do_and_not_how_they_are_written(tmp_path, monkeypatch):
    source = '''"""A module."""

def scaled(x):
    """Scale."""
    text = "# not a comment"  # a comment
    return 2 * x
'''
    rewritten = """
def scaled(x):
    # another comment
    text = "# not a comment"

    return 2 * x
"""
    assert machine.statements(source) == machine.statements(rewritten)
    assert "# not a comment" in machine.statements(source)
    assert machine.statements(source) != machine.statements(source.replace("2 *", "3 *"))
    short = 'def f(): """Größe."""; return 1'
    assert machine.statements(short) == "def f(): ; return 1"

    def version(text, name="bits/gemm.py", *more):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for file in ("jit.py", "threads.py", "packed/vit.py", "nn/heads.py", name):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(text if file == name else "")
        monkeypatch.setattr(machine.binvit, "__file__", str(root / "__init__.py"))
        machine.kernels_version.cache_clear()
        return machine.kernels_version(*more)

    try:
        assert version(source) == version(rewritten) != version(source.replace("2 *", "3 *"))
        assert version(source) != version(source, "bits/tile.py")
        assert version("a = 1", "nn/heads.py") == version("a = 2", "nn/heads.py")
        assert version("a = 1", "nn/heads.py", "nn") != version("a = 2", "nn/heads.py", "nn")
    finally:
        machine.kernels_version.cache_clear()


def test_growth_has_lines_of_reference():
    rows = [("binvit gsb", kind, n, 0.001 * n) for kind in ("tokens", "width") for n in (64, 128, 256)]
    growth = pd.DataFrame(rows, columns=["contender", "grows", "tokens", "seconds"]).assign(width=lambda t: t["tokens"])
    ax = efficiency.draw_growth(growth).axes[0]
    measured, linear, square = (line.get_ydata() for line in ax.lines)
    np.testing.assert_allclose(linear, measured)
    np.testing.assert_allclose(square, [64, 256, 1024])


def test_bench_writes_tables_and_refuses_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "benchmark_kernels", lambda **o: benchmark_kernels(["DeiT-T"], **o))
    result = CliRunner().invoke(cli, ["bench", "--part", "kernels", "--seconds", "0.01", "--out", str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    assert len(pd.read_csv(tmp_path / "b" / "kernels.csv")) == 16
    assert (tmp_path / "b" / "roofline.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--part", "speed"], "Unknown part 'speed' of the benchmark; valid are kernels, models, growth"),
        (["--training", "--part", "kernels"], "leave --part out"),
        (["--training", "--size", "huge"], "Unknown size 'huge'; valid are smoke, cpu, DeiT-S"),
        (["--training", "--scheme", "GSB"], "Unknown scheme 'GSB'; valid are float, "),
        (["--size", "cpu"], "--size and --scheme choose training steps; add --training."),
        (["--batch", "0"], "0"),
    ],
)
def test_bench_ends_with_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_busy_machine_is_told():
    quiet = machine.LoadWatch()
    sum(range(10**6))  # this process itself is no other program
    assert 0 <= quiet.stop().others <= 1
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch = machine.LoadWatch()
        time.sleep(1)
        load = watch.stop()
    finally:
        other.kill()
        other.wait()
    assert load.others > 0.2 / machine.psutil.cpu_count()
    assert load.busy == (load.others > machine.BUSY)
    assert machine.Load(0.5).sentence().endswith("busy, and the numbers should not be trusted.")
    assert machine.Load(0.01).sentence() == "Meanwhile other programs used 1% of the cores."


def test_the_fewest_rounds_give_a_ratio_an_interval():
    times = timing.interleave({"quick": lambda: None, "slow": lambda: time.sleep(0.001)}, seconds=0)
    low, high = timing.ratio_interval(times["slow"], times["quick"])
    assert 1 < low <= high < np.inf


def test_a_ratio_has_an_interval_over_rounds():
    rng = np.random.default_rng(0)
    rounds = rng.uniform(0.8, 1.2, 40)  # what the machine does to both
    times = {"theirs": np.repeat(6 * rounds, 3), "ours": rounds}
    low, high = timing.ratio_interval(times["theirs"], times["ours"])
    assert low == pytest.approx(6)
    assert high == pytest.approx(6)
    noisy = times["theirs"] * rng.uniform(0.9, 1.1, 120)
    low, high = timing.ratio_interval(noisy, times["ours"])
    assert 5.7 < low < 6 < high < 6.3
    assert np.isnan(timing.ratio_interval(noisy[:3], times["ours"][:1])).all()  # one round has no interval
