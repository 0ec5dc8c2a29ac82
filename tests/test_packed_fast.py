import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import SIMPLE, images, logits_of, trained

import binvit
from binvit import bits
from binvit.packed.fast.patches import Patches, embed_patches
from binvit.packed.fast.threads import ONE_TORCH_THREAD, TEAM, torch_threads

X = images(20)
# With norms, own inputs, scales or layers of their own for query, key and value, or scales per token or head.
CONVOLUTIONAL = {"bnn", "xnor", "xnor-k", "xnor++", "bireal", "irnet", "reactnet"}
GENERIC = CONVOLUTIONAL | {"float", "bit", "bivit-head", "binaryvit", "bhvit-qd"}


ROUNDS_ALIKE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def check_fast(model, x=X, generic=False):
    """Where sums round in another order than torch's, a few images may differ: a sum lay next to its threshold."""
    packed = binvit.pack(model)
    assert bool(packed.reason) == generic
    logits, expected = packed(x), logits_of(model, x)
    equal = (logits == expected).all(1).float().mean()
    assert equal == 1 if generic or ROUNDS_ALIKE else equal >= 0.9
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() >= 0.9
    return packed


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("name", binvit.list_schemes())
def test_every_scheme(name, distilled):
    check_fast(trained(name, distilled), generic=name in GENERIC)


@pytest.mark.parametrize("reduce", ["sample", "head", "row"])
@pytest.mark.parametrize("thresholds", [(), (0.6,), (0.3, 0.5, 0.7)])
def test_reductions_and_numbers_of_groups(reduce, thresholds):
    check_fast(trained(binvit.scheme("gsb", reduce=reduce, thresholds=thresholds)))


def test_a_maximum_over_the_batch_is_fused_for_one_image():
    model = trained(binvit.scheme("gsb", reduce="batch"))
    check_fast(model, X[:1])
    assert torch.equal(check_fast(model)(X), logits_of(model, X))


@pytest.mark.parametrize("bias", ["full", "relative", "none"])
@pytest.mark.parametrize("distilled", [False, True])
def test_attention_biases(bias, distilled):
    check_fast(trained(binvit.scheme("gsb", attention_bias=bias), distilled))


@pytest.mark.parametrize("attention", ["half_max", "quarter_max", "three_maps", "head_sign", "elastic"])
@pytest.mark.parametrize("value", ["sign", "sign_learned", "head_sign", "elastic"])
def test_rules_of_map_and_value_mix(attention, value):
    generic = "head_sign" in (attention, value)
    check_fast(trained(binvit.scheme("gsb", attention=attention, value=value)), generic=generic)


@pytest.mark.parametrize("place", ["input", "hidden", "query", "key", "value"])
@pytest.mark.parametrize("rule", ["sign", "sign_ede", "elastic"])
def test_rules_of_inputs_mix(place, rule):
    check_fast(trained(binvit.scheme("elastic", **{place: rule})))


@pytest.mark.parametrize("weight", ["sign", "sign_mean", "standardized", "bwn_channel", "sign_learned_centred"])
def test_rules_of_weights_mix(weight):
    check_fast(trained(binvit.scheme("gsb", weight=weight)))


VARIANTS = {
    "layer scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 3},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "heads of 6 channels": {"num_heads": 8},
    "one head of 130 channels": {"embed_dim": 130, "num_heads": 1},
    "heads of 65 channels": {"embed_dim": 195},
    "mlp ratio": {"mlp_ratio": 2.75},
    "patches that are no squares": {"patch_size": (4, 8)},
    "65 tokens": {"patch_size": 2},
    "silu": {"act_layer": "silu"},
    "relu": {"act_layer": "relu"},
}


