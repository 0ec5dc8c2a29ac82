"""Trains small models in one process, or in one of several, and saves what they have learned: FILE PARTS RESULTS."""

import sys

import torch

import binvit
from binvit import lab
from binvit.lab.data.datasets import load_data
from binvit.lab.training.devices import Team
from binvit.lab.training.loop import Training
from binvit.lab.training.recipes import recipe

SCHEMES = {"float": binvit.scheme("float"), "gsb": binvit.scheme("gsb", reduce="row")}
STEPS = 20


def trained(scheme: str, accumulate: int = 1, **options) -> tuple[list[float], dict[str, torch.Tensor], list[int]]:
    """Return the losses of all epochs, tensors, last gradients and answers of a model after 20 steps of 12 images."""
    # So small that no sign hangs on the last bit of a sum, which the parts' number decides; and signs are trained
    # without Adam, which makes whole steps of the last bits of a gradient that is zero in exact arithmetic.
    shape = {"width": 8, "depth": 1, "heads": 2, "patch_size": 4, "epochs": 10, "batch_size": 12}
    rate = {"optimizer": "adamw", "lr": 1e-3} if scheme == "float" else {"optimizer": "sgd", "lr": 5e-3}
    made = recipe("smoke", **shape, **rate, accumulate=accumulate, **options)
    training = Training(made, [SCHEMES[scheme]], load_data("digits", samples_per_class=3), seed=0, team=Team("cpu"))
    model = training.train()
    assert len(training.batches) * made.epochs == STEPS
    losses = [record["train_loss"] for record in training.position.history]
    gradients = {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return losses, model.state_dict() | gradients, training.predict_train().tolist()


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: trained(name, int(sys.argv[2])) for name in SCHEMES}
    trial = lab.Trial("digits", "float", samples_per_class=3, recipe_options={"width": 8, "depth": 1, "epochs": 2})
    for _ in range(2):  # trained together, then read
        table = lab.run_trials([trial], sys.argv[3], keep_models=True, progress=False, device="cpu")
        found.setdefault("seconds", []).append(float(table["seconds"][0]))
    if Team("cpu").leads:
        torch.save(found, sys.argv[1])
