"""Temporary changes of a registry's entries, undone when the test ends.

replace_entry(monkeypatch, registry, name, part)    another part under a name that is taken
add_entry(monkeypatch, registry, name, part)        a new name, through `register`
"""


def replace_entry(monkeypatch, registry, name, part):
    assert name in registry
    monkeypatch.setitem(registry._entries, name, part)


def add_entry(monkeypatch, registry, name, part):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    registry.register(name, part)
