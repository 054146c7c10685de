"""The four argument classes. Every flag of the reference's scripts parses; those that act on nothing say so."""

import difflib
import os
import re
from dataclasses import dataclass, field, fields

import torch
import transformers

from data_utils.errors import UserError


@dataclass
class LegacyArguments:
    """Flags of the reference's scripts that do nothing there or here. They parse, and `legacy_notes` says why."""

    version: str = "v0"
    concat: str = "None"
    policy_class: str = ""
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = True
    tune_mm_mlp_adapter: bool = False
    image_aspect_ratio: str = "square"
    lazy_preprocess: bool = False
    is_multimodal: bool = False
    select_seg_token_mask: bool = False
    group_by_modality_length: bool = False
    model_max_length: int = 2048
    lora_weight_path: str = ""
    lora_task_type: str = "CAUSAL_LM"
    cache_dir: str | None = None


LEGACY_REASONS = {
    "version": "there is one version of the prompt",
    "concat": "the fusion is chosen by --using_film and --is_tinyvla",
    "policy_class": "the head is chosen by --policy_head_type",
    "mm_use_im_start_end": "Qwen2-VL's chat template marks images",
    "mm_use_im_patch_token": "Qwen2-VL's chat template marks images",
    "tune_mm_mlp_adapter": "the fusion is always trained",
    "image_aspect_ratio": "images are resized to --image_size_stable",
    "lazy_preprocess": "items are always prepared when they are needed",
    "is_multimodal": "every sample has images",
    "select_seg_token_mask": "there are no segmentation tokens",
    "group_by_modality_length": "every sample has images and text",
    "model_max_length": "nothing is ever truncated",
    "lora_weight_path": "--model_name_or_path takes a folder with adapters",
    "lora_task_type": "the adapters are plain LoRA, whatever the task is called",
    "cache_dir": "models are read from the folder given; HF_HOME moves the hub's cache",
}


@dataclass
class ModelArguments(LegacyArguments):
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder of Qwen2-VL (stage 2) or of a DexVLA checkpoint (stage 3), with its processor."},
    )
    model_pretrain: str = field(default="", metadata={"help": "DexVLA weights to use with --load_pretrain True."})
    using_film: bool = field(default=True, metadata={"help": "Fuse prompt and reasoning with FiLM."})
    is_tinyvla: bool = field(default=False, metadata={"help": "TinyVLA: pooled hidden states, no reasoning written."})
    load_pretrain_dit: bool = field(default=False, metadata={"help": "Load stage-1 weights into the policy head."})
    pretrain_dit_path: str | None = field(default=None, metadata={"help": "Stage-1 head: .ckpt or .safetensors."})


@dataclass
class DataArguments:
    task_name: str | None = field(
        default=None, metadata={"help": "Entry of TASK_CONFIGS in aloha_scripts/constants.py."}
    )
    chunk_size: int = field(default=16, metadata={"help": "Actions per chunk, in control steps."})
    use_reasoning: bool = field(default=False, metadata={"help": "Train the sub-step reasoning."})
    delta_control: bool = field(default=False, metadata={"help": "Predict differences between successive actions."})
    image_size_stable: str = field(default="(320,240)", metadata={"help": '"(width,height)" of every camera.'})
    image_size_wrist: str = field(default="(320,240)", metadata={"help": '"(width,height)" of cameras named *wrist*.'})
    augment: bool = field(default=True, metadata={"help": "Random crop, rotation and colours in training."})
    episode_first: bool = field(default=False, metadata={"help": "Draw an episode, then a frame of it."})
    skip_mirrored_data: bool = field(default=False, metadata={"help": "Leave out episodes named *mirror*."})
    history_images_length: int = field(
        default=1, metadata={"help": "Frames per camera, up to the current one; more than one enter as a video."}
    )

    def __post_init__(self):
        self.image_size_stable = parse_image_size(self.image_size_stable, "image_size_stable")
        self.image_size_wrist = parse_image_size(self.image_size_wrist, "image_size_wrist")
        if self.history_images_length < 1:
            raise UserError(
                f"--history_images_length: expected a number of frames, at least 1, found {self.history_images_length}"
            )
        if self.chunk_size < 1:
            raise UserError(f"--chunk_size: expected a positive number, found {self.chunk_size}")


