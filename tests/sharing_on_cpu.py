"""Runs train_instruct_pix2pix.py with FSDP or DeepSpeed on the CPU, where accelerate leaves both out.

    sharing_on_cpu.py OPTION…

Nothing else is changed: all settings are those of `accelerate launch --use_fsdp` or `--use_deepspeed`.
"""

import runpy
import sys
from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

choose = AcceleratorState.__init__


def choose_sharing(
    state: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, deepspeed_plugin: Any = None, **options: Any
) -> None:
    choose(state, *arguments, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **options)
    if fsdp_plugin:
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
    if deepspeed_plugin:
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled first, which takes minutes
        deepspeed_plugin.set_mixed_precision(state.mixed_precision)
        deepspeed_plugin.select(_from_accelerator_state=True)
        state.distributed_type, state.deepspeed_plugins = DistributedType.DEEPSPEED, deepspeed_plugin
    PartialState._shared_state["distributed_type"] = state.distributed_type  # which all later states copy


AcceleratorState.__init__ = choose_sharing
sys.argv = ["train_instruct_pix2pix.py", *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
