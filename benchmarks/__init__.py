"""Speed and effect of what the project does, measured side by side; one command each."""
