"""Measurements behind the README's figures; none of them is a test."""
