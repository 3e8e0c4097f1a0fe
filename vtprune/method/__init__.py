"""What a method is: what it sees, what it answers, its settings, and how it is named, written and found.

Nothing here knows a model or a hook.
"""
