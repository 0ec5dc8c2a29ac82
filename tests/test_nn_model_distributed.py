"""Scales under torch.distributed: the same in all processes, from the images of all."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from nn_helpers import images, tiny_vit
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import binvit

BATCHES = 3, 5  # images of each process


def batch(rank, step):
    return images(BATCHES[rank], seed=10 * step + rank), torch.arange(BATCHES[rank])


def differing(model):
    """Names of parameters and buffers that the two processes do not share."""
    found = []
    for name, tensor in model.state_dict().items():
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor.contiguous())
        if not torch.equal(*both):
            found.append(name)
    return found


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    answer = {}
    for name in ("gsb", "bivit-head"):
        model = binvit.binarize(tiny_vit(), name)
        wrapped, average = DistributedDataParallel(model), ModelEmaV3(model, decay=0.5)
        optimizer = torch.optim.AdamW(wrapped.parameters(), 1e-3)
        for step in range(3):
            x, y = batch(rank, step)
            F.cross_entropy(wrapped(x), y).backward()
            if step == 0:
                answer[name, "first"] = {key: t.clone() for key, t in model.state_dict().items()}
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
        answer[name, "trained"], answer[name, "average"] = differing(model), differing(average.module)
    calibrated = binvit.calibrate(binvit.binarize(tiny_vit(), "gsb"), batch(rank, 0)[0])
    answer["calibrated"] = calibrated.state_dict()
    alone = binvit.calibrate(binvit.binarize(tiny_vit(), "gsb"), batch(rank, 0)[0], all_processes=False)
    answer["alone"] = differing(alone)
    try:
        binvit.binarize(tiny_vit(), "gsb").train()(batch(rank, 0)[0])
    except ValueError as error:
        answer["refused"] = str(error)
    torch.save(answer, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(process, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["gsb", "bivit-head"])
def test_processes_stay_alike_under_distributed_data_parallel(answers, name):
    for answer in answers:
        assert answer[name, "trained"] == []
        assert answer[name, "average"] == []


@pytest.mark.parametrize("name", ["gsb", "bivit-head"])
def test_the_scales_are_those_of_the_whole_batch(answers, name):
    whole = binvit.calibrate(binvit.binarize(tiny_vit(), name), torch.cat([batch(rank, 0)[0] for rank in range(2)]))
    for key, tensor in whole.state_dict().items():
        for answer in answers:
            torch.testing.assert_close(answer[name, "first"][key], tensor, rtol=1e-6, atol=1e-7)


def test_calibrate_counts_the_images_of_all_processes(answers):
    assert len(answers[0]["alone"]) > 0
    first, second = (answer["calibrated"] for answer in answers)
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert all(torch.equal(tensor, answers[0]["gsb", "first"][key]) for key, tensor in first.items())


def test_a_process_does_not_set_its_own_scales_without_a_word(answers):
    for answer in answers:
        assert answer["refused"].startswith("The scales of the binarized model have no value yet")
        assert answer["refused"].endswith(".")
