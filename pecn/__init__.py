"""The method: models, encoding, training, sampling, scores. Importing a module of it loads torch."""

import os

for _library in ("TRANSFORMERS", "DIFFUSERS"):  # their notes, such as that torchvision is missing, are of no use here
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
