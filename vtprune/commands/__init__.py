"""Commands that have a file of their own; nothing here imports torch before a command runs."""
