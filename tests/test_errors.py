"""Near matches and the messages made with them."""

from __future__ import annotations

import pytest

from filtrun.errors import Interrupted, RunFailure, UserError, closest, unknown


@pytest.mark.parametrize(
    ("word", "options", "hint"),
    [
        ("sarra", ["sara", "lora"], "; did you mean 'sara'?"),
        ("treshold", ["threshold", "fraction"], "; did you mean 'threshold'?"),
        ("Lora", ["LoRA", "SaRA"], "; did you mean 'LoRA'?"),
        ("RESNET20", ["resnet20", "vit"], "; did you mean 'resnet20'?"),
        ("fash", ["fashion_mnist", "mnist"], "; did you mean 'fashion_mnist'?"),  # cut short
        ("xyz", ["sara", "lora"], ""),
        ("", ["sara"], ""),
        ("sara", [], ""),
        (32, [32, 16], "; did you mean '32'?"),
    ],
)
def test_closest(word: object, options: list[object], hint: str) -> None:
    assert closest(word, options) == hint


def test_unknown_names_the_word_the_nearest_and_all() -> None:
    assert (
        str(unknown("model", "vitt", ["vit", "unet"]))
        == "unknown model 'vitt'; did you mean 'vit'?\nallowed: unet, vit"
    )
    assert str(unknown("model", "x", [])).endswith("allowed: (none)")


def test_exit_codes() -> None:
    assert (UserError.exit_code, RunFailure.exit_code, Interrupted.exit_code) == (2, 1, 1)
