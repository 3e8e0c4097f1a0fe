"""What a command shows: errors of one line, progress, figures."""
