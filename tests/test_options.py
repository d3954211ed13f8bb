"""Options that are fields of a dataclass are parsed as their types say."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pytest

from nnunet_semiseg.options import ModelOptions, add_options, at_least, from_args, option


@dataclass(frozen=True, kw_only=True)
class Asked(ModelOptions):
    kind: Literal["a", "b"] = option("--kind", default="a", help="one of two")
    sizes: Sequence[int | None] = option("--sizes", type=at_least(1), default=(), metavar="N", help="sizes")
    weight: float | None = option("--weight", default=None, help="weight; default: as it is")
    quick: bool = option("--quick", default=False, help="be quick")
    mirrored: bool = option("--plain", default=True, help="no mirrors")
    found: str = "not an option"


def parse(words: str, **more) -> Asked:
    parser = ArgumentParser()
    add_options(parser, Asked)
    return from_args(Asked, parser.parse_args(words.split()), **more)


def test_what_is_typed_fills_the_dataclass():
    needed = {"dataset": "501", "configuration": "2d"}
    asked = Asked(**needed, sizes=[])  # a list, as argparse makes it
    assert parse("-d 501 -c 2d") == asked and asked.fold == "0" and asked.plans == "nnUNetPlans"
    words = "-d 501 -c 2d -f all --kind b --sizes 4 8 --weight 0.5 --quick --plain"
    changed = {"fold": "all", "kind": "b", "sizes": [4, 8], "weight": 0.5, "quick": True, "mirrored": False}
    assert parse(words, found="x") == Asked(**needed, **changed, found="x")


@pytest.mark.parametrize(
    "words, message",
    [
        ("-c 2d", "the following arguments are required: -d"),
        ("-d 1 -c 2d --kind c", "invalid choice: 'c'"),
        ("-d 1 -c 2d --sizes 0", "0: give a whole number, 1 or more"),
        ("-d 1 -c 2d --weight x", "invalid float value: 'x'"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(words)
    assert message in capsys.readouterr().err


def test_the_help_says_defaults_that_tell_something():
    parser = ArgumentParser()
    add_options(parser, Asked)
    shown = " ".join(parser.format_help().split())
    assert "one of two; default: a" in shown and "sizes --weight" in shown and "weight; default: as it is" in shown
    assert "found" not in shown and "be quick --plain" in shown
