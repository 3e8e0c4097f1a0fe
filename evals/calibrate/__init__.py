"""`vtprune calibrate`: what a model is measured for, on samples without labels: how few tokens answer as the whole
model does (auto), and which heads read vision (yopo)."""

# What is measured: how few tokens keep answers, which is looked for where nothing is named; which heads read vision.
AGREEMENT, HEADS = "auto", "yopo"
