"""Private names of libraries that core/model.py and the trainer touch: each test fails when one of them moves."""

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest


def names_of(module: str) -> set[str]:
    """Names in a module's source that it looks up, defines or imports: Unsloth's needs a GPU to be imported."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "unsloth.utils.attention_dispatch",
            {
                "HAS_FLASH_ATTENTION",
                "HAS_XFORMERS",
                "_TORCH_VARLEN_ATTN",
                "_LEAN_VARLEN",
                "_varlen_can_use_cudnn",
            },
        ),
        (
            "unsloth.utils.packing",
            {"mark_allow_overlength", "_enable_hf_packed_attention", "enable_sample_packing"},
        ),
        ("unsloth.models.fsdp2_native", {"FSDP2Config", "shard_model"}),
        ("unsloth.models.fsdp2_load", {"fsdp2_sharded_loading"}),
        ("unsloth.models.fsdp2_save", {"fsdp2_gathered"}),
    ],
)
def test_unsloth_still_has_the_switches_of_its_gpu_kernels(module: str, names: set[str]) -> None:
    assert names <= names_of(module)


def test_what_is_replaced_is_still_called(unsloth: None) -> None:
    """A name that a library no longer looks up can be set in vain."""
    import transformers
    import unsloth_zoo.training_utils
    from transformers.utils import chat_template_utils
    from unsloth import tokenizer_utils

    trainer = transformers.Trainer
    for function, name in [
        (chat_template_utils.render_jinja_template, "_compile_jinja_template"),
        (tokenizer_utils.load_correct_tokenizer, "fix_chat_template"),
        (unsloth_zoo.training_utils.prepare_model_for_training, "_unsloth_original_dtype"),
        (trainer._maybe_log_save_evaluate, "_globalstep_last_logged"),
        (trainer.get_train_dataloader, "_get_train_sampler"),
        (trainer.training_step, "_prepare_inputs"),
    ]:
        assert name in inspect.unwrap(function).__code__.co_names, f"{function.__qualname__} looks up no {name}"


def test_another_attention_is_taken_and_given_back(unsloth: None) -> None:
    from fasttune.core import model as models
    from fasttune.settings import ModelConfig

    model, _ = models.load(ModelConfig(name="builtin:tiny", max_length=64), "float32", "none", False, 0)
    before = models.set_attention(model, "eager")
    assert model.config._attn_implementation == "eager"
    assert models.set_attention(model, before) == "eager"
