"""`vtprune calibrate`: what a model is measured for, on samples without labels: how few tokens answer as the whole
model does (auto), and which heads read vision (yopo)."""
