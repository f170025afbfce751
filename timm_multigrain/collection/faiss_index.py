"""Structures for approximate search."""


def update_structure(out, kind, progress):
    return None