@dataclass
class ActionHeadArguments:
    policy_head_type: str = field(
        default="scale_dp_policy", metadata={"help": "scale_dp_policy or unet_diffusion_policy."}
    )
    policy_head_size: str | None = field(
        default=None,
        metadata={"help": "ScaleDP_Ti, _S, _B, _L or _H. Default: what the model folder says, else ScaleDP_H."},
    )
    policy_head_depth: int | None = field(default=None, metadata={"help": "ScaleDP blocks, instead of a named size."})
    policy_head_width: int | None = field(default=None, metadata={"help": "ScaleDP width, instead of a named size."})
    policy_head_heads: int | None = field(default=None, metadata={"help": "ScaleDP heads, instead of a named size."})
    action_dim: int | None = field(default=None, metadata={"help": "Columns of `action`. Default: as in the data."})
    state_dim: int | None = field(default=None, metadata={"help": "Columns of `qpos`. Default: as in the data."})
    noise_samples: int = field(default=1, metadata={"help": "Noise draws per action chunk in a training step."})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    # the reference's defaults
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-7
    max_steps: int = 5000
    seed: int = 0
    logging_steps: float = 10
    per_device_eval_batch_size: int = 32
    remove_unused_columns: bool = False
    report_to: None | str | list[str] = "tensorboard"
    # transformers would look at every loss on the host; ours are looked at when something is logged
    logging_nan_inf_filter: bool = False

    gradient_checkpointing: str = field(
        default="False",
        metadata={"help": "Recompute activations: True, False, or auto, only if they would not fit into memory."},
    )
    llm_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the language loss."})
    flash_attn: bool = field(default=False, metadata={"help": "flash_attention_2 where installed, else SDPA."})
    freeze_vision_tower: bool = field(default=False, metadata={"help": "Do not train the vision tower."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the policy head and the fusion only."})
    compile_blocks: bool = field(
        default=False, metadata={"help": "torch.compile of every layer; batches are padded to multiples of 32 tokens."}
    )
    using_ema: bool = field(default=False, metadata={"help": "Keep an exponential moving average of the weights."})
    eval_ema: bool = field(default=False, metadata={"help": "Evaluate with the averaged weights (--using_ema True)."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "True: go on from the newest checkpoint of output_dir; or a checkpoint's path."}
    )
    load_pretrain: bool = field(default=False, metadata={"help": "Take config and weights from --model_pretrain."})
    max_skipped_steps: int = field(
        default=10, metadata={"help": "Steps whose loss or gradient is not finite are skipped; more than this stop."}
    )
    logging_dir: str | None = field(default=None, metadata={"help": "TensorBoard folder. Default: output_dir/runs."})
    warmup_ratio: float = field(default=0.0, metadata={"help": "Warm-up, as a share of all steps."})
    evaluation_strategy: str | None = field(default=None, metadata={"help": "Old name of --eval_strategy."})

    lora_enable: bool = field(default=False, metadata={"help": "Train low-rank adapters instead of the backbone."})
    lora_module: str = field(default="vit", metadata={"help": 'What to adapt: any of "vit llm di_head".'})
    lora_r: int = 64
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    lora_bias: str = "none"
    non_lora_lr: float | None = field(default=None, metadata={"help": "Learning rate of policy head and fusion."})
    bits: int = field(default=16, metadata={"help": "4 or 8: load the backbone quantised (needs --lora_enable True)."})
    quant_type: str = field(default="nf4", metadata={"help": "nf4 or fp4, with --bits 4."})
    double_quant: bool = field(default=True, metadata={"help": "Quantise the quantisation constants, with --bits 4."})

    def __post_init__(self):
        if self.eval_ema and not self.using_ema:
            raise UserError("--eval_ema True: expected --using_ema True too, found False")
        checkpointing = str(self.gradient_checkpointing).lower()
        if checkpointing not in ("true", "false", "auto"):
            raise UserError(f"--gradient_checkpointing: expected True, False or auto, found {checkpointing}")
        self.checkpointing_auto = checkpointing == "auto"
        self.gradient_checkpointing = checkpointing == "true"
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.accelerator_config is None and torch.accelerator.is_available():
            self.accelerator_config = {"non_blocking": True}  # batches travel while the device works
        if self.warmup_ratio and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # below 1, transformers reads it as a share of all steps
        if self.logging_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        lowered = str(self.resume_from_checkpoint).lower()
        if lowered in ("true", "false", "none"):
            self.resume_from_checkpoint = True if lowered == "true" else None
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers refuses --bf16 True without it
        if self.tf32 and not torch.cuda.is_available():
            print("--tf32 True has no effect: there is no CUDA device")
            self.tf32 = None
        if self.deepspeed and "RANK" not in os.environ:
            # started as plain `python train_vla.py`: without these DeepSpeed looks for MPI
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            os.environ.setdefault("MASTER_PORT", "29604")
        if self.activation_checkpointing is None:  # transformers' new name for it; the old one warns
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs or {"use_reentrant": False}
        super().__post_init__()
        if self.n_gpu > 1:
            print(f"{self.n_gpu} GPUs, but one process: only the first one works; scripts/*.sh or torchrun use all")
            self._n_gpu = 1  # transformers would fall back to DataParallel
        if self.deepspeed and self.device is not None:  # asking for the device starts torch.distributed
            import deepspeed

            deepspeed.init_distributed()  # ZeRO-3 shards the model while it is built, and asks DeepSpeed for the ranks
        unknown = set(self.lora_modules) - {"vit", "llm", "di_head"}
        if unknown or not self.lora_modules:
            raise UserError(f'--lora_module: expected any of "vit llm di_head", found {self.lora_module!r}')
        if self.label_smoothing_factor:
            raise UserError("--label_smoothing_factor: expected 0, the model computes its own losses")
        if self.bits not in (4, 8, 16):
            raise UserError(f"--bits: expected 4, 8 or 16, found {self.bits}")
        if self.bits < 16 and not self.lora_enable:
            raise UserError(f"--bits {self.bits}: quantised weights cannot be trained, expected --lora_enable True too")
        if self.quant_type not in ("nf4", "fp4"):
            raise UserError(f"--quant_type: expected nf4 or fp4, found {self.quant_type}")

    @property
    def lora_modules(self) -> list[str]:
        return self.lora_module.replace(",", " ").split()


def legacy_notes(args: LegacyArguments) -> list[str]:
    """One line per legacy flag that was given a value other than its default."""
    given = [(f.name, getattr(args, f.name)) for f in fields(LegacyArguments) if getattr(args, f.name) != f.default]
    return [f"--{name} {value} has no effect: {LEGACY_REASONS[name]}" for name, value in given]


def head_notes(args: ActionHeadArguments) -> list[str]:
    """One line per flag that describes another policy head than the one chosen."""
    if args.policy_head_type == "scale_dp_policy":
        return []
    names = ("policy_head_size", "policy_head_depth", "policy_head_width", "policy_head_heads")
    given = [(name, getattr(args, name)) for name in names if getattr(args, name) is not None]
    return [f"--{name} {value} has no effect: it is for scale_dp_policy" for name, value in given]


def parse_image_size(text: str | tuple[int, int], flag: str) -> tuple[int, int]:
    """ "(320,240)", "320,240", "320x240" or "480" -> (width, height) in pixels.

    Raises:
        UserError: naming the flag and what was found.
    """
    if not isinstance(text, str):
        return tuple(text)
    match = re.fullmatch(r"\(?\s*(\d+)\s*(?:[,x]\s*(\d+)\s*)?\)?", text.strip())
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < 28:
        raise UserError(f'--{flag}: expected "(width,height)" with sides of at least 28 pixels, found {text!r}')
    return size


def parse_arguments(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, TrainingArguments, ActionHeadArguments]:
    """Raises UserError for flags that nobody knows, with the nearest one that exists."""
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, ActionHeadArguments))
    *arguments, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    for flag in unknown:
        near = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
        raise UserError(f"{flag}: expected a flag of train_vla.py" + (f", did you mean {near[0]}?" if near else ""))
    return tuple(arguments)
