"""Outer losses of means while an algorithm runs: what is sent along for them, and around which algorithms."""
