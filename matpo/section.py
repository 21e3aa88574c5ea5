"""What every part of the settings has in common."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DEVICE: Final = re.compile(r"cpu|mps|cuda(:\d+)?")


def _make_numbers_strict(schema: object) -> None:
    """Everywhere in a schema of pydantic's."""
    if isinstance(schema, dict):
        if schema.get("type") in ("int", "float"):
            schema["strict"] = True
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            _make_numbers_strict(part)


class Section(BaseModel):
    """Base of every part of the settings. Numbers are strict: neither `true` nor `"1"` is 1, and 1.0 is no integer."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _make_numbers_strict(schema)
        return schema

    def changed(self, *names: str) -> list[str]:
        """Which of these options have another value than their default."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("may hold letters, digits, dots, dashes and underscores, up to 64")
    return text


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise ValueError("is no device; give cpu, cuda or cuda:NUMBER")
    return text


Name = Annotated[str, AfterValidator(_name)]
"""Part of the name of a file or folder."""
Device = Annotated[str, AfterValidator(_device)]
"""Where torch computes."""
