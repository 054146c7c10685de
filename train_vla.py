"""Trains a DexVLA: stage 2 from Qwen2-VL and a stage-1 head, stage 3 from a stage-2 checkpoint.

The scripts in scripts/ call it with their settings; README.md lists the flags.
"""

import os
from collections.abc import Callable
from pathlib import Path

import qwen2_vla.environment  # noqa: F401  before the libraries that it prepares

# isort: split
import numpy as np
import torch
from transformers import set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from data_utils import Qwen2VLADataCollatorForSupervisedDataset, UserError, load_data, load_robot_stats
from data_utils.collator import IGNORE_INDEX
from data_utils.normalization import by_robot
from data_utils.tasks import get_task
from qwen2_vla import Qwen2VLAConfig, Qwen2VLAProcess, QWen2VLATrainer
from qwen2_vla.adapters import ADAPTER_CONFIG, add_lora, halve_frozen
from qwen2_vla.arguments import (
    ActionHeadArguments,
    DataArguments,
    ModelArguments,
    TrainingArguments,
    head_notes,
    legacy_notes,
    parse_arguments,
)
from qwen2_vla.checkpointing import choose_checkpointing
from qwen2_vla.ema import EMACallback
from qwen2_vla.flops import SampleSizes
from qwen2_vla.loading import (
    build_config,
    check_model_folder,
    check_requirements,
    choose_attention,
    freeze,
    load_model,
    load_processor,
    merge_adapters,
)
from qwen2_vla.stage1 import load_stage1_head, read_stage1_head


def main(argv: list[str] | None = None):
    model_args, data_args, training_args, head_args = parse_arguments(argv)

    def say(line: str):
        if training_args.process_index == 0:
            print(line, flush=True)

    for note in legacy_notes(model_args) + head_notes(head_args):
        say(note)

    # Everything that can be wrong with the input shows here, before any weight is loaded
    task = get_task(data_args.task_name)
    resume_from = find_checkpoint(training_args)
    folder_flag = "model_pretrain" if training_args.load_pretrain else "model_name_or_path"
    folder = getattr(model_args, folder_flag)
    check_model_folder(folder, f"--{folder_flag}")
    lora_modules = training_args.lora_modules if training_args.lora_enable else []
    check_requirements(lora_modules=lora_modules, bits=training_args.bits, ema=training_args.using_ema)
    processor = load_processor(folder)
    train_set, validation_set, stats, sampling_plan = prepare_data(task, data_args, head_args, training_args, processor)
    config = prepare_config(folder, task, stats, model_args, data_args, training_args, head_args)
    check_same_run(resume_from, config, stats, training_args.lora_enable)
    stage1_head = read_stage1(model_args, config) if resume_from is None else None
    say(
        f"task {data_args.task_name}: {len(train_set.episode_paths)} training episodes with {len(train_set)} frames, "
        f"{len(validation_set.episode_paths) if validation_set else 0} validation episodes"
    )

    if training_args.checkpointing_auto:
        chosen, line = choose_checkpointing(training_args, config, sample_sizes(train_set))
        training_args.gradient_checkpointing = training_args.activation_checkpointing = chosen
        say(line)

    set_seed(training_args.seed)
    model = prepare_model(folder, config, training_args, stage1_head, say)
    ema = EMACallback() if training_args.using_ema else None
    trainer = QWen2VLATrainer(
        model=model,
        args=training_args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=Qwen2VLADataCollatorForSupervisedDataset(
            pad_token_id=processor.tokenizer.pad_token_id,
            pad_to_multiple_of=32 if training_args.compile_blocks else 1,
        ),
        processing_class=processor,
        sampling_plan=sampling_plan,
        norm_stats=stats,
        callbacks=[ema] if ema else None,
    )
    # from here on every rank draws its own noise; up to here all had to build the same model
    set_seed(training_args.seed + training_args.process_index)
    try:
        result = trainer.train(resume_from_checkpoint=resume_from)
    except UserError as error:  # only this rank may know of it
        text = str(error)
        if "Original Traceback" in text:  # of a loader's worker; the message is its last line
            text = text.splitlines()[-1].partition(": ")[2]  # without the exception's name
        raise SystemExit(f"error on rank {training_args.process_index}: {text}") from None
    if trainer.stop_on_signal.stopped_at is not None:
        say(
            f"stopped by SIGTERM after step {trainer.stop_on_signal.stopped_at}; the same command with "
            "--resume_from_checkpoint True goes on"
        )
        return
    trainer.save_model()
    if ema and not training_args.lora_enable:  # an average of adapters does not fit what they are merged into
        ema.save(training_args, training_args.output_dir)
    if training_args.lora_enable and training_args.should_save:
        merge_adapters(training_args.output_dir)  # the adapters as such are in the checkpoints
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    say(f"saved to {training_args.output_dir}")


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to go on from. A folder with checkpoints is only trained into when that was asked for."""
    newest = newest_checkpoint(args.output_dir)
    resume = args.resume_from_checkpoint
    if not resume:
        if newest:
            raise UserError(
                f"--output_dir {args.output_dir}: expected no checkpoints of another run, found {Path(newest).name}; "
                "go on from it with --resume_from_checkpoint True, or choose another folder"
            )
        return None
    if resume is True:
        if newest is None and args.process_index == 0:
            print(f"--resume_from_checkpoint True: no checkpoint in {args.output_dir} yet, training starts anew")
        return newest
    if not os.path.isfile(os.path.join(resume, "trainer_state.json")):
        raise UserError(f"--resume_from_checkpoint: expected True or a checkpoint's folder, found {resume}")
    return resume


def newest_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint that was written to its end: trainer_state.json is what is written last."""
    folders = sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [folder for folder in folders if (folder / "trainer_state.json").is_file()]
    for folder in folders[folders.index(whole[-1]) + 1 :] if whole else folders:
        print(f"{folder}: skipped, it was not written to its end")
    return str(whole[-1]) if whole else None


