"""Heads side by side: the same backbone, data, budget and seeds, and what each head's evidence is worth."""
