"""When things happen: everything that `wrap` puts on a model, and `unwrap` takes off again."""
