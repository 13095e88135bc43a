"""The base of every section of a config."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from tunesmith.config.plainyaml import show


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number_and_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1, so `lr: yes` would train at a learning rate of 1."""
        if isinstance(value, str) and not value.strip():  # a shell variable that is not set
            raise ValueError("is empty; give a value, or leave it out")
        has_bool = any(isinstance(item, bool) for item in (value if isinstance(value, list | tuple) else [value]))
        if has_bool and _means_number(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError(f"must be a number, not {show(value)}; YAML reads yes, no, on and off as true and false")
        return value


def _means_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(_means_number(part) for part in get_args(annotation))
