"""Training: one step, the loop around it, and the folder that a run leaves.

In: a `TrainConfig`. Out: a run's folder with metrics, samples, checkpoints and the trained weights. `step.py` reads
like pseudocode, and is the code that runs; `loop.py` calls it, and `run_folder.py` describes the files.
"""

from minicpgd.training.evaluation import evaluate, open_policy, respond
from minicpgd.training.export import ExportReport, export
from minicpgd.training.loop import Callbacks, train
from minicpgd.training.metrics import Experience
from minicpgd.training.run_folder import Run, load_run, load_timings
from minicpgd.training.step import Learner, seed_step

__all__ = [
    "Callbacks", "Experience", "ExportReport", "Learner", "Run", "evaluate", "export", "load_run", "load_timings",
    "open_policy", "respond", "seed_step", "train",
]  # fmt: skip
