"""The method: models, encoding, training, sampling, scoring. All modules but sampling_options load torch."""

import os

for _library in ("TRANSFORMERS", "DIFFUSERS"):  # their notes, as that torchvision is missing, are of no use here
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
if os.environ.get("HF_ENDPOINT"):  # a mirror; Xet, which is read on import, would fetch large files from elsewhere
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
