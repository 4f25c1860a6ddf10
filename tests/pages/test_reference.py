"""The site builds without a warning, and its reference leaves out no public name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

import loraplus
from loraplus import errors, integrations
from pages.site import built


def described() -> set[str]:
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((built() / "objects.inv").read_bytes(), uri="").data
    return {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}


def home(thing: object, name: str, module: str) -> set[str]:
    """Where a name may be described: where it is named, or where it is written."""
    places = {f"{module}.{name}", f"{getattr(thing, '__module__', module)}.{name}"}
    return places | ({f"loraplus.{name}"} if vars(loraplus).get(name) is thing else set())


def public(module: ModuleType) -> list[str]:
    """The classes and functions that a module writes, or those that it says are its own."""
    own = [
        name
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__
    ]
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


def test_every_name_of_the_package_is_described():
    names = described()
    assert not [name for name in loraplus.__all__ if not home(getattr(loraplus, name), name, "loraplus") & names]


def test_every_error_is_described():
    names = described()
    assert len(public(errors)) > 15
    assert not [name for name in public(errors) if f"loraplus.errors.{name}" not in names]


def test_every_name_of_the_integrations_is_described():
    names, missing = described(), []
    for found in pkgutil.iter_modules(integrations.__path__, "loraplus.integrations."):
        try:
            module = importlib.import_module(found.name)
        except ModuleNotFoundError as error:  # a plugin for a framework that is not installed
            assert not (error.name or "").startswith("loraplus")
            continue
        missing += [
            f"{found.name}.{name}"
            for name in public(module)
            if not home(getattr(module, name), name, found.name) & names
        ]
    assert not missing
