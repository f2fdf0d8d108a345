"""Folders of the adapters library."""
