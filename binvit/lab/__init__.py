"""The laboratory: data, training, trials, statistics and figures of the experiments."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "analysis",
        "benchmark",
        "data",
        "experiments",
        "figures",
        "notebooks",
        "predict",
        "project",
        "randomness",
        "training",
        "trials",
    ],
    submod_attrs={
        "analysis.claims": ["Claim"],
        "analysis.statistics": ["paired_difference", "summarize"],
        "data.datasets": ["ImageData", "list_datasets", "load_data"],
        "training.checkpoint": ["load_checkpoint", "save_checkpoint"],
        "training.loop": ["TrainingDiverged"],
        "training.model": ["build_model"],
        "training.recipe": ["Recipe", "Stage"],
        "training.recipes": ["list_recipes", "mlp_weights_stage", "recipe"],
        "trials.pool": ["TrialsFailed", "run_trials"],
        "trials.store": ["TrialResult", "load_model", "read_result"],
        "trials.train_trial": ["train_trial"],
        "trials.trial": ["Trial"],
        "trials.tune": ["tune"],
    },
)
