"""Which attention a pack is given on the way to a proof that it is exact."""

import sys
import types

import pytest


def test_unsloth_is_given_a_varlen_kernel_unless_it_is_told_not_to(
    unsloth: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That Unsloth's switches are set, and set back. Its module needs a GPU to be imported, the kernel to run."""
    from fasttune.core import model as models

    dispatch, package = types.ModuleType("unsloth.utils.attention_dispatch"), types.ModuleType("unsloth.utils")
    before = {"HAS_FLASH_ATTENTION": False, "_TORCH_VARLEN_ATTN": None, "_LEAN_VARLEN": False}
    vars(dispatch).update(before)
    package.attention_dispatch = dispatch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth.utils", package)
    undo = models.take_varlen_kernel()
    now = dict(vars(dispatch))
    assert undo is not None and callable(now["_TORCH_VARLEN_ATTN"]) and now["_LEAN_VARLEN"]
    assert not now["_varlen_can_use_cudnn"]()
    assert models.take_varlen_kernel() is None  # there is one already
    undo()
    assert {name: vars(dispatch)[name] for name in before} == before
    monkeypatch.setenv("UNSLOTH_TORCH_VARLEN", "0")
    assert models.take_varlen_kernel() is None and vars(dispatch)["_TORCH_VARLEN_ATTN"] is None


def test_a_varlen_kernel_that_is_not_exact_is_given_back(unsloth: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then Unsloth's own way is tried, and only if that is not exact either, rows are padded."""
    from fasttune import config
    from fasttune.core import model as models, packing

    asked = config.parse({"model": {"name": "builtin:tiny", "max_length": 256}, "data": {"train": "a/b"}})
    model, _ = models.load(asked.model, "float32", "none", False, 0)
    undone: list[bool] = []
    reasons = iter(["inexact", None, "inexact", "its rows see each other"])
    monkeypatch.setattr(packing.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(models, "take_varlen_kernel", lambda: lambda: undone.append(True))
    monkeypatch.setattr(models, "enable_packed_kernels", lambda model: None)
    monkeypatch.setattr(packing, "inexact", lambda *_: next(reasons))
    assert packing.enable(model, 256) is None and undone == [True]
    assert "see each other" in (packing.enable(model, 256) or "") and undone == [True, True]
