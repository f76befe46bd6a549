"""Every error class formats its message from named fields, and survives being sent elsewhere."""

from __future__ import annotations

import copy
import inspect
import pickle
import string

import pytest

from stq_compile import errors
from stq_compile.errors import StqError


def subclasses(base: type[StqError]) -> list[type[StqError]]:
    return [c for direct in base.__subclasses__() for c in (direct, *subclasses(direct))]


CLASSES = [c for c in subclasses(StqError) if c.__module__ == errors.__name__]
by_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)


def field_names(cls: type[StqError]) -> set[str]:
    parsed = string.Formatter().parse(cls.message)
    return {name for _, name, _, _ in parsed if name}


def made(cls: type[StqError]) -> StqError:
    return cls(**{name: f"<{name}>" for name in field_names(cls)})


def test_all_errors_of_the_module_are_found_and_have_one_base() -> None:
    defined = {
        c
        for _, c in inspect.getmembers(errors, inspect.isclass)
        if c.__module__ == errors.__name__ and c is not StqError and not issubclass(c, Warning)
    }
    assert defined == set(CLASSES)
    assert len(CLASSES) >= 20
    assert issubclass(StqError, Exception)


@by_class
def test_the_message_shows_every_field(cls: type[StqError]) -> None:
    message = str(made(cls))
    assert field_names(cls), "a message without a field can't say what was found"
    assert all(f"<{name}>" in message for name in field_names(cls))
    # What is left of braces is a literal in the text, as in "precision={'exp_avg': 32}".
    assert "{" not in message.replace("precision={", "")


@by_class
def test_every_class_has_a_message_of_its_own(cls: type[StqError]) -> None:
    assert "message" in vars(cls)
    assert [c for c in CLASSES if c.message == cls.message] == [cls]


@by_class
def test_a_missing_field_is_seen_at_the_raise_site(cls: type[StqError]) -> None:
    for missing in field_names(cls):
        fields = dict.fromkeys(field_names(cls) - {missing}, "x")
        with pytest.raises(KeyError, match=missing):
            cls(**fields)


@by_class
def test_it_can_be_pickled_and_copied(cls: type[StqError]) -> None:
    """Errors cross processes: data loaders, compile workers, distributed launchers."""
    error = made(cls)
    for other in (
        *(pickle.loads(pickle.dumps(error, protocol)) for protocol in (2, pickle.HIGHEST_PROTOCOL)),
        copy.copy(error),
        copy.deepcopy(error),
    ):
        assert type(other) is cls
        assert str(other) == str(error)
        assert other.fields == error.fields


def test_fields_may_hold_braces_and_objects() -> None:
    error = errors.InvalidOptionError(name="precision", value={"{x}": 7}, reason="no {width}")
    assert str(error) == "option precision={'{x}': 7} is not valid: no {width}"
    assert error.fields["value"] == {"{x}": 7}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.UnsupportedWidthError(where="exp_avg of w", width=7, valid=(2, 3)),
            "exp_avg of w: a width of 7 bits does not exist; the widths are (2, 3)",
        ),
        (
            errors.SharedScalarError(optimizer="Adam", source="beta", location="adam.py:7"),
            "Adam: the step changes beta, which all parameters share\n  at adam.py:7\n"
            "The optimizer is left as it was.",
        ),
        (StqError(detail="something"), "something"),
    ],
)
def test_some_messages_in_full(error: StqError, message: str) -> None:
    assert str(error) == message
    assert isinstance(error, StqError)


@pytest.mark.parametrize("cls", subclasses(errors.UncompiledStepError), ids=lambda c: c.__name__)
def test_what_an_eager_step_explains_is_not_about_an_optimizer_left_alone(
    cls: type[errors.UncompiledStepError],
) -> None:
    error = cls(**{name: f"<{name}>" for name in field_names(cls)})
    assert "left as it was" not in error.explanation
    assert all(f"<{name}>" in error.explanation for name in field_names(cls))
