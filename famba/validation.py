"""Frozen dataclasses of validated values, and what is wrong with a file in one line: key, value, what is allowed.

No torch.
"""

import dataclasses
import functools
import reprlib
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, dataclass_transform, get_type_hints

from pydantic import ConfigDict, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from famba.errors import InputError

T = TypeVar("T")
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def section(cls: type[T]) -> type[T]:
    """A frozen dataclass of validated values; one made or changed by code raises InputError, as params.yaml does."""
    made: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))(cls)
    init = made.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            raise _refusal(
                error, made, "", lambda *keys: (cls.__name__.removesuffix("Params").lower(), *keys)
            ) from None

    made.__init__ = checked
    return made


_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")  # what pydantic calls a key that there is not
_adapter = functools.cache(TypeAdapter)
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 120


def shortened(value: Any) -> str:
    """A value as a message shows it, however large it is."""
    try:
        return _repr.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"{type(value).__name__} of thousands of digits"


def one_given(rule: T, *keys: str) -> T:
    """The rule, if just one of these keys is given, for a validator; else ValueError."""
    if sum(getattr(rule, key) is not None for key in keys) != 1:
        raise ValueError(f"exactly one of {', '.join(keys)} is allowed")
    return rule


def validated(kind: type[T], values: Any, name: str, place: Callable[..., tuple[Any, ...]] = lambda *keys: keys) -> T:
    """Build a dataclass, or say in one line which key of which file holds which value, and what is allowed.

    Args:
        kind: a dataclass or TypedDict. A ValueError of its validators may start with the key at fault and a colon.
        name: of the file.
        place: where the file has the key that `kind` has under these names.

    Raises:
        InputError: an unknown or missing key, a wrong type or value.
    """
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise _refusal(error, kind, name, place) from None


def _refusal(error: ValidationError, kind: type, name: str, place: Callable[..., tuple[Any, ...]]) -> InputError:
    errors = error.errors(include_url=False)  # a misspelt key before the one that is missing for it
    first = min(errors, key=lambda each: each["type"] not in _UNKNOWN)
    keys = [key for key in first["loc"] if key != "[key]"]
    value, reason = first["input"], first["msg"]
    if first["type"] == "value_error":
        reason = str(first.get("ctx", {})["error"])
        if ": " in reason:
            key, _, reason = reason.partition(": ")
            keys, value = [*keys, key], getattr(value, "kwargs", value)[key]
    where = [name, ".".join(map(_plain, place(*keys)))]
    if first["type"] in _UNKNOWN:
        owner: Any = kind
        for key in keys[:-1]:
            owner = get_type_hints(owner)[str(key)]
        reason = f"unknown key; allowed: {', '.join(sorted(field.name for field in dataclasses.fields(owner)))}"
    elif first["type"] == "missing":
        reason = "missing"
    elif first["type"] in ("dict_type", "dataclass_type"):
        reason = f"{shortened(value)} is not a section of `key: value` lines"
    elif first["type"] == "tuple_type":
        reason = f"{shortened(value)} is not a list"
    else:
        reason = f"{shortened(value)}: {reason}"
    return InputError(": ".join([part for part in where if part] + [reason]))


def _plain(key: Any) -> str:
    return key if isinstance(key, str) and key.isprintable() and len(key) < 80 else shortened(key)
