"""The embedded default: clips rendered in Something-Something V2's layout, and a small base model."""
