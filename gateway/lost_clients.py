"""Clients that do not wait for their answer: those that leave, and those that stop reading it."""

from __future__ import annotations

CLIENT_GONE = "client_gone"  # the reason of the error that nobody was there to get


class ClientStalled(Exception):
    """It has read nothing for so long that it is taken for gone. Its connection must be cut."""
