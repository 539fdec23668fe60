"""Tools of a chat: how a client describes them, and how a model's text becomes calls of them.

bodies     what clients write, checked: tools, choices, earlier calls
formats    how families of models write a call; a model's own is told by its chat template
one_call   messages with several calls, for templates that take one
parser     text that comes in pieces -> content and calls

The model decides whether to call. Nothing forces or forbids tokens here, so a choice that would
need that (`required`, a named tool, `strict`) is refused by name.
"""
