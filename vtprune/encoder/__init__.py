"""One pass of a batch of images through the vision encoder, while tokens drop out and merge."""
