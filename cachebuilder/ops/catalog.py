"""The ops a manifest may name: one file of this package for each, found by looking.

A new op is one new file with one subclass of `base.OpBase` whose ``op`` field is a ``Literal`` of its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Union, get_args

from pydantic import Field

from cachebuilder.ops.base import OpBase


def _find_ops() -> dict[str, type[OpBase]]:
    found: dict[str, type[OpBase]] = {}
    for module in sorted(pkgutil.iter_modules([str(Path(__file__).parent)]), key=lambda module: module.name):
        if module.name in ("base", "catalog"):
            continue
        for item in vars(importlib.import_module(f"cachebuilder.ops.{module.name}")).values():
            if isinstance(item, type) and issubclass(item, OpBase):
                for name in get_args(item.model_fields["op"].annotation):
                    found[name] = item
    return found


#: op name → its model.
OPS: dict[str, type[OpBase]] = _find_ops()

if TYPE_CHECKING:
    Op = OpBase
else:
    #: Any op, told apart by its ``op`` field.
    Op = Annotated[Union[tuple(OPS.values())], Field(discriminator="op")]  # noqa: UP007

__all__ = ["OPS", "Op", "OpBase"]
