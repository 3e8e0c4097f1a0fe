"""`vtprune calibrate`: which heads of a decoder read vision, measured on samples without labels."""
