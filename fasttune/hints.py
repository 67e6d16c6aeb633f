"""What is said of a setting that is wrong; what Axolotl, LLaMA-Factory, TRL, Unsloth and torchtune call our settings,
and what they have that is none here.

A name that is in neither table is guessed at only where it is nearly one of ours: a wrong hint is worse than none.
"""

import difflib
import re
from typing import Any

from fasttune import errors

WRONG_BRANCH = ("string_type", "dict_type")  # of a value that may be text or a mapping
WHY = {  # of a bound
    "data.max_rows": "leave it out to read all rows",
    "data.train": "a weight is how often a row is seen in an epoch; leave out a set that is not wanted",
    "eval.problems": "each is answered before and after",
    "eval.rows": "all of them are computed each time",
    "lora.alpha": "what an adapter adds is scaled by alpha / rank",
    "lora.rank": "beyond the width of its layers an adapter gains nothing",
    "train.batch_rows": "all of them are one optimizer step",
    "train.epochs": "more only learns the rows by heart",
    "train.learning_rate": "AdamW moves each weight by about that much in a step",
    "train.weight_decay": "a step takes learning_rate × weight_decay off each weight",
}
# Our setting, with what differs → their names of it.
NAMES = {
    "checkpoint.every, '50 steps' or '10 minutes'": "save_steps save_strategy saves_per_epoch save_every",
    "checkpoint.keep": "save_total_limit keep_last_n_checkpoints",
    "data.columns": "dataset_text_field field_messages message_property_mappings column_map text_column",
    "data.eval": "eval_dataset test_datasets validation_data valid_dataset eval_file",
    "data.eval_share": "val_set_size val_size test_size validation_split",
    "data.eval_split": "dataset_test_split",
    "data.max_rows": "max_samples max_train_samples",
    "data.split": "dataset_train_split train_split",
    "data.train": "dataset datasets dataset_name dataset_path data_files train_file pretraining_dataset",
    "data.train, as owner/name:subset": "dataset_config dataset_config_name subset",
    "data.train, as {source: weight}": "interleave_probs",
    "data.train_on": "train_on_responses_only train_on_inputs train_on_input train_on_prompt mask_history "
    "roles_to_train assistant_only_loss completion_only_loss",
    "eval.every, '50 steps'": "eval_steps eval_strategy evaluation_strategy evals_per_epoch run_val_every_n_steps",
    "eval.keep_best": "load_best_model_at_end metric_for_best_model",
    "eval.rows": "max_eval_samples",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.init": "init_lora_weights pissa_init peft_init_lora_weights",
    "lora.rank": "r lora_r lora_rank",
    "lora.rslora": "use_rslora peft_use_rslora",
    "lora.targets": "target_modules lora_target lora_target_modules lora_target_linear lora_attn_modules "
    "apply_lora_to_mlp apply_lora_to_output",
    "model.dtype": "torch_dtype bf16 pure_bf16",
    "model.max_length": "sequence_len cutoff_len max_seq_length max_seq_len seq_len block_size",
    "model.name": "base_model model_name model_name_or_path pretrained_model_name_or_path model_path model_id",
    "model.quantization, none or nf4": "load_in_4bit quantization_bit quantize_base",
    "model.revision": "model_revision revision_of_model",
    "name": "run_name",
    "overwrite": "overwrite_output_dir",
    "seed": "random_state data_seed",
    "train.batch_rows, the rows of a whole optimizer step": "gradient_accumulation_steps",
    "train.batch_rows": "batch_size train_batch_size global_batch_size",
    "train.epochs": "num_epochs num_train_epochs n_epochs",
    "train.gradient_checkpointing": "use_gradient_checkpointing enable_activation_checkpointing",
    "train.learning_rate": "lr",
    "train.max_grad_norm": "clip_grad_norm gradient_clip_val",
    "train.method, lora or full": "adapter finetuning_type full_finetuning use_peft",
    "train.micro_batch_rows": "micro_batch_size per_device_train_batch_size",
    "train.optimizer": "optim",
    "train.packing": "sample_packing neat_packing packed",
    "train.report_to": "wandb_project use_wandb use_tensorboard metric_logger",
    "train.scheduler": "lr_scheduler lr_scheduler_type",
    "train.warmup_ratio, a share of all steps": "warmup_steps num_warmup_steps",
}
# Why there is no such setting ("" where there is nothing to say) → their names.
NOT_SUPPORTED = {
    "": "adam_beta1 adam_beta2 adam_epsilon bias compile deepspeed deepspeed_config dora early_stopping_patience fp16 "
    "fsdp fsdp_config init_lora label_smoothing_factor layers_to_transform load_in_8bit loftq_config "
    "lora_fan_in_fan_out lora_modules_to_save lora_plus_lr_ratio loraplus_lr_ratio max_steps_per_epoch "
    "modules_to_save neftune_noise_alpha noisy_embedding_alpha peft_use_dora relora_steps rope_scaling "
    "shift_attn special_tokens tf32 torch_compile unfrozen_parameters use_dora use_galore use_badam",
    "a step's rows are those of train.batch_rows; train.packing leaves no padding": "group_by_length "
    "length_column_name pad_to_sequence_len pad_to_max_length pad_to_multiple_of",
    "every step is in metrics.jsonl": "logging_steps log_every_n_steps logging_strategy logging_dir plot_loss",
    "the model's own chat template is used": "template chat_template chat_template_jinja default_system",
    "the model's own tokenizer is used": "tokenizer tokenizer_name tokenizer_type tokenizer_name_or_path",
    "chosen for the machine, and printed": "attn_implementation flash_attention flash_attn sdp_attention "
    "xformers_attention use_unsloth use_liger_kernel enable_liger_kernel device device_map use_cpu",
    "the option --resume goes on with a run": "resume_from_checkpoint auto_resume_from_checkpoints",
    "`fasttune merge --push-to-hub` does it": "push_to_hub hub_model_id hub_strategy hub_token",
    "prepared rows are cached under FASTTUNE_CACHE": "dataset_prepared_path overwrite_cache tokenized_path cache_dir",
    "rows are prepared before the first step": "dataloader_num_workers preprocessing_num_workers dataset_num_proc "
    "dataset_processes dataloader_pin_memory",
    "train is supervised fine-tuning; data.format=text continues a pretraining": "stage rl task_type",
    "evaluation takes the rows at once that training does": "per_device_eval_batch_size eval_batch_size",
}
THEIRS = {name: f" (did you mean {ours}?)" for ours, names in NAMES.items() for name in names.split()} | {
    name: f"; not supported{': ' if why else ''}{why}" for why, names in NOT_SUPPORTED.items() for name in names.split()
}


