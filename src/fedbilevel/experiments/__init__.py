"""Runs that leave a folder behind: comparisons, studies, their tables and figures, and what they would cost elsewhere."""
