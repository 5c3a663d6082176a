"""The method: models, encoding, training, sampling, scoring. All modules but sampling_options load torch."""

import os
from pathlib import Path

# Where downloaded models lie, unless the user has said it; what reads these variables is imported later.
if not {"HF_HOME", "HF_HUB_CACHE"} & os.environ.keys():
    os.environ["HF_HUB_CACHE"] = str(Path(__file__).parents[1] / ".cache/huggingface/hub")
for _library in ("TRANSFORMERS", "DIFFUSERS"):  # their notes, as that torchvision is missing, are of no use here
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
if not os.environ.get("HF_ENDPOINT", "mirror"):
    del os.environ["HF_ENDPOINT"]  # set to nothing, it would be taken for an address
if os.environ.get("HF_ENDPOINT"):  # a mirror; Xet, which is read on import, would fetch large files from elsewhere
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