def prepare_data(
    task: dict,
    data_args: DataArguments,
    head_args: ActionHeadArguments,
    training_args: TrainingArguments,
    processor,
):
    transform = Qwen2VLAProcess(
        processor,
        task["camera_names"],
        image_size_wrist=data_args.image_size_wrist,
        use_reasoning=data_args.use_reasoning,
    )
    # The first rank of a machine reads the episodes and keeps what it found, the others take that
    with training_args.main_process_first(desc="checking episodes"):
        train_set, validation_set, stats, plan = load_data(
            task["dataset_dir"],
            task.get("name_filter"),
            task["camera_names"],
            data_args.chunk_size,
            stats_dir=task.get("stats_dir"),
            camera_map=task.get("camera_map"),
            sample_weights=task.get("sample_weights"),
            train_ratio=task.get("train_ratio", 0.999),
            episode_first=data_args.episode_first,
            skip_mirrored_data=data_args.skip_mirrored_data,
            action_dim=head_args.action_dim,
            state_dim=head_args.state_dim,
            augment=data_args.augment,
            transform=transform,
            show_progress=training_args.process_index == 0,
            image_size_stable=data_args.image_size_stable,
            use_reasoning=data_args.use_reasoning,
            delta_control=data_args.delta_control,
            history_images_length=data_args.history_images_length,
        )
    if validation_set is None and training_args.eval_strategy != "no":
        raise UserError(
            f"--eval_strategy {training_args.eval_strategy}: expected validation episodes, found none: "
            f"lower train_ratio ({task.get('train_ratio', 0.999)}) or add episodes to the first dataset_dir"
        )
    longest = max(train_set.episode_lengths)
    if longest > task["episode_len"] and training_args.process_index == 0:
        print(f"episode_len {task['episode_len']}: the longest episode has {longest} frames, all of them are used")
    return train_set, validation_set, stats, plan


def sample_sizes(train_set) -> SampleSizes:
    """Of the first sample: all are alike but for the length of their texts."""
    item = train_set[0]
    images = tuple((image.shape[1], image.shape[2]) for image in item["images"])
    answer = int((item["labels"] != IGNORE_INDEX).sum())
    return SampleSizes(images, len(item["images"][0]), len(item["input_ids"]), answer)


