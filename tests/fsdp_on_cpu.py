"""Runs train_instruct_pix2pix.py with FSDP on the CPU, where accelerate leaves FSDP out: fsdp_on_cpu.py OPTION…

Nothing else is changed: all settings are those of `accelerate launch --use_fsdp`.
"""

import runpy
import sys
from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

choose = AcceleratorState.__init__


def choose_fsdp(state: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    choose(state, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin:
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # which all later states copy


AcceleratorState.__init__ = choose_fsdp
sys.argv = ["train_instruct_pix2pix.py", *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