@pytest.mark.parametrize("name", ["gsb", "reactnet"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_transformer(name, variant):
    scheme = binvit.scheme("gsb") if name == "gsb" else binvit.scheme(name, activation="keep", **SIMPLE)
    check_fast(trained(scheme, depth=1, **VARIANTS[variant]))


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 40)),
    st.tuples(st.integers(1, 3), st.integers(1, 9)),
    st.integers(1, 3),
    st.integers(1, 70),
    st.data(),
)
@settings(deadline=None, max_examples=40)
def test_patches_of_any_size_are_cut_and_multiplied(size, grid, channels, width, data):
    """Whole numbers, so that no order of adding rounds; patches wider than a vector and narrower ones."""
    generator = np.random.default_rng(size[0] * size[1] + width)
    image = generator.integers(-9, 10, (channels, size[0] * grid[0], size[1] * grid[1])).astype(np.float32)
    length, panels = channels * size[0] * size[1], -(-width // 64)
    weights = generator.integers(-9, 10, (panels, length, 64)).astype(np.float32)
    affine = generator.integers(1, 5, (2, width)).astype(np.float32)
    positions = generator.integers(-5, 5, (grid[0] * grid[1], width)).astype(np.float32)
    prefix = np.full((2, width), 7, np.float32)
    patches = Patches(weights, affine, positions, prefix, np.array(size), data.draw(st.integers(1, length)))
    x = np.full((2 + len(positions), width), np.nan, np.float32)
    start, stop = 0, len(positions)
    if stop > 6:  # by parts of whole tiles, as threads do
        embed_patches(patches, image, x, 6, stop)
        stop = 6
    embed_patches(patches, image, x, start, stop)
    cut = image.reshape(channels, grid[0], size[0], grid[1], size[1]).transpose(1, 3, 0, 2, 4).reshape(-1, length)
    product = cut @ weights.transpose(1, 0, 2).reshape(length, -1)[:, :width]
    np.testing.assert_array_equal(x[2:], product * affine[0] + affine[1] + positions)
    np.testing.assert_array_equal(x[:2], prefix)


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_mlp_norm": True}, {"norm_layer": "rmsnorm"}])
def test_steps_without_a_kernel_take_the_generic_path(options):
    check_fast(trained("gsb", **options), generic=True)


@pytest.mark.parametrize("components", [["mlp"], ["mhsa", "head"], ["patch_embed"]])
def test_parts_that_stay_float_take_the_generic_path(components):
    check_fast(trained(binvit.scheme("gsb", components=components)), generic=True)


@pytest.mark.parametrize("pool", [{"global_pool": "avg"}, {"global_pool": "avgmax"}])
@pytest.mark.parametrize("tokens", [{"class_token": False}, {"class_token": False, "pos_embed": "none"}, {}])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_float_patch_embedding_keeps_the_order_of_sums(pool, tokens, depth):
    components = ["mlp", "mhsa"]  # a float head, too, since eight bits would hide a rounding
    model = trained(binvit.scheme("bibert", components=components), depth=depth, patch_size=2, **pool, **tokens)
    assert not check_fast(model, images(40)).reason


@pytest.mark.parametrize("reduce", ["row", "sample"])
def test_logits_do_not_depend_on_batch_and_threads(reduce):
    packed = binvit.pack(trained(binvit.scheme("gsb", attention_bias="relative", reduce=reduce)))
    expected = packed(X)
    for threads in (1, 2, 3, 5):
        assert torch.equal(packed._fast(X, threads), expected)
        for size in (1, 3):
            assert torch.equal(torch.cat([packed._fast(x, threads) for x in X.split(size)]), expected)


def test_threads_follow_torch_and_bits():
    packed, seen = binvit.pack(trained("gsb")), []
    packed._fast = lambda x, threads: seen.append(threads) or torch.zeros(len(x), 5)
    packed._fast.takes, packed._fast.worth = lambda count: True, lambda images, threads: threads
    packed(X)
    with bits.use_threads(1):
        packed(X)
    packed(X, threads=1)
    assert seen == [min(torch.get_num_threads(), bits.get_threads()), 1, 1]
    with pytest.raises(ValueError, match="at least 1"):
        packed(X, threads=0)


def test_a_task_that_fails_on_another_thread_is_not_lost():
    def fail(number, threads):
        if number == threads - 1:
            raise RuntimeError("the last one failed")

    with pytest.raises(RuntimeError, match="the last one failed"):
        TEAM.run(fail, 3)
    seen = []
    TEAM.run(lambda number, threads: seen.append((number, threads)), 3)
    assert sorted(seen) == [(0, 3), (1, 3), (2, 3)]


def test_python_threads_may_share_a_model():
    packed = binvit.pack(trained("gsb"))
    expected, results = packed(X), [None] * 4

    def run(i):
        results[i] = packed(X)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(result, expected) for result in results)


def test_the_number_of_torch_threads_outlives_overlapping_passes():
    before, entered, leave = torch.get_num_threads(), threading.Event(), threading.Event()
    seen = []

    def overlap():
        with ONE_TORCH_THREAD:
            entered.set()
            leave.wait(10)
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        worker = threading.Thread(target=overlap)
        with ONE_TORCH_THREAD:
            worker.start()
            entered.wait(10)
        assert torch.get_num_threads() == 3
        for ask in (torch_threads, torch.get_num_threads):
            other = threading.Thread(target=lambda ask=ask: seen.append(ask()))
            other.start()
            other.join()
        leave.set()
        worker.join(10)
        assert seen == [3, 3, 1, 3]
        assert torch.get_num_threads() == 3
    finally:
        leave.set()
        torch.set_num_threads(before)


def test_numpy_images_stay_untouched():
    packed = binvit.pack(trained("gsb"))
    array = X.numpy().copy()
    array.flags.writeable = False
    np.testing.assert_array_equal(packed(array), packed(X))
    assert packed(X[:0]).shape == (0, 5)
