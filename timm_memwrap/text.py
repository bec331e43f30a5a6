"""Text from outside, made fit to be shown."""

__all__ = ["printable"]


def printable(text: str) -> str:
    """Replaces what would steer a terminal: a name from outside may hold anything."""
    return "".join(character if character.isprintable() else "?" for character in text)
