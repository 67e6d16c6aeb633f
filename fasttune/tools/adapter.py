"""An adapter folder (PEFT format): what it says of itself, and whether its weights belong to a base model.

It may come from anywhere: what PEFT would run, build or search by its word alone is bounded first.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fasttune.core import pretrained
from fasttune.errors import ModelError

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before every name of the base model
INITS = (None, True, False, "gaussian", "pissa", "olora", "orthogonal", "eva", "corda")  # no loops of a given length
REFUSED = (
    "layer_replication",
    "megatron_config",
    "loftq_config",
    "arrow_config",
)  # rebuild the base, or import by name
MOST = 1e9  # of a rank or an alpha
MATCHING_CPU_S = 2.0  # of all patterns against all layers; ordinary ones take milliseconds

Shapes = dict[str, tuple[int, ...]]


def settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter whose weights are safetensors. Raises ModelError for any other folder."""
    said = pretrained.read_json(folder / SETTINGS)
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").exists():
            raise pretrained.pickled(str(folder), "adapter_model.bin")
        raise ModelError(f"{folder}: has no {WEIGHTS}; copy the whole folder, or name another adapter")
    where = f"{folder / SETTINGS}"
    if said.get("peft_type") != "LORA":
        raise ModelError(f"{where}: peft_type is {_short(said.get('peft_type'))}, and only LORA adapters can be used")
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(said.get(name), str | None):
            raise ModelError(f"{where}: {name} is {_short(said[name])}; write a text")
    if used := [name for name in REFUSED if said.get(name)]:
        raise ModelError(
            f"{where}: {used[0]} is not supported; merge the adapter where it was made, and name the model"
        )
    if not any(said.get("init_lora_weights") is one or said.get("init_lora_weights") == one for one in INITS):
        raise ModelError(f"{where}: init_lora_weights is {_short(said['init_lora_weights'])}; save it as plain LoRA")
    numbers = {"r": said.get("r", 8), "lora_alpha": said.get("lora_alpha", 8)}
    for name in ("rank_pattern", "alpha_pattern"):
        more = said.get(name) or {}
        if not isinstance(more, dict):
            raise ModelError(f"{where}: {name} is {_short(more)}; expected a number for each layer")
        numbers |= {f"{name} of {layer}": value for layer, value in more.items()}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST:
            raise ModelError(f"{where}: {_short(name)} is {_short(value)}; expected a number above 0, below {MOST:.0e}")
    return said


def put_on(model: Any, folder: Path) -> Any:
    """The adapter on a loaded base, whose embeddings grow to the adapter's where it has more tokens.

    Raises ModelError where not every weight of the adapter finds its layer, and every layer its weight.
    """
    import peft

    shapes = check(model, folder)
    with explained(folder):
        grow(model, shapes, folder)
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        made = peft.PeftModelForCausalLM(model, config)
        mapping = getattr(model, "_checkpoint_conversion_mapping", None)  # as PeftModel.from_pretrained, which hides
        loaded = made.load_adapter(str(folder), "default", key_mapping=mapping)  # the names that fitted nowhere
    check_names(folder, shapes, loaded.missing_keys, loaded.unexpected_keys)
    return made


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """What PEFT stumbles over in a file of others, in one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        text = _short(f"{type(error).__name__}: {error}", 170)
        raise ModelError(f"{folder}: does not fit its base model, or is damaged: {text}") from error


def check(model: Any, folder: Path) -> Shapes:
    """Bound what PEFT would do with the settings on this model. Returns the shapes of the adapter's weights."""
    import safetensors

    said = settings(folder)
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS}: cannot be read ({_short(error)}); get it again") from error
    largest = max(
        (shape[0] for name, shape in shapes.items() if ".lora_" in name and "_A" in name and shape), default=0
    )
    rank = max([said.get("r", 8), *(said.get("rank_pattern") or {}).values()])
    if rank > largest:
        raise ModelError(
            f"{folder / SETTINGS}: says rank {_short(rank)}, its weights have at most {largest}; get both again"
        )
    _match(model, folder)
    return shapes


def check_names(folder: Path, shapes: Shapes, lacking: list[str], unused: list[str]) -> None:
    """`lacking`: layers without their weight; `unused`: weights without a layer. Raises ModelError for any."""
    # Of modules_to_save PEFT sometimes writes two copies more, beside the weight itself.
    unused = [name for name in unused if not (copy_of(name) and copy_of(name) in shapes)]
    if not lacking and not unused:
        return
    fits, more = len(shapes) - len(unused), f", {len(lacking)} missing" if lacking else ""
    mine, its = (_short((names or ["none"])[0].replace(".default", ""), 50) for names in (unused, lacking))
    raise ModelError(
        f"{_short(folder, 40)}: {fits or 'none'} of the adapter's {len(shapes)} weights belong to a layer of the base"
        f"{more} (no layer: {mine}; missing: {its}); set base_model_name_or_path to its own base"
    )


def copy_of(name: str) -> str | None:
    """The weight that one of those copies is of."""
    for kind in (".modules_to_save.", ".original_module."):
        if kind in name:
            return name.replace(kind, ".")
    return None


def grow(model: Any, shapes: Shapes, folder: Path) -> int | None:
    """Give the base as many embeddings as the adapter brings: how many, or None where it has as many already."""
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {name: module for name, module in model.named_modules() if module is inside or module is outside}
    brought = {
        name: shape
        for name in ends
        for kind in (".weight", ".base_layer.weight")
        if (shape := shapes.get(f"{PREFIX}{name}{kind}"))
    }
    now = tuple(inside.weight.shape)
    if all(shape == now for shape in brought.values()):
        return None
    tied = outside is None or outside.weight is inside.weight
    if len(set(brought.values())) > 1 or any(shape[1:] != now[1:] or not shape[0] for shape in brought.values()):
        raise ModelError(
            f"{folder}: its embeddings are {_short(brought)}, those of the base {now}; it has another base"
        )
    if len(brought) < len(ends) and not tied:
        raise ModelError(
            f"{folder}: brings {', '.join(brought)} of {next(iter(brought.values()))} but not the other end"
        )
    rows = next(iter(brought.values()))[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    return rows


def _match(model: Any, folder: Path) -> None:
    """Let PEFT match its patterns with every layer once, for a bounded time: some take for ever."""
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    with (
        explained(folder),
        _cpu_limit(ModelError(f"{folder / SETTINGS}: its patterns (target_modules, …) take too long; name the layers")),
    ):
        config = peft.PeftConfig.from_pretrained(str(folder))
        for name, _ in model.named_modules():
            check_target_module_exists(config, name)
            for patterns in (config.rank_pattern, config.alpha_pattern):
                get_pattern_key((patterns or {}).keys(), name)


@contextmanager
def _cpu_limit(error: Exception) -> Iterator[None]:
    """Raise `error` after MATCHING_CPU_S seconds of this process's own time. Python's `re` looks for signals."""

    def stop(*_: Any) -> None:
        raise error

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MATCHING_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _short(value: Any, most: int = 120) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= most else text[:most] + "…"
