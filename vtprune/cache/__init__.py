"""The KV cache: layers that know which places of the prompt they hold, what waits beside them, and the names of what
lies in a cache."""
