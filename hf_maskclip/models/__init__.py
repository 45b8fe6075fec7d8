"""The models and their patch masks: exactly what an export with remote code carries."""
