"""One check and one wording for all that read a memory."""

import logging

import pytest
import timm
import torch
from memory_models import fill, new_model

from timm_memwrap.memory_checks import check_memory, check_model


def test_a_model_without_memory_or_classes_is_refused_with_the_fix() -> None:
    for check in (check_model, check_memory):
        with pytest.raises(ValueError, match=r"ResNet is not a Memory Wrap model.*timm_memwrap\.wrap"):
            check(timm.create_model("test_resnet"))
        with pytest.raises(ValueError, match=r"num_classes=0.*reset_classifier\(n\)"):
            check(new_model(num_classes=0))
    check_model(new_model())
    with pytest.raises(ValueError, match=r"bank is empty.*build_memory_bank"):
        check_memory(new_model())


def test_a_stale_bank_is_told_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = fill(new_model())
    with caplog.at_level(logging.WARNING):
        check_memory(model)
        check_memory(model, stale="refuse")
        assert not caplog.records
        with torch.no_grad():
            next(model.backbone.parameters()).add_(1.0)
        check_memory(model)
    assert "stale" in caplog.text
    with pytest.raises(ValueError, match="stale"):
        check_memory(model, stale="refuse")
