"""The edge-llm command: one file per command."""
