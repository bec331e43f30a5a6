"""Figures and reports of explanations, for people to look at."""