def in_words(errors: list[Any], known: list[str]) -> list[str]:
    """A line for each of pydantic's errors; `known`: our settings as dotted names."""
    told = {item["loc"][:2] for item in errors if item["type"] not in WRONG_BRANCH}
    return [
        _one_line(item, known) for item in errors if item["type"] not in WRONG_BRANCH or item["loc"][:2] not in told
    ]


def _one_line(item: Any, known: list[str]) -> str:
    branch = r"function-|literal\[|dict\[|(bool|int|str|float)$"  # of a union: no part of the key
    key = ".".join(part for part in map(str, item["loc"]) if not re.match(branch, part))
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown setting{of_setting(key, known)}"
    if item["type"] == "missing":
        return f"{key}: is required; add it to the config or give {key}=… on the command line"
    if item["type"] == "model_type":
        return f"{key}: is a section, {key}.…=… sets one thing in it; got {errors.one_line(repr(item['input']), 100)}"
    if item["input"] is None:
        return f"{key}: is null; give a value, or leave it out"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    message = message.partition(", unable to")[0]
    why = next((f" ({why})" for name, why in WHY.items() if "than" in item["type"] and key.startswith(name)), "")
    return f"{key}: {message[0].lower()}{message[1:]}{why}, got {errors.one_line(repr(item['input']), 100)}"


def of_setting(key: str, known: list[str]) -> str:
    """What to say behind `KEY: unknown setting`; `known`: our settings as dotted names."""
    section, _, leaf = key.replace("-", "_").rpartition(".")
    if leaf.lower() in THEIRS:
        return THEIRS[leaf.lower()]
    leaves = {name.rpartition(".")[2] for name in known} | {name.partition(".")[0] for name in known}
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    ours = [name for name in known if near and name.rpartition(".")[2] == near[0]] or near
    ours.sort(key=lambda name: name.rpartition(".")[0] != section)
    return f" (did you mean {ours[0]}?)" if ours else " (docs/settings.md has all of them)"
