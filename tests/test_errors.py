# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from shira import errors
from shira.errors import ShiraError, UnknownAdapterError, did_you_mean


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("SupportError", ValueError),
        ("MaskError", ValueError),
        ("TargetError", ValueError),
        ("AdapterError", ValueError),
        ("UnknownAdapterError", KeyError),
        ("WrongBaseError", ValueError),
        ("PlacementError", ValueError),
        ("FileFormatError", ValueError),
        ("MergeError", RuntimeError),
        ("ServeError", RuntimeError),
        ("RestoreError", RuntimeError),
        ("RankMismatchError", RuntimeError),
        ("SwitchError", RuntimeError),
        ("MissingDependencyError", ImportError),
    ],
)
def test_each_error_is_ours_and_the_builtin_one_expects(name, builtin):
    error = getattr(errors, name)
    assert issubclass(error, ShiraError)
    assert issubclass(error, builtin)
    assert name in errors.__doc__  # the family tree is complete
    assert str(error("what was wrong")) == "what was wrong"


def test_the_list_above_is_complete():
    family = {e.__name__ for e in vars(errors).values() if isinstance(e, type)} - {"ShiraError"}
    drawn = {line.split("--")[1].split()[0] for line in errors.__doc__.splitlines() if "--" in line}
    assert family - {"Iterable", "Mapping"} == drawn


def test_unknown_adapter_prints_its_message_not_its_repr():
    error = UnknownAdapterError("no adapter 'a'")
    assert str(error) == "no adapter 'a'"
    assert str(UnknownAdapterError()) == ""


def test_did_you_mean_names_near_names_best_first():
    known = ["magnitude", "random", "struct"]
    assert did_you_mean("magnitud", known) == " Did you mean 'magnitude'?"
    assert did_you_mean("zzz", known) == ""
    assert did_you_mean("", known) == ""
    assert did_you_mean("q_proj", []) == ""
    assert did_you_mean("q_prj", ["v_proj", "q_proj"]) == " Did you mean 'q_proj'?"


def test_did_you_mean_takes_anything():
    assert did_you_mean(12, [123, 4]) == " Did you mean '123'?"
