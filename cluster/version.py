"""The version of this distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _installed_version() -> str:
    try:
        return version("baton-serve")
    except PackageNotFoundError:  # run from a copied tree, without installation
        return "0.0.0+unknown"


VERSION = _installed_version()
