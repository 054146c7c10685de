import os
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from data_utils import EpisodeSampler, SamplingPlan, save_stats

from .adapters import load_adapted_head, save_adapted_head
from .ema import EMACallback
from .environment import use_plain_layout
from .flops import batch_sizes, peak_flops, training_flops
from .loading import load_weights
from .meter import StepMeter, device_name
from .modeling_qwen2_vla import VLA_MODULES, Qwen2VLForConditionalGenerationForVLA
from .safety import FiniteSteps, StopOnSignal, written_beside

EXTRA_LOSSES = ("llm_loss", "action_loss")


class SetEpoch(TrainerCallback):
    """On several ranks, transformers and accelerate do not reach the sampler in the epoch that a resumed run goes on
    with: it would repeat the first epoch's order."""

    def __init__(self, sampler: EpisodeSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))


class QWen2VLATrainer(Trainer):
    """transformers' Trainer plus what DexVLA needs: both losses in the log, the head's own learning rate, weighted or
    episode-first sampling, and the dataset's statistics in every checkpoint.

    Args:
        sampling_plan: what `load_data` returns; None samples every frame once per epoch.
        norm_stats: statistics to save with each checkpoint.
    """

    def __init__(self, *args, sampling_plan: SamplingPlan | None = None, norm_stats: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.sampling_plan = sampling_plan
        self.norm_stats = norm_stats
        self.stop_on_signal = StopOnSignal()
        self.add_callback(self.stop_on_signal)
        self.finite_steps = FiniteSteps(self.args.max_skipped_steps)
        self.meter = StepMeter()
        self.peak_flops = peak_flops(device_name(self.args.device))
        self._run_dir: str | None = None  # while a checkpoint is written
        for module in self.model.modules():
            if isinstance(module, torch.nn.Conv3d):
                use_plain_layout(module.weight)
        # sums over samples of each extra loss, then the number of samples: (len(EXTRA_LOSSES) + 1,)
        self._loss_sums = {mode: self._zeros() for mode in ("train", "eval")}

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(len(EXTRA_LOSSES) + 1, device=self.args.device)

    def _prepare_inputs(self, inputs):
        # Under DeepSpeed transformers casts every float to the weights' dtype: targets rounded to bf16
        exact = {name: inputs[name].to(self.args.device) for name in ("actions", "states") if name in inputs}
        return super()._prepare_inputs(inputs) | exact

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        flops = self._flops(inputs) if model.training else 0.0
        sources, _ = inputs.pop("sources", None), inputs.pop("token_counts", None)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        # Stays on the device; it is read when something is logged
        self._losses = torch.stack([outputs[name].detach().float() for name in EXTRA_LOSSES])
        if model.training:
            self.finite_steps.watch(self.state.global_step + 1, loss, sources)
            self._add_losses("train", self._losses[None], len(inputs["input_ids"]))
            self.meter.count(len(inputs["input_ids"]), flops)
        return (loss, outputs) if return_outputs else loss

    def _flops(self, batch: dict) -> float:
        """What the batch needs by the mathematics, forward and backward; 0 where nothing could be said with it."""
        if self.peak_flops is None or "images" not in batch:
            return 0.0
        args = self.args
        each = training_flops(
            self.model.config,
            batch_sizes(batch),
            freeze_backbone=args.freeze_backbone,
            freeze_vision_tower=args.freeze_vision_tower,
            lora_modules=args.lora_modules if args.lora_enable else (),
            lora_r=args.lora_r,
        )
        return sum(each.values()) * len(batch["input_ids"])

    def training_step(self, *args, **kwargs):
        # what is not finite is skipped and reported; in the mean it would hide all other steps
        return super().training_step(*args, **kwargs).nan_to_num(0.0, 0.0, 0.0)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, torch.Tensor) and self.accelerator.scaler is None:
            self.finite_steps.watch(self.state.global_step + 1, norm)
            self.finite_steps.guard(self.optimizer.optimizer, norm)
        return norm

    def get_batch_samples(self, *args, **kwargs):
        with self.meter.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        result = super().prediction_step(model, inputs, *args, **kwargs)
        # gathered as transformers gathers the loss, so that samples repeated to fill up a rank do not count
        self._add_losses("eval", self.gather_function(self._losses.repeat(len(inputs["input_ids"]), 1)))
        return result

    def _add_losses(self, mode: str, losses: torch.Tensor, samples_each: int = 1):
        """`losses` (N, len(EXTRA_LOSSES)), each the mean over `samples_each` samples."""
        finite = losses.isfinite().all(dim=1, keepdim=True)
        self._loss_sums[mode] += torch.where(finite, F.pad(losses, (0, 1), value=1.0), 0.0).sum(dim=0) * samples_each

    def _take_losses(self, mode: str, prefix: str = "") -> dict[str, float]:
        """Means since the last call, over all ranks (for "eval" every rank has them all already)."""
        sums = self._loss_sums[mode]
        sums = (self.accelerator.reduce(sums, reduction="sum") if mode == "train" else sums).tolist()
        self._loss_sums[mode] = self._zeros()
        return {prefix + name: value / sums[-1] for name, value in zip(EXTRA_LOSSES, sums)} if sums[-1] else {}

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs:
            self.finite_steps.report(self.accelerator)
            logs = {"loss": logs.pop("loss"), **self._take_losses("train"), **logs}
            logs |= self.meter.read(self.args.world_size, self.peak_flops)
        super().log(logs, *args, **kwargs)

    @contextmanager
    def _fixed_noise(self):
        """Every evaluation draws the same noise, so that its losses compare; training's random state is kept."""
        device = self.args.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
            torch.manual_seed(self.args.seed)
            yield

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        ema = next((c for c in self.callback_handler.callbacks if isinstance(c, EMACallback)), None)
        averaged = ema.in_place_of_the_weights(self.model) if ema and self.args.eval_ema else nullcontext()
        with self._fixed_noise(), self.meter.pause(), averaged:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._take_losses("eval", f"{metric_key_prefix}_"))
        return output

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.non_lora_lr is not None:
            head = {
                id(p)
                for name, p in self.model.named_parameters()
                if any(module in name for module in VLA_MODULES) and "lora_" not in name
            }
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in head]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in head]
                    optimizer.param_groups.append({**group, "params": own, "lr": self.args.non_lora_lr})
        return optimizer

    def _get_train_sampler(self, train_dataset=None):
        if self.sampling_plan is None:
            return super()._get_train_sampler(train_dataset)
        sampler = EpisodeSampler(self.sampling_plan, seed=self.args.seed)
        self.add_callback(SetEpoch(sampler))
        return sampler

    def _get_output_dir(self, trial):
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Written whole beside its place first: a kill or a full disk leaves the checkpoints before it as they are."""
        output_dir, state = self.args.output_dir, self.state
        with self.meter.pause():
            with written_beside(output_dir, state.global_step, self.accelerator) as self._run_dir:
                try:
                    super()._save_checkpoint(model, trial)
                    self._finish_checkpoint(os.path.join(self._run_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))
                finally:
                    self._run_dir = None
            if self.args.should_save:
                best = state.best_model_checkpoint
                rotate_checkpoints(output_dir, self.args.save_total_limit, best, use_mtime=True)

    def _finish_checkpoint(self, folder: str):
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EMACallback):
                callback.save(self.args, folder)
        state = self.state
        best = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if state.best_global_step and (state.best_global_step == state.global_step or os.path.isdir(best)):
            state.best_model_checkpoint = best  # not where it is written at the moment
            if self.args.should_save:
                state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        # transformers compares key names as they are, and would keep every weight that was saved under its old name
        # as it was initialised, with no more than a warning
        model = self.model if model is None else model
        if isinstance(model, Qwen2VLForConditionalGenerationForVLA) and not self.is_fsdp_enabled:
            load_weights(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_adapted_head(model, resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            if hasattr(self.model, "peft_config"):  # adapters alone do not say what they adapt
                config = deepcopy(self.model.get_base_model().config)
                config.__dict__.pop("quantization_config", None)  # how it was trained, not what it is
                config.save_pretrained(folder)
                save_adapted_head(self.model, folder)
            if self.norm_stats is not None:
                save_stats(self.norm_stats, folder)
