"""Settings to make before transformers, DeepSpeed and bitsandbytes are imported, and those for Ascend NPUs."""

import importlib.util
import logging
import os

import torch


def prepare_npu() -> bool:
    """Imports torch_npu and makes its settings, if it is installed and finds an NPU; tells whether it does."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    import torch_npu  # noqa: F401  adds torch.npu

    if not torch.npu.is_available():
        return False
    torch.npu.set_compile_mode(jit_compile=False)  # ready-made kernels; otherwise every new shape is compiled first
    torch.npu.config.allow_internal_format = False  # converting to NPU's own layouts and back costs more than it gains
    # fp32 is fp32: hf32 is for NPUs what tf32 is for GPUs
    torch.npu.conv.allow_hf32 = torch.npu.matmul.allow_hf32 = False
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # of OpenMP and MKL: the host only hands out kernels, the loader has its own processes
    return True


def use_plain_layout(weight: torch.Tensor):
    """Brings the weight (D, C, t, h, w) of a 3-D convolution into the plain layout if it is on an NPU, in place.

    Qwen2-VL's patch embedding is one; in NPU's own layout it would be converted in every step.
    """
    if weight.device.type == "npu" and weight.ndim == 5:  # ZeRO-3 leaves an empty vector of it between uses
        import torch_npu

        weight.data = torch_npu.npu_format_cast(weight.data, torch_npu.Format.NCDHW)


# Tokenizers must not start threads before the data loader forks
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not prepare_npu() and not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed guesses right, but warns at every start
# Warns at every import that an optional CPU kernel is missing, also when nothing is quantised
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