def prepare_config(
    folder: str,
    task: dict,
    stats: dict,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    head_args: ActionHeadArguments,
) -> Qwen2VLAConfig:
    robot_stats = next(iter(by_robot(stats).values()))  # their dimensions are the same
    return build_config(
        folder,
        head_type=head_args.policy_head_type,
        head_size=head_args.policy_head_size,
        depth=head_args.policy_head_depth,
        width=head_args.policy_head_width,
        num_heads=head_args.policy_head_heads,
        chunk_size=data_args.chunk_size,
        action_dim=len(robot_stats["action_mean"]),
        state_dim=len(robot_stats["qpos_mean"]),
        noise_samples=head_args.noise_samples,
        is_tinyvla=model_args.is_tinyvla,
        using_film=model_args.using_film,
        llm_loss_weight=training_args.llm_loss_weight,
        data_config={
            "task_name": data_args.task_name,
            "camera_names": list(task["camera_names"]),
            "image_size_stable": list(data_args.image_size_stable),
            "image_size_wrist": list(data_args.image_size_wrist),
            "use_reasoning": data_args.use_reasoning,
            "delta_control": data_args.delta_control,
            "augment": data_args.augment,
            "history_images_length": data_args.history_images_length,
        },
    )


def check_same_run(checkpoint: str | None, config: Qwen2VLAConfig, stats: dict, lora: bool):
    """A checkpoint of another task, another model, or data prepared otherwise, is another run's."""
    if checkpoint is None:
        return

    def settings(config: Qwen2VLAConfig) -> dict:
        head = config.policy_head_config.to_dict()
        data = {"history_images_length": 1} | (config.data_config or {})  # older checkpoints know images only
        return data | {"using_film": config.using_film} | {f"head.{k}": head[k] for k in head}

    before, now = settings(Qwen2VLAConfig.from_pretrained(checkpoint)), settings(config)
    differences = [f"{key} {before.get(key)} (asked for: {now[key]})" for key in now if before.get(key) != now[key]]
    had_lora = os.path.isfile(os.path.join(checkpoint, ADAPTER_CONFIG))
    if had_lora != lora:
        differences.append(f"LoRA {had_lora} (asked for: {lora}, --lora_enable)")
    kept, robots = load_robot_stats(checkpoint), by_robot(stats)
    if kept.keys() != robots.keys() or any(
        key in kept[robot] and not np.array_equal(kept[robot][key], its_stats[key])
        for robot, its_stats in robots.items()
        for key in its_stats
    ):
        differences.append("statistics of other episodes (dataset_stats.json)")
    if differences:
        raise UserError(f"--resume_from_checkpoint: {checkpoint} is another run's: {', '.join(differences)}")


def read_stage1(model_args: ModelArguments, config: Qwen2VLAConfig) -> tuple[dict, str] | None:
    if not model_args.load_pretrain_dit:
        return None
    if not model_args.pretrain_dit_path:
        raise UserError("--load_pretrain_dit True: expected --pretrain_dit_path too, found none")
    return read_stage1_head(model_args.pretrain_dit_path, config.policy_head_config)


def prepare_model(
    folder: str,
    config: Qwen2VLAConfig,
    training_args: TrainingArguments,
    stage1_head: tuple[dict, str] | None,
    say: Callable[[str], None],
) -> torch.nn.Module:
    model = load_model(
        folder,
        config,
        attn_implementation=choose_attention(training_args.flash_attn),
        bits=training_args.bits,
        quant_type=training_args.quant_type,
        double_quant=training_args.double_quant,
        device=training_args.device,
    )
    if stage1_head is not None:
        tensors, summary = stage1_head
        load_stage1_head(model.policy_head, tensors)
        say(summary)
    freeze(model, backbone=training_args.freeze_backbone, vision_tower=training_args.freeze_vision_tower)
    if training_args.lora_enable:
        model = add_lora(
            model,
            training_args.lora_modules,
            r=training_args.lora_r,
            alpha=training_args.lora_alpha,
            dropout=training_args.lora_dropout,
            bias=training_args.lora_bias,
        )
        if training_args.bf16:
            halve_frozen(model)
    if training_args.compile_blocks:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile()
    trained, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or all_) for all_ in (False, True))
    say(f"{total / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M of them trained")
    return model


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        # every rank finds the same mistake, one of them says it
        raise SystemExit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1) from None
