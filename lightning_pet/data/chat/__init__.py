"""Conversations, texts and preferences for causal language models."""
