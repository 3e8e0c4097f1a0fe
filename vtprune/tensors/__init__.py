"""Pure functions of tensors: compaction of ragged batches, rows of attention, the rotary embedding."""
